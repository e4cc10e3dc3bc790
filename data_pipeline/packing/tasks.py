"""What does one packing process do: decode a group of images into scratch space, then write a shard from it?

Both steps depend only on their arguments and leave a small record when they are done. So any process on any machine can
do any of them, for the first time or again, and the bytes are the same.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.decode import decode_image
from data_pipeline.packing.claim import ShardRecord, check_claim, write_record
from data_pipeline.packing.resize import to_pixels
from data_pipeline.packing.source import Group, Item
from data_pipeline.packing.workers import count_progress
from data_pipeline.shard_format import BLOCK_IMAGES, SampleLayout, encode_samples, end_of_shard
from data_pipeline.storage import EXIT_CANNOT_WRITE, EXIT_CORRUPT, EXIT_UNREACHABLE, DataError, Store, atomic_file
from data_pipeline.typed_records import Count, Label, Sum, parse_record

log = logging.getLogger(__name__)

CHUNK_IMAGES = 64
LARGEST_STAGED_BYTES = 1 << 28  # of the record of a group


@dataclass(frozen=True)
class StageTask:
    """Decode and resize one group into scratch space."""

    scratch: str
    number: int
    group: Group
    size: int
    protocol: str
    may_skip: bool
    """Whether an image that cannot be decoded is left out and listed, instead of ending the packing."""

    def run(self) -> "Staged":
        staged = Staged([], [0, 0, 0], [0, 0, 0], {}, [])
        path = staged_path(self.scratch, self.number)
        try:
            with atomic_file(f"{path}.raw") as file:
                for images in self._chunks(staged):
                    file.write(images.data)
                    staged.add_statistics(images)
                    count_progress(len(images))
            # The record comes second: where it is, the pixels are complete.
            with atomic_file(f"{path}.json") as file:
                file.write(json.dumps(asdict(staged)).encode())
        except OSError as error:
            raise DataError(f"cannot write to the scratch folder {self.scratch}: {error}", EXIT_CANNOT_WRITE) from error
        return staged

    def _chunks(self, staged: "Staged") -> Iterator[np.ndarray]:
        """uint8 [up to 64, S, S, 3] at a time; labels and notes are added to the record."""
        chunk = np.empty((CHUNK_IMAGES, self.size, self.size, 3), np.uint8)
        filled = 0
        for item in self.group.read():
            try:
                chunk[filled], notes = pixels_of(item, self.protocol, self.size)
            except DataError:
                if not self.may_skip:
                    raise
                staged.skipped.append(item.name)
                continue
            staged.labels.append(item.label)
            for note in notes:
                staged.notes[note] = staged.notes.get(note, 0) + 1
            filled += 1
            if filled == CHUNK_IMAGES:
                yield chunk
                filled = 0
        yield chunk[:filled]


@dataclass(frozen=True)
class Staged:
    """The record of a staged group; sums are over all pixels, per channel, and exact."""

    labels: list[Label]
    sums: list[Sum]
    squares: list[Sum]
    notes: dict[str, Count]
    """How many files had each oddity."""
    skipped: list[str]
    """Names of the images that were left out."""

    def check(self, size: int) -> None:
        """ValueError unless the sums can be those of images of this size."""
        pixels = len(self.labels) * size**2
        if not len(self.sums) == len(self.squares) == 3:
            raise ValueError("it has not three channels")
        for total, squares in zip(self.sums, self.squares, strict=True):
            if not (total <= 255 * pixels and total**2 <= pixels * squares and squares <= 255 * total):
                raise ValueError("its sums are none of pixels")

    def add_statistics(self, images: np.ndarray) -> None:
        levels = np.arange(256, dtype=np.int64)
        for channel in range(3):
            histogram = np.bincount(images[..., channel].ravel(), minlength=256)
            self.sums[channel] += int(histogram @ levels)
            self.squares[channel] += int(histogram @ levels**2)


def pixels_of(item: Item, protocol: str, size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """uint8 [size, size, 3] of an item, and what was odd about its file."""
    image, notes = decode_image(item.image, item.name) if isinstance(item.image, bytes) else (item.image, ())
    try:
        return to_pixels(image, protocol, size), notes
    except ValueError as error:
        raise DataError(f"{item.name} does not fit: {error}", EXIT_CORRUPT) from error


@dataclass(frozen=True)
class ShardTask:
    """Write one shard from staged groups."""

    scratch: str
    dest: str
    deadline_seconds: float
    number: int
    name: str
    size: int
    samples: np.ndarray
    """int64 [n]: which samples, by their number in the source, in the order of the shard."""
    labels: np.ndarray
    """int64 [n]"""
    group_starts: np.ndarray
    """int64: number of the first sample of every group, and the total."""
    sha256: str | None
    """The checksum that the shard must have when it is written again for a manifest that exists; otherwise None."""
    plan: str
    """Digest of the plan that decides the bytes."""

    def run(self) -> ShardRecord:
        stride = SampleLayout(self.size).stride
        count = len(self.samples)
        tail = end_of_shard(count * stride)
        data = bytearray(count * stride + len(tail))
        view = np.frombuffer(data, np.uint8)[: count * stride].reshape(count, stride)
        blocks: list[tuple[int, int, int, str]] = []
        images = self._images()
        for first in range(0, count, BLOCK_IMAGES):
            rows = slice(first, min(first + BLOCK_IMAGES, count))
            encode_samples(self.samples[rows], self.labels[rows], images[rows], out=view[rows])
            begin, end = rows.start * stride, rows.stop * stride
            blocks.append((begin, end, rows.stop - first, xxhash.xxh3_64_hexdigest(view[rows].data)))
            count_progress(rows.stop - first)
        del view
        store, sha256 = Store(self.dest, self.deadline_seconds), hashlib.sha256(data).hexdigest()
        if self.sha256 not in (None, sha256):
            raise DataError(
                f"{store.url_of(self.name)} would come out different from what the manifest says, and was not written: "
                "the source or the software changed; pack everything again to another --dest",
                EXIT_CORRUPT,
            )
        if self.sha256 is None:
            check_claim(store, self.plan)
        store.write(self.name, bytes(data))
        record = ShardRecord(self.name, len(data), count, sha256, blocks, self.plan)
        write_record(store, self.number, record)
        return record

    def _images(self) -> np.ndarray:
        """uint8 [n, size, size, 3], gathered group by group in the order they lie on disk."""
        images = np.empty((len(self.samples), self.size, self.size, 3), np.uint8)
        groups = np.searchsorted(self.group_starts, self.samples, "right") - 1
        order = np.argsort(self.samples, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            group = int(groups[rows[0]])
            path = f"{staged_path(self.scratch, group)}.raw"
            try:
                staged = np.memmap(path, np.uint8, "r").reshape(-1, self.size, self.size, 3)
            except OSError as error:
                raise unreadable(path, error) from error
            images[rows] = staged[self.samples[rows] - self.group_starts[group]]
        return images


def staged_path(scratch: str, number: int) -> str:
    return f"{scratch}/group-{number:06d}"


def read_staged(scratch: str, number: int, size: int) -> Staged | None:
    """The record of a group that was staged before, or None: the group is then staged (again).

    One that this program cannot have written is warned of.
    """
    record, pixels = f"{staged_path(scratch, number)}.json", f"{staged_path(scratch, number)}.raw"
    try:
        if (length := length_of(record)) > LARGEST_STAGED_BYTES:
            raise ValueError(f"it has {length} bytes")
        staged = parse_record(Staged, Path(record).read_bytes())
        staged.check(size)
        return staged if length_of(pixels) == len(staged.labels) * size * size * 3 else None
    except FileNotFoundError:
        return None
    except (KeyError, ValueError) as error:
        log.warning("%s is passed over, and its images are decoded again: %s", record, error)
        return None
    except OSError as error:
        raise unreadable(record, error) from error


def length_of(path: str) -> int:
    """Bytes of a regular file; raises ValueError for a link or another special file, or OSError."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a link or another special file")
    return status.st_size


def unreadable(path: str, error: OSError) -> DataError:
    """What to do about a file of the scratch folder that gives an error of the disk."""
    text = f"cannot read {path} of the scratch folder ({error.strerror}): run the same command again"
    return DataError(text, EXIT_UNREACHABLE)
