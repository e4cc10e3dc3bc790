"""In which steps does a source become a complete set of shards, whatever was done before and by whom?

Stage every group of images into scratch space, write the shards in one global random order, write the manifest.
Each step finds out what is there already, so an interrupted or shared packing goes on where it is.
"""

import getpass
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Block, Manifest, Shard, digest_of, open_store, write_manifest
from data_pipeline.order import permutation
from data_pipeline.packing.claim import (
    JOURNAL,
    Outline,
    ShardRecord,
    check_claim,
    claim,
    read_record,
    record_name,
    refuse_links,
)
from data_pipeline.packing.plan import Settings, damaged_shards, find_finished, plan_of, protocol_of
from data_pipeline.packing.progress import PackingProgress
from data_pipeline.packing.source import Source
from data_pipeline.packing.tasks import ShardTask, Staged, StageTask, read_staged
from data_pipeline.packing.workers import run_all
from data_pipeline.shard_format import BLOCK_IMAGES, SampleLayout
from data_pipeline.storage import (
    EXIT_CANNOT_WRITE,
    EXIT_CORRUPT,
    EXIT_REFUSED,
    TORN_FILE,
    DataError,
    Store,
)
from data_pipeline.wording import counted

EXIT_COME_AGAIN = 75
GROUPS_PER_WORKER = 4  # with fewer groups, starting another process takes longer than they do
SHARDS_PER_WORKER = 2
WRITE_DEADLINE_SECONDS = 600.0


@dataclass(frozen=True)
class Workforce:
    """Who packs, where the unfinished work lies, and how much may be left out; decides nothing about the bytes."""

    workers: int
    """Processes on this machine."""
    scratch: str | None
    """Folder for unfinished work; None for one that the same command finds again."""
    task_index: int
    """Which part of the work this command does ..."""
    task_count: int
    """... of how many, on machines that share the scratch folder."""
    max_skipped: int
    """How many images that cannot be decoded may be left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.task_index < self.task_count:
            raise ValueError(f"--task-index {self.task_index}: must be 0 to {self.task_count - 1} (--task-count - 1)")
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1")
        if self.max_skipped < 0:
            raise ValueError(f"--max-skipped {self.max_skipped}: must not be negative")

    def owns(self, number: int) -> bool:
        """Whether this command does the group or shard with this number."""
        return number % self.task_count == self.task_index


def pack(
    source: Source, settings: Settings, dest: str, workforce: Workforce, rewrite: Sequence[str] = ()
) -> tuple[Manifest, bool]:
    """Make ``dest`` a complete set of shards; returns its manifest, and False if it was complete already.

    In a finished set these shards are written again: those that are missing, those of a wrong size, and those named in
    ``rewrite``.
    Raises DataError when ``dest`` holds something else, an image cannot be read, storage fails, or the parts of
    other tasks are not there yet (exit code 75).
    """
    store = open_store(dest, WRITE_DEADLINE_SECONDS)
    plan = plan_of(source, settings)
    digest = digest_of(plan)
    refuse_links(store)
    finished = find_finished(store, digest)
    if rewrite and finished is None:
        raise DataError(f"--rewrite {rewrite[0]}: {store.url} holds no finished data set; pack without --rewrite")
    if finished is None:
        claim(store, plan)
        finished = find_finished(store, digest)  # another command may have finished meanwhile
    damaged = damaged_shards(store, finished, rewrite) if finished else []
    if finished is not None and not damaged:
        store.remove(JOURNAL)
        return finished, False
    try:
        return pack_missing(source, settings, store, workforce, digest, finished, damaged)
    except DataError:
        # Who finishes cleans up: it removes claim, records and scratch space, which this one may still be reading.
        if finished is None and (manifest := find_finished(store, digest)):
            return manifest, False
        raise


def pack_missing(
    source: Source,
    settings: Settings,
    store: Store,
    workforce: Workforce,
    digest: str,
    finished: Manifest | None,
    damaged: list[int],
) -> tuple[Manifest, bool]:
    """Write what is not there yet: everything, or the damaged shards of a finished set."""
    for number in damaged:
        store.remove(record_name(number))
    workspace = workspace_of(store, digest, workforce)
    prepare_scratch(workspace)
    staged = stage(source, settings, workspace, workforce)
    if finished is None:
        records = write_shards(settings, digest, staged, store, workspace, workforce, None)
        manifest = manifest_of_packed(source, settings, digest, staged, records)
        check_claim(store, digest)
        write_manifest(store, manifest)
    else:
        manifest = finished
        try:
            only = {number: finished.shards[number].sha256 for number in damaged}
            write_shards(settings, digest, staged, store, workspace, workforce, only)
        except DataError as error:
            if error.exit_code == EXIT_CORRUPT:  # the source has changed: its staged pixels must not be used again
                clean_up(store, workspace)
            raise
    clean_up(store, workspace)
    return manifest, True


def workspace_of(store: Store, digest: str, workforce: Workforce) -> Path:
    """The folder for the unfinished work of this data set. It holds nothing else, so that it can be removed as a whole.

    It lies beside the shards when they are local, otherwise where the same command finds it again.
    """
    if workforce.scratch:
        return Path(workforce.scratch) / f"pack-{digest[:16]}"
    if store.is_local:
        return Path(store.local_path) / JOURNAL / "scratch"
    if workforce.task_count > 1:
        raise DataError("tasks that share the work need a --scratch folder that all machines see")
    return Path(tempfile.gettempdir()) / f"pack-{_user()}-{digest[:16]}"


def _user() -> str:
    """A name that no other user of this machine has."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def prepare_scratch(workspace: Path) -> None:
    try:
        workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
        foreign = workspace.is_symlink() or workspace.stat().st_uid != os.getuid()
    except OSError as error:
        raise DataError(f"cannot make the scratch folder {workspace}: {error.strerror}", EXIT_CANNOT_WRITE) from error
    if foreign:
        raise DataError(
            f"the scratch folder {workspace} belongs to another user or is a link; give one with --scratch",
            EXIT_REFUSED,
        )


def stage(source: Source, settings: Settings, workspace: Path, workforce: Workforce) -> list[Staged]:
    """Decode and resize every group that is not there yet; returns the records of all groups in order."""
    records = [read_staged(str(workspace), number, settings.size) for number in range(len(source.groups))]
    missing = [number for number, record in enumerate(records) if record is None and workforce.owns(number)]
    protocol, may_skip = source.protocol or settings.protocol, workforce.max_skipped > 0
    tasks = [
        StageTask(str(workspace), number, source.groups[number], settings.size, protocol, may_skip)
        for number in missing
    ]
    there = sum(len(record.labels) for record in records if record)
    total = source.count - there if source.count and workforce.task_count == 1 else None
    workers = max(1, min(workforce.workers, len(tasks) // GROUPS_PER_WORKER))
    with PackingProgress("decoding and resizing", total) as progress:
        for index, record in run_all(tasks, workers, progress.counter):
            records[missing[index]] = record
            limit_skipped(records, workforce)
    for number, record in enumerate(records):  # others were at work meanwhile
        records[number] = record or read_staged(str(workspace), number, settings.size)
    limit_skipped(records, workforce)
    if unfinished := records.count(None):
        raise DataError(
            f"this task's share is decoded, {counted(unfinished, 'group')} of others not yet: run this again later",
            EXIT_COME_AGAIN,
        )
    return [record for record in records if record is not None]


def limit_skipped(records: list[Staged | None], workforce: Workforce) -> None:
    """DataError when more images were left out, by all tasks together, than may be."""
    skipped = [name for record in records if record for name in record.skipped]
    if len(skipped) > workforce.max_skipped:
        raise DataError(
            f"more images than --max-skipped {workforce.max_skipped} cannot be decoded, e.g. {skipped[0]}",
            EXIT_CORRUPT,
        )


def write_shards(
    settings: Settings,
    digest: str,
    staged: list[Staged],
    store: Store,
    workspace: Path,
    workforce: Workforce,
    only: dict[int, str] | None,
) -> list[ShardRecord]:
    """Write every shard that is not there yet; returns their records in order.

    ``only``: the numbers of the shards to write, with the SHA-256 that each must have; None writes all.
    """
    starts = np.concatenate([[0], np.cumsum([len(record.labels) for record in staged])])
    labels = np.concatenate([np.asarray(record.labels, np.int64) for record in staged])
    count = int(starts[-1])
    if count == 0:
        raise DataError("the source holds no images")
    order = permutation(count, settings.seed, 4)
    records: dict[int, ShardRecord] = {}
    tasks: list[ShardTask] = []
    bounds, stride = shard_bounds(count, settings.shard_images), SampleLayout(settings.size).stride
    shards = [
        Outline(number, f"{settings.split}-{number:06d}.tar", end - begin, stride, digest)
        for number, (begin, end) in enumerate(bounds)
    ]
    wanted = range(len(bounds)) if only is None else list(only)
    written = {f"{JOURNAL}/{name}" for name in store.names(JOURNAL)}
    for number in wanted:
        if record_name(number) in written and (record := read_record(store, shards[number])):
            records[number] = record
        elif workforce.owns(number):
            name = shards[number].name
            samples = order[slice(*bounds[number])]
            where = (str(workspace), store.url, store.deadline_seconds)
            sha256 = only[number] if only else None
            tasks.append(
                ShardTask(*where, number, name, settings.size, samples, labels[samples], starts, sha256, digest)
            )
    workers = max(1, min(workforce.workers, len(tasks) // SHARDS_PER_WORKER))
    with PackingProgress("writing shards", sum(len(task.samples) for task in tasks)) as progress:
        for index, record in run_all(tasks, workers, progress.counter):
            records[tasks[index].number] = record
    written = {f"{JOURNAL}/{name}" for name in store.names(JOURNAL)}
    for number in wanted:  # others were at work meanwhile
        missing = number not in records and record_name(number) in written
        if missing and (record := read_record(store, shards[number])):
            records[number] = record
    if unfinished := len(wanted) - len(records):
        raise DataError(
            f"this task's share is written, {counted(unfinished, 'shard')} of others not yet: run this again later",
            EXIT_COME_AGAIN,
        )
    return [records[number] for number in sorted(records)]


def shard_bounds(count: int, shard_images: int) -> list[tuple[int, int]]:
    """Where each shard begins and ends, in samples: at whole blocks, and so that all shards are about equally long."""
    blocks = -(-count // BLOCK_IMAGES)
    shards = -(-count // max(BLOCK_IMAGES, shard_images))
    edges = [min(count, BLOCK_IMAGES * (blocks * number // shards)) for number in range(shards + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def manifest_of_packed(
    source: Source, settings: Settings, digest: str, staged: list[Staged], records: list[ShardRecord]
) -> Manifest:
    """The manifest of a finished packing."""
    count = sum(record.count for record in records)
    pixels = count * settings.size**2
    sums = [sum(record.sums[channel] for record in staged) for channel in range(3)]
    squares = [sum(record.squares[channel] for record in staged) for channel in range(3)]
    # Exact integers up to here; n * sum(x^2) - sum(x)^2 does not cancel as floats would.
    variances = [(pixels * squares[c] - sums[c] ** 2) / pixels**2 for c in range(3)]
    protocol = protocol_of(source, settings)
    oddities: Counter[str] = Counter()
    for group in staged:
        oddities.update(group.notes)
    skipped = [name for group in staged for name in group.skipped]
    report = {"oddities": dict(sorted(oddities.items())), "skipped": skipped}
    options = [*source.options, "--split", settings.split, "--size", str(settings.size), "--seed", str(settings.seed)]
    options += ["--shard-images", str(settings.shard_images)]
    options += ["--protocol", settings.protocol] if source.protocol is None else []
    return Manifest(
        name=f"{source.form}-{settings.size}-{protocol['name']}",
        split=settings.split,
        count=count,
        image_size=settings.size,
        encoding="npy",
        protocol=protocol,
        source={"form": source.form, **source.origin, **report, "packed_with": options, "plan_sha256": digest},
        classes=source.classes,
        seed=settings.seed,
        pixel_mean=tuple(total / pixels for total in sums),
        pixel_std=tuple(variance**0.5 for variance in variances),
        shards=tuple(Shard(record.name, record.bytes, record.count, record.sha256) for record in records),
        blocks=tuple(
            Block(number, begin, end, samples, xxh3)
            for number, record in enumerate(records)
            for begin, end, samples, xxh3 in record.blocks
        ),
    )


def clean_up(store: Store, workspace: Path) -> None:
    """Remove what only unfinished packing needs, and the torn files of writers that were killed."""
    shutil.rmtree(workspace, ignore_errors=True)
    for name in store.names():
        if name == JOURNAL or TORN_FILE in name:
            store.remove(name)
