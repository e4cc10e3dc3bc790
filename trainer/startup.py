"""May this job start? Do the data, the first weights, the run's folder and earlier attempts fit the config?

All of this is checked before a model is built and before any rank waits for another. What does not fit is refused in
one sentence.
"""

import errno
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.block_cache import BlockCache
from data_pipeline.loader import Shards, open_shards
from data_pipeline.order import usable_lanes
from data_pipeline.storage import Store
from data_pipeline.wording import counted
from trainer.checkpoint import STORE_DEADLINE_SECONDS, Checkpoint, checkpoints_url, folders_with_manifest, list_complete
from trainer.config import ModelConfig, RunConfig, as_yaml, config_from, model_config_from
from trainer.deepspeed_engine import accumulation_steps, check_offloading, deepspeed_config
from trainer.errors import CheckpointError, RunFolderFull, UnfitDisk, UnsafeFile, UsageError
from trainer.exported_model import load_first_weights, origin_tags
from trainer.faults.run_lock import RunLock
from trainer.gpus import missing_precision
from trainer.profiler import Window
from trainer.ranks import Ranks, occupied_master_port
from trainer.record.run_folder import RunFiles
from trainer.safe_files import check_room, refuse_links, remove_torn_files
from trainer.typed_values import differences, plain

OPENING_DEADLINE_SECONDS = 60.0
ROOM_BYTES = 1 << 20
"""What must fit into the run's folder at the start: its description, and some hours of points."""
WRITTEN_FOLDERS = ("samples", "repro", "skipped", "profile", "stacks", "evaluation")
"""Folders of a run that a job writes to. Links in them could lead out."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A job that may start, seen from one rank: what was asked for and what was found."""

    config: RunConfig
    ranks: Ranks
    train_shards: Shards
    validation_shards: Shards
    lock: RunLock | None
    """The lock of the run's folder; None on ranks other than 0."""
    profile: Window | None
    """The updates to write a trace of; None for no trace."""
    source: Path | None
    """Folder of exported weights that a new run begins from; None for new weights."""
    origin: dict[str, str]
    """What is recorded about those weights; empty for new weights."""


def open_data(config: RunConfig, ranks: Ranks) -> tuple[Shards, Shards]:
    """Open both data sets by their manifests and check them against model and job, before anything heavy starts.

    Raises DataError, ConfigError or UsageError.
    """
    if config.run.world_size not in (None, ranks.world_size):
        raise UsageError(
            f"this run wants {counted(config.run.world_size, 'rank')} (run.world_size) and was launched with "
            f"{ranks.world_size}; "
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
        # Indexed shards have numbers for names, up to the largest label; the last classes may have no validation image.
        fewer = shards is validation_shards and has_numbers(shards)
        if config.model.num_classes and not (
            len(shards.classes) == config.model.num_classes or fewer and len(shards.classes) < config.model.num_classes
        ):
            raise UsageError(
                f"{option}: {shards.url} has {counted(len(shards.classes), 'class', 'classes')}, "
                f"and model.num_classes is {config.model.num_classes}"
            )
    if config.model.num_classes:
        check_same_classes(*opened)
    if opened[0].count < config.train.global_batch_images:
        raise UsageError(
            f"data.train_url: {opened[0].url} holds {counted(opened[0].count, 'image')}, too few for a batch of "
            f"{config.train.global_batch_images} (train.global_batch_images)"
        )
    return opened


def check_same_classes(trained: Shards, validation: Shards) -> None:
    """UsageError where a label has another name in the validation set than in the training set."""
    if has_numbers(trained) or has_numbers(validation):
        return
    for label, (name, other) in enumerate(zip(trained.classes, validation.classes, strict=True)):
        if name != other:
            raise UsageError(
                f"data.validation_url: label {label} is {other!r} in {validation.url} and {name!r} in {trained.url}, "
                "the training set; pack both with the same classes, or set model.num_classes to 0"
            )


def has_numbers(shards: Shards) -> bool:
    """Whether nobody named the classes: names of indexed shards are their labels."""
    return shards.classes == tuple(map(str, range(len(shards.classes))))


def origin_of(config: RunConfig, source: Path | None) -> dict[str, str]:
    """What is recorded about the exported weights that a run begins from; empty for new weights.

    For a run that has a checkpoint this is what was recorded when it began: the export is not read again.

    Raises UsageError if the weights cannot be used, or if an earlier attempt without a checkpoint began from others.
    """
    recorded = RunFiles(Path(config.run.dir)).read_state().get("origin")
    if source is None and not recorded:
        return {}
    if list_complete(Store(checkpoints_url(config.run.dir, config), STORE_DEADLINE_SECONDS)):
        return recorded or {}
    origin = {} if source is None else origin_tags(source, load_first_weights(source, config))
    if recorded is not None and recorded.get("digest") != origin.get("digest"):
        began = f"from {recorded['folder']}" if recorded else "without --from"
        raise UsageError(
            f"run.dir: {config.run.dir} holds a run that began {began} and has no checkpoint yet; "
            "begin it the same way, choose another run.dir, or delete that folder"
        )
    return origin


def check_machine(config: RunConfig, ranks: Ranks) -> None:
    """Refuse a config that this machine cannot compute; raises ConfigError or UsageError."""
    check_offloading(config)
    if problem := missing_precision(config.train.precision, ranks.local_rank):
        raise UsageError(problem)


def prepare_run_folder(config: RunConfig, train_shards: Shards, ranks: Ranks) -> RunLock | None:
    """Make the run's folder, and refuse one that cannot be written, that is in use, or that holds another run.

    Returns the lock on rank 0. Between two attempts of a run everything may change but the model, the seed and the
    data. Raises UsageError, RunInUse, RunFolderFull, UnfitDisk.
    """
    if problem := occupied_master_port(ranks):
        raise UsageError(problem)
    folder = Path(config.run.dir)
    files = RunFiles(folder)
    identity = {"model": plain(config.model), "seed": config.run.seed, "data": train_shards.digest}
    lock = None
    try:
        for name in WRITTEN_FOLDERS:
            refuse_links(folder / name)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        changed = _changed(files.read_state().get("identity"), config, train_shards)
        if not changed and ranks.rank == 0:
            check_room(folder, ROOM_BYTES)
            lock = RunLock(files)
            files.write_state(identity=identity)
            for name in ("", *WRITTEN_FOLDERS):
                remove_torn_files(folder / name, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if changed:
        raise UsageError(
            f"run.dir: {folder} holds another run: {'; '.join(changed)}; choose another run.dir, or delete that folder"
        )
    if config.checkpoint.url and lock:
        store = Store(config.checkpoint.url, OPENING_DEADLINE_SECONDS)
        if store.is_local:
            try:
                Path(store.local_path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(Path(store.local_path), error, "checkpoint.url") from error
        elif missing := store.missing_part():
            raise UsageError(f"checkpoint.url: cannot write to {config.checkpoint.url}: {missing}")
    return lock


def cannot_write(folder: Path, error: OSError, option: str = "run.dir") -> Exception:
    """What is wrong with a run's folder, or that of its checkpoints, which gave this error while a job started."""
    if isinstance(error, UnsafeFile):
        return UsageError(f"{option}: {error}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFolderFull(f"{option}: no space is left in {folder}; free some, or choose another {option}")
    text = f"{option}: cannot write to {folder} ({error.strerror or error})"
    if error.errno in (errno.EIO, errno.ESTALE):
        return UnfitDisk(f"{text}; the same command goes on when the disk can be used")
    return UsageError(text)


def _changed(identity: dict[str, Any] | None, config: RunConfig, train_shards: Shards) -> list[str]:
    """How the run that a folder holds differs from this one, in phrases; `identity` may be of an older version."""
    if identity is None:
        return []
    return _differences(
        model_config_from(identity["model"], config.run.dir), identity["seed"], identity["data"], config, train_shards
    )


def _differences(model: ModelConfig, seed: int, data_digest: str, config: RunConfig, train_shards: Shards) -> list[str]:
    """How a run of this model, seed and data set differs from the run of the config, a phrase each."""
    found = [
        f"model.{path} {there} there, {here} here" for path, (there, here) in differences(model, config.model).items()
    ]
    if seed != config.run.seed:
        found.append(f"run.seed {seed} there, {config.run.seed} here")
    if data_digest != train_shards.digest:
        found.append("the training data set")
    return found


def check_fits(checkpoint: Checkpoint, config: RunConfig, train_shards: Shards, url: str) -> None:
    """Raise CheckpointError if a checkpoint is of another model, seed or data set, UsageError for another order."""
    theirs = config_from(checkpoint.config, f"{url}/{checkpoint.name}")
    different = _differences(theirs.model, theirs.run.seed, checkpoint.data_digest, config, train_shards)
    if theirs.optimizer.name != config.optimizer.name:
        different.append(f"optimizer.name {theirs.optimizer.name} there, {config.optimizer.name} here")
    if different:
        raise CheckpointError(
            f"{url} holds checkpoints of another run: {'; '.join(different)}; choose another checkpoint.url"
        )
    # An epoch is whole only in one order. Of a data set and a seed, the lanes in use decide it, and nothing else.
    counts = train_shards.manifest.block_counts
    lanes, before = (usable_lanes(c.data.lanes, sum(counts), max(counts)) for c in (config, theirs))
    if lanes != before and checkpoint.samples % sum(counts) and checkpoint.step < config.train.steps:
        raise UsageError(
            f"data.lanes is {config.data.lanes}, and {checkpoint.name} was written with {theirs.data.lanes} in the "
            "middle of an epoch: the order of the images would change, and some would be seen twice and others never; "
            f"add --set data.lanes={theirs.data.lanes}, or choose another run.dir"
        )


def why_not_anew(files: RunFiles, config: RunConfig) -> str | None:
    """A sentence if a run of which no checkpoint can be used has had one; None if it may begin at step 0.

    An attempt that was killed before its first checkpoint has nothing to go on from, and the run begins anew.
    """
    url = checkpoints_url(config.run.dir, config)
    state = files.read_state()
    damaged = folders_with_manifest(Store(url, STORE_DEADLINE_SECONDS))
    had_one = isinstance(state.get("checkpoint_step"), int)
    # What attempts of older versions left. They recorded no `checkpoint_step`.
    ended = state.get("state") in ("finished", "stopped") and bool(state.get("step"))
    trained = files.last_steps().get("train/bits_per_dim", 0)
    if not (damaged or had_one or ended or trained >= 2 * config.checkpoint.every_steps):
        return None
    found = f"only damaged ones ({', '.join(damaged)})" if damaged else "none"
    steps = f"has trained to step {trained}" if trained else "has trained"
    return (
        f"{files.folder} {steps}, and of its checkpoints there are {found} in {url}: nothing was deleted, and the run "
        "does not begin again at step 0 by itself. Put a copy of its checkpoints there, or correct checkpoint.url; to "
        "begin anew, choose another run.dir, or delete both"
    )


def count_start(files: RunFiles, config: RunConfig, step: int) -> str | None:
    """Record that this start begins at `step`; returns a sentence if several starts in a row got no further.

    Only starts with the same config count.
    """
    before = files.read_state()
    digest = hashlib.sha256(as_yaml(config).encode()).hexdigest()[:16]
    repeated = before.get("state") != "finished" and (before.get("start_step"), before.get("start_config")) == (
        step,
        digest,
    )
    count = before.get("starts_without_progress", 0) + 1 if repeated else 0
    changes: dict[str, Any] = {"start_step": step, "start_config": digest, "starts_without_progress": count}
    if step:  # an attempt may have been killed between a checkpoint and the note of it
        changes["checkpoint_step"] = step
    files.write_state(**changes)
    if count < config.limits.starts_without_progress:
        return None
    return (
        f"{counted(count, 'start')} in a row got no further than step {step} (limits.starts_without_progress); "
        f"the last one ended with: {before.get('reason', 'no reason recorded')}. "
        "Any change of the config allows another start"
    )


def print_check(config: RunConfig, ranks: Ranks) -> None:
    """Print what `--check` shows, on rank 0: the resolved config, the job's size and DeepSpeed's configuration."""
    if ranks.rank == 0:
        print(as_yaml(config))
        account = config.model.account()
        print(f"parameters: {account.parameters:,}")
        print(f"forward GFLOP per image: {account.flops.forward / 1e9:.2f}")
        print(f"deepspeed: {json.dumps(deepspeed_config(config, ranks.world_size))}")
