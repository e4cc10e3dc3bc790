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

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402

import torch  # noqa: E402
import torch.distributed  # noqa: E402

from data_pipeline.block_cache import BlockCache  # noqa: E402
from data_pipeline.loader import Shards, evaluation_batches, open_shards, train_batches  # noqa: E402
from models.image_transformer import ImageTransformer, forward_flops, num_parameters  # noqa: E402
from trainer.checkpoint import Checkpoints  # noqa: E402
from trainer.config import RunConfig, as_yaml, load_config  # noqa: E402
from trainer.deepspeed_engine import DeepSpeedEngine, accumulation_steps, deepspeed_config, init_distributed  # noqa: E402
from trainer.evaluate import evaluate  # noqa: E402
from trainer.exit_codes import BUG, FINISHED, INTERRUPTED, STOPPED, UsageError, code_of, report  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.preemption import StopRequest  # noqa: E402
from trainer.progress import Progress  # noqa: E402
from trainer.ranks import Ranks, occupied_master_port, ranks_from_environment  # noqa: E402
from trainer.tracking import RunFiles, Tracker  # noqa: E402

COLLECTIVE_TIMEOUT_SECONDS = 600.0
"""A rank that does not answer for so long is lost. Longer than any evaluation, checkpoint or slow read."""


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
    parser.add_argument("--check", action="store_true", help="print the resolved config and the job's size, then stop")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # added by the launcher; LOCAL_RANK says the same
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    ranks = ranks_from_environment()
    try:
        config = load_config(arguments.config, arguments.overrides)
        train_shards, validation_shards = open_data(config, ranks)
        if arguments.check:
            print_check(config, ranks)
            return FINISHED
        prepare_run_folder(config, train_shards, ranks)
        return run(config, ranks, train_shards, validation_shards)
    except KeyboardInterrupt:  # before training, which has its own way to stop: nothing to save yet
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        code = code_of(error)
        if ranks.local_rank == 0 or code == BUG:  # one sentence a machine, not one a rank
            report(error, code)
        return code


def run(config: RunConfig, ranks: Ranks, train_shards: Shards, validation_shards: Shards) -> int:
    """Build the parts, train, close down; returns the exit code."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    device = init_distributed(COLLECTIVE_TIMEOUT_SECONDS, ranks.local_rank)
    torch.manual_seed(config.run.seed)  # the same first weights on every rank
    model = ImageTransformer(config.model, checkpoint_every_layers=config.train.activation_checkpoint_every_layers)
    engine = DeepSpeedEngine(model, config, ranks, device)
    progress = Progress(enabled=ranks.rank == 0, total_steps=config.train.steps)
    datasets = {"training": train_shards, "validation": validation_shards}
    tracker = Tracker(config, rank=ranks.rank, world_size=ranks.world_size, datasets=datasets)
    checkpoints = Checkpoints(f"{config.run.dir}/checkpoints", ranks, device, config.checkpoint.keep_last)

    step, samples = 0, 0
    if checkpoint := checkpoints.newest(progress.note):
        checkpoints.load(engine, checkpoint)
        step, samples = checkpoint.step, checkpoint.samples
        progress.note(f"going on from {checkpoint.name}")

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
        scores = evaluate(engine.forward, config.model, batches, device, expected)
        engine.train(True)
        return scores

    def save(step: int, samples: int) -> None:
        checkpoints.save(
            engine,
            step=step,
            samples=samples,
            config=dataclasses.asdict(config),
            data_digest=train_shards.digest,
        )

    stop = StopRequest()
    batches = train_batches(
        train_shards,
        seed=config.run.seed,
        lanes=config.data.lanes,
        consumed_samples=samples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        global_batch_images=config.train.global_batch_images,
        micro_batch_images=config.train.micro_batch_images,
        fetch_threads=config.data.fetch_threads,
        prefetch_batches=config.data.prefetch_batches,
    )
    try:
        step, finished = train(
            config,
            engine,
            batches,
            validate,
            save,
            tracker,
            progress,
            stop.agreed,
            rank=ranks.rank,
            step=step,
            samples=samples,
        )
    except Exception as error:
        tracker.close("failed", code=code_of(error), reason=str(error), step=step)
        raise
    if finished:
        tracker.close("finished", code=FINISHED, reason="all steps done", step=step)
        progress.note(f"finished: {config.run.dir}")
    else:
        tracker.close("stopped", code=STOPPED, reason="stop requested", step=step)
        progress.note(f"stopped at step {step} on request; the same command goes on from there")
    torch.distributed.destroy_process_group()
    return FINISHED if finished else STOPPED


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


def prepare_run_folder(config: RunConfig, train_shards: Shards, ranks: Ranks) -> None:
    """Make the run's folder, and refuse one that cannot be written or that holds another run.

    Raises UsageError. What may change between two attempts of a run is everything but the model, the seed and the data.
    """
    if problem := occupied_master_port(ranks):
        raise UsageError(problem)
    folder = Path(config.run.dir)
    identity = json.loads(
        json.dumps({"model": dataclasses.asdict(config.model), "seed": config.run.seed, "data": train_shards.digest})
    )
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        known = RunFiles(folder).read_state().get("identity", identity)
        if known == identity and ranks.rank == 0:
            RunFiles(folder).write_state(identity=identity)
    except OSError as error:
        raise UsageError(f"run.dir: cannot write to {folder} ({error.strerror})") from error
    if known != identity:
        changed = [key for key in identity if known[key] != identity[key]]
        raise UsageError(
            f"run.dir: {folder} holds a run with another {' and '.join(changed)}; "
            "choose another run.dir, or delete that folder"
        )


def print_check(config: RunConfig, ranks: Ranks) -> None:
    """What `--check` prints: the resolved config, the job's size and DeepSpeed's configuration, once."""
    if ranks.rank == 0:
        print(as_yaml(config))
        print(f"parameters: {num_parameters(config.model):,}")
        print(f"forward GFLOP per image: {forward_flops(config.model) / 1e9:.2f}")
        print(f"deepspeed: {json.dumps(deepspeed_config(config, ranks.world_size))}")


if __name__ == "__main__":
    sys.exit(main())
