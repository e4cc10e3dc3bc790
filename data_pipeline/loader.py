"""How do shards at a URL become the batches of one rank?

The stages: the order (order.py) says which windows a rank needs and when. Threads read the blocks of these windows
ahead, check them and retry (storage.py). One thread copies images from the open windows into batches. The training loop
takes the batches from a short queue. These are threads and not worker processes, because handing a batch from a process
to the trainer costs several times as much as making it.
"""

import atexit
import contextlib
import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.assembly import CLOSING_SECONDS, PlannedBatch, WindowReader, assemble
from data_pipeline.batch import Batch
from data_pipeline.block_cache import BlockCache
from data_pipeline.damaged_blocks import DamagedBlocks
from data_pipeline.manifest import Manifest, open_store, read_manifest
from data_pipeline.order import StoredOrder, TrainingOrder, Window, rank_share
from data_pipeline.storage import DataError, Store

OPENING_DEADLINE_SECONDS = 60.0
WAITING_SECONDS = 1.0  # so often a loop that waits for a batch looks whether the thread still lives
EVALUATION_FETCH_THREADS, EVALUATION_PREFETCH_BATCHES = 2, 4  # blocks come one after the other


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` section of a config."""

    train_url: str
    """Folder of packed shards to train on, or a URL like s3://bucket/prefix."""
    validation_url: str
    """The same for the images that are evaluated."""
    lanes: int = 8
    """How many places of the data set a global batch draws from; part of the order of samples, so that it may change
    between two epochs, and not within one. A multiple of the
    number of ranks keeps ranks from reading the same bytes. Small data sets use fewer (a divisor of it). A rank
    holds about lanes / ranks + 2 * fetch_threads blocks of 512 images in memory."""
    fetch_threads: int = 4
    """How many blocks a rank reads at the same time."""
    prefetch_batches: int = 4
    """How many finished micro-batches wait for the training loop."""
    read_deadline_seconds: float = 600.0
    """How long a failing read is tried again before the run stops with exit code 69; less than
    ``limits.step_seconds``, or the run is taken for hung meanwhile."""
    max_damaged_blocks: int = 0
    """How many blocks of training images may be damaged in the store without ending the run with exit code 65. Images
    of the next good block take the place of each, all others keep theirs; a warning, an event and the metric
    ``data/damaged_blocks`` say so. 0 allows none. An evaluation never allows any."""
    cache_dir: str | None = None
    """Folder on this machine's disk that keeps blocks of a remote data set for the next epoch and the next job; null
    keeps none. The processes of a machine share it. An error of the folder is a warning, and blocks come from the
    store."""
    cache_gib: float = 32.0
    """How large that folder may grow, in GiB."""

    def __post_init__(self) -> None:
        for field in ("train_url", "validation_url"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field} is empty: give a folder or a URL like s3://bucket/prefix")
        for field, largest in (("lanes", 65536), ("fetch_threads", 256), ("prefetch_batches", 1024)):
            if not 1 <= getattr(self, field) <= largest:
                raise ValueError(f"{field} is {getattr(self, field)}: choose 1 to {largest}")
        if not self.read_deadline_seconds > 0:
            raise ValueError(f"read_deadline_seconds is {self.read_deadline_seconds}: choose more than 0, usually 600")
        if self.max_damaged_blocks < 0:
            raise ValueError(f"max_damaged_blocks is {self.max_damaged_blocks}: choose 0 (none) or more")
        if not self.cache_gib > 0:
            raise ValueError(f"cache_gib is {self.cache_gib}: choose more than 0, usually 32")


@dataclass(frozen=True)
class Shards:
    """A packed data set that has been opened: its manifest, and the folder its blocks are read from."""

    store: Store
    cache: BlockCache | None
    """Where blocks are kept on this node, if anywhere."""
    manifest: Manifest
    digest: str
    """Identifies the data set, to the last byte; every checkpoint records it."""

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


def open_shards(url: str, *, read_deadline_seconds: float = 600.0, cache: BlockCache | None = None) -> Shards:
    """Open the data set at a URL; reads only the manifest.

    Blocks go through ``cache``, if one is given and the data set is not on a disk of this machine.
    Raises DataError: nothing there or nothing in it (exit code 2), damaged (65), storage unreachable (69).
    """
    manifest, digest = read_manifest(open_store(url, min(read_deadline_seconds, OPENING_DEADLINE_SECONDS)))
    store = open_store(url, read_deadline_seconds)
    return Shards(store, None if store.is_local else cache, manifest, digest)


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
    damaged: DamagedBlocks | None = None,
) -> Iterator[Batch]:
    """The micro-batches of one rank, without end, from the sample after ``consumed_samples``.

    A step covers the next ``global_batch_images`` positions of the order; rank r takes every world_size-th of
    them, from the r-th on, in order, cut into micro-batches. So the samples of a step do not depend on the number
    of ranks, and ``consumed_samples`` is all there is to remember. Reading starts at the first ``next``; the
    threads end when the iterator is closed or forgotten. ``damaged`` allows some damaged blocks and
    collects them; images of the next good block in the manifest then replace those of a damaged one.

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
        number = 0
        while True:
            consumed = consumed_samples + (number // accumulation + 1) * global_batch_images
            yield PlannedBatch(micro_batch_images, consumed)
            number += 1

    return stream(
        shards,
        order,
        order.windows(start, world_size),
        plan(),
        start=start,
        stride=world_size,
        batch_images=micro_batch_images,
        fetch_threads=fetch_threads,
        prefetch_batches=prefetch_batches,
        damaged=damaged,
        evaluating=False,
    )


def evaluation_batches(
    shards: Shards, *, rank: int, world_size: int, batch_images: int, limit: int | None
) -> Iterator[Batch]:
    """Every image exactly once over all ranks, in the same number of batches on every rank.

    Each rank reads its own stretch of the shards. Where a stretch ends before the last batch, black images with
    ``valid`` False fill it up. ``limit`` takes only so many images, the first of the packed (shuffled) order.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    if batch_images < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_images {batch_images} and limit {limit} must be at least 1")
    count = shards.count if limit is None else min(limit, shards.count)
    begin, end = rank_share(count, rank, world_size)
    batches = math.ceil(math.ceil(count / world_size) / batch_images)
    order = StoredOrder(shards.manifest.block_counts)

    def plan() -> Iterator[PlannedBatch]:
        for number in range(batches):
            left = end - begin - number * batch_images
            yield PlannedBatch(max(0, min(batch_images, left)), number)

    windows = order.windows(begin, end) if begin < end else iter(())
    return stream(
        shards,
        order,
        windows,
        plan(),
        start=begin,
        stride=1,
        batch_images=batch_images,
        fetch_threads=EVALUATION_FETCH_THREADS,
        prefetch_batches=EVALUATION_PREFETCH_BATCHES,
        damaged=None,
        evaluating=True,
    )


def stream(
    shards: Shards,
    order: TrainingOrder | StoredOrder,
    windows: Iterator[Window],
    plan: Iterator[PlannedBatch],
    *,
    start: int,
    stride: int,
    batch_images: int,
    fetch_threads: int,
    prefetch_batches: int,
    damaged: DamagedBlocks | None,
    evaluating: bool,
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
        reader = None
        try:
            reader = WindowReader(
                shards.store,
                shards.cache,
                shards.manifest,
                order,
                windows,
                start=start,
                stride=stride,
                batch_images=batch_images,
                fetch_threads=fetch_threads,
                damaged=damaged,
                stop=stop,
            )
            has_labels = bool(shards.classes)
            for batch in assemble(
                plan, reader, batch_images=batch_images, has_labels=has_labels, evaluating=evaluating
            ):
                if not hand_over(batch):
                    return
            hand_over(None)
        # Whatever it is, the training loop raises it; in this thread it would be lost.
        except BaseException as error:  # noqa: BLE001
            hand_over(error)
        finally:
            if reader is not None:
                reader.close()

    thread = threading.Thread(target=produce, name="assemble batches", daemon=True)

    def end() -> None:
        stop.set()
        thread.join(2 * CLOSING_SECONDS)

    thread.start()
    # A daemon thread that is still inside torch when the interpreter goes down would abort the process.
    atexit.register(end)
    try:
        while True:
            item = next_item(finished, thread)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        end()
        atexit.unregister(end)


def next_item(
    finished: "queue.Queue[Batch | BaseException | None]", thread: threading.Thread
) -> Batch | BaseException | None:
    """What the thread put into the queue next. Raises RuntimeError if it has ended and nothing more will come."""
    while True:
        alive = thread.is_alive()  # asked first: what it puts before it ends is then in the queue
        with contextlib.suppress(queue.Empty):
            return finished.get(timeout=WAITING_SECONDS if alive else 0.0)
        if not alive:
            raise RuntimeError(f"the thread that is to {thread.name} ended without a word")
