"""How are shards that others made (an image and a .cls per sample, no manifest) made ready for training?

    python -m data_pipeline.index s3://bucket/prefix

Reads and decodes everything once, then writes a manifest beside the shards. They are streamed in the same order and
with the same checks as packed ones, but more slowly, because every image file is decoded each time it is used.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from data_pipeline.archives import READ_DEADLINE_SECONDS, open_range
from data_pipeline.decode import decode_image
from data_pipeline.image_shards import ImageSample, class_number_of, image_of, samples_in
from data_pipeline.manifest import (
    LARGEST_BLOCK_BYTES,
    MANIFEST_NAME,
    SHARD_NAME,
    Block,
    Manifest,
    Shard,
    check,
    open_store,
    read_manifest,
    write_manifest,
)
from data_pipeline.packing.input_files import is_of_programs, refuse_gaps, warn_of_gaps
from data_pipeline.packing.progress import PackingProgress
from data_pipeline.packing.tasks import Staged
from data_pipeline.packing.workers import count_progress, run_all, without_memory
from data_pipeline.shard_format import BLOCK_IMAGES
from data_pipeline.storage import EXIT_CORRUPT, EXIT_UNREACHABLE, DataError, Store
from data_pipeline.terminal import guard_terminal
from data_pipeline.wording import counted

MOST_CLASSES = 100_000  # each has a name in the manifest


@dataclass(frozen=True)
class IndexTask:
    """Read one shard from end to end."""

    store: Store
    name: str
    size: int

    def run(self) -> "IndexedShard":
        where = self.store.url_of(self.name)
        with open_range(where) as file:
            samples = list(samples_in(file, where))
        statistics = Staged([], [0, 0, 0], [0, 0, 0], {}, [])
        labelled, ignored, whole, blocks = 0, Counter[str](), hashlib.sha256(), []
        begin = 0
        for run in runs_of(samples):
            data = self.store.read(self.name, begin, run[-1].end)
            whole.update(data)
            blocks.append((begin, run[-1].end, len(run), xxhash.xxh3_64_hexdigest(data)))
            for sample in run:
                moved = moved_back(sample, begin)
                image = image_of(data, moved, self.size, where)
                statistics.add_statistics(image[None])
                statistics.labels.append(class_number_of(data, moved, where) if sample.label else -1)
                labelled += sample.label is not None
                ignored.update(sample.ignored)
            begin = run[-1].end
            count_progress(len(run))
        size = self.store.size(self.name)
        whole.update(self.store.read(self.name, begin, size))
        if 0 < labelled < len(samples):
            without = samples[statistics.labels.index(-1)].key
            raise DataError(f"{where}: sample {without!r} has no .cls, unlike others", EXIT_CORRUPT)
        return IndexedShard(Shard(self.name, size, len(samples), whole.hexdigest()), blocks, statistics, dict(ignored))


def runs_of(samples: Sequence[ImageSample]) -> Iterator[Sequence[ImageSample]]:
    """The samples of each block: as many as in a packed one, or fewer where these have too many bytes."""
    first = 0
    for number in range(1, len(samples) + 1):
        begin = samples[first - 1].end if first else 0
        full = number - first == BLOCK_IMAGES or number == len(samples)
        if full or samples[number].end - begin > LARGEST_BLOCK_BYTES:
            yield samples[first:number]
            first = number


@dataclass(frozen=True)
class IndexedShard:
    """What the manifest says about a shard."""

    shard: Shard
    blocks: list[tuple[int, int, int, str]]
    """begin, end, count and XXH3 of each."""
    statistics: Staged
    """Labels (-1 where there is none) and sums over the pixels."""
    ignored: dict[str, int]
    """How many members are neither image nor label, by extension."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.index", description="Index shards of image files.")
    parser.add_argument("url", help="the folder of the tar files, local or s3://bucket/prefix")
    parser.add_argument("--split", default="train", help="what the manifest calls them (default train)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    options = parser.parse_args(arguments)
    guard_terminal()
    try:
        manifest = index(open_store(options.url, READ_DEADLINE_SECONDS), options.split, options.workers)
    except DataError as error:
        print(f"index: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"index: {without_memory(error)}", file=sys.stderr)
        return EXIT_UNREACHABLE
    images, shards = counted(manifest.count, "image"), counted(len(manifest.shards), "shard")
    print(f"{options.url}: indexed {images} of {manifest.name}, {shards}")
    for extension, count in manifest.source.get("ignored_members", {}).items():
        print(f"  ignored .{extension}: {count:,}")
    return 0


def index(store: Store, split: str, workers: int) -> Manifest:
    """Write a manifest for the shards of a folder, unless there is one."""
    if store.exists(MANIFEST_NAME):
        return read_manifest(store)[0]
    if store.url.endswith(".tar"):
        raise DataError(f"{store.url} names a shard: give the folder of the shards")
    names = [name for name in store.names() if name.endswith(".tar") and not is_of_programs(name)]
    if not names:
        raise DataError(f"no tar files at {store.url}: {store.missing_part() or 'nothing there ends in .tar'}")
    if strange := [name for name in names if not SHARD_NAME.fullmatch(name)]:
        raise DataError(
            f"{store.url_of(strange[0])}: a manifest cannot name this shard; rename it, to letters, digits, and _ . - "
            "inside of the name"
        )
    refuse_gaps(names, store.url)
    warn_of_gaps(names, store.url)
    size = size_of_first(store, names)
    tasks = [IndexTask(store, name, size) for name in names]
    found: dict[int, IndexedShard] = {}
    with PackingProgress("indexing", None) as progress:
        for number, indexed in run_all(tasks, min(workers, len(tasks)), progress.counter):
            found[number] = indexed
    indexed_shards = [found[number] for number in range(len(names)) if found[number].shard.count]
    if not indexed_shards:
        raise DataError(f"the tar files at {store.url} hold no samples")
    manifest = manifest_of_indexed(store, split, size, indexed_shards)
    try:
        check(manifest)
    except ValueError as error:
        raise DataError(f"the shards at {store.url} cannot be streamed: {error}", EXIT_CORRUPT) from error
    write_manifest(store, manifest)
    return manifest


def size_of_first(store: Store, names: list[str]) -> int:
    """Edge in pixels of the first image that is found; all others must have the same."""
    for name in names:
        where = store.url_of(name)
        with open_range(where) as file:
            for sample in samples_in(file, where):
                file.seek(sample.image.offset)
                image, _ = decode_image(file.read(sample.image.size), f"{where}: {sample.image.name}")
                if image.width != image.height:
                    raise DataError(
                        f"{where}: {sample.image.name} is {image.width} x {image.height}; only square images of one "
                        "size are streamed, others have to be packed",
                        EXIT_CORRUPT,
                    )
                return image.width
    raise DataError(f"the tar files at {store.url} hold no samples")


def manifest_of_indexed(store: Store, split: str, size: int, shards: list[IndexedShard]) -> Manifest:
    """The manifest of indexed shards; classes are as many as the largest label needs."""
    labels = [label for shard in shards for label in shard.statistics.labels]
    if min(labels) < 0 <= max(labels):
        raise DataError(f"some shards at {store.url} have labels and others have none", EXIT_CORRUPT)
    if max(labels) >= MOST_CLASSES:
        raise DataError(f"{store.url} has the label {max(labels)}: more than {MOST_CLASSES:,} classes", EXIT_CORRUPT)
    pixels = len(labels) * size**2
    sums = [sum(shard.statistics.sums[channel] for shard in shards) for channel in range(3)]
    squares = [sum(shard.statistics.squares[channel] for shard in shards) for channel in range(3)]
    ignored: Counter[str] = Counter()
    for shard in shards:
        ignored.update(shard.ignored)
    return Manifest(
        name=f"{store.url.rpartition('/')[2]}-{size}",
        split=split,
        count=len(labels),
        image_size=size,
        encoding="files",
        protocol={"name": "unknown", "applied_by": "whoever made the shards"},
        source={"form": "webdataset", "ignored_members": dict(sorted(ignored.items()))},
        classes=tuple(str(label) for label in range(max(labels) + 1)),
        seed=0,
        pixel_mean=tuple(total / pixels for total in sums),
        pixel_std=tuple((pixels * squares[c] - sums[c] ** 2) ** 0.5 / pixels for c in range(3)),
        shards=tuple(shard.shard for shard in shards),
        blocks=tuple(Block(number, *block) for number, shard in enumerate(shards) for block in shard.blocks),
    )


def moved_back(sample: ImageSample, begin: int) -> ImageSample:
    """The sample with its offsets counted from ``begin``."""
    label = sample.label and sample.label._replace(offset=sample.label.offset - begin)
    image = sample.image._replace(offset=sample.image.offset - begin)
    return ImageSample(sample.key, image, label, sample.end - begin, sample.ignored)


if __name__ == "__main__":
    sys.exit(main())
