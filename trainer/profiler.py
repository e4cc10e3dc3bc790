"""What does a step spend its time on, operator by operator? A window of steps under torch's profiler (`--profile`).

`--profile 20:3` records updates 20, 21 and 22 on rank 0 into `profile/` of the run's folder: a trace for
chrome://tracing or ui.perfetto.dev, a table of the operators that took longest, and one of the floating-point
operations of each part of the model with what was achieved of them in a second.

The operations are the model's own exact count. Counters that watch operators, such as DeepSpeed's flops profiler, count
local attention as dense, or do not see it in a fused kernel.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from models.model import Flops
from trainer.errors import ConfigError

ROWS_OF_THE_TABLE = 30
Interval = tuple[float, float]


@dataclass(frozen=True)
class Window:
    """The updates first, first + 1, ... of a run, `count` of them; the first update of a run is 1."""

    first: int
    count: int


def parse_window(text: str) -> Window:
    """`FIRST:COUNT`; raises ConfigError."""
    first, colon, count = text.partition(":")
    if not (colon and first.isdecimal() and count.isdecimal() and int(first) >= 1 and int(count) >= 1):
        raise ConfigError(f"--profile {text}: write it as FIRST:COUNT, for example --profile 20:3 for updates 20 to 22")
    return Window(int(first), int(count))


class StepProfiler:
    """Records the updates of a window; does nothing without one, and on ranks other than 0."""

    def __init__(
        self,
        window: Window | None,
        folder: Path,
        *,
        rank: int,
        device: torch.device,
        flops: Mapping[str, Flops],
        images_per_update: float,
    ) -> None:
        """`flops` are those of each part of the model for one image; `images_per_update` are those of this rank."""
        self._window = window if rank == 0 else None
        self._folder = folder
        self._on_gpu = device.type == "cuda"
        self._running: torch.profiler.profile | None = None
        self._first = 0
        self._started = 0.0
        self._flops, self._images_per_update = flops, images_per_update
        self.files: list[Path] = []
        """What was written: the trace and the tables."""

    def step(self, done: int) -> dict[str, float]:
        """Call before every update, with the number of updates done. Returns metrics if a window has just ended."""
        if self._window is None:
            return {}
        first, end = self._window.first, self._window.first + self._window.count
        if self._running and done + 1 >= end:
            return self._finish(done)
        if not self._running and first <= done + 1 < end:  # a resumed run may begin inside the window
            self._start(done)
        return {}

    def close(self, done: int) -> dict[str, float]:
        """Call after the last update: ends a window that reaches beyond it, and returns its metrics."""
        return self._finish(done) if self._running else {}

    def _start(self, done: int) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        self._running = torch.profiler.profile(activities=activities, record_shapes=True)
        self._first = done + 1
        self._running.start()
        self._started = time.perf_counter()

    def _finish(self, done: int) -> dict[str, float]:
        profile, self._running, self._window = self._running, None, None
        assert profile is not None
        if self._on_gpu:
            torch.cuda.synchronize()  # the window includes what the last update has queued
        seconds = time.perf_counter() - self._started
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first:09d}-{done:09d}"
        trace, table = self._folder / f"{name}.trace.json.gz", self._folder / f"{name}.operators.txt"
        profile.export_chrome_trace(str(trace))
        order = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table.write_text(profile.key_averages().table(sort_by=order, row_limit=ROWS_OF_THE_TABLE) + "\n")
        parts, updates = self._folder / f"{name}.flops.txt", done + 1 - self._first
        parts.write_text(flops_table(self._flops, images=self._images_per_update * updates, seconds=seconds))
        self.files = [trace, table, parts]
        return communication_metrics(profile.events() or [], updates=updates, on_gpu=self._on_gpu)


def flops_table(parts: Mapping[str, Flops], *, images: float, seconds: float) -> str:
    """A table of the operations of each part of the model for one image, and the rate that one device reached."""
    total = sum(parts.values(), Flops(0, 0, 0))
    lines = [f"{'GFLOP for one image':<24}{'forward':>12}{'backward':>12}{'recomputed':>12}{'share':>8}"]
    for name, part in (*parts.items(), ("all", total)):
        numbers = "".join(f"{flops / 1e9:>12.4f}" for flops in (part.forward, part.backward, part.recomputed))
        lines.append(f"{name:<24}{numbers}{part.training / total.training:>8.1%}")
    achieved = images * total.training / seconds / 1e12
    done = images * (total.training + total.recomputed) / seconds / 1e12
    lines.append("")
    lines.append(f"{images:g} images of this rank in {seconds:.3f} s under the profiler, which slows them down:")
    lines.append(f"{achieved:.4f} TFLOP/s of the model, {done:.4f} TFLOP/s with recomputation")
    return "\n".join(lines) + "\n"


def communication_metrics(events: Iterable[FunctionEvent], *, updates: int, on_gpu: bool) -> dict[str, float]:
    """Time per update while collectives ran and, on a GPU, while nothing but collectives ran."""
    kernels: list[Interval] = []
    collectives: list[Interval] = []
    for event in events:
        interval = (event.time_range.start, event.time_range.end)  # microseconds
        if event.name.startswith(("gloo:", "ncclDevKernel", "ncclKernel")):
            collectives.append(interval)
        elif on_gpu and event.device_type != DeviceType.CPU and not event.is_user_annotation:
            kernels.append(interval)
    metrics = {"perf/communication_ms": _covered(collectives) / 1000 / updates}
    if on_gpu:
        exposed = _covered(collectives + kernels) - _covered(kernels)
        metrics["perf/communication_exposed_ms"] = exposed / 1000 / updates
    return metrics


def _covered(intervals: list[Interval]) -> float:
    """Length of the union of the intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
