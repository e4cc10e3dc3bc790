"""Are the points of the curves what they say: means over images, rates of work, parts of a step, the largest memory?"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.launch import SMALL_JOB
from trainer import metrics
from trainer.config import load_config
from trainer.metrics import Meter, Work, peak_memory_bytes, work_of

CPU = torch.device("cpu")


class Clock:
    """A clock that tests move on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def one_step(meter: Meter, clock: Clock, seconds: dict[str, float], images: int, losses: list[float]) -> None:
    meter.restart_clock()
    for name, duration in seconds.items():
        with meter.section(name):
            clock.now += duration
    for loss in losses:
        meter.add(torch.tensor(loss))
    meter.step_done(images)


def test_the_loss_is_the_mean_of_the_micro_batches_in_bits(clock: Clock) -> None:
    meter = Meter(CPU)
    one_step(meter, clock, {"data": 1.0}, 8, [math.log(2), 3 * math.log(2)])
    one_step(meter, clock, {"data": 1.0}, 8, [5 * math.log(2), 7 * math.log(2)])
    assert meter.reduce()["train/bits_per_dim"] == pytest.approx(4)


def test_sections_are_means_over_updates_and_what_lies_between_steps_counts_nowhere(clock: Clock) -> None:
    meter = Meter(CPU)
    parts = {"data": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.15}
    one_step(meter, clock, parts, 8, [1.0])
    clock.now += 50  # an evaluation
    one_step(meter, clock, {name: 3 * value for name, value in parts.items()}, 8, [1.0])
    point = meter.reduce()
    for name, value in parts.items():
        assert point[f"perf/{name}_ms"] == pytest.approx(2 * 1000 * value)
    assert point["perf/step_ms"] == pytest.approx(2 * 1000 * sum(parts.values()))
    assert point["data/wait_fraction"] == pytest.approx(0.1 / 0.75)
    assert point["perf/images_per_s"] == pytest.approx(16 / 3)


def test_a_point_holds_nothing_of_the_one_before(clock: Clock) -> None:
    meter = Meter(CPU)
    one_step(meter, clock, {"data": 5.0, "forward": 5.0}, 800, [100.0])
    meter.reduce()
    one_step(meter, clock, {"data": 1.0}, 4, [math.log(2)])
    point = meter.reduce()
    assert point["train/bits_per_dim"] == pytest.approx(1)
    assert point["perf/images_per_s"] == pytest.approx(4)
    assert "perf/forward_ms" not in point


def test_rates_follow_from_images_per_second(clock: Clock) -> None:
    work = Work(tokens_per_image=3072, flops_per_image=2 * 10**12, devices=4, peak_tflops=40.0)
    meter = Meter(CPU, work)
    one_step(meter, clock, {"forward": 2.0}, 80, [1.0])
    point = meter.reduce()
    assert point["perf/images_per_s_per_gpu"] == pytest.approx(10)
    assert point["perf/tokens_per_s"] == pytest.approx(40 * 3072)
    assert point["perf/tflops_per_gpu"] == pytest.approx(20)
    assert point["perf/mfu"] == pytest.approx(0.5)


def test_on_a_cpu_no_utilisation_is_made_up(clock: Clock) -> None:
    config = load_config(SMALL_JOB, [])
    work = work_of(config, 2, CPU)
    assert work == Work(
        tokens_per_image=32 * 32, flops_per_image=config.model.account().flops.training, devices=2, peak_tflops=None
    )
    meter = Meter(CPU, work)
    one_step(meter, clock, {"forward": 1.0}, 8, [1.0])
    point = meter.reduce()
    assert "perf/mfu" not in point and point["perf/tflops_per_gpu"] > 0


def test_the_peak_memory_keeps_what_was_freed() -> None:
    before = peak_memory_bytes(CPU)
    size = before + 2**26  # more than this process ever had
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_memory_bytes(CPU) >= size
    del block
    assert peak_memory_bytes(CPU) >= size


def test_memory_is_that_of_the_largest_rank_and_each_ranks_own_time_is_known(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """The sum over ranks of vectors that hold each rank's memory and time in its own place gives all of them."""

    def of_three_ranks(mine: torch.Tensor) -> torch.Tensor:
        assert mine[2:].tolist() == [0, 2 * 2**30, 0, 0, pytest.approx(1.25), 0]
        return mine + mine.new_tensor([1.0, 1.0, 7 * 2**30, 0, 2**30, 4.0, 0, 5.0])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(metrics, "peak_memory_bytes", lambda device: 2 * 2**30)
    monkeypatch.setattr(metrics, "all_sum", of_three_ranks)
    meter = Meter(CPU)
    one_step(meter, clock, {"data": 1.0, "forward": 0.25, "backward": 3.0}, 8, [math.log(2)])
    point = meter.reduce()
    assert point["mem/peak_gib"] == 7
    assert meter.own_seconds_of_rank == pytest.approx([4.0, 1.25, 5.0])
    assert point["train/bits_per_dim"] == pytest.approx((math.log(2) + 1) / 2 / math.log(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_sections_are_timed_on_the_device() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    meter = Meter(device)
    meter.restart_clock()
    for name, products in (("forward", 1), ("backward", 20)):
        with meter.section(name):
            for _ in range(products):
                matrix @ matrix
    meter.add(torch.ones((), device=device))
    meter.step_done(1)
    point = meter.reduce()
    assert 5 < point["perf/backward_ms"] / point["perf/forward_ms"] < 80


def test_every_name_is_in_the_table_with_its_unit(clock: Clock) -> None:
    table = set(re.findall(r"^\| `([a-z]+/\w+)` \|", Path(metrics.__file__).read_text(), flags=re.MULTILINE))
    work = Work(tokens_per_image=1, flops_per_image=1, devices=1, peak_tflops=1.0)
    meter = Meter(CPU, work)
    one_step(meter, clock, dict.fromkeys(("data", "forward", "backward", "optimizer"), 1.0), 1, [1.0])
    assert meter.reduce().keys() <= table
