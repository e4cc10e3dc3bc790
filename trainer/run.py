"""The main job: train the Image Transformer of a config, or go on where the same command stopped.

deepspeed --hostfile cluster/hosts trainer/run.py --config configs/imagenet64_big.yaml
deepspeed --num_accelerators 2 trainer/run.py --config configs/quickstart.yaml --set train.steps=1000
"""

import sys
from pathlib import Path

# The launcher runs this file by its path, which puts trainer/ first on the module search path; the repository's root
# belongs there, so that `models` and `data_pipeline` are found and no file of ours can shadow a library.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import os  # noqa: E402

# Read when torch is loaded: CPU threads that wait for each other sleep instead of spinning. On a machine that other
# processes use too, spinning made steps seven times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Warnings of torch's C++ code are stack traces of sockets that a lost rank has closed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Its profiler tells of each of its stages.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import torch  # noqa: E402
import torch.distributed  # noqa: E402

from data_pipeline.batch import Batch  # noqa: E402
from data_pipeline.damaged_blocks import DamagedBlocks  # noqa: E402
from data_pipeline.loader import evaluation_batches, train_batches  # noqa: E402
from models.image_transformer import ImageTransformer, flops_by_part  # noqa: E402
from trainer.checkpoint import Checkpoints, checkpoints_url  # noqa: E402
from trainer.command_line import report  # noqa: E402
from trainer.config import RunConfig, load_config  # noqa: E402
from trainer.deepspeed_engine import DeepSpeedEngine, check_offloading, deepspeed_config, init_distributed  # noqa: E402
from trainer.errors import (  # noqa: E402
    BUG,
    FINISHED,
    HANG,
    INTERRUPTED,
    STOPPED,
    LostRank,
    NoProgress,
    Superseded,
    UsageError,
    code_of,
    is_foreseen,
)
from trainer.exported_model import first_states, load_first_weights, origin_tags  # noqa: E402
from trainer.faults.preemption import StopRequest  # noqa: E402
from trainer.faults.watchdog import Verdict, Watchdog  # noqa: E402
from trainer.gpus import missing_precision  # noqa: E402
from trainer.loop import Interrupted, Job, TrainingState, train  # noqa: E402
from trainer.profiler import StepProfiler, parse_window  # noqa: E402
from trainer.progress import Progress  # noqa: E402
from trainer.ranks import Ranks, from_rank_0, meeting, ranks_from_environment  # noqa: E402
from trainer.record.redaction import guard_output  # noqa: E402
from trainer.record.run_folder import RunFiles  # noqa: E402
from trainer.record.tracker import open_tracker  # noqa: E402
from trainer.scoring import score  # noqa: E402
from trainer.startup import (  # noqa: E402
    Start,
    check_fits,
    count_start,
    open_data,
    origin_of,
    prepare_run_folder,
    print_check,
)
from trainer.training_samples import draw_grid  # noqa: E402

COLLECTIVE_TIMEOUT_SECONDS = 600.0
"""The last resort, behind the watchdog's shorter limits: a rank that does not join a collective for so long is lost."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: trainer/errors.py",
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one option; repeatable",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="EXPORT_DIR",
        help="begin a new run from exported weights (trainer.export); one with a checkpoint goes on from that",
    )
    parser.add_argument(
        "--profile", metavar="FIRST:COUNT", help="write a torch profiler trace of these updates, e.g. 20:3"
    )
    parser.add_argument("--check", action="store_true", help="print the resolved config and the job's size, then stop")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # added by the launcher; LOCAL_RANK says the same
    arguments = parser.parse_args()
    guard_output()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    ranks = ranks_from_environment()
    try:
        config = load_config(arguments.config, arguments.overrides)
        profile = parse_window(arguments.profile) if arguments.profile else None
        train_shards, validation_shards = open_data(config, ranks)
        origin = origin_of(config, arguments.source)
        if arguments.check:
            print_check(config, ranks)
            return FINISHED
        check_offloading(config)
        if problem := missing_precision(config.train.precision, ranks.local_rank):
            raise UsageError(problem)
        lock = prepare_run_folder(config, train_shards, ranks)
        start = Start(
            config=config,
            ranks=ranks,
            train_shards=train_shards,
            validation_shards=validation_shards,
            lock=lock,
            profile=profile,
            source=arguments.source,
            origin=origin,
        )
        return run(start)
    except KeyboardInterrupt:  # before training, which has its own way to stop: nothing to save yet
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        code = code_of(error)
        # One sentence a machine, not one a rank; the first one may be the one that is lost.
        if ranks.local_rank == 0 or code == BUG or (isinstance(error, LostRank) and ranks.local_rank == 1):
            report(error)
        return code


def run(start: Start) -> int:
    """Build the parts, train, close down; returns the exit code."""
    config, ranks = start.config, start.ranks
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    files = RunFiles(Path(config.run.dir))
    watchdog, device = join_ranks(start, files)
    attempt = from_rank_0(start.lock.attempt if start.lock else 0)
    tracker = None
    state = TrainingState()
    try:
        engine = build_engine(config, ranks, device)
        progress = Progress(enabled=ranks.rank == 0, total_steps=config.train.steps)
        url = checkpoints_url(config.run.dir, config)
        checkpoints = Checkpoints(url, ranks, device, config.checkpoint, attempt)
        newest = checkpoints.newest(progress.note)
        step = newest.step if newest else 0
        if problem := from_rank_0(count_start(files, config, step) if ranks.rank == 0 else None):
            raise NoProgress(problem)
        origin = start.origin
        if newest is None and start.source:
            origin = begin_from(start.source, engine, config)
        tracker = open_tracker(
            config,
            ranks,
            datasets={"training": start.train_shards, "validation": start.validation_shards},
            artifacts={"deepspeed.json": json.dumps(deepspeed_config(config, ranks.world_size), indent=1)},
            tags={f"origin.{key}": value for key, value in origin.items()},
        )
        if newest is None:
            progress.note(f"a new run: {url} holds no checkpoint")
            if start.lock:
                files.write_state(origin=origin)
            if origin:
                weights = f"{origin['weights']} weights of step {origin['step']} of {origin['run']}"
                text = f"begins from {start.source}: {weights}"
                progress.note(text)
                tracker.event(0, "origin", text, origin=origin)
        else:
            check_fits(newest, config, start.train_shards, url)
            checkpoints.load(engine, newest)
            state = TrainingState(newest.step, newest.updates, newest.samples)
            instead = f", not from {start.source}, as it began" if start.source else ""
            progress.note(f"going on from {newest.name}{instead}")
        minutes = config.limits.run_minutes
        stop = StopRequest(config.run.dir, None if minutes is None else 60 * minutes)

        def validate(images: int | None) -> dict[str, float]:
            engine.train(False)
            batches = evaluation_batches(
                start.validation_shards,
                rank=ranks.rank,
                world_size=ranks.world_size,
                batch_images=config.evaluate.batch_images,
                limit=images,
            )
            expected = min(images or start.validation_shards.count, start.validation_shards.count)
            scores = score(engine.forward, config.model, interruptible(batches, stop, watchdog), device, expected)
            engine.train(True)
            return scores

        def draw_samples(step: int) -> None:
            grid = draw_grid(engine, config, ranks, device, start.validation_shards, watchdog.alive)
            if grid is not None:
                tracker.log_image(step, "samples", grid)

        damaged_blocks = DamagedBlocks(config.data.max_damaged_blocks) if config.data.max_damaged_blocks else None
        profiler = step_profiler(start, files, device)
        job = Job(
            config=config,
            ranks=ranks,
            engine=engine,
            batches=training_batches(start, state.samples, damaged_blocks),
            damaged_blocks=damaged_blocks,
            images_per_epoch=start.train_shards.count,
            data_digest=start.train_shards.digest,
            evaluate=validate,
            draw_samples=draw_samples,
            checkpoints=checkpoints,
            files=files,
            tracker=tracker,
            progress=progress,
            stop=stop,
            superseded=start.lock.superseded if start.lock else lambda: False,
            watchdog=watchdog,
            profiler=profiler,
        )
        already_done = newest is not None and step >= config.train.steps and newest.bits_per_dim is not None
        finished = already_done or train(job, state)
    except Exception as error:
        error = explained(error, watchdog, ranks)
        if tracker is not None and not isinstance(error, Superseded):
            tracker.close("failed", code=code_of(error), reason=str(error), step=state.step)
        elif start.lock is not None and not isinstance(error, Superseded):
            files.write_state(state="failed", code=code_of(error), reason=str(error), ended=time.time())
        raise error
    watchdog.close()
    for path in profiler.files:
        tracker.log_file(path, "profile")
    if finished:
        tracker.close("finished", code=FINISHED, reason="all steps done", step=state.step)
        progress.note(f"finished: {config.run.dir}")
    else:
        stop.forget_stop_file()
        tracker.close("stopped", code=STOPPED, reason=stop.reason, step=state.step)
        progress.note(f"stopped at step {state.step} on request; the same command goes on from there")
    torch.distributed.destroy_process_group()
    return FINISHED if finished else STOPPED


def join_ranks(start: Start, files: RunFiles) -> tuple[Watchdog, torch.device]:
    """Meet the other ranks; returns what watches over all of them from now on, and this rank's device.

    Raises LostRank, naming those that did not come.
    """

    def record_hang(verdict: Verdict) -> None:
        files.write_state(state="failed", code=verdict.code, reason=verdict.reason, ended=time.time())

    ranks, limits = start.ranks, start.config.limits
    stacks = files.folder / "stacks" / f"rank-{ranks.rank:05d}-{int(time.time())}.txt"
    watchdog = Watchdog(limits, ranks, stacks, record_hang)
    # Half of the limit: the rest of the start needs time, too.
    with meeting(ranks, min(COLLECTIVE_TIMEOUT_SECONDS, limits.startup_seconds / 2)) as absent:
        if absent:
            watchdog.close()
            if start.lock:
                record_hang(Verdict(absent, HANG))
            raise LostRank(absent, HANG)
        device = init_distributed(COLLECTIVE_TIMEOUT_SECONDS, ranks.local_rank)
    watchdog.connect()
    return watchdog, device


def build_engine(config: RunConfig, ranks: Ranks, device: torch.device) -> DeepSpeedEngine:
    """The model with its first weights, the same on every rank, and its optimizer."""
    torch.manual_seed(config.run.seed)
    model = ImageTransformer(
        config.model,
        checkpoint_every_layers=config.train.activation_checkpoint_every_layers,
        checkpoint_keeps_attention=config.train.activation_checkpoint_keeps_attention,
    )
    return DeepSpeedEngine(model, config, ranks, device)


def begin_from(source: Path, engine: DeepSpeedEngine, config: RunConfig) -> dict[str, str]:
    """Give the engine exported weights in place of its first ones; returns what is recorded of them."""
    exported = load_first_weights(source, config)
    engine.load_state(first_states(exported, config), updates=0)
    return origin_tags(source, exported)


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
    """What writes the trace that was asked for, and counts operations in it."""
    config = start.config
    flops = flops_by_part(
        config.model,
        checkpoint_every_layers=config.train.activation_checkpoint_every_layers,
        checkpoint_keeps_attention=config.train.activation_checkpoint_keeps_attention,
    )
    return StepProfiler(
        start.profile,
        files.folder / "profile",
        rank=start.ranks.rank,
        device=device,
        flops=flops,
        images_per_update=config.train.global_batch_images / start.ranks.world_size,
    )


def interruptible(batches: Iterator[Batch], stop: StopRequest, watchdog: Watchdog) -> Iterator[Batch]:
    """The batches of an evaluation, of which every rank has the same number; raises Interrupted when all shall stop."""
    watchdog.phase("step")
    for batch in batches:
        if stop.agreed().stop:
            raise Interrupted
        watchdog.alive()
        yield batch


def explained(error: Exception, watchdog: Watchdog, ranks: Ranks) -> Exception:
    """The error, or the failure of another rank that caused it; tells the other ranks of an error of this one."""
    code = code_of(error)
    # A runtime error of nobody's is most likely a collective that another rank has left.
    collective = isinstance(error, RuntimeError) and not is_foreseen(error)
    if collective and ranks.world_size > 1 and (verdict := watchdog.verdict_of_the_others()):
        return LostRank(verdict.reason, verdict.code)
    watchdog.failed(str(error).splitlines()[0] if str(error) else type(error).__name__, code)
    watchdog.close()
    return error


if __name__ == "__main__":
    sys.exit(main())
