"""What does one packing process do: decode a group of images into scratch space, then write a shard from it?

Both steps depend on their arguments alone and leave a small record when they are done, so that any process on
any machine can do any of them, again or for the first time, with the same bytes as the result.
"""

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.resize import to_pixels
from data_pipeline.shard_format import SampleLayout, encode, end_of_shard
from data_pipeline.sources import Group
from data_pipeline.storage import EXIT_UNREACHABLE, DataError, Store, write_atomically

JOURNAL = "_packing"
BLOCK_IMAGES = 512


@dataclass(frozen=True)
class StageTask:
    """Decode and resize one group into scratch space."""

    scratch: str
    number: int
    group: Group
    size: int
    protocol: str

    def run(self) -> "Staged":
        images, labels = [], []
        for item in self.group.read():
            images.append(to_pixels(item.image, self.protocol, self.size))
            labels.append(item.label)
            count_progress(1)
        pixels = np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8)
        wide = pixels.reshape(-1, 3).astype(np.int64)
        staged = Staged(labels, wide.sum(axis=0).tolist(), (wide * wide).sum(axis=0).tolist())
        write_atomically(f"{staged_path(self.scratch, self.number)}.raw", pixels.reshape(-1).data)
        # The record comes second: where it is, the pixels are complete.
        write_atomically(f"{staged_path(self.scratch, self.number)}.json", json.dumps(asdict(staged)).encode())
        return staged


@dataclass(frozen=True)
class Staged:
    """The record of a staged group; sums are over all pixels, per channel, and exact."""

    labels: list[int]
    sums: list[int]
    squares: list[int]


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

    def run(self) -> "ShardRecord":
        stride = SampleLayout(self.size).stride
        count = len(self.samples)
        tail = end_of_shard(count * stride)
        data = bytearray(count * stride + len(tail))
        view = np.frombuffer(data, np.uint8)[: count * stride].reshape(count, stride)
        blocks: list[tuple[int, int, int, str]] = []
        images = self._images()
        for first in range(0, count, BLOCK_IMAGES):
            rows = slice(first, min(first + BLOCK_IMAGES, count))
            view[rows] = encode(self.samples[rows], self.labels[rows], images[rows])
            begin, end = rows.start * stride, rows.stop * stride
            blocks.append((begin, end, rows.stop - first, xxhash.xxh3_64_hexdigest(view[rows].data)))
            count_progress(rows.stop - first)
        del view
        store = Store(self.dest, self.deadline_seconds)
        store.write(self.name, bytes(data))
        record = ShardRecord(self.name, len(data), count, hashlib.sha256(data).hexdigest(), blocks)
        store.write(record_name(self.number), json.dumps(asdict(record)).encode())
        return record

    def _images(self) -> np.ndarray:
        """uint8 [n, size, size, 3], gathered group by group in the order they lie on disk."""
        images = np.empty((len(self.samples), self.size, self.size, 3), np.uint8)
        groups = np.searchsorted(self.group_starts, self.samples, "right") - 1
        order = np.argsort(self.samples, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            group = int(groups[rows[0]])
            path = f"{staged_path(self.scratch, group)}.raw"
            staged = np.memmap(path, np.uint8, "r").reshape(-1, self.size, self.size, 3)
            images[rows] = staged[self.samples[rows] - self.group_starts[group]]
        return images


@dataclass(frozen=True)
class ShardRecord:
    """The journal entry of a shard that is written: what the manifest says about it."""

    name: str
    bytes: int
    count: int
    sha256: str
    blocks: list[tuple[int, int, int, str]]
    """begin, end, count and XXH3 of each."""


Task = StageTask | ShardTask


def staged_path(scratch: str, number: int) -> str:
    return f"{scratch}/group-{number:06d}"


def record_name(number: int) -> str:
    return f"{JOURNAL}/shard-{number:06d}.json"


def read_staged(scratch: str, number: int, size: int) -> Staged | None:
    """The record of a group that was staged before, or None."""
    record, pixels = Path(f"{staged_path(scratch, number)}.json"), Path(f"{staged_path(scratch, number)}.raw")
    if not record.exists():
        return None
    staged = Staged(**json.loads(record.read_bytes()))
    whole = pixels.exists() and pixels.stat().st_size == len(staged.labels) * size * size * 3
    return staged if whole else None


def run_all(tasks: Sequence[Task], workers: int, progress: Any) -> Iterator[tuple[int, Any]]:
    """Run tasks, on several processes if asked, and yield (index, result) as they finish.

    progress: a shared counter of images (``multiprocessing.Value``) that the tasks add to.
    """
    if workers <= 1:
        set_progress(progress)
        try:
            for index, task in enumerate(tasks):
                yield index, task.run()
        finally:
            set_progress(None)
        return
    # Not fork: a filesystem of s3fs must not be inherited. The fork server imports everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(progress,))
    try:
        futures = {pool.submit(run_task, task): index for index, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process was killed, probably because memory ran out: use fewer --workers and run the same "
            "command again, it goes on where it was",
            EXIT_UNREACHABLE,
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_task(task: Task) -> Any:
    return task.run()


def start_worker(progress: Any) -> None:
    """Prepare a worker process: it counts images, and ends when the process that started it is gone."""
    set_progress(progress)

    def leave_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


_progress: Any = None


def set_progress(progress: Any) -> None:
    """Name the counter this process adds to."""
    global _progress
    _progress = progress


def count_progress(images: int) -> None:
    """Add to the shared counter, if there is one."""
    if _progress is not None:
        with _progress.get_lock():
            _progress.value += images
