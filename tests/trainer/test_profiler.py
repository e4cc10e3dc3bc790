"""Does `--profile` record the updates it was asked for, no others, and how much of them was communication?"""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from models.model import Flops
from trainer.errors import ConfigError
from trainer.profiler import StepProfiler, Window, communication_metrics, flops_table, parse_window

CPU = torch.device("cpu")
PARTS = {
    "attention scores": Flops(forward=10**9, backward=2 * 10**9, recomputed=10**9),
    "head": Flops(forward=3 * 10**9, backward=6 * 10**9, recomputed=0),
}


def run_steps(profiler: StepProfiler, begin: int, end: int) -> list[tuple[int, dict[str, float]]]:
    """Updates begin + 1 to end; update n multiplies matrices of n + 10 rows. What the profiler gave, and when."""
    found = []
    for done in range(begin, end):
        if metrics := profiler.step(done):
            found.append((done, metrics))
        matrix = torch.ones(done + 11, done + 11)
        matrix @ matrix
    if metrics := profiler.close(end):
        found.append((end, metrics))
    return found


def rows_multiplied(trace: Path) -> list[int]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted(event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm")


@pytest.mark.parametrize(
    ("begin", "end", "recorded", "written"),
    [
        (0, 9, [4, 5, 6], "000000004-000000006"),
        (3, 9, [4, 5, 6], "000000004-000000006"),
        (4, 9, [5, 6], "000000005-000000006"),  # resumed inside the window
        (0, 5, [4, 5], "000000004-000000005"),  # the run ends inside it
    ],
)
def test_the_window_and_nothing_else_is_recorded(
    tmp_path: Path, begin: int, end: int, recorded: list[int], written: str
) -> None:
    profiler = StepProfiler(Window(4, 3), tmp_path / "profile", rank=0, device=CPU, flops=PARTS, images_per_update=4)
    ((when, metrics),) = run_steps(profiler, begin, end)
    assert when == recorded[-1]
    assert metrics == {"perf/communication_ms": 0.0}  # one process
    trace, table, flops = profiler.files
    assert f"{4 * len(recorded)} images of this rank" in flops.read_text()
    assert rows_multiplied(trace) == [update + 10 for update in recorded]
    assert trace.name == f"steps-{written}.trace.json.gz"
    assert "aten::mm" in table.read_text()


@pytest.mark.parametrize(
    ("window", "rank", "begin"), [(None, 0, 0), (Window(4, 3), 1, 0), (Window(4, 3), 0, 6), (Window(40, 3), 0, 0)]
)
def test_without_a_window_on_other_ranks_and_outside_of_it_nothing_happens(
    tmp_path: Path, window: Window | None, rank: int, begin: int
) -> None:
    profiler = StepProfiler(window, tmp_path / "profile", rank=rank, device=CPU, flops=PARTS, images_per_update=4)
    assert run_steps(profiler, begin, 8) == []
    assert profiler.files == [] and not (tmp_path / "profile").exists()


def event(name: str, start: float, end: float, device: Any = DeviceType.CUDA, annotation: bool = False) -> Any:
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=time_range, device_type=device, is_user_annotation=annotation)


def test_communication_is_counted_once_and_exposed_where_nothing_else_runs() -> None:
    events = [
        event("ncclDevKernel_AllReduce", 0, 4000),
        event("ncclDevKernel_AllGather", 3000, 6000),
        event("gemm", 1000, 2000),
        event("gemm", 5000, 9000),
        event("aten::mm", 0, 9000, DeviceType.CPU),
        event("backward", 0, 9000, annotation=True),  # a label over kernels, no kernel
    ]
    assert communication_metrics(events, updates=2, on_gpu=True) == pytest.approx(
        {"perf/communication_ms": 3.0, "perf/communication_exposed_ms": 2.0}
    )


def test_on_a_cpu_collectives_of_gloo_are_counted() -> None:
    events = [event("gloo:all_reduce", 500, 2500, DeviceType.CPU), event("aten::mm", 0, 9000, DeviceType.CPU)]
    assert communication_metrics(events, updates=1, on_gpu=False) == {"perf/communication_ms": 2.0}


def test_the_table_of_operations_has_each_part_and_what_was_achieved() -> None:
    header, scores, head, total, _, window, achieved = flops_table(PARTS, images=8, seconds=2.0).splitlines()
    assert header.split()[-4:] == ["forward", "backward", "recomputed", "share"]
    assert scores.split() == ["attention", "scores", "1.0000", "2.0000", "1.0000", "25.0%"]
    assert head.split() == ["head", "3.0000", "6.0000", "0.0000", "75.0%"]
    assert total.split() == ["all", "4.0000", "8.0000", "1.0000", "100.0%"]
    assert window.startswith("8 images of this rank in 2.000 s")
    assert achieved == "0.0480 TFLOP/s of the model, 0.0520 TFLOP/s with recomputation"


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "0:3", "5:0", "-5:3", "a:b", "5:3:1", "5 : 3"])
def test_a_bad_window_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="--profile .*: write it as FIRST:COUNT"):
        parse_window(text)


def test_a_window_is_read() -> None:
    assert parse_window("20:3") == Window(first=20, count=3)
