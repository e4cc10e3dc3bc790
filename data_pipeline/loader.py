"""How do shards at a URL become the batches of one rank?

The stages, in order: the order (order.py) says which windows a rank needs and when; fetch threads read their
blocks ahead of need, checked and retried (storage.py); one thread copies images out of the open windows into
finished batches; the training loop takes them from a short queue. Threads, not worker processes: handing a
batch from a process to the trainer costs several times what making it costs.
"""

import atexit
import heapq
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.manifest import Manifest, open_store, read_manifest
from data_pipeline.order import StoredOrder, TrainingOrder, Window, rank_share
from data_pipeline.shard_format import decode
from data_pipeline.storage import DataError, Store

OPENING_DEADLINE_SECONDS = 60.0
CLOSING_SECONDS = 5.0  # a read that hangs may outlive its iterator, but not hold up the program for longer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` section of a config."""

    train_url: str
    """Folder of packed shards to train on, or a URL like s3://bucket/prefix."""
    validation_url: str
    """The same for the images that are evaluated."""
    lanes: int
    """How many places of the data set a global batch draws from; part of the order of samples. A multiple of the
    number of ranks keeps ranks from reading the same bytes. Small data sets use fewer (a divisor of it). A rank
    holds about lanes / ranks + 2 * fetch_threads blocks of 512 images in memory."""
    fetch_threads: int
    """How many blocks a rank reads at the same time."""
    prefetch_batches: int
    """How many finished micro-batches wait for the training loop."""
    read_deadline_seconds: float
    """How long a failing read is tried again before the run stops with exit code 69."""

    def __post_init__(self) -> None:
        for field in ("train_url", "validation_url"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field} is empty: give a folder or a URL like s3://bucket/prefix")
        for field, largest in (("lanes", 65536), ("fetch_threads", 256), ("prefetch_batches", 1024)):
            if not 1 <= getattr(self, field) <= largest:
                raise ValueError(f"{field} is {getattr(self, field)}: choose 1 to {largest}")
        if not self.read_deadline_seconds > 0:
            raise ValueError(f"read_deadline_seconds is {self.read_deadline_seconds}: choose more than 0, usually 600")


@dataclass(frozen=True)
class Shards:
    """A packed data set that has been opened: its manifest, and the folder its blocks are read from."""

    store: Store
    manifest: Manifest
    digest: str
    """Identifies the data set with every byte of it; belongs into every checkpoint."""

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def count(self) -> int:
        return self.manifest.count

    @property
    def image_size(self) -> int:
        """Edge of the square images in pixels."""
        return self.manifest.image_size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; empty when the images have none."""
        return self.manifest.classes


class PlannedBatch(NamedTuple):
    """One batch before its images are there."""

    positions: np.ndarray
    """int64 [B], rising: what to look up in the order."""
    valid: np.ndarray | None
    """bool [B], evaluation only."""
    position: int
    """Goes into the batch."""


class OpenWindow(NamedTuple):
    """A window whose block has arrived."""

    images: np.ndarray
    """uint8 [rows of the block, S * S * 3], a view of the bytes that were read."""
    labels: list[int]
    rows: list[int]
    """The block's rows in the order of use."""


def open_shards(url: str, *, read_deadline_seconds: float = 600.0) -> Shards:
    """Open the data set at a URL; reads only the manifest.

    Raises DataError: nothing there or nothing in it (exit code 2), damaged (65), storage unreachable (69).
    """
    manifest, digest = read_manifest(open_store(url, min(read_deadline_seconds, OPENING_DEADLINE_SECONDS)))
    return Shards(open_store(url, read_deadline_seconds), manifest, digest)


def train_batches(
    shards: Shards,
    *,
    seed: int,
    lanes: int,
    consumed_samples: int,
    rank: int,
    world_size: int,
    global_batch_images: int,
    micro_batch_images: int,
    fetch_threads: int,
    prefetch_batches: int,
) -> Iterator[Batch]:
    """The micro-batches of one rank, without end, from the sample after ``consumed_samples``.

    A step covers the next ``global_batch_images`` positions of the order; rank r takes every world_size-th of
    them, from the r-th on, in order, cut into micro-batches. So the samples of a step do not depend on the number
    of ranks, and ``consumed_samples`` is all there is to remember. Reading starts at the first ``next``; the
    threads end when the iterator is closed or forgotten.

    Raises DataError when the data set is smaller than one global batch, and from ``next`` when reading fails.
    """
    per_round = world_size * micro_batch_images
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    if micro_batch_images < 1 or global_batch_images < 1 or global_batch_images % per_round:
        raise ValueError(
            f"a global batch of {global_batch_images} images is not a multiple of {world_size} ranks x "
            f"{micro_batch_images} images per micro-batch"
        )
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples is {consumed_samples}: must not be negative")
    if shards.count < global_batch_images:
        raise DataError(
            f"{shards.url} holds {shards.count} images, fewer than one global batch of {global_batch_images}: "
            "use a smaller batch, fewer ranks or more data"
        )
    order = TrainingOrder(shards.manifest.block_counts, seed=seed, lanes=lanes)
    start = consumed_samples + rank
    accumulation = global_batch_images // per_round

    def plan() -> Iterator[PlannedBatch]:
        offsets = world_size * np.arange(micro_batch_images, dtype=np.int64)
        number = 0
        while True:
            consumed = consumed_samples + (number // accumulation + 1) * global_batch_images
            yield PlannedBatch(start + number * per_round + offsets, None, consumed)
            number += 1

    return stream(shards, order, order.windows(start, world_size), plan(), fetch_threads, prefetch_batches)


def evaluation_batches(
    shards: Shards, *, rank: int, world_size: int, batch_images: int, limit: int | None
) -> Iterator[Batch]:
    """Every image exactly once over all ranks, in the same number of batches on every rank.

    Each rank reads its own stretch of the shards. Where a stretch ends before the last batch, images repeat with
    ``valid`` False. ``limit`` takes only so many images, the first of the packed (shuffled) order.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    if batch_images < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_images {batch_images} and limit {limit} must be at least 1")
    count = shards.count if limit is None else min(limit, shards.count)
    begin, end = rank_share(count, rank, world_size)
    batches = math.ceil(math.ceil(count / world_size) / batch_images)
    order = StoredOrder(shards.manifest.block_counts)
    # A rank without any image of its own pads with the first one it can have.
    begin, last = min(begin, count - 1), max(min(begin, count - 1), end - 1)

    def plan() -> Iterator[PlannedBatch]:
        for number in range(batches):
            positions = begin + number * batch_images + np.arange(batch_images, dtype=np.int64)
            yield PlannedBatch(np.minimum(positions, last), positions < end, number)

    return stream(shards, order, order.windows(begin, last + 1), plan(), 2, 4)


def stream(
    shards: Shards,
    order: TrainingOrder | StoredOrder,
    windows: Iterator[Window],
    plan: Iterator[PlannedBatch],
    fetch_threads: int,
    prefetch_batches: int,
) -> Iterator[Batch]:
    """Run the stages behind a queue; an error of any of them is raised here, after the batches before it."""
    finished: queue.Queue[Batch | BaseException | None] = queue.Queue(prefetch_batches)
    stop = threading.Event()

    def hand_over(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                finished.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in assemble(shards, order, windows, plan, fetch_threads, stop):
                if not hand_over(batch):
                    return
            hand_over(None)
        # Whatever it is, the training loop has to raise it: this thread has nobody to tell.
        except BaseException as error:  # noqa: BLE001
            hand_over(error)

    thread = threading.Thread(target=produce, name="assemble batches", daemon=True)

    def end() -> None:
        stop.set()
        thread.join(CLOSING_SECONDS)

    # A daemon thread that is still inside torch when the interpreter goes down would abort the process.
    atexit.register(end)
    thread.start()
    try:
        while True:
            item = finished.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        end()
        atexit.unregister(end)


def assemble(
    shards: Shards,
    order: TrainingOrder | StoredOrder,
    windows: Iterator[Window],
    plan: Iterator[PlannedBatch],
    fetch_threads: int,
    stop: threading.Event,
) -> Iterator[Batch]:
    """Copy images from open windows into batches; windows open in time and close after their last use.

    At most ``2 * fetch_threads`` windows are read ahead of need, besides those in use (one a lane).
    """
    size = shards.image_size
    pinned = torch.cuda.is_available()
    has_labels = bool(shards.classes)
    requests: queue.SimpleQueue[tuple[Window, Future[OpenWindow]] | None] = queue.SimpleQueue()
    ahead: deque[tuple[Window, Future[OpenWindow]]] = deque()
    opened: dict[int, OpenWindow] = {}
    closing: list[tuple[int, int]] = []  # heap of (last position, key)

    def read_ahead() -> None:
        while len(ahead) < 2 * fetch_threads and (window := next(windows, None)) is not None:
            ahead.append((window, Future()))
            requests.put(ahead[-1])

    threads = [
        threading.Thread(target=fetch, args=(shards, order, requests, stop), name="fetch blocks", daemon=True)
        for _ in range(fetch_threads)
    ]
    for thread in threads:
        thread.start()
    try:
        read_ahead()
        for planned in plan:
            until = int(planned.positions[-1])
            while ahead and ahead[0][0].first <= until:
                window, future = ahead.popleft()
                read_ahead()
                opened[window.key] = result_of(future, stop)
                heapq.heappush(closing, (window.last, window.key))

            images = torch.empty((len(planned.positions), size, size, 3), dtype=torch.uint8, pin_memory=pinned)
            labels = torch.empty(len(planned.positions), dtype=torch.int64, pin_memory=pinned)
            into, labels_into = images.numpy().reshape(len(images), -1), labels.numpy()
            keys, places = order.locate(planned.positions)
            for i, (key, place) in enumerate(zip(keys.tolist(), places.tolist(), strict=True)):
                window_images, window_labels, rows = opened[key]
                row = rows[place]
                into[i] = window_images[row]
                labels_into[i] = window_labels[row]
            yield Batch(
                images=images,
                labels=labels if has_labels else None,
                valid=None if planned.valid is None else torch.from_numpy(planned.valid),
                position=planned.position,
            )

            while closing and closing[0][0] <= until:
                del opened[heapq.heappop(closing)[1]]
    finally:
        for _ in threads:
            requests.put(None)
        deadline = time.monotonic() + CLOSING_SECONDS / 2
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def result_of(future: Future[OpenWindow], stop: threading.Event) -> OpenWindow:
    """The window, or the error that fetching it ended in; CancelledError as soon as a stop is requested."""
    while True:
        try:
            return future.result(timeout=0.2)
        except TimeoutError:
            if stop.is_set():
                raise CancelledError from None


def fetch(
    shards: Shards,
    order: TrainingOrder | StoredOrder,
    requests: "queue.SimpleQueue[tuple[Window, Future[OpenWindow]] | None]",
    stop: threading.Event,
) -> None:
    """What a fetch thread does until it is told to end: read the blocks of windows, checked and retried."""
    while (request := requests.get()) is not None:
        window, future = request
        if stop.is_set():
            future.cancel()
            continue
        block = shards.manifest.blocks[window.block]
        try:
            name = shards.manifest.shards[block.shard].name
            data = shards.store.read(name, block.begin, block.end, xxh3=block.xxh3, stop=stop)
            images, labels = decode(data, shards.image_size)
            future.set_result(OpenWindow(images, labels.tolist(), order.rows(window).tolist()))
        # Raised again where the result is taken.
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
