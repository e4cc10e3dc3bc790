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

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import torch  # noqa: E402
import torch.distributed  # noqa: E402

from data_pipeline.batch import Batch  # noqa: E402
from data_pipeline.block_cache import BlockCache  # noqa: E402
from data_pipeline.damaged_blocks import DamagedBlocks  # noqa: E402
from data_pipeline.loader import Shards, evaluation_batches, open_shards, train_batches  # noqa: E402
from data_pipeline.storage import Store  # noqa: E402
from models.image_transformer import ImageTransformer, model_flops, num_parameters  # noqa: E402
from trainer.checkpoint import Checkpoint, CheckpointError, Checkpoints, checkpoints_url  # noqa: E402
from trainer.config import RunConfig, as_yaml, load_config  # noqa: E402
from trainer.deepspeed_engine import DeepSpeedEngine, accumulation_steps, deepspeed_config, init_distributed  # noqa: E402
from trainer.evaluate import evaluate  # noqa: E402
from trainer.exit_codes import (  # noqa: E402
    BUG,
    FINISHED,
    INTERRUPTED,
    STOPPED,
    LostRank,
    NoProgress,
    Superseded,
    UsageError,
    code_of,
    report,
)
from trainer.loop import Interrupted, Job, TrainingState, train  # noqa: E402
from trainer.preemption import StopRequest  # noqa: E402
from trainer.profiler import StepProfiler, Window, parse_window  # noqa: E402
from trainer.progress import Progress  # noqa: E402
from trainer.ranks import Ranks, from_rank_0, occupied_master_port, ranks_from_environment  # noqa: E402
from trainer.redaction import guard_output  # noqa: E402
from trainer.run_lock import RunLock  # noqa: E402
from trainer.tracking import RunFiles, Tracker  # noqa: E402
from trainer.training_samples import draw_grid  # noqa: E402
from trainer.watchdog import Verdict, Watchdog  # noqa: E402

COLLECTIVE_TIMEOUT_SECONDS = 600.0
"""The last resort, behind the watchdog's shorter limits: a rank that does not join a collective for so long is lost."""
OPENING_DEADLINE_SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: trainer/exit_codes.py",
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
        if arguments.check:
            print_check(config, ranks)
            return FINISHED
        lock = prepare_run_folder(config, train_shards, ranks)
        return run(config, ranks, train_shards, validation_shards, lock, profile)
    except KeyboardInterrupt:  # before training, which has its own way to stop: nothing to save yet
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        code = code_of(error)
        # One sentence a machine, not one a rank; the first one may be the one that is lost.
        if ranks.local_rank == 0 or code == BUG or (isinstance(error, LostRank) and ranks.local_rank == 1):
            report(error, code)
        return code


def run(
    config: RunConfig,
    ranks: Ranks,
    train_shards: Shards,
    validation_shards: Shards,
    lock: RunLock | None,
    profile: Window | None,
) -> int:
    """Build the parts, train, close down; returns the exit code."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    files = RunFiles(Path(config.run.dir))

    def record_hang(verdict: Verdict) -> None:
        files.write_state(state="failed", code=verdict.code, reason=verdict.reason, ended=time.time())

    attempt = lock.attempt if lock else 0
    stacks = files.folder / "stacks" / f"rank-{ranks.rank:05d}-{int(time.time())}.txt"
    watchdog = Watchdog(config.limits, ranks, stacks, record_hang)
    device = init_distributed(COLLECTIVE_TIMEOUT_SECONDS, ranks.local_rank)
    watchdog.connect()
    attempt = from_rank_0(attempt)
    tracker = None
    state = TrainingState()
    try:
        torch.manual_seed(config.run.seed)  # the same first weights on every rank
        model = ImageTransformer(
            config.model,
            checkpoint_every_layers=config.train.activation_checkpoint_every_layers,
            checkpoint_keeps_attention=config.train.activation_checkpoint_keeps_attention,
        )
        engine = DeepSpeedEngine(model, config, ranks, device)
        progress = Progress(enabled=ranks.rank == 0, total_steps=config.train.steps)
        url = checkpoints_url(config.run.dir, config)
        checkpoints = Checkpoints(url, ranks, device, config.checkpoint, attempt)
        newest = checkpoints.newest(progress.note)
        step = newest.step if newest else 0
        if problem := from_rank_0(count_start(files, config, step) if ranks.rank == 0 else None):
            raise NoProgress(problem)
        datasets = {"training": train_shards, "validation": validation_shards}
        texts = {"deepspeed.json": json.dumps(deepspeed_config(config, ranks.world_size), indent=1)}
        tracker = Tracker(config, rank=ranks.rank, world_size=ranks.world_size, datasets=datasets, artifacts=texts)
        if newest is None:
            progress.note(f"a new run: {url} holds no checkpoint")
        else:
            check_fits(newest, config, train_shards, url)
            checkpoints.load(engine, newest)
            state = TrainingState(newest.step, newest.updates, newest.samples)
            progress.note(f"going on from {newest.name}")
        minutes = config.limits.run_minutes
        stop = StopRequest(config.run.dir, None if minutes is None else 60 * minutes)

        def validate(images: int | None) -> dict[str, float]:
            engine.train(False)
            batches = evaluation_batches(
                validation_shards,
                rank=ranks.rank,
                world_size=ranks.world_size,
                batch_images=config.evaluate.batch_images,
                limit=images,
            )
            expected = min(images or validation_shards.count, validation_shards.count)
            scores = evaluate(engine.forward, config.model, interruptible(batches, stop, watchdog), device, expected)
            engine.train(True)
            return scores

        def draw_samples(step: int) -> None:
            grid = draw_grid(engine, config, ranks, device, validation_shards, watchdog.alive)
            if grid is not None:
                tracker.log_image(step, "samples", grid)

        allowed = config.data.max_damaged_blocks
        damaged_blocks = DamagedBlocks(allowed) if allowed else None
        batches = train_batches(
            train_shards,
            seed=config.run.seed,
            lanes=config.data.lanes,
            consumed_samples=state.samples,
            rank=ranks.rank,
            world_size=ranks.world_size,
            global_batch_images=config.train.global_batch_images,
            micro_batch_images=config.train.micro_batch_images,
            fetch_threads=config.data.fetch_threads,
            prefetch_batches=config.data.prefetch_batches,
            damaged=damaged_blocks,
        )
        profiler = StepProfiler(profile, files.folder / "profile", rank=ranks.rank, device=device)
        job = Job(
            config=config,
            ranks=ranks,
            engine=engine,
            batches=batches,
            damaged_blocks=damaged_blocks,
            images_per_epoch=train_shards.count,
            data_digest=train_shards.digest,
            evaluate=validate,
            draw_samples=draw_samples,
            checkpoints=checkpoints,
            files=files,
            tracker=tracker,
            progress=progress,
            stop=stop,
            superseded=lock.superseded if lock else lambda: False,
            watchdog=watchdog,
            profiler=profiler,
        )
        already_done = newest is not None and step >= config.train.steps and newest.bits_per_dim is not None
        finished = already_done or train(job, state)
    except Exception as error:
        error = explained(error, watchdog, ranks)
        if tracker is not None and not isinstance(error, Superseded):
            tracker.close("failed", code=code_of(error), reason=str(error), step=state.step)
        elif lock is not None and not isinstance(error, Superseded):
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
    collective = code == BUG and isinstance(error, RuntimeError) and not isinstance(error, NoProgress)
    if collective and ranks.world_size > 1 and (verdict := watchdog.verdict_of_the_others()):
        return LostRank(verdict.reason, verdict.code)
    watchdog.failed(str(error).splitlines()[0] if str(error) else type(error).__name__, code)
    watchdog.close()
    return error


def count_start(files: RunFiles, config: RunConfig, step: int) -> str | None:
    """Remember that this start begins at `step`; a sentence if several in a row with this config got no further."""
    before = files.read_state()
    digest = hashlib.sha256(as_yaml(config).encode()).hexdigest()[:16]
    repeated = before.get("state") != "finished" and (before.get("start_step"), before.get("start_config")) == (
        step,
        digest,
    )
    count = before.get("starts_without_progress", 0) + 1 if repeated else 0
    files.write_state(start_step=step, start_config=digest, starts_without_progress=count)
    if count < config.limits.starts_without_progress:
        return None
    return (
        f"{count} starts in a row got no further than step {step} (limits.starts_without_progress); the last one ended "
        f"with: {before.get('reason', 'no reason recorded')}. Any change of the config allows another start"
    )


def check_fits(checkpoint: Checkpoint, config: RunConfig, train_shards: Shards, url: str) -> None:
    """Raise CheckpointError if a checkpoint is of another model, seed or data set."""
    model = json.loads(json.dumps(dataclasses.asdict(config.model)))
    theirs = checkpoint.config["model"]
    different = [
        f"model.{name} {theirs.get(name)} there, {value} here"
        for name, value in model.items()
        if theirs.get(name) != value
    ]
    if checkpoint.config["run"]["seed"] != config.run.seed:
        different.append(f"run.seed {checkpoint.config['run']['seed']} there, {config.run.seed} here")
    if checkpoint.data_digest != train_shards.digest:
        different.append("the training data set")
    if different:
        raise CheckpointError(
            f"{url} holds checkpoints of another run: {'; '.join(different)}; choose another checkpoint.url"
        )


def open_data(config: RunConfig, ranks: Ranks) -> tuple[Shards, Shards]:
    """Open both data sets by their manifests and check them against model and job, before anything heavy starts.

    Raises DataError, ConfigError or UsageError.
    """
    if config.run.world_size not in (None, ranks.world_size):
        raise UsageError(
            f"this run wants {config.run.world_size} ranks (run.world_size) and was launched with {ranks.world_size}; "
            f"check the hostfile's path and slots, or add --set run.world_size={ranks.world_size}"
        )
    accumulation_steps(config, ranks.world_size)
    deadline = config.data.read_deadline_seconds
    cache = BlockCache(config.data.cache_dir, int(config.data.cache_gib * 2**30)) if config.data.cache_dir else None
    train_shards = open_shards(config.data.train_url, read_deadline_seconds=deadline, cache=cache)
    validation_shards = open_shards(config.data.validation_url, read_deadline_seconds=deadline, cache=cache)
    opened = train_shards, validation_shards
    for option, shards in zip(("data.train_url", "data.validation_url"), opened, strict=True):
        if shards.image_size != config.model.image_size:
            raise UsageError(
                f"{option}: {shards.url} holds images of {shards.image_size}x{shards.image_size}, "
                f"and model.image_size is {config.model.image_size}"
            )
        if config.model.num_classes and not shards.classes:
            raise UsageError(
                f"{option}: {shards.url} holds images without labels, and model.num_classes is "
                f"{config.model.num_classes}; set it to 0, or train on labelled images"
            )
        if config.model.num_classes and len(shards.classes) != config.model.num_classes:
            raise UsageError(
                f"{option}: {shards.url} has {len(shards.classes)} classes, "
                f"and model.num_classes is {config.model.num_classes}"
            )
    if opened[0].count < config.train.global_batch_images:
        raise UsageError(
            f"data.train_url: {opened[0].url} holds {opened[0].count} images, too few for "
            f"{ranks.world_size} ranks that take {config.train.global_batch_images} images a step "
            "(train.global_batch_images)"
        )
    return opened


def prepare_run_folder(config: RunConfig, train_shards: Shards, ranks: Ranks) -> RunLock | None:
    """Make the run's folder, and refuse one that cannot be written, that is in use, or that holds another run.

    Returns the lock on rank 0. What may change between two attempts of a run is everything but the model, the seed and
    the data. Raises UsageError, RunInUse.
    """
    if problem := occupied_master_port(ranks):
        raise UsageError(problem)
    folder = Path(config.run.dir)
    files = RunFiles(folder)
    identity = json.loads(
        json.dumps({"model": dataclasses.asdict(config.model), "seed": config.run.seed, "data": train_shards.digest})
    )
    lock = None
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        known = files.read_state().get("identity", identity)
        if known == identity and ranks.rank == 0:
            lock = RunLock(files)
            files.write_state(identity=identity)
    except OSError as error:
        raise UsageError(f"run.dir: cannot write to {folder} ({error.strerror})") from error
    if known != identity:
        changed = [key for key in identity if known[key] != identity[key]]
        raise UsageError(
            f"run.dir: {folder} holds a run with another {' and '.join(changed)}; "
            "choose another run.dir, or delete that folder"
        )
    if config.checkpoint.url and lock:
        store = Store(config.checkpoint.url, OPENING_DEADLINE_SECONDS)
        if store.is_local:
            Path(store.local_path).mkdir(parents=True, exist_ok=True)
        elif missing := store.missing_part():
            raise UsageError(f"checkpoint.url: cannot write to {config.checkpoint.url}: {missing}")
    return lock


def print_check(config: RunConfig, ranks: Ranks) -> None:
    """What `--check` prints: the resolved config, the job's size and DeepSpeed's configuration, once."""
    if ranks.rank == 0:
        print(as_yaml(config))
        print(f"parameters: {num_parameters(config.model):,}")
        print(f"forward GFLOP per image: {model_flops(config.model).forward / 1e9:.2f}")
        print(f"deepspeed: {json.dumps(deepspeed_config(config, ranks.world_size))}")


if __name__ == "__main__":
    sys.exit(main())
