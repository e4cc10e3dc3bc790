"""How do images get from blocks into batches, with blocks read ahead of need by several threads?

Every byte is moved twice: from the disk or the network into the memory of its window, from there into its batch.
"""

import contextlib
import heapq
import math
import mmap
import queue
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.block_cache import BlockCache
from data_pipeline.damaged_blocks import SAME_ANSWERS, DamagedBlocks
from data_pipeline.image_shards import images_in
from data_pipeline.manifest import Block, Manifest
from data_pipeline.order import StoredOrder, TrainingOrder, Window
from data_pipeline.shard_format import SampleLayout, encode_samples
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store

CLOSING_SECONDS = 2.5  # closing a reader does not wait longer for a read that hangs
MAP_NORESERVE = 0x4000  # Linux; the module mmap names it from Python 3.13 on


class PlannedBatch(NamedTuple):
    """One batch before its images are there."""

    samples: int
    """How many of the rank's samples it takes; at the end of an evaluation fewer than it has room for."""
    position: int
    """Becomes ``Batch.position``."""


@dataclass(frozen=True)
class ReadWindow:
    """A window whose block has arrived."""

    slot: int
    """Which part of the memory holds the block."""
    rows: np.ndarray
    """int64 [n]: the rows of the block that the rank uses, in the order of use."""
    labels: np.ndarray
    """int64 [n]: their labels."""


Request = tuple[Window, "Future[ReadWindow]"]


def assemble(
    plan: Iterator[PlannedBatch], reader: "WindowReader", *, batch_images: int, has_labels: bool, evaluating: bool
) -> Iterator[Batch]:
    """Fill the planned batches. In evaluation, rows without a sample are marked as not valid."""
    pinned, layout = torch.cuda.is_available(), reader.layout
    memory = BatchMemory((batch_images, layout.image_size, layout.image_size, 3), pinned)
    source = torch.from_numpy(layout.pixels(reader.memory.samples))
    for planned in plan:
        images, count = memory.take(), planned.samples
        labels = torch.zeros(batch_images, dtype=torch.int64, pin_memory=pinned)
        rows, labels.numpy()[:count] = reader.next_samples(count)
        pixels = images.view(batch_images, -1)
        torch.index_select(source, 0, torch.from_numpy(rows), out=pixels[:count])  # numpy would copy everything twice
        pixels[count:] = 0
        reader.let_go()
        valid = torch.arange(batch_images) < count if evaluating else None
        yield Batch(images=images, labels=labels if has_labels else None, valid=valid, position=planned.position)


class WindowMemory:
    """Room for the blocks of windows, side by side, so that the rows of all of them are one array.

    Address space is reserved for the largest number of blocks. Memory is taken only for as many as were used at once.
    """

    def __init__(self, slots: int, block_rows: int, layout: SampleLayout) -> None:
        self.slot_rows = -(-block_rows // 8) * 8  # every slot begins at the start of a page
        self.samples = fresh_pages(slots * self.slot_rows * layout.stride).reshape(-1, layout.stride)
        """uint8 [slots * slot_rows, bytes of a sample]"""
        # What was used last is used next: its pages exist, and the processor's cache may still hold them.
        self.free = list(reversed(range(slots)))


class WindowReader:
    """The samples of a rank in their order, from windows that threads read ahead of need.

    Holds the windows in use, one for each lane that the rank draws from, and ``2 * fetch_threads`` more.
    """

    def __init__(
        self,
        store: Store,
        cache: BlockCache | None,
        manifest: Manifest,
        order: TrainingOrder | StoredOrder,
        windows: Iterator[Window],
        *,
        start: int,
        stride: int,
        batch_images: int,
        fetch_threads: int,
        damaged: DamagedBlocks | None,
        stop: threading.Event,
    ) -> None:
        """The rank's sample number i is at position ``start + i * stride`` of the order.

        ``damaged`` collects damaged blocks, and other blocks replace them; if None, a damaged block is an error.
        """
        store = store if damaged is None else replace(store, same_answers=SAME_ANSWERS)
        self.damaged = damaged
        self.store, self.cache, self.manifest, self.layout = store, cache, manifest, manifest.layout
        self.order, self.windows, self.start, self.stride = order, windows, start, stride
        self.stop = stop
        self.taken = 0
        self.closing: list[tuple[int, int]] = []  # heap of (number of the last sample, slot)
        self.ahead: deque[Request] = deque()
        self.most_ahead = 2 * fetch_threads
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        block_rows = max(block.count for block in manifest.blocks)
        # Before a batch one window of each lane is open. A batch opens at most one more for each of its images.
        slots = order.lanes + batch_images + self.most_ahead + 1
        self.memory = WindowMemory(slots, block_rows, self.layout)
        # A ring: the rank's sample number i is at index i modulo the length. The ring is long enough for the last row
        # of a window that was just opened, and a multiple of the batch, so that no batch is cut in two.
        reach = batch_images + block_rows * order.lanes // stride + order.lanes
        self.length = (reach // batch_images + 1) * batch_images
        self.rows, self.labels = np.empty(self.length, np.int64), np.empty(self.length, np.int64)
        self.failure: BaseException | None = None
        """Why one of the threads ended without an answer to its request."""
        self.threads: list[threading.Thread] = []
        self._read_ahead()
        try:
            for _ in range(fetch_threads):
                thread = threading.Thread(target=self._fetch_all, name="fetch blocks", daemon=True)
                thread.start()
                self.threads.append(thread)
        except BaseException:  # no more threads, or no memory for one
            self.close()
            raise

    def next_samples(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the images of the next samples are in the memory, and their labels; both int64 [count].

        Waits for their blocks, and raises the error of a read that failed. Call ``let_go`` when the images are copied.
        """
        begin = self.taken % self.length
        self.taken += count
        while self.ahead and self.ahead[0][0].first < self.start + self.taken * self.stride:
            window, future = self.ahead.popleft()
            self._read_ahead()
            read = self._result_of(future)
            numbers = (window.positions - self.start) // self.stride
            self.rows[numbers % self.length] = read.slot * self.memory.slot_rows + read.rows
            self.labels[numbers % self.length] = read.labels
            heapq.heappush(self.closing, (int(numbers[-1]), read.slot))
        return self.rows[begin : begin + count], self.labels[begin : begin + count].copy()

    def let_go(self) -> None:
        """Free the memory of windows whose samples have all been taken."""
        while self.closing and self.closing[0][0] < self.taken:
            self.memory.free.append(heapq.heappop(self.closing)[1])

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

    def _result_of(self, future: "Future[ReadWindow]") -> ReadWindow:
        """Wait for a window. Raises the error of its read, or CancelledError as soon as a stop is requested."""
        while not wait([future], timeout=0.2).done:
            if self.stop.is_set():
                raise CancelledError
            if not all(thread.is_alive() for thread in self.threads):
                raise self.failure or RuntimeError("a thread that fetches blocks ended without a word")
        return future.result()

    def _fetch_all(self) -> None:
        # Whatever it is, it is raised again where the result is taken.
        try:
            while (request := self.requests.get()) is not None:
                window, future = request
                if self.stop.is_set():
                    future.cancel()
                    continue
                try:
                    future.set_result(self._fetch(window))
                except BaseException as error:  # noqa: BLE001
                    future.set_exception(error)
        except BaseException as error:  # noqa: BLE001
            self.failure = error

    def _fetch(self, window: Window) -> ReadWindow:
        slot = self.memory.free.pop()
        count = self.manifest.blocks[self._fill_slot(slot, window.block)].count
        rows = self.order.rows(window) % count  # a block that replaces another may have fewer rows
        begin = slot * self.memory.slot_rows
        samples = self.memory.samples[begin : begin + count]
        return ReadWindow(slot, rows, self.layout.labels(samples)[rows])

    def _fill_slot(self, slot: int, number: int) -> int:
        """Read a block, or the next good one if it is damaged and may be replaced; returns the number of that block."""
        if self.damaged is None:
            try:
                self._read_samples(slot, self.manifest.blocks[number])
            except DataError as error:
                if error.exit_code != EXIT_CORRUPT or self.stop.is_set():
                    raise
                advice = f"python -m data_pipeline.verify {shlex.quote(self.store.url)} says how to repair it"
                raise DataError(f"{error}; {advice}", EXIT_CORRUPT) from error
            return number
        total = len(self.manifest.blocks)
        for candidate in ((number + further) % total for further in range(total)):
            if candidate in self.damaged.causes:
                continue
            try:
                self._read_samples(slot, self.manifest.blocks[candidate])
                return candidate
            except DataError as error:
                if error.exit_code != EXIT_CORRUPT or self.stop.is_set():
                    raise
                self.damaged.add(candidate, error)
        raise DataError(f"every block of {self.store.url} is damaged", EXIT_CORRUPT)

    def _read_samples(self, slot: int, block: Block) -> None:
        begin = slot * self.memory.slot_rows
        samples = self.memory.samples[begin : begin + block.count]
        if self.manifest.encoding == "npy":
            self._read(block, memoryview(samples.reshape(-1)))  # type: ignore[arg-type]
        else:
            data = bytearray(block.end - block.begin)
            self._read(block, memoryview(data))
            where = self.store.url_of(self.manifest.shards[block.shard].name)
            images, labels = images_in(bytes(data), self.manifest.image_size, where)
            encode_samples(np.arange(block.count), labels, images, out=samples)

    def _read(self, block: Block, into: memoryview) -> None:
        name = self.manifest.shards[block.shard].name
        if self.cache is None:
            self.store.read_block(name, block.begin, into, block.xxh3, self.stop)
        else:
            self.cache.read_block(self.store, name, block.begin, into, block.xxh3, self.stop)


def fresh_pages(size: int) -> np.ndarray:
    """uint8 [size] that starts with a page. Memory is taken only where it is written, in huge pages if there are any.

    numpy's own arrays start 16 bytes after a page does. A file that is read into such an array is copied between places
    that lie 16 bytes apart within their pages. That takes ten times as long on AMD's current processors.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class BatchMemory:
    """Tensors of one shape. Their memory is used again when nobody holds them any more.

    Pinned tensors come from torch, which reuses their memory itself.
    """

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self.shape, self.pinned = shape, pinned
        # The number of references that ``_counts`` finds for an array that only this list holds.
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
        self.arrays.append(fresh_pages(math.prod(self.shape)).reshape(self.shape))
        return torch.from_numpy(self.arrays[-1])  # holds a reference to the array as long as any view of it lives

    def _counts(self) -> Iterator[tuple[int, int]]:
        for place in range(len(self.arrays)):
            yield place, sys.getrefcount(self.arrays[place])
