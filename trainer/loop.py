"""What happens at each step of training, in order?"""

import dataclasses
import logging
import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.damaged_blocks import DamagedBlocks
from data_pipeline.wording import counted
from models.likelihood import nats
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.engine import Engine, Update
from trainer.errors import CheckpointError, Diverged, Superseded
from trainer.faults.divergence import SkipCounter, SpikeAlarm
from trainer.faults.preemption import StopRequest
from trainer.faults.replay import LOSS, compare, gradient_checksums, random_state_kept, reproducible
from trainer.faults.replicas import checksum
from trainer.faults.stragglers import SLOW_POINTS, StragglerWatch
from trainer.faults.watchdog import Watchdog
from trainer.metrics import Meter, work_of
from trainer.model_inputs import model_inputs
from trainer.optimizer import learning_rate
from trainer.profiler import StepProfiler
from trainer.progress import Progress
from trainer.ranks import Ranks, from_all_ranks
from trainer.record.run_folder import RunFiles
from trainer.record.tracker import NoTracker, Tracker
from trainer.tensor_file import write_small_file

log = logging.getLogger(__name__)

SAVED_SKIPPED_BATCHES = 10
"""So many skipped updates of an attempt leave their batches in the run's folder, where somebody can look at them."""


FINISHED_PATIENCE_SECONDS = 30.0
"""How long the last checkpoint of a run is tried again. Nothing else is left to be done then."""
STOPPED_PATIENCE_SECONDS = 10.0
"""The same for that of a requested stop, after which the machine is soon taken away."""


class Interrupted(Exception):
    """All ranks agreed to stop in the middle of an evaluation."""


@dataclass
class TrainingState:
    """How far the training is: all that a resumed run needs beside the engine's tensors."""

    step: int = 0
    """Updates attempted."""
    updates: int = 0
    """Updates applied."""
    samples: int = 0
    """Training images consumed."""
    unsaved: str | None = None
    """After a requested stop whose checkpoint could not be written: why, and from which step the run goes on."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of one training job, built by `trainer/job.py`."""

    config: RunConfig
    ranks: Ranks
    engine: Engine
    batches: Iterator[Batch]
    damaged_blocks: DamagedBlocks | None
    """Damaged blocks of the training data that were replaced, the same on every rank; None if none are allowed."""
    images_per_epoch: int
    data_digest: str
    evaluate: Callable[[int | None], dict[str, float]]
    """Scores this many validation images (None: all). Collective. Raises Interrupted."""
    draw_samples: Callable[[int], None]
    """Draws a grid of images and records it at the given step. Collective."""
    checkpoints: Checkpoints
    files: RunFiles
    tracker: Tracker | NoTracker
    progress: Progress
    stop: StopRequest
    superseded: Callable[[], bool]
    """Whether a newer attempt writes to the run's folder."""
    watchdog: Watchdog
    profiler: StepProfiler


def train(job: Job, state: TrainingState) -> bool:
    """Train from `state` on and keep it current. Returns True at the end, False after a requested stop.

    Raises DataError when training data cannot be read, Diverged when gradients stay non-finite, Superseded when a newer
    attempt has taken over, CheckpointError when checkpoints, or the last one, cannot be written any more.
    """
    settings = job.config.train
    meter = Meter(job.engine.device, work_of(job.config, job.ranks.world_size, job.engine.device))
    skips, alarm = SkipCounter(job.config.limits.skipped_updates), SpikeAlarm(job.config.limits.loss_spike)
    stragglers, hosts = StragglerWatch(), from_all_ranks(socket.gethostname())
    job.progress.start(state.step)
    job.engine.train(True)
    try:
        if state.step == 0:
            job.tracker.log(0, job.evaluate(job.config.evaluate.images))
        while state.step < settings.steps:
            job.watchdog.phase("step")
            profiled = job.profiler.step(state.step)
            bits_per_dim = None
            meter.restart_clock()
            torch.manual_seed(_dropout_seed(job.config.run.seed, state.step, job.ranks.rank))
            rate = learning_rate(job.config.optimizer, state.step, settings.steps)
            micro_batches: list[tuple[Batch, Tensor]] = []
            every = job.config.limits.replay_every_steps
            for _ in range(job.engine.accumulation_steps):
                with meter.section("data"):
                    batch = next(job.batches)
                replayed = every and state.step % every == 0 and not micro_batches
                loss = (
                    micro_step_twice(job.engine, job.config, batch, meter, state.step)
                    if replayed
                    else micro_step(job.engine, job.config, batch, meter)
                )
                micro_batches.append((batch, loss))
                job.watchdog.alive()
            with meter.section("optimizer"):
                update = job.engine.update(rate)
            job.watchdog.alive()
            state.step += 1
            state.samples += settings.global_batch_images
            meter.step_done(settings.global_batch_images)
            _count_update(job, state, skips, update, micro_batches)

            if state.step == settings.steps or state.step % settings.log_every_steps == 0:
                _log(job, state, meter, alarm, skips, rate, update, profiled)
                _name_stragglers(job, state, stragglers.newly_slow(meter.own_seconds_of_rank), hosts)
            if state.step < settings.steps:
                if state.step % job.config.evaluate.every_steps == 0:
                    bits_per_dim = _evaluate(job, state, job.config.evaluate.images)
                every = job.config.tracking.sample_every_steps
                if every and state.step % every == 0:
                    job.draw_samples(state.step)
                if state.step % job.config.checkpoint.every_steps == 0 and skips.in_a_row == 0:
                    _save(job, state, bits_per_dim)
            if _agree(job, state, skips):
                return _stop(job, state)
        job.tracker.log(state.step, job.profiler.close(state.step))
        score = _evaluate(job, state, None)
    except Interrupted:
        return _stop(job, state)
    if problem := _save_last(job, state, score, FINISHED_PATIENCE_SECONDS):
        raise CheckpointError(f"all steps are done, but {problem}")
    return True


def interruptible(batches: Iterator[Batch], stop: StopRequest, watchdog: Watchdog) -> Iterator[Batch]:
    """Yield the batches of an evaluation; raises Interrupted when all ranks shall stop.

    Every rank must have the same number of batches: before each one the ranks agree whether to stop.
    """
    watchdog.phase("step")
    for batch in batches:
        if stop.agreed().stop:
            raise Interrupted
        watchdog.alive()
        yield batch


def micro_step(engine: Engine, config: RunConfig, batch: Batch, meter: Meter) -> Tensor:
    """Run one micro-batch forward and backward; returns its mean loss in nats per sub-pixel."""
    with meter.section("data"):
        batch = batch.to(engine.device)  # uint8 until here: a quarter of the copy
    with meter.section("forward"):
        loss = _mean_loss(config, batch, engine.forward(*model_inputs(batch, config.model)))
    with meter.section("backward"):
        engine.backward(loss)
    loss = loss.detach()  # stays on the device: no synchronisation
    meter.add(loss)
    return loss


def micro_step_twice(engine: Engine, config: RunConfig, batch: Batch, meter: Meter, step: int) -> Tensor:
    """As micro_step, after the same was computed beside it. Collective. Raises Irreproducible if the two differ."""
    with reproducible(engine.device):
        with random_state_kept(engine.device), gradient_checksums(engine.parameters(), discard=True) as first:
            here = batch.to(engine.device)
            loss = engine.recompute(*model_inputs(here, config.model), partial(_mean_loss, config, here))
            first[LOSS] = checksum(loss)
        with gradient_checksums(engine.parameters()) as second:
            loss = micro_step(engine, config, batch, meter)
            second[LOSS] = checksum(loss)
    compare(step, first, second)
    return loss


def _mean_loss(config: RunConfig, batch: Batch, parameters: Tensor) -> Tensor:
    """Nats per sub-pixel."""
    return nats(config.model.output, parameters, batch.images).sum() / batch.images.numel()


def _count_update(
    job: Job, state: TrainingState, skips: SkipCounter, update: Update, micro_batches: list[tuple[Batch, Tensor]]
) -> None:
    """Count the update. If it was skipped, say why, and go back to a checkpoint if that is due.

    `micro_batches` are those of this rank, with their losses. Raises Diverged if skipping does not help.
    """
    if update.outcome == "applied":
        state.updates += 1
        skips.applied()
    if update.outcome != "skipped":
        return
    bad = [index for index, (_, loss) in enumerate(micro_batches) if not math.isfinite(float(loss))]
    blamed = [rank for rank, found in enumerate(from_all_ranks(bool(bad))) if found]
    first = state.samples - job.config.train.global_batch_images
    whose = f"the loss of rank {', '.join(map(str, blamed))}" if blamed else "a gradient"
    text = f"step {state.step}: {whose} is not finite; the update is skipped (training images {first}-{state.samples})"
    job.progress.note(text)
    job.tracker.event(state.step, "skipped_update", text, first_sample=first, end_sample=state.samples, ranks=blamed)
    if skips.total < SAVED_SKIPPED_BATCHES:
        _keep_batches(job, state.step, [b for i, (b, _) in enumerate(micro_batches) if i in bad or not blamed])
    loaded = None
    if skips.in_a_row + 1 >= skips.limit:
        job.watchdog.phase("checkpoint")
        loaded = job.checkpoints.newest(job.progress.note)
    match skips.skipped(can_roll_back=loaded is not None):
        case "give up":
            raise Diverged(
                f"{counted(skips.limit, 'update')} in a row, up to step {state.step}, had a loss or a gradient that is "
                "not finite; the last checkpoint is untouched. Try a smaller optimizer.peak_lr or a longer "
                "optimizer.schedule.warmup_steps"
            )
        case "roll back":
            assert loaded is not None
            newest = loaded.checkpoint
            loaded.put_into(job.engine)
            state.updates = newest.updates
            skipped = counted(skips.limit, "skipped update")
            text = (
                f"step {state.step}: back to the weights of {newest.name} after {skipped}; "
                f"training images {newest.samples}-{state.samples} are left out"
            )
            job.progress.note(text)
            job.tracker.event(state.step, "roll_back", text, checkpoint=newest.name)


def _keep_batches(job: Job, step: int, batches: list[Batch]) -> None:
    """Write suspicious micro-batches of this rank into the run's folder, where somebody can look at them."""
    folder = job.files.folder / "skipped"
    for index, batch in enumerate(batches):
        tensors = {"images": batch.images.cpu()} | ({} if batch.labels is None else {"labels": batch.labels.cpu()})
        name = f"step-{step:09d}-rank-{job.ranks.rank:05d}-{index}.safetensors"
        try:
            folder.mkdir(exist_ok=True)
            write_small_file(folder / name, tensors)
        except OSError as error:
            log.warning("%s: cannot be written (%s); training goes on without it", folder / name, error.strerror)


def _log(
    job: Job,
    state: TrainingState,
    meter: Meter,
    alarm: SpikeAlarm,
    skips: SkipCounter,
    rate: float,
    update: Update,
    profiled: dict[str, float],
) -> None:
    metrics = meter.reduce()
    metrics |= profiled | {
        "optim/lr": rate,
        "optim/skipped_updates": skips.total,
        "progress/images_seen": state.samples,
        "progress/epoch": state.samples / job.images_per_epoch,
    }
    if update.gradient_norm is not None:
        metrics["optim/grad_norm"] = update.gradient_norm
    if job.damaged_blocks is not None:
        metrics["data/damaged_blocks"] = _count_damaged_blocks(job, state, job.damaged_blocks)
    loss = metrics["train/bits_per_dim"]
    if math.isfinite(loss) and alarm.rises(loss):
        text = f"step {state.step}: the loss jumped to {loss:.3f} bits/dim"
        job.progress.note(f"warning: {text}")
        job.tracker.event(state.step, "loss_spike", text, bits_per_dim=loss)
    job.tracker.log(state.step, {name: value for name, value in metrics.items() if math.isfinite(value)})
    job.progress.update(state.step, loss, metrics["perf/images_per_s"])


def _count_damaged_blocks(job: Job, state: TrainingState, damaged: DamagedBlocks) -> int:
    """How many different damaged blocks all ranks have met. Each new one becomes an event. Collective.

    Raises DataError on all ranks when there are more than the config allows.
    """
    fresh = damaged.merge(from_all_ranks(damaged.snapshot()))
    for number, cause in fresh.items():
        text = f"step {state.step}: block {number} of the training data was replaced by the next good one: {cause}"
        job.tracker.event(state.step, "damaged_block", text, block=number)
    return len(damaged.causes)


def _name_stragglers(job: Job, state: TrainingState, slow: dict[int, float], hosts: list[str]) -> None:
    """Report the ranks that hold the others up. `slow` holds the time of each as a multiple of the median."""
    for rank, ratio in slow.items():
        text = (
            f"step {state.step}: rank {rank} on {hosts[rank]} holds the others up: for {SLOW_POINTS} points of the "
            f"curves its data and forward passes took {ratio:.1f} times as long as the median rank's"
        )
        job.progress.note(f"warning: {text}")
        job.tracker.event(state.step, "straggler", text, rank=rank, host=hosts[rank], ratio=ratio)


def _evaluate(job: Job, state: TrainingState, images: int | None) -> float:
    scores = job.evaluate(images)
    job.tracker.log(state.step, scores)
    job.progress.note(f"step {state.step}: validation {scores['val/bits_per_dim']:.3f} bits/dim")
    return scores["val/bits_per_dim"]


def _save(job: Job, state: TrainingState, bits_per_dim: float | None) -> None:
    job.watchdog.phase("checkpoint")
    job.checkpoints.save(
        job.engine,
        step=state.step,
        updates=state.updates,
        samples=state.samples,
        bits_per_dim=bits_per_dim,
        config=dataclasses.asdict(job.config),
        data_digest=job.data_digest,
        alive=job.watchdog.alive,
    )


def _agree(job: Job, state: TrainingState, skips: SkipCounter) -> bool:
    """Complete a checkpoint that all ranks have written. Returns whether all ranks shall stop. Raises Superseded."""
    agreed = job.stop.agreed(superseded=job.superseded(), checkpoint_written=job.checkpoints.is_written())
    if agreed.superseded:
        raise Superseded(f"{job.files.folder}: a newer attempt at this run has taken over; this one ends unsaved")
    if agreed.checkpoint_written and job.checkpoints.complete():
        skips.checkpointed()
    return agreed.stop and state.step < job.config.train.steps


def _stop(job: Job, state: TrainingState) -> bool:
    if state.step:
        state.unsaved = _save_last(job, state, None, STOPPED_PATIENCE_SECONDS)
    return False


def _save_last(job: Job, state: TrainingState, bits_per_dim: float | None, patience_seconds: float) -> str | None:
    """Save, and wait until it is done. If that fails for so long, returns why and from where the run goes on."""
    patience = min(patience_seconds, job.config.limits.checkpoint_seconds)
    job.watchdog.phase("checkpoint")
    if problem := job.checkpoints.complete_last(0.0):  # one that was being written; this one takes its place
        log.warning("an older checkpoint was not written: %s", problem)
    _save(job, state, bits_per_dim)
    problem = job.checkpoints.complete_last(patience, job.watchdog.alive)
    if problem is None:
        return None
    safe = job.checkpoints.newest_step()
    rest = "no checkpoint is complete" if safe is None else f"the same command goes on from step {safe}, which is safe"
    return f"the checkpoint of step {state.step} cannot be written: {problem}; {rest}"


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's randomness is a function of (seed, step, rank), so a resumed run needs no generator state."""
    return (seed * 1_000_003 + step) * 65_537 + rank
