"""What is every metric called, in which unit, and how is it averaged over micro-batches and ranks?

| name | unit | meaning |
|---|---|---|
| `train/bits_per_dim` | bits per sub-pixel | mean over the images since the last point, all ranks |
| `val/bits_per_dim` | bits per sub-pixel | exact, over validation images |
| `val/images` | images | how many that were |
| `optim/lr` | | learning rate of the last update |
| `optim/grad_norm` | | global gradient norm before clipping, last update |
| `perf/images_per_s` | images / s | all ranks, since the last point, without evaluation and checkpoints |
| `perf/images_per_s_per_gpu` | images / s | the same for one rank |
| `perf/tokens_per_s` | tokens / s | all ranks; a token is a position of the sequence (a sub-pixel or a pixel) |
| `perf/tflops_per_gpu` | 10^12 FLOP / s | products of forward and backward passes, exact (the model's `account`); recomputation is not counted |
| `perf/mfu` | | model FLOPs utilisation: that, as a share of the GPU's dense peak in the precision of the run; left out where the peak is not known (a CPU, a GPU that `trainer/gpus.py` does not list) |
| `perf/step_ms` | ms | mean wall time of an update, all of the following |
| `perf/data_ms` | ms | of it, rank 0: waiting for the data stream and copying to the device |
| `perf/forward_ms` | ms | forward passes and loss |
| `perf/backward_ms` | ms | backward passes; with ZeRO, gradients are reduced meanwhile |
| `perf/optimizer_ms` | ms | the update, with the communication that belongs to it |
| `perf/communication_ms` | ms | time per update in which collectives ran, rank 0; measured in the window of `--profile` only, because the backends work in the background and a timer in every step would stop them |
| `perf/communication_exposed_ms` | ms | of it, while no other kernel ran; on GPUs, likewise |
| `data/wait_fraction` | | share of the time of an update spent waiting for the data stream, rank 0 |
| `data/damaged_blocks` | blocks | blocks of training images that were damaged and replaced by others, all ranks, since this attempt began; only with `data.max_damaged_blocks` |
| `mem/peak_gib` | GiB | largest memory of any rank since its start: what torch had allocated on the GPU; on a CPU the process's resident memory |
| `progress/images_seen` | images | training images consumed |
| `progress/epoch` | epochs | the same, in passes over the training set |

The step of a point is the number of optimizer updates done. On a GPU the sections of a step are timed by events on its
stream, which are read when a point is made, so that no step waits for the device; on a CPU by the clock.
"""  # noqa: E501 (a row of a table is a line)

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed
from torch import Tensor

from trainer.config import RunConfig
from trainer.gpus import find_gpu
from trainer.ranks import all_sum

Section = Literal["data", "forward", "backward", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a training image costs, and what the devices could do."""

    tokens_per_image: int
    flops_per_image: int
    """Forward and backward, without recomputation."""
    devices: int
    peak_tflops: float | None
    """Of one device; None where it is not known."""


def work_of(config: RunConfig, world_size: int, device: torch.device) -> Work:
    """The work of a run's model on this kind of device."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    account = config.model.account()
    return Work(
        tokens_per_image=account.positions,
        flops_per_image=account.flops.training,
        devices=world_size,
        peak_tflops=gpu.peak_tflops(config.train.precision) if gpu else None,
    )


class Meter:
    """Takes means over the steps since the last point. Only `reduce` waits for the device."""

    def __init__(self, device: torch.device, work: Work | None = None) -> None:
        self._device, self._work = device, work
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, micro-batches
        self.own_seconds_of_rank: list[float] = []
        """Seconds that each rank spent on its own before the last point: waiting for data, and in forward passes."""
        self._started = time.perf_counter()
        self._begin_interval()

    def restart_clock(self) -> None:
        """Begin to count time; call at the start of a step."""
        self._started = time.perf_counter()

    @contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Count the time inside as this part of the step. Sections do not nest."""
        if self._device.type == "cuda" and name != "data":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._section_seconds[name] += time.perf_counter() - began

    def add(self, loss: Tensor) -> None:
        """Add one micro-batch's mean loss, in nats per sub-pixel."""
        self._loss += torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])

    def step_done(self, images: int) -> None:
        """Count one update over `images` images of all ranks."""
        self._images += images
        self._steps += 1
        self._seconds += time.perf_counter() - self._started

    def reduce(self) -> dict[str, float]:
        """Return the means since the last call and begin a new interval; collective."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._section_seconds[name] += begin.elapsed_time(end) / 1000
        loss, count, peak_bytes = self._agree()
        metrics = {
            "train/bits_per_dim": loss / count / math.log(2),
            "perf/images_per_s": self._images / self._seconds,
            "perf/step_ms": 1000 * self._seconds / self._steps,
            "data/wait_fraction": self._section_seconds["data"] / self._seconds,
            "mem/peak_gib": peak_bytes / 2**30,
        }
        for name, seconds in self._section_seconds.items():
            metrics[f"perf/{name}_ms"] = 1000 * seconds / self._steps
        if self._work:
            metrics |= _rates(self._work, metrics["perf/images_per_s"])
        self._loss.zero_()
        self._begin_interval()
        return metrics

    def _begin_interval(self) -> None:
        self._images = self._steps = 0
        self._seconds = 0.0
        self._section_seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def _agree(self) -> tuple[float, float, float]:
        """Sum of losses, number of micro-batches and largest memory of all ranks, in one reduction.

        The same reduction brings `own_seconds_of_rank`.
        """
        initialized = torch.distributed.is_initialized()
        rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if initialized else (0, 1)
        of_ranks = self._loss.new_zeros(2, world_size)  # each rank in a place of its own, so that a sum gathers them
        own_seconds = sum(self._section_seconds.get(name, 0.0) for name in ("data", "forward"))
        of_ranks[:, rank] = of_ranks.new_tensor([peak_memory_bytes(self._device), own_seconds])
        loss, count, *gathered = all_sum(torch.cat([self._loss, of_ranks.flatten()])).tolist()
        self.own_seconds_of_rank = gathered[world_size:]
        return loss, count, max(gathered[:world_size])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory since the start: allocated by torch on a GPU; on a CPU resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; there ru_maxrss begins with the memory of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rates(work: Work, images_per_s: float) -> dict[str, float]:
    tflops = images_per_s * work.flops_per_image / work.devices / 1e12
    metrics = {
        "perf/images_per_s_per_gpu": images_per_s / work.devices,
        "perf/tokens_per_s": images_per_s * work.tokens_per_image,
        "perf/tflops_per_gpu": tflops,
    }
    if work.peak_tflops:
        metrics["perf/mfu"] = tflops / work.peak_tflops
    return metrics
