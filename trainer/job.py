"""How is a training job built, how does it go on from a checkpoint, and how does it end?"""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.distributed

from data_pipeline.batch import Batch
from data_pipeline.damaged_blocks import DamagedBlocks
from data_pipeline.loader import evaluation_batches, train_batches
from trainer.checkpoint import Checkpoints, LoadedCheckpoint, checkpoints_url
from trainer.command_line import is_out_of_memory
from trainer.config import RunConfig
from trainer.deepspeed_engine import DeepSpeedEngine, deepspeed_config, init_distributed
from trainer.errors import (
    FINISHED,
    HANG,
    INTERRUPTED,
    STOPPED,
    CheckpointError,
    LostRank,
    NoProgress,
    OutOfMemory,
    RecordIncomplete,
    StoppedEarly,
    Superseded,
    code_of,
    is_foreseen,
)
from trainer.exported_model import first_states, load_first_weights, origin_tags
from trainer.faults.preemption import StopRequest
from trainer.faults.watchdog import Verdict, Watchdog
from trainer.loop import Job, TrainingState, interruptible
from trainer.model_inputs import model_inputs
from trainer.profiler import StepProfiler
from trainer.progress import Progress
from trainer.ranks import COLLECTIVE_TIMEOUT, Ranks, from_rank, from_rank_0, meeting
from trainer.record.redaction import one_line
from trainer.record.run_folder import RunFiles
from trainer.record.tracker import NoTracker, Tracker, open_tracker
from trainer.safe_files import tried_twice, worded
from trainer.scoring import score
from trainer.startup import Start, cannot_write, check_fits, count_start, why_not_anew
from trainer.training_samples import draw_grid

log = logging.getLogger(__name__)

MEETING_SECONDS = 600.0
"""A rank that has not started after so long is missing."""


def share_cores(ranks: Ranks) -> None:
    """Without a GPU, give each rank of this machine its share of the cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))


def join_ranks(start: Start, files: RunFiles) -> tuple[Watchdog, torch.device]:
    """Meet the other ranks; returns the watchdog over all of them and this rank's device.

    Raises LostRank, naming those that did not come.
    """

    def record_hang(verdict: Verdict) -> None:
        state = ended_as(verdict.code)
        files.write_state(state=state, code=verdict.code, reason=verdict.reason, ended=time.time())

    ranks, limits = start.ranks, start.config.limits
    stacks = files.folder / "stacks" / f"rank-{ranks.rank:05d}-{int(time.time())}.txt"
    watchdog = Watchdog(limits, ranks, stacks, record_hang)
    # Half of the limit, because the rest of the start needs time as well.
    with meeting(ranks, min(MEETING_SECONDS, limits.startup_seconds / 2)) as absent:
        if absent:
            watchdog.close()
            if start.lock:
                record_hang(Verdict(absent, HANG))
            raise LostRank(absent, HANG)
        try:
            device = init_distributed(COLLECTIVE_TIMEOUT, ranks.local_rank)
            watchdog.connect()
        except torch.distributed.DistError as error:
            watchdog.close()
            raise LostRank(f"a rank was lost while the ranks met ({one_line(error)})", HANG) from error
    return watchdog, device


def build_engine(config: RunConfig, ranks: Ranks, device: torch.device) -> DeepSpeedEngine:
    """The model with its first weights, the same on every rank, and its optimizer."""
    torch.manual_seed(config.run.seed)
    return DeepSpeedEngine(config.model.build(config.train.recompute), config, ranks, device)


def open_checkpoints(start: Start, files: RunFiles, device: torch.device) -> Checkpoints:
    """The run's checkpoints, with this attempt's number in the names of new files; collective."""

    def remember(step: int) -> None:
        try:
            # After the last step nobody would write it again.
            tried_twice(lambda: files.write_state(checkpoint_step=step))
        except OSError as error:
            log.warning("%s: cannot be written (%s)", files.state, error)

    attempt = from_rank_0(start.lock.attempt if start.lock else 0)
    url = checkpoints_url(start.config.run.dir, start.config)
    return Checkpoints(url, start.ranks, device, start.config.checkpoint, attempt, remember)


def newest_checkpoint(
    start: Start, files: RunFiles, checkpoints: Checkpoints, progress: Progress
) -> LoadedCheckpoint | None:
    """The checkpoint to go on from, read; None for a new run. Collective.

    Raises NoProgress if several starts in a row got no further than that, CheckpointError if the run had a checkpoint
    and none can be used.
    """
    newest = checkpoints.newest(progress.note)
    if newest is None and (
        problem := from_rank_0(why_not_anew(files, start.config) if start.ranks.rank == 0 else None)
    ):
        raise CheckpointError(problem)
    step = newest.checkpoint.step if newest else 0
    if problem := from_rank_0(count_start(files, start.config, step) if start.ranks.rank == 0 else None):
        raise NoProgress(problem)
    return newest


def begin_from(source: Path, engine: DeepSpeedEngine, config: RunConfig) -> dict[str, str]:
    """Give the engine exported weights in place of its first ones; returns what is recorded about them."""
    exported = load_first_weights(source, config)
    engine.load_state(first_states(exported.state, config), updates=0)
    return origin_tags(source, exported)


def begin_from_images(start: Start, engine: DeepSpeedEngine) -> None:
    """Give the engine the first weights of a family where these depend on images; of others, nothing. Collective.

    Every rank computes them from the first images of the run, whose number does not depend on that of the ranks. Then
    all take rank 0's. Averages of the weights start from them, as PixelSNAIL's do in its authors' code; those of
    PixelCNN++ start from the weights before, which is forgotten after a few times 1 / (1 - ema_decay) updates.
    """
    config = start.config
    with torch.device("meta"):
        count = min(config.model.build().initial_images, start.train_shards.count)
    if not count:
        return
    torch.manual_seed(config.run.seed)
    model = config.model.build().to(engine.device).train()
    batches = train_batches(
        start.train_shards,
        seed=config.run.seed,
        lanes=config.data.lanes,
        consumed_samples=0,
        rank=0,
        world_size=1,
        global_batch_images=count,
        micro_batch_images=count,
        fetch_threads=config.data.fetch_threads,
        prefetch_batches=1,
        damaged=DamagedBlocks(config.data.max_damaged_blocks) if config.data.max_damaged_blocks else None,
    )
    torch.manual_seed(config.run.seed)  # of dropout
    model.initialise(*model_inputs(next(batches).to(engine.device), config.model))
    weights = {name: from_rank(0, parameter.detach()) for name, parameter in model.named_parameters()}
    engine.load_state(first_states(weights, config), updates=0)


def start_tracker(start: Start, origin: dict[str, str], step: int) -> Tracker | NoTracker:
    """Begin to record the run in its folder and in MLflow, from a step on.

    `origin` is what is recorded about its first weights. Raises RunFolderFull, UnfitDisk or UsageError if the folder
    cannot be written.
    """
    config, ranks = start.config, start.ranks
    try:
        return open_tracker(
            config,
            ranks,
            step=step,
            datasets={"training": start.train_shards, "validation": start.validation_shards},
            artifacts={"deepspeed.json": json.dumps(deepspeed_config(config, ranks.world_size), indent=1)},
            tags={f"origin.{key}": value for key, value in origin.items()},
        )
    except OSError as error:
        raise cannot_write(Path(config.run.dir), error) from error


def announce_new_run(
    start: Start, files: RunFiles, tracker: Tracker | NoTracker, progress: Progress, origin: dict[str, str]
) -> None:
    """Say and record that the run begins, and from which weights."""
    progress.note(f"a new run: {checkpoints_url(start.config.run.dir, start.config)} holds no checkpoint")
    if start.lock:
        files.write_state(origin=origin)
    if origin:
        weights = f"{origin['weights']} weights of step {origin['step']} of {origin['run']}"
        text = f"begins from {start.source}: {weights}"
        progress.note(text)
        tracker.event(0, "origin", text, origin=origin)


def resume(start: Start, loaded: LoadedCheckpoint, engine: DeepSpeedEngine, progress: Progress) -> TrainingState:
    """Put a checkpoint into the engine; returns how far the training was. Collective.

    Raises CheckpointError if it is of another run.
    """
    newest = loaded.checkpoint
    check_fits(newest, start.config, start.train_shards, checkpoints_url(start.config.run.dir, start.config))
    loaded.put_into(engine)
    instead = f", not from {start.source}, as it began" if start.source else ""
    progress.note(f"going on from {newest.name}{instead}")
    return TrainingState(newest.step, newest.updates, newest.samples)


def is_finished(newest: LoadedCheckpoint | None, config: RunConfig) -> bool:
    """Whether an earlier attempt has made all steps and scored the result, so that there is nothing left to do."""
    if newest is None:
        return False
    return newest.checkpoint.step >= config.train.steps and newest.checkpoint.bits_per_dim is not None


def build_job(
    start: Start,
    state: TrainingState,
    engine: DeepSpeedEngine,
    checkpoints: Checkpoints,
    files: RunFiles,
    tracker: Tracker | NoTracker,
    progress: Progress,
    watchdog: Watchdog,
) -> Job:
    """All that the training loop needs; from here on a signal stops the training and not the process. Collective."""
    config = start.config
    minutes = config.limits.run_minutes
    stop = StopRequest(config.run.dir, None if minutes is None else 60 * minutes)
    damaged_blocks = DamagedBlocks(config.data.max_damaged_blocks) if config.data.max_damaged_blocks else None
    return Job(
        config=config,
        ranks=start.ranks,
        engine=engine,
        batches=training_batches(start, state.samples, damaged_blocks),
        damaged_blocks=damaged_blocks,
        images_per_epoch=start.train_shards.count,
        data_digest=start.train_shards.digest,
        evaluate=lambda images: validate(start, engine, stop, watchdog, images),
        draw_samples=lambda step: draw_samples(start, engine, tracker, watchdog, step),
        checkpoints=checkpoints,
        files=files,
        tracker=tracker,
        progress=progress,
        stop=stop,
        superseded=start.lock.superseded if start.lock else lambda: False,
        watchdog=watchdog,
        profiler=step_profiler(start, files, engine.device),
    )


def training_batches(start: Start, consumed_samples: int, damaged: DamagedBlocks | None) -> Iterator[Batch]:
    """This rank's micro-batches, from the first image that the run has not consumed."""
    config = start.config
    return train_batches(
        start.train_shards,
        seed=config.run.seed,
        lanes=config.data.lanes,
        consumed_samples=consumed_samples,
        rank=start.ranks.rank,
        world_size=start.ranks.world_size,
        global_batch_images=config.train.global_batch_images,
        micro_batch_images=config.train.micro_batch_images,
        fetch_threads=config.data.fetch_threads,
        prefetch_batches=config.data.prefetch_batches,
        damaged=damaged,
    )


def step_profiler(start: Start, files: RunFiles, device: torch.device) -> StepProfiler:
    """The profiler that writes the trace asked for with `--profile`; without that it does nothing."""
    config = start.config
    return StepProfiler(
        start.profile,
        files.folder / "profile",
        rank=start.ranks.rank,
        device=device,
        flops=config.model.account(config.train.recompute).parts,
        images_per_update=config.train.global_batch_images / start.ranks.world_size,
    )


def validate(
    start: Start, engine: DeepSpeedEngine, stop: StopRequest, watchdog: Watchdog, images: int | None
) -> dict[str, float]:
    """Score this many validation images (None: all) with the engine's weights. Collective. Raises Interrupted."""
    config, ranks, count = start.config, start.ranks, start.validation_shards.count
    engine.train(False)
    batches = evaluation_batches(
        start.validation_shards,
        rank=ranks.rank,
        world_size=ranks.world_size,
        batch_images=config.evaluate.batch_images,
        limit=images,
    )
    watched = interruptible(batches, stop, watchdog)
    scores = score(engine.forward, config.model, watched, engine.device, min(images or count, count))
    engine.train(True)
    return scores


def draw_samples(
    start: Start, engine: DeepSpeedEngine, tracker: Tracker | NoTracker, watchdog: Watchdog, step: int
) -> None:
    """Draw a grid of images and record it at this step; collective."""
    grid = draw_grid(engine, start.config, start.ranks, engine.device, start.validation_shards, watchdog.alive)
    if grid is not None:
        tracker.log_image(step, "samples", grid)


def explained(error: Exception, watchdog: Watchdog, ranks: Ranks) -> Exception:
    """The error, or the failure of another rank that caused it. An error of this rank's own is told to the others."""
    if is_out_of_memory(error):
        error = OutOfMemory(
            f"the device's memory ran out ({one_line(error)}); a smaller train.micro_batch_images, "
            "train.activation_checkpoint_every_layers: 1 or a higher train.zero_stage needs less, and "
            "python -m trainer.plan says how much"
        )
    error = worded(error)
    code = code_of(error)
    # An unclassified RuntimeError usually means that a peer left a collective.
    collective = isinstance(error, RuntimeError) and not is_foreseen(error)
    if collective and ranks.world_size > 1 and (verdict := watchdog.verdict_of_the_others()):
        return LostRank(verdict.reason, verdict.code)
    watchdog.failed(str(error).splitlines()[0] if str(error) else type(error).__name__, code)
    watchdog.close()
    return error


def tell_of_stop(stop: StoppedEarly, watchdog: Watchdog) -> None:
    """Tell the other ranks that this one was asked to stop, so that they do not wait for it."""
    watchdog.failed(str(stop), stop.exit_code)
    watchdog.close()


def ended_as(code: int) -> Literal["stopped", "failed"]:
    """The state of a run that has ended with an exit code before it was finished."""
    return "stopped" if code in (STOPPED, INTERRUPTED) else "failed"


def record_failure(
    error: BaseException, start: Start, files: RunFiles, tracker: Tracker | NoTracker | None, state: TrainingState
) -> None:
    """Record why the attempt failed. If it was superseded, write nothing: the folder belongs to the newer attempt."""
    if isinstance(error, Superseded):
        return
    if tracker is not None:
        tracker.close(ended_as(code_of(error)), code=code_of(error), reason=str(error), step=state.step)
    elif start.lock is not None:
        try:
            code = code_of(error)
            files.write_state(state=ended_as(code), code=code, reason=str(error), ended=time.time())
        except OSError as other:  # the first error is the one to be told
            log.warning("%s: cannot be written (%s)", files.state, other)


def close_job(job: Job, state: TrainingState, *, finished: bool) -> int:
    """Record that the attempt finished or stopped on request, and leave the other ranks; returns the exit code.

    Raises RecordIncomplete on rank 0 if the run's folder lacks points or the end of a finished run.
    """
    job.watchdog.close()
    for path in job.profiler.files:
        job.tracker.log_file(path, "profile")
    if finished:
        lacking = job.tracker.close("finished", code=FINISHED, reason="all steps done", step=state.step)
        if not lacking:
            job.progress.note(f"finished: {job.config.run.dir}")
    else:
        lacking = None  # the same command goes on, and it has been warned of
        job.stop.forget_stop_file()
        reason = f"{job.stop.reason}; {state.unsaved}" if state.unsaved else job.stop.reason
        job.tracker.close("stopped", code=STOPPED, reason=reason, step=state.step)
        rest = state.unsaved or "the same command goes on from there"
        job.progress.note(f"stopped at step {state.step} on request; {rest}")
    torch.distributed.destroy_process_group()
    if lacking:
        raise RecordIncomplete(f"all steps are done and the weights are safe, but {lacking}")
    return FINISHED if finished else STOPPED
