"""Is memory used again only when nobody looks at it, and bounded however large the data set is?"""

import gc
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash

from data_pipeline.assembly import BatchMemory, fresh_pages
from data_pipeline.loader import Shards, evaluation_batches
from data_pipeline.manifest import Block, Manifest, Shard, write_manifest
from data_pipeline.shard_format import SampleLayout, end_of_shard
from data_pipeline.storage import Store


def addresses(memory: BatchMemory) -> list[int]:
    return [array.ctypes.data for array in memory.arrays]


def test_memory_of_a_batch_is_used_again_once_it_is_gone() -> None:
    memory = BatchMemory((4, 8, 8, 3), pinned=False)
    first = memory.take()
    address = first.data_ptr()
    second = memory.take()
    assert second.data_ptr() != address and address % mmap.PAGESIZE == 0
    del first
    assert memory.take().data_ptr() == address


@pytest.mark.parametrize(
    "look", [lambda t: t[1:2], lambda t: t.permute(0, 3, 1, 2), lambda t: t.numpy(), lambda t: t.to("cpu")[0].view(-1)]
)
def test_memory_is_left_alone_as_long_as_any_view_of_it_lives(look) -> None:  # type: ignore[no-untyped-def]
    memory = BatchMemory((4, 8, 8, 3), pinned=False)
    batch = memory.take()
    address = batch.data_ptr()
    view = look(batch)
    del batch
    gc.collect()
    assert memory.take().data_ptr() != address
    del view
    assert memory.take().data_ptr() == address


def test_batches_that_are_kept_stay_as_they_were(shards: Shards) -> None:
    batches = evaluation_batches(shards, rank=0, world_size=1, batch_images=64, limit=None)
    kept = [(batch.images, batch.images.clone()) for batch in batches]
    assert all(torch.equal(images, copy) for images, copy in kept)


@pytest.mark.parametrize("size", [1, 4096, 5_000_000])
def test_fresh_memory_begins_a_page_and_can_be_written(size: int) -> None:
    array = fresh_pages(size)
    array[-1] = 7
    assert array.shape == (size,) and array.ctypes.data % mmap.PAGESIZE == 0 and array[-1] == 7


def black_images(folder: Path, size: int, count: int) -> None:
    """A data set of black images in sparse files: any number of them takes no room on the disk."""
    stride, shards, blocks, checksums = SampleLayout(size).stride, [], [], {}
    for first in range(0, count, 8192):
        images = min(8192, count - first)
        name = f"train-{len(shards):06d}.tar"
        length = images * stride + len(end_of_shard(images * stride))
        with (folder / name).open("wb") as file:
            file.truncate(length)
        for row in range(0, images, 512):
            rows = min(512, images - row)
            checksums.setdefault(rows, xxhash.xxh3_64_hexdigest(bytes(rows * stride)))
            blocks.append(Block(len(shards), row * stride, (row + rows) * stride, rows, checksums[rows]))
        shards.append(Shard(name, length, images, "0" * 64))
    fields = ("black", "train", count, size, "npy", {}, {}, (), 0, (0.0,) * 3, (0.0,) * 3)
    write_manifest(Store(str(folder), 0.0), Manifest(*fields, tuple(shards), tuple(blocks)))


STREAM = """
import json, sys, time
from data_pipeline.loader import open_shards, train_batches

def memory(field):
    return int(open("/proc/self/status").read().partition(field)[2].split()[0]) / 1024

options = json.loads(sys.argv[1])
steps = options.pop("steps")
before, started = memory("VmRSS:"), time.process_time()
batches = train_batches(open_shards(options.pop("url")), seed=0, fetch_threads=4, prefetch_batches=2, **options)
next(batches)
seconds = time.process_time() - started
peaks = []
for number in range(steps):
    next(batches)
    if number % (steps // 4) == steps // 4 - 1:
        peaks.append(memory("VmHWM:") - before)
print(json.dumps({"seconds": seconds, "peaks": peaks}))
"""


def stream(**options: object) -> dict[str, object]:
    command = [sys.executable, "-c", STREAM, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_two_million_images_are_opened_and_resumed_quickly_and_in_little_memory(tmp_path: Path) -> None:
    black_images(tmp_path, size=8, count=2_000_000)
    answer = stream(
        url=str(tmp_path),
        lanes=240,
        consumed_samples=3_100_160,
        rank=3,
        world_size=8,
        global_batch_images=1024,
        micro_batch_images=128,
        steps=8,
    )
    assert answer["seconds"] < 2.0  # type: ignore[operator]
    assert max(answer["peaks"]) < 300  # type: ignore[call-overload]


def test_memory_stays_flat_over_an_epoch_and_within_the_stated_bound(tmp_path: Path) -> None:
    count, lanes, batch = 40_000, 8, 200
    black_images(tmp_path, size=32, count=count)
    answer = stream(
        url=str(tmp_path),
        lanes=lanes,
        consumed_samples=0,
        rank=0,
        world_size=1,
        global_batch_images=batch,
        micro_batch_images=batch,
        steps=2 * count // batch,
    )
    # As DataConfig.lanes says: a block for every lane and two for every fetch thread; and a few batches.
    bound = ((lanes + 2 * 4) * 512 * SampleLayout(32).stride + 8 * batch * 32 * 32 * 3) / 2**20
    first, *_, last = answer["peaks"]  # type: ignore[misc]
    assert last < bound + 30, "thirty megabytes for libraries that come to life"
    assert last < first * 1.1 + 5
