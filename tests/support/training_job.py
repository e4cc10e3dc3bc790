"""How do tests run the training loop in their own process: plain torch, no launcher, no DeepSpeed, in seconds?

The engine is `TorchEngine`; checkpoints, the run's folder, the meter and scoring are the real ones. What talks to
other processes or machines is replaced: the tracker keeps a list, and a request to stop is a function.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from models.model import Model
from tests.support.launch import SMALL_JOB, TINY_MODEL
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig, load_config
from trainer.engine import TorchEngine, Update
from trainer.faults.preemption import Agreed
from trainer.loop import Job, interruptible
from trainer.profiler import StepProfiler
from trainer.progress import Progress
from trainer.ranks import Ranks
from trainer.record.run_folder import RunFiles
from trainer.scoring import score

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
SIZE = 8
VALIDATION_IMAGES = 6


def config_of(folder: Path, **changes: object) -> RunConfig:
    """Twenty steps of a tiny model; `train__steps=5` changes train.steps."""
    values: dict[str, object] = TINY_MODEL | {
        "run.dir": folder,
        "run.seed": 3,
        "train.steps": 20,
        "train.global_batch_images": 8,
        "train.micro_batch_images": 4,
        "train.precision": "fp32",
        "train.log_every_steps": 1,
        "optimizer.peak_lr": 0.004,
        "optimizer.schedule.warmup_steps": 5,
        "optimizer.schedule.final_lr_fraction": 0.05,
        "optimizer.weight_decay": 0.01,
        "optimizer.clip_grad_norm": 1.0,
        "optimizer.ema_decay": 0.9,
        "evaluate.every_steps": 100,
        "evaluate.images": None,
        "checkpoint.every_steps": 100,
        "checkpoint.background": False,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"{name}={'null' if value is None else value}" for name, value in values.items()]
    return load_config(SMALL_JOB, overrides)


def pictures(first: int, count: int) -> Tensor:
    """Pictures first, first + 1, ...: slopes of colour by integers alone, so the same ones everywhere. uint8."""
    number = torch.arange(first, first + count).view(-1, 1, 1, 1)
    row, column, channel = (torch.arange(n) for n in (SIZE, SIZE, 3))
    slope = row.view(1, -1, 1, 1) * (number % 5) + column.view(1, 1, -1, 1) * (number % 7) + channel * 20
    return ((slope * 3 + number * 37) % 256).to(torch.uint8)


def training_batches(config: RunConfig, consumed: int) -> Iterator[Batch]:
    """Micro-batches of the pictures from number `consumed` on."""
    size = config.train.micro_batch_images
    for first in itertools.count(consumed, size):
        yield Batch(pictures(first, size), labels=None, valid=None, position=first + size)


def new_model(config: RunConfig) -> Model:
    """The model with its first weights, a function of the run's seed."""
    torch.manual_seed(config.run.seed)
    return config.model.build()


class BrokenEngine(TorchEngine):
    """A TorchEngine of which some updates get a loss, or a gradient behind a good loss, that is not a number."""

    def __init__(self, model: Model, config: RunConfig, *, losses: set[int], gradients: set[int]) -> None:
        """`losses` and `gradients` are numbers of updates, from 1; the last micro-batch of each goes wrong."""
        super().__init__(model, config)
        self._losses, self._gradients = losses, gradients
        self._update, self._micro_batch = 1, 0

    def forward(self, *inputs: Any) -> Tensor:
        parameters = super().forward(*inputs)
        if not torch.is_grad_enabled():
            return parameters  # an evaluation
        self._micro_batch += 1
        return parameters * float("nan") if self._is_bad(self._losses) else parameters

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * float("nan") if self._is_bad(self._gradients) else loss)

    def update(self, learning_rate: float) -> Update:
        done = super().update(learning_rate)
        self._update, self._micro_batch = self._update + 1, 0
        return done

    def _is_bad(self, updates: set[int]) -> bool:
        return self._update in updates and self._micro_batch == self.accumulation_steps


@dataclass
class Recorded:
    """What the loop told the tracker."""

    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if metrics:
            self.points.append((step, dict(metrics)))

    def event(self, step: int, name: str, text: str, **fields: Any) -> None:
        self.events.append((step, name, text, fields))

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for step, metrics in self.points if name in metrics]


class Asked:
    """In place of a StopRequest: a function says whether somebody has asked the job to stop."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def agreed(self, *, superseded: bool = False, checkpoint_written: bool = True) -> Agreed:
        return Agreed(self._asked(), superseded, checkpoint_written)


class NoWatchdog:
    """In place of a Watchdog: nothing ends a test that hangs but pytest."""

    def phase(self, phase: str) -> None:
        """Nothing."""

    def alive(self) -> None:
        """Nothing."""


def job_of(
    config: RunConfig,
    engine: TorchEngine | None = None,
    *,
    consumed: int = 0,
    stop: Callable[[], bool] = lambda: False,
    superseded: Callable[[], bool] = lambda: False,
) -> tuple[Job, Recorded]:
    """A job of one rank in this process, and what it records. `consumed` images were trained on before."""
    engine = engine or TorchEngine(new_model(config), config)
    recorded, asked, watchdog = Recorded(), Asked(stop), NoWatchdog()
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)

    def evaluate(images: int | None) -> dict[str, float]:
        engine.train(False)
        valid = torch.ones(2, dtype=torch.bool)
        batches = (Batch(pictures(9000 + i, 2), None, valid, i) for i in range(0, VALIDATION_IMAGES, 2))
        watched: Any = interruptible(batches, asked, watchdog)  # type: ignore[arg-type]
        scores = score(engine.forward, config.model, watched, engine.device, VALIDATION_IMAGES)
        engine.train(True)
        return scores

    job = Job(
        config=config,
        ranks=ALONE,
        engine=engine,
        batches=training_batches(config, consumed),
        damaged_blocks=None,
        images_per_epoch=80,
        data_digest="pictures",
        evaluate=evaluate,
        draw_samples=lambda step: None,
        checkpoints=Checkpoints(str(folder / "checkpoints"), ALONE, engine.device, config.checkpoint, attempt=1),
        files=RunFiles(folder),
        tracker=recorded,  # type: ignore[arg-type]
        progress=Progress(enabled=False, total_steps=config.train.steps),
        stop=asked,  # type: ignore[arg-type]
        superseded=superseded,
        watchdog=watchdog,  # type: ignore[arg-type]
        profiler=StepProfiler(None, folder / "profile", rank=0, device=engine.device, flops={}, images_per_update=8),
    )
    return job, recorded
