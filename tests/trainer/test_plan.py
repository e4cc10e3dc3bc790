"""Does a plan say what a run needs, what it assumes, and what will go wrong?"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from models.model import Recompute
from tests.support.launch import ROOT, SMALL_JOB
from trainer.comparison.scaling_page import short
from trainer.config import RunConfig, as_yaml, load_config
from trainer.errors import UsageError
from trainer.gpus import find_gpu
from trainer.memory import activation_bytes, state_bytes
from trainer.plan import (
    ASSUMED_MFU,
    HEADROOM_GIB,
    LINK_EFFICIENCY,
    Cluster,
    Plan,
    Rate,
    as_text,
    main,
    make_plan,
    measured_rate,
    warnings,
)

PEAK = 989.4e12


def config_of(**changes: object) -> RunConfig:
    values = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(SMALL_JOB, [f"{name}={value}" for name, value in values.items()])


def cluster_of(nodes: int = 1, gpus: int = 2, gpu: str = "H200") -> Cluster:
    return Cluster(gpu=find_gpu(gpu), nodes=nodes, gpus_per_node=gpus, network_gbit_per_s=400)


def plan_of(cluster: Cluster | None = None, rate: Rate | None = None, **changes: object) -> Plan:
    return make_plan(config_of(**changes), cluster or cluster_of(), rate)


def test_the_parts_are_those_of_the_models_own_accounts() -> None:
    plan = plan_of()
    config = plan.config
    assert plan.account == config.model.account()
    assert plan.stages[2] == state_bytes(config, plan.account.parameters, "cuda", stage=2, ranks=2)
    every = config.train.activation_checkpoint_every_layers
    assert plan.choices[plan.chosen].activation_bytes == activation_bytes(config, "cuda", Recompute(every=every))


def test_without_a_measurement_time_is_that_of_the_assumed_rate_and_the_plan_says_so() -> None:
    plan = plan_of(cluster_of(gpus=1))  # nothing to communicate with
    flops = plan.config.model.account(Recompute(every=2)).flops
    seconds = 8 * (flops.training + flops.recomputed) / (ASSUMED_MFU * PEAK)
    speed = plan.speeds[plan.chosen]
    assert speed.exposed_communication_s == 0
    assert speed.images_per_s == pytest.approx(8 / seconds)
    assert speed.hours == pytest.approx(plan.config.train.steps * seconds / 3600)
    assert "assumed 40% of 989 TFLOP/s, not measured" in as_text(plan)


def test_communication_over_the_network_is_that_of_the_ring() -> None:
    inside, across = (
        plan_of(cluster_of(1, 4), train__micro_batch_images=2),
        plan_of(cluster_of(4, 1), train__micro_batch_images=2),
    )
    weights = 2 * inside.account.parameters
    gather = 3 / 4 * weights / (LINK_EFFICIENCY * 400 / 8 * 1e9)  # of the new weights; nothing hides it
    assert across.speeds[0].exposed_communication_s >= gather
    ratio = across.speeds[0].exposed_communication_s / inside.speeds[0].exposed_communication_s
    assert ratio >= 450 / 50


def test_recomputation_takes_time_and_saves_memory() -> None:
    plan = plan_of(model__layers=4)
    by_name = {choice.name: (choice, speed) for choice, speed in zip(plan.choices, plan.speeds, strict=True)}
    order = ["none", "1 in 2", "each layer"]
    assert [by_name[name][0].activation_bytes for name in order] == sorted(
        (by_name[name][0].activation_bytes for name in order), reverse=True
    )
    compute = [by_name[name][1].compute_s for name in order]
    assert compute == sorted(compute) and len(set(compute)) == 3


def test_a_choice_of_its_own_is_added() -> None:
    plan = plan_of(model__layers=6, train__activation_checkpoint_every_layers=3)
    assert plan.choices[plan.chosen].name == "1 in 3"


def test_images_replace_the_configs_steps() -> None:
    plan = make_plan(config_of(), cluster_of(), images=801)
    assert plan.updates == 101  # of 8 images, the last one begun


def write_run(folder: Path, config: RunConfig, points: list[dict[str, float]]) -> Path:
    (folder / "config.yaml").write_text(as_yaml(config))
    lines = [json.dumps({"step": step, "time": 0.0, "metrics": point}) for step, point in enumerate(points)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "met']))
    return folder


def test_a_measured_rate_is_the_settled_one_with_recomputation(tmp_path: Path) -> None:
    config = config_of()
    tflops = [1.0, 90.0, 200.0, 210.0, 190.0]  # the first points hold compilation
    run = write_run(
        tmp_path, config, [{"perf/tflops_per_gpu": t, "perf/mfu": 1e12 * t / PEAK} for t in tflops] + [{"val/x": 1.0}]
    )
    rate = measured_rate(run, find_gpu("H200"))
    flops = config.model.account(Recompute(every=2)).flops
    assert rate.flops_per_s == pytest.approx(200e12 * (flops.training + flops.recomputed) / flops.training)
    plan = plan_of(cluster_of(gpus=1), rate)
    # The same job is planned to run as it ran.
    assert plan.speeds[plan.chosen].images_per_s * flops.training == pytest.approx(200e12)
    assert "measured:" in as_text(plan) and "assumed" not in as_text(plan)


@pytest.mark.parametrize(
    ("points", "gpu", "message"),
    [
        ([{"perf/tflops_per_gpu": 1.0}], "H200", "was trained on a CPU or a GPU of unknown peak, not on H200"),
        ([{"perf/tflops_per_gpu": 100.0, "perf/mfu": 100e12 / PEAK}], "A100", "device of 989 TFLOP/s, not on A100"),
        ([{"perf/tflops_per_gpu": 100.0, "perf/mfu": 0.1}], "", "not on a CPU"),
        ([{"train/bits_per_dim": 5.0}], "H200", "has no perf/tflops_per_gpu"),
    ],
)
def test_a_measurement_of_another_device_is_refused(
    tmp_path: Path, points: list[dict[str, float]], gpu: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        measured_rate(write_run(tmp_path, config_of(), points), find_gpu(gpu))


def test_what_does_not_fit_is_said_with_what_would() -> None:
    plan = plan_of(cluster_of(gpus=1, gpu="L4"), train__micro_batch_images=512, train__global_batch_images=512)
    index, stage = plan.chosen, plan.config.train.zero_stage
    large = dataclasses.replace(plan.choices[index], activation_bytes=100 * 2**30)
    plan.choices[index] = large
    (found,) = [text for text in warnings(plan) if "does not fit" in text]
    usable = 22.3 - HEADROOM_GIB
    fitting = (usable * 2**30 - plan.stages[stage].peak(0)) / (100 * 2**30) * 512
    assert (
        64 <= fitting < 128 and "a micro-batch of 64 fits" in found
    )  # of 512 / 1 rank, 64 divides and 128 is too large
    text = as_text(plan)
    assert "[!" in text and max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"limits__run_minutes": 1e-6}, "limits.run_minutes"),
        ({"limits__step_seconds": 1e-9}, "limits.step_seconds"),
    ],
)
def test_what_would_stop_the_run_is_said(changes: dict[str, Any], word: str) -> None:
    assert warnings(plan_of(cluster_of(gpus=1))) == []
    (found,) = warnings(plan_of(cluster_of(gpus=1), **changes))
    assert word in found


def run_main(*arguments: str) -> int:
    return main(["--config", str(SMALL_JOB), *arguments])


def test_the_command_fits_100_columns_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert run_main("--gpus", "2", "--json", str(file)) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 100
    written = json.loads(file.read_text())
    assert written["gpu"] == "H200" and written["states_bytes"].keys() == {"1", "2", "3"}
    assert written["recomputation"][written["chosen"]]["every"] == 2
    assert written["forecast"]["flops"] == written["images"] * plan_of().account.flops.training
    assert "Forecast\n\n  spends " in text and "Not measured here." in text


def test_the_command_forecasts_from_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runs = sorted(str(run) for run in (ROOT / "benchmarks/results/scaling").iterdir())
    arguments = ["--config", str(ROOT / "configs/quickstart.yaml"), "--gpus", "2"]
    assert main([*arguments, "--runs", *runs]) == 0
    assert f"by the law of {len(runs)} runs" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--runs", *runs[:3]]) == 2
    assert "a law takes at least 8 runs" in capsys.readouterr().err


def test_the_header_of_the_big_config_says_what_its_plan_says() -> None:
    file = ROOT / "configs/imagenet64_big.yaml"
    plan = make_plan(load_config(file, []), cluster_of(8, 8, "H100"))
    speed, (bits,), sizes = plan.speeds[plan.chosen], plan.forecast.bits_per_dim, plan.forecast.sizes
    epochs = plan.updates * plan.config.train.global_batch_images / 1_281_149
    memory = plan.total_bytes(plan.config.train.zero_stage, plan.chosen) / 2**30
    header = " ".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    for said in (
        f"{plan.forecast.flops:.2g} FLOP of training",
        f"{plan.forecast.tokens / plan.forecast.parameters:.0f} tokens for each parameter: {epochs:.0f} epochs",
        f"{short(sizes.low)} to {short(sizes.high)} parameters suit so many FLOP",
        f"{bits.low:.2f} to {bits.high:.2f} bits/dim, not measured here",
        f"{speed.hours * 64:,.0f} GPU-hours on 64 H100, {speed.hours:.1f} hours, {memory:.1f} GiB of each",
        f"an assumed {ASSUMED_MFU:.0%}",
    ):
        assert said in header
    assert sizes.low < plan.forecast.parameters < sizes.high and warnings(plan) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H3000"], "--gpu H3000: not in trainer/gpus.py; known are cpu, "),
        (["--gpu", "cpu", "--gpus", "2"], "add --calibrate RUN"),
        (["--gpus", "3"], "train.global_batch_images: 8 is not a multiple of 3 ranks"),
        (["--nodes", "0"], "--nodes: must be above 0, not 0"),
        (["--images", "-5"], "--images: must be above 0, not -5"),
        (["--runs", "/nowhere"], "/nowhere: holds no run"),
        (["--calibrate", "/nowhere"], "--calibrate /nowhere: holds no run"),
        (["--set", "model.layer=3"], "did you mean model.layers"),
        (["--gpus", "2", "--json", "/nowhere/plan.json"], "--json /nowhere/plan.json: cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert len(captured.err.splitlines()) == 1
