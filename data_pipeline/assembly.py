"""How do images get from blocks into batches, with blocks read ahead of need by several threads?"""

import heapq
import math
import mmap
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.block_cache import BlockCache
from data_pipeline.image_shards import images_in
from data_pipeline.manifest import Block, Manifest
from data_pipeline.order import StoredOrder, TrainingOrder, Window
from data_pipeline.shard_format import SampleLayout, encode
from data_pipeline.storage import Store

CLOSING_SECONDS = 2.5  # a read that hangs may outlive its reader, but not hold up the program for longer


class PlannedBatch(NamedTuple):
    """One batch before its images are there."""

    positions: np.ndarray
    """int64, rising: what to look up in the order; fewer than the batch holds at the end of an evaluation."""
    position: int
    """Goes into the batch."""


@dataclass
class OpenWindow:
    """A window whose block has arrived."""

    samples: np.ndarray
    """uint8 [rows of the block, bytes of a sample]: the block as it lies in the shard."""
    rows: np.ndarray
    """int64 [n]: the rows that the rank uses, in the order of use."""
    labels: np.ndarray
    """int64 [n]: their labels."""
    memory: np.ndarray
    """What ``samples`` is a part of; used again for another window."""
    used: int
    """How many samples were taken out so far."""

    def take(self, count: int) -> slice:
        """Which of the rows come next."""
        self.used += count
        assert self.used <= len(self.rows), (self.used, len(self.rows))
        return slice(self.used - count, self.used)


Request = tuple[Window, "Future[OpenWindow]"]


def assemble(
    plan: Iterator[PlannedBatch],
    windows: "WindowReader",
    order: TrainingOrder | StoredOrder,
    layout: SampleLayout,
    *,
    batch_images: int,
    has_labels: bool,
    evaluating: bool,
) -> Iterator[Batch]:
    """Fill the planned batches; in evaluation, mark what is left over of the last ones as not valid."""
    pinned = torch.cuda.is_available()
    memory = BatchMemory((batch_images, layout.image_size, layout.image_size, 3), pinned)
    scratch = aligned_empty(batch_images * layout.stride).reshape(batch_images, layout.stride)
    for planned in plan:
        images, count = memory.take(), len(planned.positions)
        labels = torch.zeros(batch_images, dtype=torch.int64, pin_memory=pinned)
        into, labels_into = images.numpy().reshape(batch_images, -1), labels.numpy()
        into[count:] = 0
        if count:
            until = int(planned.positions[-1])
            windows.open_until(until)
            keys = order.window_keys(planned.positions)
            by_window = np.argsort(keys, kind="stable")
            keys = keys[by_window]
            cuts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), count]
            for begin, end in pairwise(cuts):
                slots, window = by_window[begin:end], windows.opened[int(keys[begin])]
                next_rows = window.take(len(slots))
                # mode="clip" writes straight into the output; the default would collect a copy of it first.
                np.take(window.samples, window.rows[next_rows], axis=0, out=scratch[: len(slots)], mode="clip")
                into[slots] = layout.pixels(scratch[: len(slots)])
                labels_into[slots] = window.labels[next_rows]
            windows.close_until(until)
        valid = torch.arange(batch_images) < count if evaluating else None
        yield Batch(images=images, labels=labels if has_labels else None, valid=valid, position=planned.position)


class WindowReader:
    """Windows in the order of their first need, read by threads that keep ahead of it.

    Holds the windows in use, one for each lane that the rank draws from, and ``2 * fetch_threads`` more.
    """

    def __init__(
        self,
        store: Store,
        cache: BlockCache | None,
        manifest: Manifest,
        order: TrainingOrder | StoredOrder,
        windows: Iterator[Window],
        fetch_threads: int,
        stop: threading.Event,
    ) -> None:
        self.store, self.cache, self.manifest = store, cache, manifest
        self.order, self.windows = order, windows
        self.stop = stop
        self.opened: dict[int, OpenWindow] = {}
        self.closing: list[tuple[int, int]] = []  # heap of (last position, key)
        self.ahead: deque[Request] = deque()
        self.most_ahead = 2 * fetch_threads
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        # Memory of windows that were closed: fresh pages cost more time than reading into old ones.
        self.free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self.memory_bytes = max(block.count for block in manifest.blocks) * manifest.layout.stride
        self.threads = [
            threading.Thread(target=self._fetch_all, name="fetch blocks", daemon=True) for _ in range(fetch_threads)
        ]
        for thread in self.threads:
            thread.start()
        self._read_ahead()

    def open_until(self, position: int) -> None:
        """Wait for every window that is needed up to a position; raises what a failed read ended in."""
        while self.ahead and self.ahead[0][0].first <= position:
            window, future = self.ahead.popleft()
            self._read_ahead()
            self.opened[window.key] = result_of(future, self.stop)
            heapq.heappush(self.closing, (window.last, window.key))

    def close_until(self, position: int) -> None:
        """Let go of the windows that are not needed after a position."""
        while self.closing and self.closing[0][0] <= position:
            self.free.put(self.opened.pop(heapq.heappop(self.closing)[1]).memory)

    def close(self) -> None:
        """End the threads; one that hangs in a read ends when the read does."""
        for _ in self.threads:
            self.requests.put(None)
        deadline = time.monotonic() + CLOSING_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _read_ahead(self) -> None:
        while len(self.ahead) < self.most_ahead and (window := next(self.windows, None)) is not None:
            self.ahead.append((window, Future()))
            self.requests.put(self.ahead[-1])

    def _fetch_all(self) -> None:
        while (request := self.requests.get()) is not None:
            window, future = request
            if self.stop.is_set():
                future.cancel()
                continue
            try:
                future.set_result(self._fetch(window))
            # Raised again where the result is taken.
            except BaseException as error:  # noqa: BLE001
                future.set_exception(error)

    def _fetch(self, window: Window) -> OpenWindow:
        block, layout = self.manifest.blocks[window.block], self.manifest.layout
        try:
            memory = self.free.get_nowait()
        except queue.Empty:
            memory = aligned_empty(self.memory_bytes)
        samples = memory[: block.count * layout.stride].reshape(block.count, layout.stride)
        if self.manifest.encoding == "npy":
            self._read(block, memoryview(samples.reshape(-1)))  # type: ignore[arg-type]
        else:
            data = bytearray(block.end - block.begin)
            self._read(block, memoryview(data))
            where = self.store.url_of(self.manifest.shards[block.shard].name)
            images, labels = images_in(bytes(data), self.manifest.image_size, where)
            encode(np.arange(block.count), labels, images, out=samples)
        rows = self.order.rows(window)
        return OpenWindow(samples, rows, layout.labels(samples)[rows], memory, 0)

    def _read(self, block: Block, into: memoryview) -> None:
        name = self.manifest.shards[block.shard].name
        if self.cache is None:
            self.store.read_block(name, block.begin, into, block.xxh3, self.stop)
        else:
            self.cache.read_block(self.store, name, block.begin, into, block.xxh3, self.stop)


def result_of(future: "Future[OpenWindow]", stop: threading.Event) -> OpenWindow:
    """The window, or the error that fetching it ended in; CancelledError as soon as a stop is requested."""
    while True:
        try:
            return future.result(timeout=0.2)
        except TimeoutError:
            if stop.is_set():
                raise CancelledError from None


def aligned_empty(size: int) -> np.ndarray:
    """Uninitialised uint8 [size] that begins a page.

    numpy's own arrays begin 16 bytes into a page. Copying between places that are 16 bytes apart within their pages
    takes AMD's current processors ten times as long, which is what reading a file's pages into such an array does.
    """
    array = np.empty(size + mmap.PAGESIZE, np.uint8)
    start = -array.ctypes.data % mmap.PAGESIZE
    return array[start : start + size]


class BatchMemory:
    """Tensors of one shape whose memory is used again when nobody holds it any more.

    Pinned tensors come from torch, which keeps their memory itself.
    """

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self.shape, self.pinned = shape, pinned
        # How many references an array has that only this list holds, as counted by ``_counts``.
        self.arrays = [np.empty(0, np.uint8)]
        self.unused = next(self._counts())[1]
        self.arrays.clear()

    def take(self) -> torch.Tensor:
        """An uninitialised uint8 tensor."""
        if self.pinned:
            return torch.empty(self.shape, dtype=torch.uint8, pin_memory=True)
        for place, count in self._counts():
            if count == self.unused:
                return torch.from_numpy(self.arrays[place])
        self.arrays.append(aligned_empty(math.prod(self.shape)).reshape(self.shape))
        return torch.from_numpy(self.arrays[-1])  # holds a reference to the array as long as any view of it lives

    def _counts(self) -> Iterator[tuple[int, int]]:
        for place in range(len(self.arrays)):
            yield place, sys.getrefcount(self.arrays[place])
