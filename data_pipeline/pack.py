"""How do images become a shuffled, checksummed, reproducible set of WebDataset shards at a URL?

    python -m data_pipeline.pack --source photographs --dest data/train --size 32 --split train --images 12000
    python -m data_pipeline.pack --source folder --input /photos --dest s3://bucket/photos64 --size 64 --split train

Two phases, both parallel and both restartable: every group of images is decoded and resized into scratch space,
then the shards are written in one global random order. The manifest comes last. Interrupted at any point, the
same command goes on, and the result is the same to the last byte.
"""

import argparse
import getpass
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.manifest import (
    MANIFEST_NAME,
    Block,
    Manifest,
    Shard,
    digest_of,
    open_store,
    read_manifest,
    write_manifest,
)
from data_pipeline.order import permutation
from data_pipeline.pack_work import (
    BLOCK_IMAGES,
    JOURNAL,
    ShardRecord,
    ShardTask,
    Staged,
    StageTask,
    read_staged,
    record_name,
    run_all,
)
from data_pipeline.resize import PROTOCOLS, describe
from data_pipeline.sources import Source, folder, photographs
from data_pipeline.storage import EXIT_CANNOT_WRITE, EXIT_REFUSED, TORN_FILE, DataError, Store, read_json

SHARD_IMAGES = 8192
GROUPS_PER_WORKER = 16  # fewer are done sooner than another process starts
WRITE_DEADLINE_SECONDS = 600.0
PLAN_NAME = f"{JOURNAL}/plan.json"


@dataclass(frozen=True)
class Settings:
    """Everything besides the source that decides the bytes of the result."""

    split: str
    size: int
    protocol: str
    seed: int
    shard_images: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 1024:
            raise ValueError(f"--size {self.size}: the edge in pixels must be 1 to 1024")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"--protocol {self.protocol}: known are {', '.join(PROTOCOLS)}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")
        if self.shard_images < 1:
            raise ValueError(f"--shard-images {self.shard_images}: must be at least 1")
        if not self.split.isidentifier():
            raise ValueError(f"--split {self.split!r}: use a word like train or validation")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    try:
        settings = Settings(options.split, options.size, options.protocol, options.seed, options.shard_images)
        source = open_source(options)
        manifest, fresh = pack(source, settings, options.dest, options.workers, options.scratch)
    except DataError as error:
        print(f"pack: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npack: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{options.dest}: {'packed' if fresh else 'already packed with these settings,'} {manifest.count:,} images "
        f"of {manifest.name} ({manifest.split}), {len(manifest.shards)} shards, {megabytes:,.0f} MB"
    )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.pack", description="Pack images into shards.")
    parser.add_argument("--source", required=True, choices=["photographs", "folder"], help="what kind of input")
    parser.add_argument("--input", help="URL of the input: a folder or s3://bucket/prefix (not for photographs)")
    parser.add_argument("--dest", required=True, help="where the shards go: a folder or s3://bucket/prefix")
    parser.add_argument("--size", required=True, type=int, help="edge of the packed images in pixels")
    parser.add_argument("--split", required=True, help="train or validation")
    parser.add_argument("--images", type=int, help="photographs only: how many crops to take")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and of the shuffle (default 0)")
    parser.add_argument("--protocol", default="chrabaszcz", choices=sorted(PROTOCOLS), help="how images are resized")
    parser.add_argument("--shard-images", type=int, default=SHARD_IMAGES, help="images per shard, at most")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--scratch", help="local folder for unfinished work (default: at a local destination, or /tmp)")
    return parser.parse_args(arguments)


def open_source(options: argparse.Namespace) -> Source:
    """The source that the command line names."""
    if options.source == "photographs":
        if options.images is None or options.input is not None:
            raise DataError("--source photographs takes --images (how many crops) and no --input")
        return photographs(split=options.split, size=options.size, images=options.images, seed=options.seed)
    if options.input is None or options.images is not None:
        raise DataError(f"--source {options.source} takes --input (the URL of the images) and no --images")
    return folder(options.input)


def pack(
    source: Source, settings: Settings, dest: str, workers: int, scratch: str | None = None
) -> tuple[Manifest, bool]:
    """Make ``dest`` a complete set of shards; returns its manifest, and False if it was complete already.

    Raises DataError when ``dest`` holds something else, or an image cannot be read, or storage fails.
    """
    store = open_store(dest, WRITE_DEADLINE_SECONDS)
    plan = plan_of(source, settings)
    digest = digest_of(plan)
    finished = find_finished(store, digest)
    workspace = Path(scratch or default_scratch(store, digest))
    if finished is None:
        claim(store, plan)
        prepare_scratch(workspace)
        staged = stage(source, settings, workspace, workers)
        records = write_shards(settings, staged, store, workspace, workers)
        manifest = manifest_of(source, settings, digest, staged, records)
        write_manifest(store, manifest)
    clean_up(store, workspace)
    return finished or manifest, finished is None


def clean_up(store: Store, workspace: Path) -> None:
    """Remove what only unfinished packing needs, and the torn files of writers that were killed."""
    shutil.rmtree(workspace, ignore_errors=True)
    for name in store.names():
        if name == JOURNAL or TORN_FILE in name:
            store.remove(name)


def plan_of(source: Source, settings: Settings) -> dict[str, Any]:
    """What decides the bytes of the result, as JSON; its digest is the identity of the data set."""
    return {
        "source": {"form": source.form, **source.origin},
        "classes": list(source.classes),
        "split": settings.split,
        "size": settings.size,
        "protocol": describe(settings.protocol),
        "seed": settings.seed,
        "shard_images": settings.shard_images,
    }


def find_finished(store: Store, digest: str) -> Manifest | None:
    """The manifest at the destination if it was packed by the same plan; DataError if by another one."""
    if not store.exists(MANIFEST_NAME):
        return None
    manifest, _ = read_manifest(store)
    if manifest.source.get("plan_sha256") != digest:
        raise DataError(
            f"{store.url} already holds another data set: {manifest.count} images of {manifest.name}, split "
            f"{manifest.split}, seed {manifest.seed}; choose another --dest or remove it"
        )
    return manifest


def claim(store: Store, plan: dict[str, Any]) -> None:
    """Write the plan to the destination; DataError if another plan, or something else, is there."""
    if store.exists(PLAN_NAME):
        if digest_of(read_json(store, PLAN_NAME, 1 << 26)) != digest_of(plan):
            raise DataError(
                f"{store.url} holds the unfinished packing of another data set or of other settings; "
                "finish that one, choose another --dest, or remove it"
            )
        return
    others = [name for name in store.names() if name != JOURNAL]
    if others:
        raise DataError(f"{store.url} is not empty (it holds {others[0]}); choose another --dest or remove it")
    store.write(PLAN_NAME, json.dumps(plan, indent=1).encode())


def default_scratch(store: Store, digest: str) -> str:
    """Beside the shards when they are local; otherwise a folder that the same command finds again."""
    if store.is_local:
        return f"{store.local_path}/{JOURNAL}/scratch"
    return f"{tempfile.gettempdir()}/pack-{getpass.getuser()}-{digest[:16]}"


def prepare_scratch(workspace: Path) -> None:
    try:
        workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise DataError(f"cannot make the scratch folder {workspace}: {error.strerror}", EXIT_CANNOT_WRITE) from error
    if workspace.stat().st_uid != os.getuid():
        raise DataError(
            f"the scratch folder {workspace} belongs to another user; give one with --scratch", EXIT_REFUSED
        )


def stage(source: Source, settings: Settings, workspace: Path, workers: int) -> list[Staged]:
    """Decode and resize every group that is not there yet; returns the records of all groups in order."""
    records = [read_staged(str(workspace), number, settings.size) for number in range(len(source.groups))]
    missing = [number for number, record in enumerate(records) if record is None]
    tasks = [
        StageTask(str(workspace), number, source.groups[number], settings.size, settings.protocol) for number in missing
    ]
    total = source.count - sum(len(record.labels) for record in records if record) if source.count else None
    with Progress("decoding and resizing", total) as progress:
        for index, record in run_all(tasks, useful_workers(workers, len(tasks)), progress.counter):
            records[missing[index]] = record
    return [record for record in records if record is not None]


def useful_workers(workers: int, tasks: int) -> int:
    return max(1, min(workers, tasks // GROUPS_PER_WORKER))


def write_shards(
    settings: Settings, staged: list[Staged], store: Store, workspace: Path, workers: int
) -> list[ShardRecord]:
    """Write every shard that is not there yet; returns the records of all shards in order."""
    starts = np.concatenate([[0], np.cumsum([len(record.labels) for record in staged])])
    labels = np.concatenate([np.asarray(record.labels, np.int64) for record in staged])
    count = int(starts[-1])
    if count == 0:
        raise DataError("the source holds no images")
    order = permutation(count, settings.seed, 4)
    written = {f"{JOURNAL}/{name}" for name in store.names(JOURNAL)}
    records: dict[int, ShardRecord] = {}
    tasks: list[ShardTask] = []
    for number, (first, last) in enumerate(shard_bounds(count, settings.shard_images)):
        if record_name(number) in written:
            records[number] = ShardRecord(**read_json(store, record_name(number), 1 << 24))
            continue
        samples = order[first:last]
        name = f"{settings.split}-{number:06d}.tar"
        tasks.append(
            ShardTask(
                str(workspace),
                store.url,
                store.deadline_seconds,
                number,
                name,
                settings.size,
                samples,
                labels[samples],
                starts,
            )
        )
    with Progress("writing shards", sum(len(task.samples) for task in tasks)) as progress:
        for index, record in run_all(tasks, min(workers, len(tasks)) if len(tasks) >= 4 else 1, progress.counter):
            records[tasks[index].number] = record
    return [records[number] for number in sorted(records)]


def shard_bounds(count: int, shard_images: int) -> list[tuple[int, int]]:
    """First and last sample of each shard: whole blocks, dealt out so that shards are about equally long."""
    blocks = -(-count // BLOCK_IMAGES)
    shards = -(-count // max(BLOCK_IMAGES, shard_images))
    edges = [min(count, BLOCK_IMAGES * (blocks * number // shards)) for number in range(shards + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def manifest_of(
    source: Source, settings: Settings, digest: str, staged: list[Staged], records: list[ShardRecord]
) -> Manifest:
    """The manifest of a finished packing."""
    count = sum(record.count for record in records)
    pixels = count * settings.size**2
    sums = [sum(record.sums[channel] for record in staged) for channel in range(3)]
    squares = [sum(record.squares[channel] for record in staged) for channel in range(3)]
    # Exact integers up to here; n * sum(x^2) - sum(x)^2 does not cancel as floats would.
    variances = [(pixels * squares[c] - sums[c] ** 2) / pixels**2 for c in range(3)]
    return Manifest(
        name=f"{source.form}-{settings.size}-{settings.protocol}",
        split=settings.split,
        count=count,
        image_size=settings.size,
        protocol=describe(settings.protocol),
        source={"form": source.form, **source.origin, "plan_sha256": digest},
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


class Progress:
    """One live line on a terminal, a plain line every ten seconds elsewhere; on stderr."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = what, total
        self.counter = multiprocessing.get_context("forkserver").Value("q", 0)
        self.live = sys.stderr.isatty()
        self.done = threading.Event()
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Progress":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        if self.counter.value:
            self._show(end="\n")

    def _run(self) -> None:
        while not self.done.wait(0.2 if self.live else 10.0):
            self._show(end="" if self.live else "\n")

    def _show(self, end: str) -> None:
        images, seconds = self.counter.value, time.monotonic() - self.started
        rate = images / max(seconds, 1e-3)
        text = f"{self.what}: {images:,}" + (f" of {self.total:,}" if self.total else "") + f" images, {rate:,.0f}/s"
        if self.total and 0 < images < self.total:
            text += f", {(self.total - images) / rate:,.0f} s left"
        sys.stderr.write(f"\r{text:<78}{end}" if self.live else f"{text}{end}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
