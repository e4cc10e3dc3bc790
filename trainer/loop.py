"""What happens at each step of training, in order?"""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from models.likelihood import nats
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.exit_codes import Diverged
from trainer.metrics import Meter
from trainer.model_inputs import model_inputs
from trainer.optimizer import learning_rate
from trainer.progress import Progress
from trainer.tracking import Tracker


def train(
    config: RunConfig,
    engine: Engine,
    batches: Iterator[Batch],
    evaluate: Callable[[int | None], dict[str, float]],
    save: Callable[[int, int], None],
    tracker: Tracker,
    progress: Progress,
    stop_requested: Callable[[], bool],
    *,
    rank: int,
    step: int,
    samples: int,
) -> tuple[int, bool]:
    """Train from `step` updates and `samples` images to the end or to a requested stop.

    `evaluate` scores so many validation images (None: all), `save` writes a checkpoint of (step, samples).
    Returns the updates done and whether that is the end. Raises Diverged when the loss is not a number.
    """
    settings = config.train
    meter = Meter(engine.device)
    progress.start(step)
    engine.train(True)
    if step == 0:
        tracker.log(0, evaluate(config.evaluate.images))
    while step < settings.steps:
        meter.restart_clock()
        torch.manual_seed(_dropout_seed(config.run.seed, step, rank))
        rate = learning_rate(config.optimizer, step, settings.steps)
        for _ in range(engine.accumulation_steps):
            waiting = time.perf_counter()
            batch = next(batches)
            meter.waited(waiting)
            meter.add(micro_step(engine, config, batch, rate))
        step += 1
        samples += settings.global_batch_images
        meter.step_done(settings.global_batch_images)

        last = step == settings.steps
        if last or step % settings.log_every_steps == 0:
            metrics = meter.reduce()
            if not math.isfinite(metrics["train/bits_per_dim"]):
                raise Diverged(
                    f"the training loss is not finite at step {step}; the last checkpoint is untouched. "
                    "Try a smaller optimizer.peak_lr or a longer optimizer.warmup_steps"
                )
            metrics |= {"optim/lr": rate, "progress/images_seen": samples}
            if (norm := engine.gradient_norm()) is not None:
                metrics["optim/grad_norm"] = norm
            tracker.log(step, metrics)
            progress.update(step, metrics["train/bits_per_dim"], metrics["perf/images_per_s"])
        if last or step % config.evaluate.every_steps == 0:
            scores = evaluate(None if last else config.evaluate.images)
            tracker.log(step, scores)
            progress.note(f"step {step}: validation {scores['val/bits_per_dim']:.3f} bits/dim")
        stopping = stop_requested()
        if last or stopping or step % config.checkpoint.every_steps == 0:
            save(step, samples)
        if stopping and not last:
            return step, False
    return step, True


def micro_step(engine: Engine, config: RunConfig, batch: Batch, rate: float) -> Tensor:
    """One micro-batch forward and backward, and the update after the last one; its mean loss in nats per sub-pixel."""
    batch = batch.to(engine.device)  # uint8 until here: a quarter of the copy
    parameters = engine.forward(*model_inputs(batch, config.model))
    loss = nats(config.model.output, parameters, batch.images).sum() / batch.images.numel()
    engine.backward(loss)
    engine.step(rate)
    return loss.detach()  # stays on the device: no synchronisation


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's randomness is a function of (seed, step, rank), so a resumed run needs no generator state."""
    return (seed * 1_000_003 + step) * 65_537 + rank
