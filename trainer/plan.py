"""What will a run need and take, before a GPU-hour is spent: memory, operations, images per second, days?

    python -m trainer.plan --config configs/imagenet64_big.yaml --gpu H200 --gpus 8 --nodes 8
    python -m trainer.plan --config configs/imagenet64_big.yaml --gpu H200 --calibrate runs/imagenet64_big
    python -m trainer.plan --config configs/quickstart.yaml --gpus 2 --runs benchmarks/results/scaling/*

Needs neither a GPU nor the data. Memory: trainer/memory.py. Time: products at a rate that `--calibrate` takes from
another run's metrics, else an assumed one, which the plan says; plus communication that nothing hides. Not modelled:
waiting for data, evaluation, checkpoints, stragglers. What the run will reach: trainer/forecast.py.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.wording import counted
from models.model import Account, Flops, Recompute
from trainer.command_line import run_tool
from trainer.comparison.run_history import RunHistory, history_of_folder
from trainer.config import RunConfig, load_config, load_written
from trainer.errors import UsageError
from trainer.forecast import Forecast, forecast_of
from trainer.gpus import GPUS, Gpu, find_gpu
from trainer.memory import States, Target, activation_bytes, num_orthogonalised, state_bytes
from trainer.options import Muon
from trainer.record.run_folder import Journal, Point

ASSUMED_MFU = 0.4
"""Of the dense peak; published trainers of dense transformers in bf16 reach 0.35 to 0.5 on H100s."""
LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that large collectives reach."""
HEADROOM_GIB = 2.0
"""Left free on a GPU for what the memory model leaves out: CUDA's context, NCCL's buffers, fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that a plan is made for."""

    gpu: Gpu | None
    """None: CPU processes."""
    nodes: int
    gpus_per_node: int
    network_gbit_per_s: float
    """Between nodes, for each GPU."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def link_bytes_per_s(self) -> float:
        """Of the slowest link that a collective over all ranks crosses; infinite inside a CPU machine."""
        if self.nodes > 1:
            return LINK_EFFICIENCY * self.network_gbit_per_s / 8 * 1e9
        return LINK_EFFICIENCY * self.gpu.link_gb_per_s * 1e9 if self.gpu else float("inf")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Floating-point operations per second that one device does, recomputation included."""

    flops_per_s: float
    source: str
    """Where the figure is from, as the plan prints it."""


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """One choice of activation checkpointing."""

    every: int
    keeps_attention: bool
    activation_bytes: int
    flops: Flops

    @property
    def name(self) -> str:
        if self.every == 0:
            return "none"
        return ("each layer" if self.every == 1 else f"1 in {self.every}") + "*" * self.keeps_attention


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one update takes, in seconds, and what follows."""

    compute_s: float
    exposed_communication_s: float
    images_per_s: float
    hours: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is printed."""

    config: RunConfig
    cluster: Cluster
    account: Account
    """Of the model, without recomputation."""
    updates: int
    stages: dict[int, States]
    choices: list[Recomputation]
    rate: Rate
    speeds: list[Speed]
    """At the config's stage, one for each choice."""
    forecast: Forecast

    @property
    def chosen(self) -> int:
        """Index of the config's own choice of recomputation."""
        train = self.config.train
        wanted = (train.activation_checkpoint_every_layers, train.activation_checkpoint_keeps_attention)
        return [(choice.every, choice.keeps_attention) for choice in self.choices].index(wanted)

    @property
    def usable_bytes(self) -> float:
        gpu = self.cluster.gpu
        return (gpu.memory_gib - HEADROOM_GIB) * 2**30 if gpu else float("inf")

    def total_bytes(self, stage: int, choice: int) -> int:
        return self.stages[stage].peak(self.choices[choice].activation_bytes)


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    rate: Rate | None = None,
    images: int | None = None,
    runs: Sequence[RunHistory] = (),
) -> Plan:
    """A plan for `images` training images (None: as many as the config's steps take); `rate` None: an assumed one.
    `runs`: those that the forecast is made from.

    Raises UsageError where the batch does not divide, where no rate is known, or where the runs give no forecast.
    """
    train, ranks = config.train, cluster.ranks
    per_pass = train.micro_batch_images * ranks
    if train.global_batch_images % per_pass:
        raise UsageError(
            f"train.global_batch_images: {train.global_batch_images} is not a multiple of {counted(ranks, 'rank')} x "
            f"train.micro_batch_images {train.micro_batch_images} = {per_pass}; change one of these (--nodes, --gpus)"
        )
    account = config.model.account()
    parameters = account.parameters
    updates = train.steps if images is None else -(-images // train.global_batch_images)
    if rate is None:
        rate = _assumed_rate(config, cluster)
    target: Target = "cuda" if cluster.gpu else "cpu"
    choices = [_recomputation(config, target, choice) for choice in _choices(config)]
    return Plan(
        config=config,
        cluster=cluster,
        account=account,
        updates=updates,
        stages={
            stage: state_bytes(
                config, parameters, target, stage=stage, ranks=ranks, orthogonalised=num_orthogonalised(config)
            )
            for stage in _stages(config)
        },
        choices=choices,
        rate=rate,
        speeds=[_speed(config, cluster, choice.flops, parameters, rate, updates) for choice in choices],
        forecast=forecast_of(config, updates * train.global_batch_images, runs),
    )


def measured_rate(run: Path, gpu: Gpu | None) -> Rate:
    """What one device of a run did: the median over the second half of its `perf/tflops_per_gpu`, recomputation added.

    Raises UsageError for a folder without such points, or where they are of another device.
    """
    config_file, metrics_file = run / "config.yaml", run / "metrics.jsonl"
    if not (config_file.exists() and metrics_file.exists()):
        raise UsageError(f"--calibrate {run}: holds no run (no config.yaml and metrics.jsonl); give a run.dir")
    points = list(_points(metrics_file))
    rates = [point["perf/tflops_per_gpu"] for point in points if "perf/tflops_per_gpu" in point]
    if not rates:
        raise UsageError(f"--calibrate {run}: its metrics.jsonl has no perf/tflops_per_gpu; let it train for longer")
    config = load_written(config_file)
    peaks = [point["perf/tflops_per_gpu"] / point["perf/mfu"] for point in points if point.get("perf/mfu")]
    expected = gpu.peak_tflops(config.train.precision) if gpu else None
    if (expected is None) != (not peaks) or (expected and abs(peaks[-1] / expected - 1) > 0.01):
        was = f"a device of {peaks[-1]:.0f} TFLOP/s" if peaks else "a CPU or a GPU of unknown peak"
        raise UsageError(f"--calibrate {run}: was trained on {was}, not on {gpu.name if gpu else 'a CPU'} (--gpu)")
    flops = config.model.account(config.train.recompute).flops
    median = statistics.median(rates[len(rates) // 2 :])
    with_recomputation = median * 1e12 * (flops.training + flops.recomputed) / flops.training
    return Rate(
        flops_per_s=with_recomputation,
        source=f"measured: {run} did {with_recomputation / 1e12:.4g} TFLOP/s on each device, recomputation included",
    )


def warnings(plan: Plan) -> list[str]:
    """What is likely to go wrong, a sentence each."""
    config, speed = plan.config, plan.speeds[plan.chosen]
    update_s = speed.compute_s + speed.exposed_communication_s
    found = []
    stage = config.train.zero_stage
    total = plan.total_bytes(stage, plan.chosen)
    if total > plan.usable_bytes:
        free = plan.usable_bytes - plan.stages[stage].peak(0)
        of_an_image = plan.choices[plan.chosen].activation_bytes / config.train.micro_batch_images
        images = config.train.global_batch_images // plan.cluster.ranks
        fitting = max((n for n in range(1, images + 1) if images % n == 0 and n * of_an_image <= free), default=0)
        advice = (
            f"a micro-batch of {fitting} fits (train.micro_batch_images)"
            if fitting >= 1
            else "take a higher stage, recompute more layers, or offload the optimizer"
        )
        found.append(
            f"does not fit: {_gib(total)} GiB at stage {stage}, and {_gib(plan.usable_bytes)} GiB are usable; {advice}"
        )
    first_checkpoint_minutes = config.checkpoint.every_steps * update_s / 60
    limit = config.limits.run_minutes
    if limit is not None and first_checkpoint_minutes > limit:
        found.append(
            f"the first checkpoint comes after {first_checkpoint_minutes:.0f} min, later than limits.run_minutes "
            f"{limit:g}: only the one written on stopping is left; lower checkpoint.every_steps"
        )
    if update_s > config.limits.step_seconds:
        found.append(
            f"an update takes {update_s:.0f} s, longer than limits.step_seconds {config.limits.step_seconds:g}: it "
            "would be taken for hung"
        )
    if speed.exposed_communication_s > 0.2 * speed.compute_s:
        found.append(
            f"communication that nothing hides takes {speed.exposed_communication_s / update_s:.0%} of an update; "
            "larger micro-batches or a lower stage need less"
        )
    return found


def as_text(plan: Plan) -> str:
    """The plan for a terminal of 100 columns."""
    config, cluster, flops = plan.config, plan.cluster, plan.choices[plan.chosen].flops
    train, speed = config.train, plan.speeds[plan.chosen]
    device = cluster.gpu.name if cluster.gpu else "CPU process"
    accumulation = train.global_batch_images // (train.micro_batch_images * cluster.ranks)
    account = plan.account
    attention = ""
    if account.attention:
        attention = f" ({account.parts[account.attention].forward / flops.forward:.0%} attention)"
    lines = [
        f"{config.run.name}: {cluster.ranks} x {device} ({cluster.nodes} x {cluster.gpus_per_node}), "
        f"{train.precision}, ZeRO stage {train.zero_stage}",
        "",
        f"  model   {_count(account.parameters)} parameters, {account.positions:,} tokens an image",
        f"  FLOP    an image: {_count(flops.forward)} forward, {_count(flops.training)} with backward"
        f"{attention}, {_count(flops.recomputed)} recomputed",
        f"  batch   {train.global_batch_images:,} images = {counted(cluster.ranks, 'rank')} "
        f"x {train.micro_batch_images} x {accumulation} accumulated",
        f"  length  {counted(plan.updates, 'update')} = {_count(plan.updates * train.global_batch_images)} images",
        "",
        f"Memory of one {device} in GiB"
        + (f" ({cluster.gpu.memory_gib:g}, of which {HEADROOM_GIB:g} are left free)" if cluster.gpu else ""),
        "",
        *_memory_table(plan),
        "",
        f"Speed ({plan.rate.source})",
        "",
        *_speed_table(plan),
        "",
        f"  {_duration(speed.hours)} to {_count(plan.updates * train.global_batch_images)} images, "
        f"{speed.hours * cluster.ranks:,.0f} {'GPU' if cluster.gpu else 'process'}-hours; "
        f"{speed.images_per_s * account.positions:,.0f} tokens/s",
        "",
        "Forecast",
        "",
        *(
            line
            for name, text in plan.forecast.lines()
            for line in textwrap.wrap(text, 98, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
        ),
    ]
    if found := warnings(plan):
        lines += ["", "Warnings", ""]
        for text in found:
            lines += textwrap.wrap(text, 98, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def as_dictionary(plan: Plan) -> dict[str, object]:
    """The plan as JSON takes it: bytes, seconds, operations."""
    cluster, config = plan.cluster, plan.config
    return {
        "run": config.run.name,
        "gpu": cluster.gpu.name if cluster.gpu else "cpu",
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "parameters": plan.account.parameters,
        "tokens_per_image": plan.account.positions,
        "updates": plan.updates,
        "images": plan.updates * config.train.global_batch_images,
        "zero_stage": config.train.zero_stage,
        "chosen": plan.chosen,
        "rate": dataclasses.asdict(plan.rate),
        "states_bytes": {str(stage): dataclasses.asdict(states) for stage, states in plan.stages.items()},
        "recomputation": [
            dataclasses.asdict(choice) | dataclasses.asdict(speed)
            for choice, speed in zip(plan.choices, plan.speeds, strict=True)
        ],
        "usable_bytes": plan.usable_bytes if cluster.gpu else None,
        "forecast": dataclasses.asdict(plan.forecast),
        "warnings": warnings(plan),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="exit codes: 0, 2 (usage)"
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--gpu", default="H200", help="name of a GPU, or cpu (default H200)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node; with cpu, processes (default 8)")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--network", type=float, default=400.0, help="Gbit/s of a GPU between nodes (default 400)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--images", type=int, help="training images to plan for instead of the config's steps")
    target.add_argument("--steps", type=int, help="updates to plan for instead of the config's")
    parser.add_argument("--calibrate", metavar="RUN", help="folder of a run on the same device, whose rate is taken")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN", help="folders of runs of the config's kind, to forecast from"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan there too")
    given = parser.parse_args(arguments)
    return run_tool(lambda: _plan(given))


def _plan(given: argparse.Namespace) -> None:
    for option in ("gpus", "nodes", "images", "steps", "network"):
        value = getattr(given, option)
        if value is not None and not value > 0:
            raise UsageError(f"--{option}: must be above 0, not {value}")
    gpu = None if given.gpu.lower() == "cpu" else find_gpu(given.gpu)
    if gpu is None and given.gpu.lower() != "cpu":
        raise UsageError(f"--gpu {given.gpu}: not in trainer/gpus.py; known are cpu, {', '.join(g.name for g in GPUS)}")
    overrides = given.overrides + ([f"train.steps={given.steps}"] if given.steps else [])
    config = load_config(given.config, overrides)
    cluster = Cluster(gpu=gpu, nodes=given.nodes, gpus_per_node=given.gpus, network_gbit_per_s=given.network)
    rate = measured_rate(Path(given.calibrate), gpu) if given.calibrate else None
    runs = [history_of_folder(Path(run)) for run in given.runs]
    plan = make_plan(config, cluster, rate, given.images, runs)
    if given.json:
        try:
            Path(given.json).write_text(json.dumps(as_dictionary(plan), indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"--json {given.json}: cannot be written ({error.strerror})") from error
    print(as_text(plan))


def _stages(config: RunConfig) -> list[int]:
    if isinstance(config.optimizer, Muon):
        return [0, 3] if config.train.precision == "fp32" else [1, 3]
    return [0, 1, 2, 3] if config.train.precision == "fp32" else [1, 2, 3]


def _choices(config: RunConfig) -> list[Recompute]:
    """Recomputation of nothing, of every second layer, of all layers with and without attention, and the config's."""
    own = config.train.recompute
    usual = [Recompute(), Recompute(every=1, keeps_attention=True), Recompute(every=1)]
    if config.model.num_units >= 2:
        usual.insert(1, Recompute(every=2))
    return usual if own in usual else [*usual, own]


def _recomputation(config: RunConfig, target: Target, recompute: Recompute) -> Recomputation:
    return Recomputation(
        every=recompute.every,
        keeps_attention=recompute.keeps_attention,
        activation_bytes=activation_bytes(config, target, recompute),
        flops=config.model.account(recompute).flops,
    )


def _assumed_rate(config: RunConfig, cluster: Cluster) -> Rate:
    if cluster.gpu is None:
        raise UsageError("--gpu cpu: the rate of a CPU cannot be assumed; add --calibrate RUN with a run made on it")
    peak = cluster.gpu.peak_tflops(config.train.precision)
    return Rate(
        flops_per_s=ASSUMED_MFU * peak * 1e12,
        source=f"assumed {ASSUMED_MFU:.0%} of {peak:,.0f} TFLOP/s, not measured: --calibrate RUN takes that of a run",
    )


def _speed(config: RunConfig, cluster: Cluster, flops: Flops, parameters: int, rate: Rate, updates: int) -> Speed:
    """Products at a rate, and communication (ring collectives) beyond what the backward pass hides."""
    train, ranks = config.train, cluster.ranks
    images = train.global_batch_images / ranks
    compute = images * (flops.training + flops.recomputed) / rate.flops_per_s
    backward = images * (flops.backward + flops.recomputed) / rate.flops_per_s
    passes = train.global_batch_images // (train.micro_batch_images * ranks)
    # One way round the ring: every rank sends this share of the weights' bytes once.
    ring = (ranks - 1) / ranks * parameters * (4 if train.precision == "fp32" else 2) / cluster.link_bytes_per_s
    if train.zero_stage == 3:  # weights for forward and for backward, gradients, in every micro-batch
        exposed = max(0.0, 3 * passes * ring - compute)
    elif train.zero_stage == 2:  # gradients in every micro-batch; then the new weights, which nothing hides
        exposed = max(0.0, passes * ring - backward) + ring
    else:  # gradients once, after the last micro-batch, and the new weights or, at stage 0, the gradients' sum
        exposed = 2 * ring
    update = compute + exposed
    return Speed(
        compute_s=compute,
        exposed_communication_s=exposed,
        images_per_s=train.global_batch_images / update,
        hours=update * updates / 3600,
    )


def _points(metrics_file: Path) -> Iterator[dict[str, float]]:
    for record in Journal(metrics_file, Point).records():
        yield record["metrics"]


def _memory_table(plan: Plan) -> list[str]:
    train = plan.config.train
    head = f"  {'stage':<7}{'weights':>8}{'gradients':>11}{'optimizer':>11}{'buffers':>9}   total with recomputation of"
    rows = [head, f"  {'':<46} " + "".join(f"{choice.name:>12}" for choice in plan.choices)]
    for stage, states in plan.stages.items():
        parts = (states.weights, states.gradients, states.optimizer, states.buffers)
        widths = (8, 11, 11, 9)
        cells = "".join(f"{_gib(part):>{width}}" for part, width in zip(parts, widths, strict=True))
        totals = ""
        for index in range(len(plan.choices)):
            total = plan.total_bytes(stage, index)
            mark = "!" if total > plan.usable_bytes else ""
            text = f"{mark}{_gib(total)}"
            if stage == train.zero_stage and index == plan.chosen:
                text = f"[{text}]"
            totals += f"{text:>12}"
        rows.append(f"  {stage:<7}{cells} {totals}")
    rows.append(f"  {'activations alone':<46} " + "".join(f"{_gib(c.activation_bytes):>12}" for c in plan.choices))
    notes = "[this config]"
    if plan.cluster.gpu:
        notes += "   ! does not fit"
    if any(choice.keeps_attention for choice in plan.choices):
        notes += "   * but its attention"
    if host := plan.stages[train.zero_stage].host:
        notes += f"   {_gib(host)} more on the host"
    return [*rows, f"  {notes}"]


def _speed_table(plan: Plan) -> list[str]:
    def row(name: str, cells: list[str]) -> str:
        return f"  {name:<46} " + "".join(f"{cell:>12}" for cell in cells)

    speeds, rank_count = plan.speeds, plan.cluster.ranks
    return [
        row("recomputation of", [choice.name for choice in plan.choices]),
        row("an update: compute, ms", [f"{1000 * speed.compute_s:,.0f}" for speed in speeds]),
        row("and communication not hidden, ms", [f"{1000 * speed.exposed_communication_s:,.1f}" for speed in speeds]),
        row("images/s", [f"{speed.images_per_s:,.1f}" for speed in speeds]),
        row("images/s of one device", [f"{speed.images_per_s / rank_count:,.2f}" for speed in speeds]),
        row("time", [_duration(speed.hours) for speed in speeds]),
    ]


def _gib(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}"


def _count(number: float) -> str:
    """Four digits and a unit: 206.4 M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} min"


if __name__ == "__main__":
    sys.exit(main())
