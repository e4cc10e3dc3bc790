"""Does the cache read each block once a node, keep its bound, and survive kills, damage and full disks?"""

import contextlib
import errno
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from data_pipeline import block_cache
from data_pipeline.block_cache import BlockCache
from data_pipeline.loader import Shards, evaluation_batches, open_shards
from data_pipeline.storage import TORN_FILE, DataError, Store
from tests.conftest import pack_photographs
from tests.support.s3_server import S3Server
from tests.support.small_disk import on_small_disk

BLOCK = 10_000
NUM_BLOCKS = 12
DATA = np.random.default_rng(0).integers(0, 256, (NUM_BLOCKS, BLOCK), dtype=np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "store"), 0.5)
    store.write("x", DATA.tobytes())
    return store


def read(cache: BlockCache, store: Store, number: int) -> bytes:
    into = memoryview(bytearray(BLOCK))
    xxh3 = xxhash.xxh3_64_hexdigest(DATA[number].tobytes())
    cache.read_block(store, "x", number * BLOCK, into, xxh3, threading.Event())
    return bytes(into)


def cached(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if "-" in path.name]


def test_a_block_is_asked_for_once(store: Store, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 10 * BLOCK)
    assert read(cache, store, 3) == DATA[3].tobytes()
    store.remove("x")
    assert read(cache, store, 3) == DATA[3].tobytes()
    assert read(BlockCache(str(tmp_path / "cache"), 10 * BLOCK), store, 3) == DATA[3].tobytes(), "by the next job too"
    with pytest.raises(DataError):
        read(cache, store, 4)


@pytest.mark.parametrize("damage", [b"", b"short", bytes(BLOCK), bytes(BLOCK + 1)])
def test_a_damaged_block_is_read_from_the_store_again(store: Store, tmp_path: Path, damage: bytes) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 10 * BLOCK)
    read(cache, store, 3)
    (path,) = cached(tmp_path / "cache")
    path.write_bytes(damage)
    assert read(cache, store, 3) == DATA[3].tobytes()
    assert path.read_bytes() == DATA[3].tobytes()


def test_what_was_used_longest_ago_makes_room(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "TOUCH_SECONDS", 0.0)
    cache = BlockCache(str(tmp_path / "cache"), 3 * BLOCK)
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        read(cache, store, number)
        time.sleep(0.02)
    store.remove("x")
    for number in (0, 2, 3):
        assert read(cache, store, number) == DATA[number].tobytes()
    with pytest.raises(DataError):
        read(cache, store, 1)


def test_a_block_larger_than_the_cache_passes_by(store: Store, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "cache"), BLOCK - 1)
    assert read(cache, store, 0) == DATA[0].tobytes() and cached(tmp_path / "cache") == []


def held_bytes(folder: str) -> int:
    held = 0
    for path in cached(Path(folder)):
        with contextlib.suppress(FileNotFoundError):  # another process evicted it after the listing
            held += path.stat().st_size
    return held


def hammer(
    folder: str, limit: int, store: Store, seed: int, stop_after: float, failures: "multiprocessing.Queue[str]"
) -> None:
    cache, rng = BlockCache(folder, limit), np.random.default_rng(seed)
    deadline = time.monotonic() + stop_after
    while time.monotonic() < deadline:
        number = int(rng.integers(NUM_BLOCKS))
        if read(cache, store, number) != DATA[number].tobytes():
            failures.put(f"block {number} was wrong")
        held = held_bytes(folder)
        if held > limit:
            failures.put(f"{held} bytes are more than {limit}")


def test_many_processes_keep_the_bound_and_kills_leave_no_bad_file(store: Store, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures: multiprocessing.Queue[str] = context.Queue()
    limit, folder = 5 * BLOCK, str(tmp_path / "cache")
    BlockCache(folder, limit)
    processes = [context.Process(target=hammer, args=(folder, limit, store, seed, 3.0, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    time.sleep(1.0)
    os.kill(processes[0].pid or 0, signal.SIGKILL)
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    for process in processes:
        process.join()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [-9, -9, 0, 0]
    for path in cached(tmp_path / "cache"):
        if TORN_FILE not in path.name:
            data = path.read_bytes()
            assert path.name == f"{xxhash.xxh3_64_hexdigest(data)}-{len(data)}"


def test_torn_files_of_dead_processes_are_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    BlockCache(str(folder), BLOCK)
    old, new = folder / f"a-1{TORN_FILE}1", folder / f"a-1{TORN_FILE}2"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    BlockCache(str(folder), BLOCK)
    assert new.exists() and not old.exists()


def test_a_full_disk_ends_the_caching_but_not_the_reading(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 10 * BLOCK)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            assert read(cache, store, number) == DATA[number].tobytes()
    assert caplog.text.count("no more caching in") == 1 and "No space left on device" in caplog.text
    assert cached(tmp_path / "cache") == []


READ_ALL = """
import sys, threading
import xxhash
from data_pipeline.block_cache import BlockCache
from data_pipeline.storage import Store

store, block = Store(sys.argv[1], 0.5), 10_000
cache = BlockCache(sys.argv[2], 1 << 30)
for epoch in range(2):
    for number, xxh3 in enumerate(sys.argv[3:]):
        into = memoryview(bytearray(block))
        cache.read_block(store, "x", number * block, into, xxh3, threading.Event())
        assert xxhash.xxh3_64_hexdigest(into) == xxh3
print("all read")
"""


def test_a_disk_that_is_really_full_ends_the_caching_but_not_the_reading(store: Store, tmp_path: Path) -> None:
    arguments = [store.url, f"{tmp_path}/disk/cache", *(xxhash.xxh3_64_hexdigest(row.tobytes()) for row in DATA)]
    done = on_small_disk(tmp_path / "disk", 64, '"$@"', sys.executable, "-c", READ_ALL, *arguments)
    assert done.returncode == 0 and done.stdout == "all read\n", done.stderr
    assert done.stderr.count("no more caching in") == 1 and "No space left on device" in done.stderr


SABOTAGE: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "a file in its place": lambda folder: (shutil.rmtree(folder, ignore_errors=True), folder.write_text("")),
    "no locks": lambda folder: shutil.rmtree(folder / "locks"),
    "a file for locks": lambda folder: (shutil.rmtree(folder / "locks"), (folder / "locks").write_text("")),
    "folders for locks": lambda folder: [
        ((folder / f"locks/{number}").unlink(missing_ok=True), (folder / f"locks/{number}").mkdir())
        for number in range(block_cache.NUM_LOCKS)
    ],
    "a pipe for the lock of sizes": lambda folder: ((folder / "locks/size").unlink(), os.mkfifo(folder / "locks/size")),
    "a folder for the total": lambda folder: ((folder / "total").unlink(), (folder / "total").mkdir()),
    "folders for blocks": lambda folder: [
        (folder / f"{xxhash.xxh3_64_hexdigest(row.tobytes())}-{BLOCK}").mkdir() for row in DATA[1:]
    ],
}


@pytest.mark.parametrize("what", SABOTAGE)
@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "in the middle"])
def test_whatever_becomes_of_the_folder_is_one_warning(
    store: Store, tmp_path: Path, what: str, begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    cache = BlockCache(str(folder), 10 * BLOCK)
    if begun:
        assert read(cache, store, 0) == DATA[0].tobytes()
    SABOTAGE[what](folder)
    if not begun:
        cache = BlockCache(str(folder), 10 * BLOCK)
    for number in 2 * list(range(NUM_BLOCKS)):
        assert read(cache, store, number) == DATA[number].tobytes()
    mended = not begun and what in ("removed", "no locks")
    assert caplog.text.count("blocks come from the store") == len(caplog.records) == (0 if mended else 1), caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"-50000", b"9" * 5000, b"1e3"])
def test_a_total_that_is_no_number_is_counted_again(
    store: Store, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 3 * BLOCK)
    (tmp_path / "cache/a-1").mkdir()  # somebody else's, and never removed
    (tmp_path / "cache/holiday-2026").write_bytes(bytes(4 * BLOCK))
    for number in range(NUM_BLOCKS):
        (tmp_path / "cache/total").write_bytes(content)
        assert read(cache, store, number) == DATA[number].tobytes()
        assert len([path for path in cached(tmp_path / "cache") if path.stat().st_size == BLOCK]) <= 3
    assert not caplog.records and (tmp_path / "cache/a-1").exists() and (tmp_path / "cache/holiday-2026").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.ENOLCK, errno.ESTALE])
@pytest.mark.parametrize(
    "operation", ["os.open", "os.scandir", "os.replace", "fcntl.flock", "os.fstat", "pathlib.Path.open", "os.utime"]
)
@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "in the middle"])
def test_every_operation_on_the_folder_may_fail(
    store: Store,
    tmp_path: Path,
    number: int,
    operation: str,
    begun: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(block_cache, "TOUCH_SECONDS", -1.0)
    monkeypatch.setattr(Store, "read_block", read_from_memory)
    cache = BlockCache(str(tmp_path / "cache"), 3 * BLOCK)
    assert not begun or read(cache, store, 0) == DATA[0].tobytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as faulty:
        faulty.setattr(operation, fail)
        if not begun:
            cache = BlockCache(str(tmp_path / "cache"), 3 * BLOCK)
        got = [read(cache, store, block) for block in sorted(2 * list(range(NUM_BLOCKS)))]
    assert got == [DATA[block].tobytes() for block in sorted(2 * list(range(NUM_BLOCKS)))]
    assert caplog.text.count("blocks come from the store") == len(caplog.records) == (operation != "os.utime")


def read_from_memory(store: Store, name: str, begin: int, into: memoryview, xxh3: str, stop: threading.Event) -> None:
    into[:] = DATA.reshape(-1)[begin : begin + len(into)].data


def test_a_lock_that_a_stopped_process_holds_does_not_hold_this_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(block_cache, "LOCK_SECONDS", 0.2)
    cache, other = BlockCache(str(tmp_path / "cache"), 10 * BLOCK), BlockCache(str(tmp_path / "cache"), 10 * BLOCK)
    lock = str(int(xxhash.xxh3_64_hexdigest(DATA[0].tobytes()), 16) % block_cache.NUM_LOCKS)
    with other._locked(lock, None):
        assert read(cache, store, 0) == DATA[0].tobytes()
    assert cache.writable and not caplog.records
    with other._locked("size", None):
        assert read(cache, store, 1) == DATA[1].tobytes()
    assert caplog.text.count("blocks come from the store") == 1 and "another process has held a lock" in caplog.text


@pytest.mark.parametrize("change", ["ro", "nr_inodes=3"])
def test_a_disk_that_takes_no_more_files_ends_the_caching_but_not_the_reading(
    store: Store, tmp_path: Path, change: str
) -> None:
    arguments = [store.url, f"{tmp_path}/disk/cache", *(xxhash.xxh3_64_hexdigest(row.tobytes()) for row in DATA)]
    script = f'mount -o remount,{change} "{tmp_path}/disk" && "$@"'
    done = on_small_disk(tmp_path / "disk", 2048, script, sys.executable, "-c", READ_ALL, *arguments)
    assert done.returncode == 0 and done.stdout == "all read\n", done.stderr
    assert done.stderr.count("blocks come from the store") == 1


def test_what_a_read_only_disk_holds_is_used(store: Store, tmp_path: Path) -> None:
    arguments = [store.url, f"{tmp_path}/disk/cache", *(xxhash.xxh3_64_hexdigest(row.tobytes()) for row in DATA)]
    script = f'"$@" && mount -o remount,ro "{tmp_path}/disk" && rm "{store.url}/x" && "$@"'
    done = on_small_disk(tmp_path / "disk", 2048, script, sys.executable, "-c", READ_ALL, *arguments)
    assert done.returncode == 0 and done.stdout == "all read\nall read\n", done.stderr


def test_a_second_epoch_from_s3_needs_no_server(
    shards: Shards, s3_bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    cache = BlockCache(str(tmp_path / "cache"), 1 << 30)
    remote = open_shards(f"s3://{s3_bucket}/train", read_deadline_seconds=1.0, cache=cache)
    assert open_shards(shards.url, cache=cache).cache is None, "local files are not copied to the disk again"
    expected = list(evaluation_batches(shards, rank=0, world_size=1, batch_images=500, limit=None))
    for epoch in range(2):
        got = list(evaluation_batches(remote, rank=0, world_size=1, batch_images=500, limit=None))
        assert all(torch.equal(a.images, b.images) for a, b in zip(got, expected, strict=True))
        if epoch == 0:
            s3_server.kill()
    s3_server.start()
