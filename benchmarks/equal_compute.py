"""What do models need for unseen photographs after equally many FLOPs of training? Each run once, kept in a file.

Benchmarks name runs: a config, cut to a budget of training FLOPs (steps = budget / FLOPs of a training image / images a
step, from the model's account), and a seed. Those that `results/equal_compute.jsonl` lacks are made, one line each, so
that a benchmark that was cut off goes on where it stopped, and tables can be written again from the file.

Engine, optimizer, loss, learning rate and order of images are the trainer's; one process, one thread, fp32 without
ZeRO, no checkpoints and no MLflow. The images are those of the quickstart, packed if they are not there. All runs of a
seed see the same images in the same order, and score the same ones, so that they can be compared image by image.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import commit
from data_pipeline.loader import evaluation_batches, open_shards
from models.likelihood import nats
from models.model import Account
from trainer.config import ModelConfig, RunConfig, config_from
from trainer.deepspeed_engine import DeepSpeedEngine, init_distributed
from trainer.job import begin_from_images, build_engine, training_batches
from trainer.loop import micro_step
from trainer.metrics import Meter
from trainer.model_inputs import model_inputs
from trainer.optimizer import learning_rate
from trainer.ranks import COLLECTIVE_TIMEOUT, Ranks, ranks_from_environment
from trainer.startup import Start
from trainer.typed_values import plain

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data/quickstart"
JOURNAL = Path(__file__).with_name("results") / "equal_compute.jsonl"
PHOTOGRAPHS = {"train": 12_000, "validation": 512}
"""Crops of 32 x 32 of each split, as in the Makefile."""
SCORED_IMAGES = 128
"""How many validation images are scored where not all are: the first ones."""

Settings = dict[str, Any]
"""A section of a config as YAML has it."""

OLD_MODEL: Settings = {
    "family": "image_transformer",
    "image_size": 32,
    "input": "ordinal",
    "output": {"kind": "mixture", "components": 10},
    "attention": {"kind": "local_1d", "query_block": 128, "memory": 128},
    "layers": 3,
    "width": 96,
    "heads": 3,
    "attention_width": 96,
    "ff_width": 192,
    "block": "modern",
    "norm": "pre",
    "position": "rotary",
}
OLD_OPTIMIZER: Settings = {
    "name": "adamw",
    "peak_lr": 4e-3,
    "schedule": {"kind": "cosine", "warmup_steps": 20, "final_lr_fraction": 0.05},
    "weight_decay": 0.01,
    "ema_decay": 0.95,
}
"""The first quickstart, 220 steps of 8 images: its 4.2 TFLOP of training are the unit of all budgets here."""
OLD_BATCH, OLD_IMAGES = 8, 1760


@dataclass(frozen=True)
class Result:
    """What one run gave."""

    config: RunConfig
    flops: float
    """Of training, all images."""
    bits: tuple[float, ...]
    """Bits/dim of each validation image: of all with the average of the weights, or `raw`."""
    raw: tuple[float, ...]
    """The same of the first SCORED_IMAGES with the raw weights, which are the better ones after few steps, when an
    average still holds the first weights. Empty for a few runs of which only the mean was kept."""
    raw_mean: float
    cpu_seconds: float
    """Of training, scoring not included."""
    commit: str

    @property
    def mean(self) -> float:
        return sum(self.bits) / len(self.bits)


@dataclass(frozen=True)
class Wanted:
    """A run that a table needs."""

    config: RunConfig
    validation_images: int

    def is_answered_by(self, result: Result) -> bool:
        ours, theirs = self.config, result.config
        return (
            len(result.bits) >= self.validation_images
            and (ours.model, ours.optimizer) == (theirs.model, theirs.optimizer)
            and (ours.train.steps, ours.train.global_batch_images, ours.run.seed)
            == (theirs.train.steps, theirs.train.global_batch_images, theirs.run.seed)
        )


def settings_of(model: Settings, optimizer: Settings, batch_images: int, *, steps: int = 1, seed: int = 0) -> RunConfig:
    """The config of a run of these sections."""
    batch = {"global_batch_images": batch_images, "micro_batch_images": batch_images}
    values = {
        "run": {"name": "equal compute", "dir": "runs/equal_compute", "seed": seed},
        "model": model,
        "data": {
            "train_url": "data/quickstart/train",
            "validation_url": "data/quickstart/validation",
            "fetch_threads": 2,
        },
        "train": {"steps": steps, **batch, "precision": "fp32", "zero_stage": 0},
        "optimizer": optimizer,
    }
    return config_from(values, "equal_compute")


@cache
def account_of(model: ModelConfig) -> Account:
    """See `ModelConfig.account`."""
    return model.account()


@cache
def unit_of_compute() -> float:
    """FLOPs of training of the first quickstart."""
    return OLD_IMAGES * float(account_of(settings_of(OLD_MODEL, OLD_OPTIMIZER, OLD_BATCH).model).flops.training)


def wanted(config: RunConfig, budget: float, seed: int) -> Wanted:
    """A run of this model, optimizer and batch on `budget` units of compute. One on less than a unit scores the first
    SCORED_IMAGES. A warm-up takes at most a tenth of its steps."""
    batch = config.train.global_batch_images
    steps = max(1, round(budget * unit_of_compute() / account_of(config.model).flops.training / batch))
    optimizer = plain(config.optimizer)
    warmup = min(optimizer["schedule"]["warmup_steps"], max(1, steps // 10))
    optimizer["schedule"] = optimizer["schedule"] | {"warmup_steps": warmup}
    fitted = settings_of(plain(config.model), optimizer, batch, steps=steps, seed=seed)
    return Wanted(fitted, PHOTOGRAPHS["validation"] if budget >= 1 else SCORED_IMAGES)


class Journal:
    """The file of all results."""

    def __init__(self, path: Path = JOURNAL) -> None:
        self._path = path
        self._results = [_from_line(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, run: Wanted) -> Result | None:
        """The newest result of a run; None if it was not made."""
        return next((result for result in reversed(self._results) if run.is_answered_by(result)), None)

    def add(self, result: Result) -> None:
        self._results.append(result)
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(_as_line(result) + "\n")


def _as_line(result: Result) -> str:
    config = result.config
    return json.dumps(
        {
            "flops": result.flops,
            "parameters": account_of(config.model).parameters,
            "seed": config.run.seed,
            "mean": round(result.mean, 4),
            "raw_mean": round(result.raw_mean, 4),
            "cpu_seconds": round(result.cpu_seconds, 1),
            "commit": result.commit,
            "steps": config.train.steps,
            "batch": config.train.global_batch_images,
            "optimizer": plain(config.optimizer),
            "model": plain(config.model),
            "bits": [round(value, 4) for value in result.bits],
            "raw": [round(value, 4) for value in result.raw],
        },
        separators=(",", ":"),
    )


def _from_line(line: str) -> Result:
    """A result as some version wrote it, its config as this version understands it."""
    values = json.loads(line)
    return Result(
        settings_of(values["model"], values["optimizer"], values["batch"], steps=values["steps"], seed=values["seed"]),
        values["flops"],
        tuple(values["bits"]),
        tuple(values["raw"]),
        values["raw_mean"],
        values["cpu_seconds"],
        values["commit"],
    )


def make_missing(runs: Iterable[Wanted], journal: Journal) -> None:
    """Make the runs that the journal lacks, one after the other."""
    missing = [run for run in dict.fromkeys(runs) if journal.find(run) is None]
    for number, run in enumerate(missing, start=1):
        model = run.config.model
        label = f"[{number}/{len(missing)}] {model.family}, {account_of(model).parameters:,} parameters"
        print(f"{label}, {run.config.train.steps} steps, seed {run.config.run.seed}", file=sys.stderr, flush=True)
        result = measure(run.config, run.validation_images)
        journal.add(result)
        print(f"    {result.mean:.4f} bits/dim, {result.cpu_seconds:.0f} CPU s", file=sys.stderr, flush=True)


def measure(config: RunConfig, validation_images: int) -> Result:
    """Train, and score the first validation images."""
    pack_photographs()
    ranks, device = _alone()
    shards = {split: open_shards(str(DATA / split)) for split in PHOTOGRAPHS}
    start = Start(
        config=config,
        ranks=ranks,
        train_shards=shards["train"],
        validation_shards=shards["validation"],
        lock=None,
        profile=None,
        source=None,
        origin={},
    )
    engine = build_engine(config, ranks, device)
    begin_from_images(start, engine)
    begun = time.process_time()
    train(start, engine)
    seconds = time.process_time() - begun
    averages, weights = _weights(engine)
    raw = bits_of_images(start, weights, min(validation_images, SCORED_IMAGES))
    averaged = validation_images > SCORED_IMAGES
    bits = bits_of_images(start, averages or weights, validation_images) if averaged else raw
    images = config.train.steps * config.train.global_batch_images
    return Result(
        config,
        images * float(account_of(config.model).flops.training),
        tuple(bits),
        tuple(raw),
        sum(raw) / len(raw),
        seconds,
        commit(),
    )


def train(start: Start, engine: DeepSpeedEngine) -> None:
    """All steps, as `trainer.loop.train` makes them, with nothing beside them."""
    config, batches, meter = start.config, training_batches(start, 0, None), Meter(engine.device)
    engine.train(True)
    for step in range(config.train.steps):
        torch.manual_seed(config.run.seed * 1_000_003 + step)  # of dropout
        for _ in range(engine.accumulation_steps):
            micro_step(engine, config, next(batches), meter)
        engine.update(learning_rate(config.optimizer, step, config.train.steps))


def _weights(engine: DeepSpeedEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averages of the weights, if they are kept, and the weights."""
    averages, weights = {}, {}
    for name, state in engine.state():
        weights[name] = state["weight"].cpu().clone()
        if "ema" in state:
            averages[name] = state["ema"].cpu().clone()
    return averages, weights


def bits_of_images(start: Start, weights: dict[str, Tensor], count: int) -> list[float]:
    """Bits/dim of the first `count` validation images, one by one."""
    model_config, found = start.config.model, []
    model = model_config.build()
    model.load_state_dict(weights)
    model.eval()
    batches = evaluation_batches(start.validation_shards, rank=0, world_size=1, batch_images=16, limit=count)
    with torch.no_grad():
        for batch in batches:
            losses = nats(model_config.output, model(*model_inputs(batch, model_config)), batch.images)
            bits = losses.double().flatten(1).sum(1) / (batch.images[0].numel() * math.log(2))
            found += bits[batch.valid].tolist()
    return found


def pack_photographs() -> None:
    """The images of the quickstart, if they are not there."""
    for split, count in PHOTOGRAPHS.items():
        if not (DATA / split / "manifest.json").exists():
            options = ["--source", "photographs", "--dest", str(DATA / split), "--size", "32"]
            options += ["--split", split, "--images", str(count)]
            subprocess.run([sys.executable, "-m", "data_pipeline.pack", *options], cwd=ROOT, check=True)


@cache
def _alone() -> tuple[Ranks, torch.device]:
    """This process as the only rank of a job, on one thread."""
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    return ranks, init_distributed(COLLECTIVE_TIMEOUT, ranks.local_rank)


def standard_error(values: Sequence[float]) -> float:
    """Of a mean; 0 of a single value."""
    count = len(values)
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count) if count > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """How much more bits/dim one config needs than another, of the same seeds and images."""

    mean: float
    error: float
    """Standard error: of seeds and of images, both added in squares."""
    seeds: int


def difference(these: Sequence[Result], those: Sequence[Result]) -> Difference | None:
    """Of these over those with raw weights, for the seeds and images that both have; None if there are none."""
    others = {result.config.run.seed: result.raw for result in those}
    pairs = [(result.raw, others[result.config.run.seed]) for result in these if result.config.run.seed in others]
    if not pairs:
        return None
    count = min(min(len(bits), len(other)) for bits, other in pairs)
    gaps = [[bits[i] - other[i] for i in range(count)] for bits, other in pairs]
    by_seed = [sum(row) / count for row in gaps]
    by_image = [sum(row[i] for row in gaps) / len(gaps) for i in range(count)]
    error = math.hypot(standard_error(by_seed), standard_error(by_image))
    return Difference(sum(by_seed) / len(by_seed), error, len(pairs))
