"""Does every rank get its batches, exactly and in order, and does every failure end in one sentence?"""

import gc
import gzip
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import assembly, loader, storage
from data_pipeline.assembly import WindowReader
from data_pipeline.batch import Batch
from data_pipeline.loader import DataConfig, Shards, evaluation_batches, open_shards, train_batches
from data_pipeline.manifest import Block, Manifest, Shard, write_manifest
from data_pipeline.order import TrainingOrder
from data_pipeline.shard_format import SampleLayout, decode_samples, encode_samples, end_of_shard
from data_pipeline.storage import DataError, Store
from tests.conftest import forget_filesystems, pack_photographs
from tests.support.faulty_filesystem import FAULTS, FaultyFilesystem
from tests.support.s3_server import S3Server

GLOBAL_BATCH = 48
CONFIG = {
    "train_url": "a",
    "validation_url": "b",
    "lanes": 240,
    "fetch_threads": 4,
    "prefetch_batches": 2,
    "read_deadline_seconds": 600.0,
    "max_damaged_blocks": 0,
    "cache_dir": None,
    "cache_gib": 32.0,
}


def all_images(shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as they lie in the shards, read block by block."""
    parts = []
    for block in shards.manifest.blocks:
        data = (Path(shards.url) / shards.manifest.shards[block.shard].name).read_bytes()[block.begin : block.end]
        parts.append(decode_samples(data, shards.image_size))
    images = np.concatenate([images for images, _ in parts])
    shape = (-1, shards.image_size, shards.image_size, 3)
    return images.reshape(shape), np.concatenate([labels for _, labels in parts])


def steps(shards: Shards, *, ranks: int, micro: int, consumed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of ``count`` global batches, put together from all ranks."""
    iterators = [
        train_batches(
            shards,
            seed=3,
            lanes=12,
            consumed_samples=consumed,
            rank=rank,
            world_size=ranks,
            global_batch_images=GLOBAL_BATCH,
            micro_batch_images=micro,
            fetch_threads=2,
            prefetch_batches=2,
        )
        for rank in range(ranks)
    ]
    size = shards.image_size
    images = np.empty((count, GLOBAL_BATCH, size, size, 3), np.uint8)
    labels = np.empty((count, GLOBAL_BATCH), np.int64)
    for step in range(count):
        for rank, iterator in enumerate(iterators):
            for part in range(GLOBAL_BATCH // (ranks * micro)):
                batch = next(iterator)
                assert batch.position == consumed + (step + 1) * GLOBAL_BATCH
                assert batch.labels is not None and batch.valid is None
                images[step, rank::ranks][part * micro : (part + 1) * micro] = batch.images.numpy()
                labels[step, rank::ranks][part * micro : (part + 1) * micro] = batch.labels.numpy()
    for iterator in iterators:
        iterator.close()
    return images.reshape(-1, size, size, 3), labels.reshape(-1)


def test_global_batches_are_the_order_applied_to_the_shards(shards: Shards) -> None:
    images, labels = all_images(shards)
    starts = np.cumsum([0, *shards.manifest.block_counts])
    order = TrainingOrder(shards.manifest.block_counts, seed=3, lanes=12)
    count = 2 * shards.count // GLOBAL_BATCH
    got_images, got_labels = steps(shards, ranks=1, micro=GLOBAL_BATCH, consumed=0, count=count)
    samples = np.full(count * GLOBAL_BATCH, -1)
    for window in order.windows(0, 1):
        if window.first >= len(samples):
            break
        inside = window.positions < len(samples)
        samples[window.positions[inside]] = (starts[window.block] + order.rows(window))[inside]
    assert (got_images == images[samples]).all() and (got_labels == labels[samples]).all()


def test_an_epoch_holds_every_image_once(shards: Shards) -> None:
    images, _ = all_images(shards)
    got, _ = steps(shards, ranks=1, micro=24, consumed=0, count=shards.count // GLOBAL_BATCH + 1)
    assert Counter(x.tobytes() for x in got[: shards.count]) == Counter(x.tobytes() for x in images)


@pytest.mark.parametrize(("ranks", "micro"), [(2, 12), (3, 16), (4, 3), (6, 8), (16, 3)])
def test_ranks_and_accumulation_do_not_change_the_global_batches(shards: Shards, ranks: int, micro: int) -> None:
    # The start is a few batches before the end of the first epoch.
    consumed = GLOBAL_BATCH * (shards.count // GLOBAL_BATCH - 3)
    expected = steps(shards, ranks=1, micro=GLOBAL_BATCH, consumed=0, count=shards.count // GLOBAL_BATCH + 3)
    got = steps(shards, ranks=ranks, micro=micro, consumed=consumed, count=6)
    assert (got[0] == expected[0][consumed:]).all() and (got[1] == expected[1][consumed:]).all()


def numbered(folder: Path, counts: list[int]) -> Shards:
    """A data set of one-pixel images in blocks of the given sizes; labels number the images."""
    numbers, stride = np.arange(sum(counts)), SampleLayout(1).stride
    pixels = np.stack([numbers, numbers >> 8, numbers >> 16], 1).astype(np.uint8).reshape(-1, 1, 1, 3)
    data = encode_samples(numbers, numbers, pixels).tobytes() + end_of_shard(len(numbers) * stride)
    edges = [0, *np.cumsum(counts).tolist()]
    blocks = tuple(
        Block(0, a * stride, b * stride, b - a, xxhash.xxh3_64_hexdigest(data[a * stride : b * stride]))
        for a, b in pairwise(edges)
    )
    shard = Shard("train-000000.tar", len(data), len(numbers), "0" * 64)
    fields = ("numbered", "train", len(numbers), 1, "npy", {}, {}, ("a class",), 0, (0.0,) * 3, (0.0,) * 3)
    store = Store(str(folder), 0.0)
    store.write(shard.name, data)
    write_manifest(store, Manifest(*fields, (shard,), blocks))
    return open_shards(str(folder))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 30),
    kills=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_any_ranks_micro_batches_and_kills_give_the_samples_of_one_undisturbed_rank(
    counts: list[int], lanes: int, kills: list[tuple[int, int, int]]
) -> None:
    """kills: (ranks, images per micro-batch, steps) of each life of the run; batches are as large as a round."""

    def life(consumed: int, ranks: int, micro: int, steps: int) -> list[int]:
        seen = np.empty((steps, ranks * micro), np.int64)
        for rank in range(ranks):
            batches = train_batches(
                shards,
                seed=3,
                lanes=lanes,
                consumed_samples=consumed,
                rank=rank,
                world_size=ranks,
                global_batch_images=ranks * micro,
                micro_batch_images=micro,
                fetch_threads=2,
                prefetch_batches=1,
            )
            for step in range(steps):
                batch = next(batches)
                assert batch.labels is not None
                pixels = batch.images.numpy().reshape(-1, 3).astype(np.int64)
                assert (pixels @ [1, 256, 65536] == batch.labels.numpy()).all()
                seen[step, rank::ranks] = batch.labels.numpy()
            batches.close()
        return [int(label) for label in seen.reshape(-1)]

    with tempfile.TemporaryDirectory() as folder:
        shards = numbered(Path(folder), counts)
        kills = [(ranks, min(micro, max(1, shards.count // ranks)), n) for ranks, micro, n in kills]
        kills = [life for life in kills if life[0] * life[1] <= shards.count]
        lived: list[int] = []
        for ranks, micro, steps in kills:
            lived += life(len(lived), ranks, micro, steps)
        assert not lived or lived == life(0, 1, 1, len(lived))


@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
@pytest.mark.parametrize("limit", [None, 1, 5, 700, 10**9])
def test_evaluation_sees_each_image_once_in_equally_many_batches(shards: Shards, ranks: int, limit: int | None) -> None:
    images, labels = all_images(shards)
    count = min(limit or shards.count, shards.count)
    seen_images, seen_labels, lengths = [], [], set()
    for rank in range(ranks):
        batches = list(evaluation_batches(shards, rank=rank, world_size=ranks, batch_images=100, limit=limit))
        lengths.add(len(batches))
        for index, batch in enumerate(batches):
            assert batch.valid is not None and batch.labels is not None
            assert batch.position == index and len(batch.images) == 100
            seen_images.append(batch.images[batch.valid].numpy())
            seen_labels.append(batch.labels[batch.valid].numpy())
    assert len(lengths) == 1
    assert (np.concatenate(seen_images) == images[:count]).all()
    assert (np.concatenate(seen_labels) == labels[:count]).all()


PARTS = {
    "before the first read": (WindowReader, "__init__"),
    "making room": (assembly, "fresh_pages"),
    "looking for the next block": (TrainingOrder, "_epoch_windows"),
    "opening the batches": (loader, "assemble"),
    "reading a block": (WindowReader, "_fetch"),
    "answering": (Future, "set_result"),
    "filling a batch": (WindowReader, "next_samples"),
    "letting go of a block": (WindowReader, "let_go"),
}


@pytest.mark.parametrize("error", [MemoryError("planted"), TimeoutError("planted"), KeyboardInterrupt("planted")])
@pytest.mark.parametrize("part", PARTS)
def test_an_error_anywhere_in_a_thread_reaches_the_loop(
    shards: Shards, part: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    batches = one_rank(shards)
    monkeypatch.setattr(*PARTS[part], fail)
    started = time.monotonic()
    with pytest.raises(type(error), match="planted"):
        next(batches)
    assert time.monotonic() - started < 10
    batches.close()


def test_a_thread_that_ends_without_a_word_is_noticed(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = one_rank(shards)
    monkeypatch.setattr(threading.Thread, "run", lambda thread: None)
    with pytest.raises(RuntimeError, match="the thread that is to assemble batches ended without a word"):
        next(batches)
    monkeypatch.undo()
    batches = one_rank(shards)
    monkeypatch.setattr(WindowReader, "_fetch_all", lambda reader: None)
    with pytest.raises(RuntimeError, match="a thread that fetches blocks ended without a word"):
        next(batches)


def one_rank(shards: Shards) -> Generator[Batch, None, None]:
    batches = train_batches(
        shards,
        seed=0,
        lanes=4,
        consumed_samples=0,
        rank=0,
        world_size=1,
        global_batch_images=16,
        micro_batch_images=16,
        fetch_threads=2,
        prefetch_batches=2,
    )
    assert isinstance(batches, Generator)
    return batches


def test_threads_end_when_the_iterator_is_closed_or_forgotten(shards: Shards) -> None:
    before = threading.active_count()
    for close in (True, False):
        iterator = evaluation_batches(shards, rank=0, world_size=1, batch_images=10, limit=None)
        next(iterator)
        assert threading.active_count() > before
        if close:
            iterator.close()
        del iterator
        gc.collect()
        for _ in range(100):
            if threading.active_count() == before:
                break
            threading.Event().wait(0.05)
        assert threading.active_count() == before


@pytest.fixture
def damaged(tmp_path: Path) -> Shards:
    """A data set of its own, to be damaged; failing reads are given up soon."""
    pack_photographs(str(tmp_path / "d"), images=1200)
    return open_shards(str(tmp_path / "d"), read_deadline_seconds=0.3)


def flip_a_bit(shard: Path, place: int) -> None:
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)


def cut(shard: Path, place: int) -> None:
    shard.write_bytes(shard.read_bytes()[:place])


def remove(shard: Path, place: int) -> None:
    shard.unlink()


def replace_by_web_page(shard: Path, place: int) -> None:
    shard.write_bytes(b"<html>502 Bad Gateway</html>")


def empty(shard: Path, place: int) -> None:
    shard.write_bytes(b"")


def compress(shard: Path, place: int) -> None:
    shard.write_bytes(gzip.compress(shard.read_bytes()))


def replace_by_another_shard(shard: Path, place: int) -> None:
    pack_photographs(str(shard.parent / "other"), images=1200, seed=1)
    os.replace(shard.parent / "other" / shard.name, shard)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "0 bytes came instead of"),
        (compress, "bytes came instead of|the checksum is"),
        (replace_by_another_shard, "the checksum is"),
        (flip_a_bit, "the checksum is"),
        (cut, "bytes came instead of"),
        (remove, "there is no such .* object, although the manifest lists it"),
        (replace_by_web_page, "bytes came instead of"),
    ],
)
def test_damage_is_found_named_and_ends_with_code_65(
    damaged: Shards, damage: Callable[[Path, int], None], message: str
) -> None:
    block = damaged.manifest.blocks[1]
    whole = list(evaluation_batches(damaged, rank=0, world_size=1, batch_images=256, limit=None))
    damage(Path(damaged.url) / damaged.manifest.shards[0].name, block.begin + 5000)
    batches = evaluation_batches(damaged, rank=0, world_size=1, batch_images=256, limit=None)
    with pytest.raises(DataError, match=rf"cannot read .*train-000000.tar \(bytes \d+-\d+\).*{message}") as caught:
        for batch in batches:
            assert batch.position < 2, "nothing of the damaged block is handed out"
            assert torch.equal(batch.images, whole[batch.position].images)
    assert caught.value.exit_code == 65


def test_faulty_storage_changes_no_byte_of_three_epochs(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * shards.count // GLOBAL_BATCH + 1
    expected = steps(shards, ranks=2, micro=24, consumed=0, count=count)
    faulty = FaultyFilesystem(share=0.4, seed=1)
    monkeypatch.setattr(storage, "open_filesystem", lambda url: faulty)
    monkeypatch.setattr(storage, "LONGEST_DELAY_SECONDS", 0.01)
    got = steps(shards, ranks=2, micro=24, consumed=0, count=count)
    assert (got[0] == expected[0]).all() and (got[1] == expected[1]).all()
    assert all(faulty.counts[fault] for fault in FAULTS), "every kind of fault struck"


def test_s3_gives_the_same_batches_as_the_local_disk(shards: Shards, s3_bucket: str) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    remote = open_shards(f"s3://{s3_bucket}/train")
    assert remote.digest == shards.digest
    expected = steps(shards, ranks=1, micro=48, consumed=960, count=20)
    got = steps(remote, ranks=3, micro=8, consumed=960, count=20)
    assert (got[0] == expected[0]).all() and (got[1] == expected[1]).all()


def test_a_server_killed_in_the_middle_of_an_epoch_changes_nothing(
    shards: Shards, s3_bucket: str, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    remote = open_shards(f"s3://{s3_bucket}/train", read_deadline_seconds=120.0)
    expected = list(evaluation_batches(shards, rank=0, world_size=1, batch_images=64, limit=None))
    got = []
    for number, batch in enumerate(evaluation_batches(remote, rank=0, world_size=1, batch_images=64, limit=None)):
        got.append(batch)
        if number == 2:
            s3_server.pause()  # the next read is under way when the end comes
            threading.Timer(1.0, s3_server.kill).start()
            threading.Timer(3.0, s3_server.start).start()
    assert "trying again" in caplog.text
    assert len(got) == len(expected)
    assert all(torch.equal(a.images, b.images) for a, b in zip(got, expected, strict=True))


def test_a_server_away_for_longer_than_the_deadline_is_one_sentence(s3_bucket: str, s3_server: S3Server) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    remote = open_shards(f"s3://{s3_bucket}/train", read_deadline_seconds=2.0)
    s3_server.kill()
    try:
        with pytest.raises(DataError, match=rf"cannot read s3://{s3_bucket}/train/.* gave up after \d+ s") as caught:
            list(evaluation_batches(remote, rank=0, world_size=1, batch_images=64, limit=None))
    finally:
        s3_server.start()
    assert caught.value.exit_code == 69


def test_a_shard_that_disappears_from_s3_in_the_middle_of_an_epoch_is_named_at_once(s3_bucket: str) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=6000)
    remote = open_shards(f"s3://{s3_bucket}/train", read_deadline_seconds=600.0)
    with pytest.raises(DataError, match="there is no such .* object, although the manifest lists it") as caught:
        for batch in evaluation_batches(remote, rank=0, world_size=1, batch_images=64, limit=None):
            if batch.position == 1:
                remote.store.remove("train-000000.tar")
    assert caught.value.exit_code == 65 and f"s3://{s3_bucket}/train/train-000000.tar" in str(caught.value)


def test_no_bucket_and_wrong_credentials_are_named_when_a_data_set_is_opened(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no shards at s3://no-such-bucket/x: there is no bucket no-such-b") as caught:
        open_shards("s3://no-such-bucket/x")
    assert caught.value.exit_code == 2
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_filesystems()
    with pytest.raises(DataError, match=f"s3://{s3_bucket}/x/manifest.json: access is denied") as caught:
        open_shards(f"s3://{s3_bucket}/x")
    assert caught.value.exit_code == 2


def test_a_program_that_ends_without_closing_the_iterator_ends_at_once(shards: Shards) -> None:
    code = (
        "import sys; from data_pipeline.loader import *;"
        "batches = evaluation_batches(open_shards(sys.argv[1]), rank=0, world_size=1, batch_images=8, limit=None);"
        "next(batches)"
    )
    subprocess.run([sys.executable, "-c", code, shards.url], check=True, timeout=60)


def test_a_forked_process_reads_with_connections_of_its_own(shards: Shards, s3_bucket: str) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=600)
    remote = open_shards(f"s3://{s3_bucket}/train")
    child = os.fork()
    if child == 0:
        batches = list(evaluation_batches(remote, rank=0, world_size=1, batch_images=100, limit=None))
        os._exit(0 if len(batches) == 6 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_data_set_smaller_than_a_global_batch_is_refused(shards: Shards) -> None:
    with pytest.raises(DataError, match="3000 images, fewer than one global batch of 4096") as caught:
        train_batches(
            shards,
            seed=0,
            lanes=1,
            consumed_samples=0,
            rank=0,
            world_size=1,
            global_batch_images=4096,
            micro_batch_images=4096,
            fetch_threads=1,
            prefetch_batches=1,
        )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_url", " "),
        ("lanes", 0),
        ("fetch_threads", 0),
        ("prefetch_batches", -1),
        ("read_deadline_seconds", 0.0),
        ("max_damaged_blocks", -1),
        ("cache_gib", 0.0),
    ],
)
def test_config_names_the_field_that_is_wrong(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        DataConfig(**(CONFIG | {field: value}))  # type: ignore[arg-type]
