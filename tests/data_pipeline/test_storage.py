"""Do reads and writes survive what storage does, and do failures name the URL, the range and the reason?"""

import contextlib
import errno
import gc
import itertools
import os
import pickle
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline import storage
from data_pipeline.storage import DataError, Store, normalised, open_filesystem, path_of, read_json, with_retries
from tests.conftest import forget_filesystems
from tests.support.faulty_filesystem import FAULTS, FaultyFilesystem
from tests.support.faulty_s3 import FaultyS3
from tests.support.s3_server import S3Server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LONGEST_DELAY_SECONDS", 0.001)


def failing(error: Exception, times: int) -> Callable[[], str]:
    """Fails so many times, then answers."""
    left = [times]

    def attempt() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "answer"

    return attempt


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("error", [OSError("x"), TimeoutError(), ConnectionResetError(), TypeError("s3fs bug")])
def test_passing_failures_are_tried_again_until_they_pass(error: Exception) -> None:
    assert with_retries(failing(error, 20), "read u", 60.0, None) == "answer"


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), IsADirectoryError("x")])
def test_permanent_failures_are_tried_once_more_and_reported_at_once(error: Exception) -> None:
    assert with_retries(failing(error, 1), "read u", 60.0, None) == "answer"
    started = time.monotonic()
    with pytest.raises(DataError, match="^cannot read u: ") as caught:
        with_retries(failing(error, 2), "read u", 60.0, None)
    assert caught.value.exit_code == 2 and time.monotonic() - started < 5


def test_a_suspension_does_not_use_up_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job may be suspended for days while a request is on its way, or while it waits for the next try."""
    days = itertools.count(0.0, 86_400.0)  # one goes by whenever somebody looks
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=lambda: next(days), sleep=lambda _: None))
    fail = failing(ConnectionResetError("woken up"), 3)
    assert with_retries(fail, "read u", 900.0, None) == "answer"
    fail = failing(OSError("a server that hangs"), 10**9)
    with pytest.raises(DataError, match="gave up after 9.. s and [89] tries"):
        with_retries(fail, "read u", 900.0, None)
    with pytest.raises(DataError, match="gave up after .* s and [23] tries"):
        with_retries(fail, "read u", 60.0, None)


def test_the_deadline_ends_it_with_how_long_and_why() -> None:
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"^cannot read u: gave up after [01] s and \d+ tr(y|ies); last: OSError: why$"
    ) as caught:
        with_retries(failing(OSError("why"), 10**9), "read u", 0.5, None)
    assert caught.value.exit_code == 69
    assert 0.4 < time.monotonic() - started < 5


def test_a_stop_request_ends_the_waiting() -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    with pytest.raises(DataError):
        with_retries(failing(OSError("x"), 10**9), "read u", 600.0, stop)
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("no_waiting")
def test_reads_through_faults_give_the_right_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(data)
    faulty = FaultyFilesystem(share=0.9, seed=0)
    monkeypatch.setattr(storage, "open_filesystem", lambda url: faulty)
    store = Store(str(tmp_path), 60.0)
    for begin in range(0, len(data), 512):
        piece, got = data[begin : begin + 512], bytearray(512)
        store.read_block("x", begin, memoryview(got), xxhash.xxh3_64_hexdigest(piece), threading.Event())
        assert got == piece
    assert all(faulty.counts[fault] for fault in FAULTS), "every kind of fault struck"


def test_a_wrong_checksum_names_object_and_range_and_is_corruption(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    where = re.escape(f"{tmp_path}/x (bytes 10-20)")
    with pytest.raises(DataError, match=f"cannot read {where}: .*checksum") as caught:
        Store(str(tmp_path), 0.0).read_block("x", 10, memoryview(bytearray(10)), "0" * 16, threading.Event())
    assert caught.value.exit_code == 65
    with pytest.raises(DataError, match="cannot read .*10 bytes came instead of 20") as caught:
        Store(str(tmp_path), 0.0).read("x", 90, 110)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("url", "message", "code"),
    [
        ("pipe:cat x.tar", "start a program", 77),
        ("cmd:cat x.tar", "start a program", 77),
        ("filecache::s3://a/b", "chain filesystems", 77),
        ("s3://user:secret@bucket/x", "password in the URL", 77),
        ("ftp://host/x", "not a known storage", 2),
        ("", "is empty", 2),
        ("s3://", "names no bucket", 2),
        ("s3:///prefix", "names no bucket", 2),
    ],
)
def test_urls_that_are_not_for_data_are_refused(url: str, message: str, code: int) -> None:
    with pytest.raises(DataError, match=message) as caught:
        normalised(url)
    assert caught.value.exit_code == code
    assert "secret" not in str(caught.value)


def test_paths_follow_fsspec() -> None:
    assert path_of("s3://bucket/a/b/") == "bucket/a/b"
    assert path_of("relative") == f"{Path.cwd()}/relative"
    assert normalised("s3://bucket/a/") == "s3://bucket/a"


def test_local_objects_are_written_whole_listed_and_removed(tmp_path: Path) -> None:
    store = Store(f"{tmp_path}/new/folder", 0.0)
    assert store.names() == [] and not store.exists("x")
    store.write("deep/x", b"12345")
    store.write("y", b"")
    assert store.names() == ["deep", "y"] and store.exists("deep/x")
    assert store.walk() == {"deep/x": 5, "y": 0}
    assert store.read("deep/x") == b"12345" and store.read("deep/x", 1, 3) == b"23"
    store.remove("deep")
    store.remove("deep")
    assert store.names() == ["y"]


STRANGE_NAMES = (
    "run[1]",
    "run*",
    "run?",
    "[!a]",
    "ru**",
    "a b ",
    "a#b",
    "100%25",
    "a+b",
    "画像",
    "x?versionId=1",
    "{a,b}",
)
NEIGHBOURS = (
    "run1",
    "runx",
    "b",
    "a",
    "100%",
    "x",
)  # what these would mean as patterns or in a URL


@pytest.fixture(params=["local", "s3", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder on each kind of storage."""
    if request.param == "s3":
        yield f"s3://{request.getfixturevalue('s3_bucket')}/root"
    elif request.param == "memory":
        yield "memory://root"
        open_filesystem("memory://").store.clear()
        open_filesystem("memory://").pseudo_dirs[:] = [""]
    else:
        yield str(tmp_path / "root")


def test_of_many_writers_one_creates_an_object(root: str) -> None:
    store = Store(root, 30.0)
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: store.create("deep/x", b"%d" % number), range(8)))
    (winner,) = [number for number, first in enumerate(created) if first] if "s3:" not in root else [None]
    assert any(created) and not store.create("deep/x", b"late")  # Swift looks for the object, then writes
    assert winner is None or store.read("deep/x") == b"%d" % winner
    assert store.walk().keys() == {"deep/x"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_created_where_there_are_no_links(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.link", fail)
    store = Store(str(tmp_path), 0.0)
    assert store.create("x", b"first") and not store.create("x", b"second")
    assert store.walk() == {"x": 5} and store.read("x") == b"first"


def test_an_object_is_created_by_a_store_that_knows_no_conditions(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    store = Store(f"s3://{s3_bucket}", 30.0)
    for number in (1, 2):
        faulty_s3.meet("not implemented", times=1, writes=True)
        assert store.create("x", b"%d" % number) == (number == 1)
    assert store.read("x") == b"1"


def test_every_path_is_literal(root: str) -> None:
    """Names are no patterns for any operation, neither in the folder's URL nor below it; neighbours stay untouched."""
    everything = Store(root, 30.0)
    for neighbour in NEIGHBOURS:
        everything.write(f"{neighbour}/kept", b"kept")
    before = everything.walk()
    for folder, name in zip(STRANGE_NAMES, STRANGE_NAMES[5:] + STRANGE_NAMES[:5], strict=True):
        store = Store(f"{root}/{folder}", 30.0)
        assert store.names() == [] and not store.exists("kept")
        store.remove("kept")
        store.write(f"{name}/{name}", name.encode())
        assert store.write_pieces(f"{name}/pieces", lambda: iter([memoryview(b"123")])) == 3
        assert store.names() == [name] and store.names(name) == sorted([name, "pieces"])
        assert store.walk() == {f"{name}/{name}": len(name.encode()), f"{name}/pieces": 3}
        assert store.read_whole(f"{name}/{name}", 100) == name.encode()
        store.remove(f"{name}/{name}")
        assert store.names(name) == ["pieces"]
        store.remove(name)
        assert store.names() == []
    assert everything.walk() == before


@pytest.mark.parametrize("name", ["", "..", "../other", "a/../../other", "."])
def test_a_removal_never_leaves_its_folder(root: str, name: str) -> None:
    everything = Store(root, 30.0)
    everything.write("other/kept", b"1")
    everything.write("mine/a/kept", b"1")
    with pytest.raises(DataError, match="cannot remove .*is not inside of") as caught:
        Store(f"{root}/mine", 30.0).remove(name)
    assert caught.value.exit_code == 77
    assert everything.walk() == {"other/kept": 1, "mine/a/kept": 1}


def test_a_removal_does_not_follow_links(tmp_path: Path) -> None:
    everything, mine = Store(str(tmp_path), 0.0), Store(f"{tmp_path}/mine", 0.0)
    everything.write("other/deep/kept", b"1")
    mine.write("folder/x", b"1")
    (tmp_path / "mine/link").symlink_to(tmp_path / "other")
    (tmp_path / "mine/folder/link").symlink_to(tmp_path / "other/deep")
    with pytest.raises(DataError, match="cannot remove .*/mine/link/deep: a link leads out of ") as caught:
        mine.remove("link/deep")
    assert caught.value.exit_code == 77
    mine.remove("folder")
    mine.remove("link")
    assert mine.names() == [] and everything.walk() == {"other/deep/kept": 1}


def test_an_object_that_marks_a_folder_is_not_in_it(s3_bucket: str) -> None:
    """Web consoles make one, named like the folder with a slash behind it, for a folder that somebody creates there."""
    open_filesystem("s3://x").call_s3("put_object", Bucket=s3_bucket, Key="new/", Body=b"")
    everything, store = Store(f"s3://{s3_bucket}", 30.0), Store(f"s3://{s3_bucket}/new", 30.0)
    assert store.names() == [] and store.walk() == {}
    everything.remove("new")
    assert everything.names() == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="cannot write .*disk is full") as caught:
        Store(str(tmp_path), 60.0).write("x", b"data")
    assert caught.value.exit_code == 73
    assert list(tmp_path.iterdir()) == []


def pieces_that_fail(first: bytes) -> Iterator[memoryview]:
    yield memoryview(first)
    raise DataError("no more")


def test_what_has_the_name_of_an_unfinished_file_later_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, later = os.replace, []

    def replace_and_begin_another(source: str, target: str) -> None:
        replace(source, target)
        later.append(Path(source))
        later[0].write_bytes(b"of another writer")

    monkeypatch.setattr(os, "replace", replace_and_begin_another)
    with storage.atomic_file(str(tmp_path / "a")) as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and later[0].read_bytes() == b"of another writer"


def test_a_file_that_cannot_be_removed_either_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: str, *_: object) -> None:
        raise OSError(errno.EIO, call)

    monkeypatch.setattr(os, "replace", partial(fail, "of the replacement"))
    monkeypatch.setattr(os, "unlink", partial(fail, "of the removal"))
    with pytest.raises(OSError, match="of the replacement"), storage.atomic_file(str(tmp_path / "a")) as file:
        file.write(b"x")


def test_pieces_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(f"{tmp_path}/new", 0.0)
    assert store.write_pieces("deep/x", lambda: map(memoryview, (b"123", b"", b"45"))) == 5
    assert store.read("deep/x") == b"12345"
    with pytest.raises(DataError, match="no more"):
        store.write_pieces("deep/y", lambda: pieces_that_fail(b"123"))
    assert store.walk() == {"deep/x": 5}


def test_errors_cross_processes_unharmed() -> None:
    error = pickle.loads(pickle.dumps(DataError("sentence", 65)))
    assert (str(error), error.exit_code) == ("sentence", 65)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"<html>"])
def test_what_is_not_json_is_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match="is not JSON") as caught:
        read_json(Store(str(tmp_path), 0.0), "x.json", 100)
    assert caught.value.exit_code == 65
    with pytest.raises(DataError, match="bytes, more than 0"):
        read_json(Store(str(tmp_path), 0.0), "x.json", 0)


def test_s3_objects_are_written_read_by_range_listed_and_removed(s3_bucket: str) -> None:
    store = Store(f"s3://{s3_bucket}/prefix", 30.0)
    assert store.names() == [] and not store.exists("x")
    store.write("deep/x", b"12345")
    assert store.names() == ["deep"] and store.exists("deep/x"), "listings are not cached"
    assert store.walk() == {"deep/x": 5}
    assert store.read("deep/x", 1, 3) == b"23" and store.read("deep/x") == b"12345"
    assert store.read_whole("deep/x", 5) == b"12345"
    with pytest.raises(DataError, match="deep/x has 5 bytes, more than 4"):
        store.read_whole("deep/x", 4)
    store.write("empty", b"")
    assert store.read_whole("empty", 5) == b""
    store.remove("empty")
    store.remove("deep")
    assert store.names() == []


@pytest.mark.parametrize("size", [0, 5, 11 * 2**20], ids=["nothing", "one request", "several requests"])
def test_pieces_are_written_to_s3_whole_or_not_at_all(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(open_filesystem("s3://x"), "default_block_size", 5 * 2**20)
    store, content = Store(f"s3://{s3_bucket}/prefix", 30.0), random.Random(0).randbytes(size)
    pieces = [memoryview(content)[begin : begin + 2**20] for begin in range(0, size, 2**20)]
    assert store.write_pieces("deep/x", lambda: iter(pieces)) == size
    assert store.read("deep/x") == content
    with pytest.raises(DataError, match="no more"):
        store.write_pieces("deep/y", lambda: pieces_that_fail(content))
    gc.collect()  # a file that Python drops must not write what it holds
    assert store.walk() == {"deep/x": size}


def test_a_name_that_no_bucket_can_have_is_refused_at_once(s3_bucket: str) -> None:
    for action in (lambda store: store.walk(), lambda store: store.write("y", b"1")):
        with pytest.raises(DataError, match="s3://Bad_Bucket/x.*bucket is not valid") as caught:
            action(Store("s3://Bad_Bucket/x", 600.0))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("begin", [90, 100, 200])
def test_an_object_on_s3_that_ends_too_early_is_corruption(s3_bucket: str, begin: int) -> None:
    """Not storage that is away, wherever it ends: S3 answers a range behind the end with an error of its own."""
    store = Store(f"s3://{s3_bucket}", 0.5)
    store.write("x", bytes(100))
    came = max(0, 100 - begin)
    with pytest.raises(DataError, match=rf"cannot read .*/x \(bytes .*: {came} bytes came instead of 50") as caught:
        store.read("x", begin, begin + 50)
    assert caught.value.exit_code == 65


def test_a_missing_bucket_is_named(s3_bucket: str) -> None:
    assert Store(f"s3://{s3_bucket}/nothing", 30.0).missing_part() is None
    assert (
        Store("s3://no-such-bucket/x", 30.0).missing_part() == "there is no bucket no-such-bucket, or no access to it"
    )
    with pytest.raises(DataError, match="cannot write s3://no-such-bucket/x/y: there is no such bucket") as caught:
        Store("s3://no-such-bucket/x", 30.0).write("y", b"1")
    assert caught.value.exit_code == 2


def test_wrong_credentials_are_reported_at_once(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_filesystems()
    store = Store(f"s3://{s3_bucket}/x", 600.0)
    for action in (lambda: store.exists("y"), lambda: store.read("y", 0, 1), lambda: store.write("y", b"1")):
        with pytest.raises(DataError, match=f"cannot [a-z ]* s3://{s3_bucket}/x/y.*access is denied") as caught:
            action()
        assert caught.value.exit_code == 2


@pytest.fixture
def faulty_s3(s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy in front of the server, which this process's S3 client goes through."""
    proxy = FaultyS3(s3_server.endpoint)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, proxy.endpoint)
    forget_filesystems()
    yield proxy
    proxy.stop()


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fault", ["busy", "broken off", "trickle"])
def test_a_busy_breaking_or_trickling_server_gives_the_right_bytes_in_the_end(
    fault: str, faulty_s3: FaultyS3, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 40
    store = Store(f"s3://{s3_bucket}", 120.0)
    store.write("x", data)
    monkeypatch.setattr(storage, "REQUEST_SECONDS", 2.0 if fault == "trickle" else 60.0)
    faulty_s3.meet(fault, times=1 if fault == "trickle" else 5)
    for begin in range(0, len(data), 2048):
        piece, got = data[begin : begin + 2048], bytearray(2048)
        store.read_block("x", begin, memoryview(got), xxhash.xxh3_64_hexdigest(piece), threading.Event())
        assert got == piece
    assert faulty_s3.met == (1 if fault == "trickle" else 5)


@pytest.mark.parametrize(
    ("fault", "message", "code"),
    [
        ("forbidden", "access is denied", 2),
        ("skewed", "access is denied .*made up", 2),
        ("expired", "access is denied .*made up", 2),
        ("elsewhere", "the bucket is in another region", 2),
        ("busy", "gave up after .* tr(y|ies); last: ", 69),
        ("invalid", "the store refuses it .*made up", 2),
        ("no code", "the store refuses it .*SomethingElse.*made up", 2),
        ("not allowed", "access is denied .*made up", 2),
        ("not implemented", "the store refuses it .*made up", 2),
        ("no bucket", "there is no such bucket", 2),
    ],
)
def test_an_answer_that_stays_is_named(
    fault: str, message: str, code: int, faulty_s3: FaultyS3, s3_bucket: str
) -> None:
    store = Store(f"s3://{s3_bucket}", 1.0 if fault == "busy" else 600.0)
    store.write("x", bytes(100))
    faulty_s3.meet(fault, times=10**9)
    with pytest.raises(DataError, match=rf"^cannot read s3://{s3_bucket}/x \(bytes 0-100\): .*{message}") as caught:
        store.read("x", 0, 100)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("fault", "message", "code"),
    [
        ("full", "the store has no space left .*InsufficientStorage", 73),
        ("quota", "the store has no space left .*QuotaExceeded", 73),
        ("invalid", "the store refuses it .*made up", 2),
        ("forbidden", "access is denied", 2),
        ("no bucket", "there is no such bucket", 2),
        ("not implemented", "the store refuses it .*made up", 2),
    ],
)
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
def test_a_write_that_the_store_will_never_take_ends_at_once(
    fault: str, message: str, code: int, in_pieces: bool, faulty_s3: FaultyS3, s3_bucket: str
) -> None:
    store = Store(f"s3://{s3_bucket}", 600.0)
    faulty_s3.meet(fault, times=10**9, writes=True)
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"^cannot write s3://{s3_bucket}/x: .*{message}") as caught:
        if in_pieces:
            store.write_pieces("x", lambda: iter([memoryview(b"123")]))
        else:
            store.write("x", b"123")
    assert caught.value.exit_code == code and time.monotonic() - started < 30


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fault", ["slow", "spoiled", "broken"])
def test_a_write_that_fails_for_a_while_is_tried_again(fault: str, faulty_s3: FaultyS3, s3_bucket: str) -> None:
    store = Store(f"s3://{s3_bucket}", 120.0)
    faulty_s3.meet(fault, times=6, writes=True)
    store.write("x", b"123")
    assert store.read("x") == b"123" and faulty_s3.met == 6


def test_wrong_settings_are_not_tried_again(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="the settings for the store are wrong .*bad name") as caught:
        Store("s3://bad name/x", 600.0).write("y", b"1")
    assert caught.value.exit_code == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    forget_filesystems()
    with pytest.raises(DataError, match="the settings for the store are wrong .*nonsense") as caught:
        Store(f"s3://{s3_bucket}/x", 600.0).write("y", b"1")
    assert caught.value.exit_code == 2


def test_a_name_that_no_disk_takes_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there can be no such path .File name too long") as caught:
        Store(str(tmp_path), 600.0).write(300 * "x", b"1")
    assert caught.value.exit_code == 2


def test_a_server_that_is_away_too_long_is_one_sentence(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    forget_filesystems()
    with pytest.raises(
        DataError, match=rf"cannot read s3://{s3_bucket}/x \(bytes 0-1\): gave up after \d+ s"
    ) as caught:
        Store(f"s3://{s3_bucket}", 1.0).read("x", 0, 1)
    assert caught.value.exit_code == 69


def test_a_trickling_read_is_cut_off(s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request has its own limit: a server that stands still does not use up the whole deadline."""
    Store(f"s3://{s3_bucket}", 30.0).write("x", bytes(1000))
    filesystem = open_filesystem(f"s3://{s3_bucket}")
    monkeypatch.setattr(storage, "REQUEST_SECONDS", 1.0)
    s3_server.pause()
    try:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            storage.bytes_of(filesystem, f"{s3_bucket}/x", 0, 1000)
        assert time.monotonic() - started < 10
    finally:
        s3_server.resume()
    assert storage.bytes_of(filesystem, f"{s3_bucket}/x", 0, 1000) == bytes(1000)


def test_a_file_that_the_disk_cannot_look_up_does_not_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    store = Store(str(tmp_path), 0.0)
    assert not store.exists("x") and not store.exists("x/y")
    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(DataError, match="cannot look for"):
        store.exists("x")


def test_what_a_store_keeps_half_of_is_created_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store, pipe_file = Store("memory://half", 5.0), MemoryFileSystem.pipe_file

    def half_at_first(filesystem: MemoryFileSystem, path: str, value: bytes, **options: str) -> None:
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
        pipe_file(filesystem, path, value[: len(value) // 2], **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", half_at_first)
    assert store.create("plan.json", b"the whole plan") and store.read("plan.json") == b"the whole plan"
    assert not store.create("plan.json", b"another plan") and store.read("plan.json") == b"the whole plan"
    store.remove("plan.json")


class _PlainServer(SimpleHTTPRequestHandler):
    """Python's own web server, which sends whole files whatever part is asked for."""

    def log_message(self, *_: object) -> None:
        pass


class _SizelessServer(_PlainServer):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length":
            super().send_header(keyword, value)


def test_a_web_server_without_byte_ranges_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(100))
    with serving(partial(_PlainServer, directory=str(tmp_path))) as url:
        store = Store(url, 30.0)
        assert store.read_whole("shard.tar", 100) == bytes(100)
        for read in (
            lambda: store.read("shard.tar", 10, 20),
            lambda: store.read_block("shard.tar", 10, memoryview(bytearray(10)), "0" * 16, threading.Event()),
        ):
            with pytest.raises(DataError, match="the server ignores byte ranges") as caught:
                read()
            assert caught.value.exit_code == 2
        with pytest.raises(DataError, match="this kind of storage can only be read"):
            store.remove("shard.tar")
    with (
        serving(partial(_SizelessServer, directory=str(tmp_path))) as url,
        pytest.raises(DataError, match="the server does not say how large it is"),
    ):
        Store(url, 30.0).size("shard.tar")


@contextlib.contextmanager
def serving(handler: Callable[..., SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
