"""Is every byte of a packed data set what its manifest says, and an ordinary WebDataset besides?

    python -m data_pipeline.verify s3://bucket/prefix

Reads everything. Exit code 0 when all is well; 65 with a line per problem, and how to repair them, otherwise.
"""

import argparse
import hashlib
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data_pipeline.damaged_blocks import SAME_ANSWERS
from data_pipeline.image_shards import images_in
from data_pipeline.loader import Shards, open_shards
from data_pipeline.manifest import MANIFEST_NAME, Block, Manifest, Shard, open_store
from data_pipeline.pack import EXTRA_OPTIONS
from data_pipeline.packing.progress import PackingProgress
from data_pipeline.shard_format import KEY_DIGITS, decode_samples, encode_samples, end_of_shard
from data_pipeline.storage import EXIT_CORRUPT, EXIT_REFUSED, DataError, Store
from data_pipeline.terminal import guard_terminal
from data_pipeline.wording import counted

READ_DEADLINE_SECONDS = 60.0
STRANGE = "does not belong to the data set"


class Problem(NamedTuple):
    """Something that is wrong."""

    name: str
    """Of the file."""
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class Findings:
    """What is wrong with one shard, and the keys of its samples."""

    problems: list[Problem]
    images: int
    keys: np.ndarray
    """int64 [n]; empty for shards that others made, whose keys ``data_pipeline.index`` has compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.verify", description="Check a packed data set.")
    parser.add_argument("url", help="the folder of the shards, local or s3://bucket/prefix")
    options = parser.parse_args(arguments)
    guard_terminal()
    try:
        refuse_links(open_store(options.url, READ_DEADLINE_SECONDS))
        shards = open_shards(options.url, read_deadline_seconds=READ_DEADLINE_SECONDS)
        problems = verify(shards)
    except DataError as error:
        print(f"verify: {error}", file=sys.stderr)
        return error.exit_code
    manifest = shards.manifest
    if problems:
        for problem in problems:
            print(problem)
        print(f"{shards.url}: {counted(len(problems), 'problem')}. {repair(shards, problems)}")
        return EXIT_CORRUPT
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{shards.url}: all is well with {counted(manifest.count, 'image')} of {manifest.name} ({manifest.split}), "
        f"{counted(len(manifest.shards), 'shard')}, {megabytes:,.0f} MB, digest {shards.digest[:16]}"
    )
    return 0


def refuse_links(store: Store) -> None:
    """DataError if a file of a local data set, which may come from somebody else, is a link out of its folder."""
    if not store.is_local:
        return
    folder = os.path.realpath(store.local_path)
    for name in store.names():
        path = os.path.join(folder, name)
        if os.path.islink(path) and os.path.commonpath([folder, os.path.realpath(path)]) != folder:
            raise DataError(
                f"{store.url_of(name)} is a link that leads out of the folder, which is not followed here; "
                "put the file itself there",
                EXIT_REFUSED,
            )


def verify(shards: Shards) -> list[Problem]:
    """Everything that is wrong with the data set; empty when nothing is.

    Raises DataError when the storage does not answer.
    """
    manifest = shards.manifest
    problems: list[Problem] = []
    keys = []
    with PackingProgress("verifying", manifest.count) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for findings in pool.map(lambda number: check_shard(shards, number), range(len(manifest.shards))):
            problems += findings.problems
            keys.append(findings.keys)
            progress.counter.value += findings.images
    found = np.concatenate(keys)
    if not problems and len(np.unique(found)) != len(found):
        problems.append(Problem(MANIFEST_NAME, "some samples have the same key"))
    listed = {MANIFEST_NAME, *(shard.name for shard in manifest.shards)}
    problems += [Problem(name, STRANGE) for name in shards.store.names() if name not in listed]
    return problems


def repair(shards: Shards, problems: Sequence[Problem]) -> str:
    """What to do about the problems, as sentences and a command to copy."""
    manifest, found = shards.manifest, {problem.name for problem in problems}
    names = [shard.name for shard in manifest.shards if shard.name in found]
    advice = []
    if strange := [shards.store.url_of(problem.name) for problem in problems if problem.text == STRANGE]:
        advice.append(f"Remove {', '.join(strange)}.")
    if MANIFEST_NAME in found:
        advice.append("Pack everything again to another --dest.")
    if names and manifest.encoding == "files":
        advice.append(
            f"Get {', '.join(names)} once more from whoever made the shards. If they were changed on purpose, remove "
            f"{shards.store.url_of(MANIFEST_NAME)} and run python -m data_pipeline.index {shlex.quote(shards.url)}"
        )
    elif names:
        advice.append(f"To write the damaged shards again, with the same bytes:\n  {repair_command(shards, names)}")
    return " ".join(advice)


def repair_command(shards: Shards, names: Sequence[str]) -> str:
    """The packing command that writes some shards again; INPUT and LABELS stand for where the source lies."""
    source = shards.manifest.source
    options = source.get("packed_with", [])
    options = options if len(options) >= 2 else ["--source", "..."]
    needed = EXTRA_OPTIONS.get(options[1], {"input"}) - {"images"}
    places = [f"--{option} {option.upper()}" for option in sorted(needed)]
    skipped = ["--max-skipped", str(len(source["skipped"]))] if source.get("skipped") else []
    rest = shlex.join(["--dest", shards.url, *skipped, "--rewrite", *names])
    return " ".join(["python -m data_pipeline.pack", shlex.join(options), *places, rest])


def check_shard(shards: Shards, number: int) -> Findings:
    """Read one shard from end to end."""
    manifest, store = shards.manifest, replace(shards.store, same_answers=SAME_ANSWERS)
    shard = manifest.shards[number]
    blocks = [block for block in manifest.blocks if block.shard == number]
    problems: list[Problem] = []
    keys = []
    whole = hashlib.sha256()
    try:
        size = store.size(shard.name)
        if size != shard.bytes:
            problems.append(Problem(shard.name, f"has {size} bytes instead of {shard.bytes}"))
            return Findings(problems, shard.count, np.empty(0, np.int64))
        for block in blocks:
            data = bytearray(block.end - block.begin)
            try:
                store.read_block(shard.name, block.begin, memoryview(data), block.xxh3, threading.Event())
            except DataError as error:
                if error.exit_code != EXIT_CORRUPT:
                    raise
                problems.append(Problem(shard.name, str(error)))
                continue
            whole.update(data)
            for text in check_block(manifest, block, bytes(data)):
                problems.append(Problem(shard.name, f"bytes {block.begin}-{block.end} {text}"))
            if manifest.encoding == "npy":
                keys.append(keys_of(data, block))
        if not problems and (wrong := check_end(store, shard, whole, blocks[-1].end, manifest.encoding)):
            problems.append(Problem(shard.name, wrong))
    except DataError as error:
        # Storage that is away, or access that is denied, says nothing about the shards.
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        problems.append(Problem(shard.name, "is missing"))
    return Findings(problems, shard.count, np.concatenate(keys) if keys else np.empty(0, np.int64))


def check_end(store: Store, shard: Shard, before: "hashlib._Hash", end: int, encoding: str) -> str | None:
    """What is wrong after the blocks of a shard, whose SHA-256 is ``before``, or None. Wrong bytes are read again."""
    text = None
    for _attempt in range(SAME_ANSWERS):
        whole, tail = before.copy(), store.read(shard.name, end, shard.bytes)
        whole.update(tail)
        if encoding == "npy" and tail != end_of_shard(end):
            text = "does not end as a tar file does"
        elif whole.hexdigest() != shard.sha256:
            text = f"the SHA-256 is {whole.hexdigest()} instead of {shard.sha256}"
        else:
            return None
    return text


def check_block(manifest: Manifest, block: Block, data: bytes) -> Iterator[str]:
    """What is wrong with the bytes of a block, whose checksum is right."""
    size = manifest.image_size
    if manifest.encoding == "files":
        try:
            images_in(data, size, "the shard")
        except DataError as error:
            yield f"are not samples of images: {error}"
        return
    images, labels = decode_samples(data, size)
    if manifest.classes and not (labels < len(manifest.classes)).all():
        yield f"hold the label {labels.max()}, but there are {len(manifest.classes)} classes"
    # Writing the samples again must give these bytes: every tar and npy header is as webdataset makes it.
    if encode_samples(keys_of(data, block), labels, images.reshape(-1, size, size, 3)).tobytes() != data:
        yield "are not samples as webdataset writes them"


def keys_of(data: bytes | bytearray, block: Block) -> np.ndarray:
    """The number in the name of each sample, int64 [n]."""
    names = np.frombuffer(data, np.uint8).reshape(block.count, -1)[:, :KEY_DIGITS].astype(np.int64) - ord("0")
    return names @ (10 ** np.arange(KEY_DIGITS - 1, -1, -1, dtype=np.int64))


if __name__ == "__main__":
    sys.exit(main())
