"""Is every byte of a packed data set what its manifest says, and an ordinary WebDataset besides?

    python -m data_pipeline.verify s3://bucket/prefix

Reads everything. Exit code 0 when all is well, 65 with a line per problem otherwise.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline.image_shards import images_in
from data_pipeline.loader import Shards, open_shards
from data_pipeline.manifest import MANIFEST_NAME, Block, Manifest
from data_pipeline.packing_progress import PackingProgress
from data_pipeline.shard_format import KEY_DIGITS, decode, encode, end_of_shard
from data_pipeline.storage import EXIT_CORRUPT, DataError

READ_DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Findings:
    """What is wrong with one shard, and the keys of its samples."""

    problems: list[str]
    images: int
    keys: np.ndarray
    """int64 [n]; empty for shards of others, whose keys indexing compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.verify", description="Check a packed data set.")
    parser.add_argument("url", help="the folder of the shards, local or s3://bucket/prefix")
    options = parser.parse_args(arguments)
    try:
        shards = open_shards(options.url, read_deadline_seconds=READ_DEADLINE_SECONDS)
        problems = verify(shards)
    except DataError as error:
        print(f"verify: {error}", file=sys.stderr)
        return error.exit_code
    for problem in problems:
        print(problem)
    manifest = shards.manifest
    if problems:
        print(
            f"{shards.url}: {len(problems)} problems; delete the shards named above and run the packing command again, "
            "it writes just those"
        )
        return EXIT_CORRUPT
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{shards.url}: all is well with {manifest.count:,} images of {manifest.name} ({manifest.split}), "
        f"{len(manifest.shards)} shards, {megabytes:,.0f} MB, digest {shards.digest[:16]}"
    )
    return 0


def verify(shards: Shards) -> list[str]:
    """Everything that is wrong with the data set, one line each; empty when nothing is."""
    manifest, problems = shards.manifest, []
    keys = []
    with PackingProgress("verifying", manifest.count) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for findings in pool.map(lambda number: check_shard(shards, number), range(len(manifest.shards))):
            problems += findings.problems
            keys.append(findings.keys)
            progress.counter.value += findings.images
    found = np.concatenate(keys)
    if not problems and len(np.unique(found)) != len(found):
        problems.append("some samples have the same key")
    listed = {MANIFEST_NAME, *(shard.name for shard in manifest.shards)}
    for name in shards.store.names():
        if name not in listed:
            problems.append(f"{name}: does not belong to the data set")
    return problems


def check_shard(shards: Shards, number: int) -> Findings:
    """Read one shard from end to end."""
    manifest, store = shards.manifest, shards.store
    shard = manifest.shards[number]
    blocks = [block for block in manifest.blocks if block.shard == number]
    problems: list[str] = []
    keys = []
    whole = hashlib.sha256()
    try:
        size = store.size(shard.name)
        if size != shard.bytes:
            problems.append(f"{shard.name}: has {size} bytes instead of {shard.bytes}")
            return Findings(problems, shard.count, np.empty(0, np.int64))
        for block in blocks:
            data = store.read(shard.name, block.begin, block.end)
            whole.update(data)
            problems += [
                f"{shard.name}: bytes {block.begin}-{block.end} {text}" for text in check_block(manifest, block, data)
            ]
            if manifest.encoding == "npy":
                keys.append(keys_of(data, block))
        tail = store.read(shard.name, blocks[-1].end, shard.bytes)
        whole.update(tail)
        if manifest.encoding == "npy" and tail != end_of_shard(blocks[-1].end):
            problems.append(f"{shard.name}: does not end as a tar file does")
        if whole.hexdigest() != shard.sha256:
            problems.append(f"{shard.name}: the SHA-256 is {whole.hexdigest()} instead of {shard.sha256}")
    except DataError as error:
        problems.append(f"{shard.name}: {error}")
    return Findings(problems, shard.count, np.concatenate(keys) if keys else np.empty(0, np.int64))


def check_block(manifest: Manifest, block: Block, data: bytes) -> Iterator[str]:
    """What is wrong with the bytes of a block."""
    if xxhash.xxh3_64_hexdigest(data) != block.xxh3:
        yield f"have the checksum {xxhash.xxh3_64_hexdigest(data)} instead of {block.xxh3}"
        return
    size = manifest.image_size
    if manifest.encoding == "files":
        try:
            images_in(data, size, "the shard")
        except DataError as error:
            yield f"are not samples of images: {error}"
        return
    images, labels = decode(data, size)
    if manifest.classes and not (labels < len(manifest.classes)).all():
        yield f"hold the label {labels.max()}, but there are {len(manifest.classes)} classes"
    # Writing the samples again must give these bytes: every tar and npy header is as webdataset makes it.
    if encode(keys_of(data, block), labels, images.reshape(-1, size, size, 3)).tobytes() != data:
        yield "are not samples as webdataset writes them"


def keys_of(data: bytes, block: Block) -> np.ndarray:
    """The number in the name of each sample, int64 [n]."""
    names = np.frombuffer(data, np.uint8).reshape(block.count, -1)[:, :KEY_DIGITS].astype(np.int64) - ord("0")
    return names @ (10 ** np.arange(KEY_DIGITS - 1, -1, -1, dtype=np.int64))


if __name__ == "__main__":
    sys.exit(main())
