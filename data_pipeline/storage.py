"""How are bytes at a URL opened, read by range, checked, retried and written whole?

Every access of this package to a disk or an object store goes through this file, so that each failure is
worded once, names the URL and the byte range, and ends in the exit code the trainer reports.
"""

import asyncio
import contextlib
import errno
import io
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, BinaryIO, TypeVar

import fsspec
import xxhash
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.typed_records import parse_object
from data_pipeline.wording import counted

log = logging.getLogger(__name__)

Result = TypeVar("Result")

EXIT_USAGE = 2
EXIT_CORRUPT = 65
EXIT_UNREACHABLE = 69
EXIT_CANNOT_WRITE = 73
EXIT_REFUSED = 77

SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https", "memory")

# These settings hold for one request. The loop below retries it until the deadline and checks every block. s3fs has two
# loops of its own, one inside the other, so its defaults would hang for half an hour on a stalled server.
S3_SETTINGS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "s3": {"addressing_style": "path"},
        "retries": {"total_max_attempts": 2, "mode": "standard"},
    },
}

# Answers that say "not you, or not so" as a rule (HTTP 400 to 499), and of which these may pass nevertheless.
PASSING_STATUSES = (408, 409, 425, 429)
PASSING_S3_CODES = (
    "BadDigest",
    "BandwidthLimitExceeded",
    "IncompleteBody",
    "RequestLimitExceeded",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
)
PRECONDITION_FAILED, RANGE_NOT_SATISFIABLE, NOT_IMPLEMENTED, INSUFFICIENT_STORAGE = 412, 416, 501, 507
FULL_S3_CODES = ("QuotaExceeded", "XMinioStorageFull")
# Errors that botocore raises before it asks anybody.
SETTINGS_ERRORS = ("NoRegionError", "ParamValidationError", "PartialCredentialsError", "ProfileNotFound")

PIECE_BYTES = 1 << 20
TORN_FILE = ".unfinished-"  # in the name of a local file while it is written

REMOVALS_AT_ONCE = 64
REQUEST_SECONDS = 120.0  # for one request, however long the deadline; a block is a few megabytes
FIRST_DELAY_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 30.0
PERMANENT_ATTEMPTS = 2


class DataError(ValueError):
    """Something is wrong with the data or its storage; the message is one sentence for the user."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.exit_code)


@dataclass(frozen=True)
class Store:
    """A folder on some filesystem, and how patiently it is asked.

    Names are literal, whatever characters are in them: none is a pattern.
    ``read`` and ``write`` retry with a jittered back-off until ``deadline_seconds`` have passed, then raise
    ``DataError`` with exit code 69. An answer that will not change (no such object, access denied) is asked
    for once more and then raised at once.
    """

    url: str
    deadline_seconds: float
    same_answers: int | None = None
    """After so many equal wrong answers in a row for a block, the store is taken to hold these bytes, and reading ends
    before the deadline. None retries until the deadline."""

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def read(
        self,
        name: str,
        begin: int | None = None,
        end: int | None = None,
    ) -> bytes:
        """The bytes ``[begin, end)`` of an object (all of it by default), checked for length."""
        path = self._path(name)

        def attempt() -> bytes:
            data = bytes_of(open_filesystem(self.url), path, begin, end)
            if begin is not None and end is not None and len(data) != end - begin:
                raise CorruptRead(f"{len(data)} bytes came instead of {end - begin}")
            return data

        where = self.url_of(name) + ("" if begin is None else f" (bytes {begin}-{end})")
        return with_retries(attempt, f"read {where}", self.deadline_seconds, None)

    def read_whole(self, name: str, limit_bytes: int) -> bytes:
        """All of an object that must not be larger than the limit, which is checked before anything is read."""
        size = self.size(name)
        if size > limit_bytes:
            raise DataError(f"{self.url_of(name)} has {size} bytes, more than {limit_bytes}", EXIT_CORRUPT)
        return self.read(name, 0, size) if size else b""

    def read_block(self, name: str, begin: int, into: memoryview, xxh3: str, stop: threading.Event) -> None:
        """Fill ``into`` with the bytes of an object from ``begin`` on, checked against their XXH3-64."""
        path, where = self._path(name), f"{self.url_of(name)} (bytes {begin}-{begin + len(into)})"
        wrong: list[str] = []  # checksums of the last wrong answers, as long as they were equal

        def attempt() -> None:
            size, found = read_into(open_filesystem(self.url), path, begin, into)
            if size == len(into) and found == xxh3:
                return
            what = f"the checksum is {found} instead of {xxh3}"
            if size != len(into):
                what = f"{size} bytes came instead of {len(into)}"
            wrong[:] = [*wrong, found] if found in wrong else [found]
            if len(wrong) == self.same_answers:
                raise DataError(f"cannot read {where}: {what}, {len(wrong)} times in a row", EXIT_CORRUPT)
            raise CorruptRead(what)

        try:
            with_retries(attempt, f"read {where}", self.deadline_seconds, stop)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                # Its checksum is known, so it was there once: the data set is damaged, the URL is right.
                raise DataError(f"{error}, although the manifest lists it; pack again", EXIT_CORRUPT) from error
            raise

    def write(self, name: str, data: bytes) -> None:
        """Write an object in one piece. It appears whole or not at all, even when the writer is killed."""
        filesystem, path = open_filesystem(self.url), self._path(name)

        def attempt() -> None:
            if self.is_local:
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                with atomic_file(path) as file:
                    file.write(data)
            else:
                filesystem.pipe_file(path, data)
                size = filesystem.info(path)["size"]
                if size != len(data):
                    raise CorruptRead(f"the store kept {size} of {len(data)} bytes")

        with_retries(attempt, f"write {self.url_of(name)}", self.deadline_seconds, None)

    def create(self, name: str, data: bytes) -> bool:
        """As ``write`` for a small object, unless there is one of this name; returns whether this call wrote it.

        Of several writers one succeeds. If an answer is lost, False is returned for an object that this call wrote. A
        store without conditional writes may let two succeed; the last one's object stays.
        """
        filesystem, path = open_filesystem(self.url), self._path(name)

        def attempt() -> bool:
            if self.is_local:
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                return create_local(path, data)
            try:
                filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if status_of(error) == PRECONDITION_FAILED:
                    return False
                if status_of(error) != NOT_IMPLEMENTED:
                    raise
                if filesystem.exists(path):
                    return False
                filesystem.pipe_file(path, data)
            size = filesystem.info(path)["size"]
            if size != len(data):
                filesystem.rm_file(path)  # or the next try would take it for somebody else's
                raise CorruptRead(f"the store kept {size} of {len(data)} bytes")
            return True

        return with_retries(attempt, f"write {self.url_of(name)}", self.deadline_seconds, None)

    def write_pieces(self, name: str, pieces: Callable[[], Iterable[memoryview]]) -> int:
        """As ``write``, for content that is not in memory as a whole; returns its bytes.

        ``pieces`` is called for each try and yields the content from its beginning, in pieces of a megabyte or so.
        """
        filesystem, path = open_filesystem(self.url), self._path(name)

        def attempt() -> int:
            if self.is_local:
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                with atomic_file(path) as file:
                    return sum(file.write(piece) for piece in pieces())
            with upload(filesystem, path) as file:
                size = sum(file.write(piece) for piece in pieces())
            kept = filesystem.info(path)["size"]
            if kept != size:
                raise CorruptRead(f"the store kept {kept} of {size} bytes")
            return size

        return with_retries(attempt, f"write {self.url_of(name)}", self.deadline_seconds, None)

    def forget(self, name: str) -> None:
        """Let the system drop what it holds of a local file in memory, so that the next read asks the disk.

        A request and no more: other processes may hold it, and some systems have no such call.
        """
        if self.is_local and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), open(self._path(name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def exists(self, name: str) -> bool:
        filesystem, path = open_filesystem(self.url), self._path(name)

        def attempt() -> bool:
            if not self.is_local:
                return bool(filesystem.exists(path))
            try:  # os.path.exists takes any error of the disk for a missing file
                os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

        return with_retries(attempt, f"look for {self.url_of(name)}", self.deadline_seconds, None)

    def size(self, name: str) -> int:
        """Bytes of an object."""
        filesystem, path = open_filesystem(self.url), self._path(name)

        def attempt() -> int:
            size = filesystem.info(path)["size"]
            if size is None:
                raise DataError(f"{self.url_of(name)}: the server does not say how large it is, so it cannot be read")
            return int(size)

        return with_retries(attempt, f"look for {self.url_of(name)}", self.deadline_seconds, None)

    def names(self, below: str = "") -> list[str]:
        """Names of the objects directly in the folder (or one below it), sorted; empty when there is none."""
        filesystem, path = open_filesystem(self.url), self._path(below)

        def attempt() -> list[str]:
            try:
                found = filesystem.ls(path, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            entries = [str(entry) for entry in found if entry != f"{path}/"]  # an object that only marks the folder
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

        return with_retries(attempt, f"list {self.url_of(below)}", self.deadline_seconds, None)

    def walk(self) -> dict[str, int]:
        """Size in bytes of every object below the folder, at any depth, by its name relative to the folder."""
        filesystem, path = open_filesystem(self.url), self._path("")

        def attempt() -> dict[str, int]:
            found = filesystem.find(path, detail=True)
            return {
                name[len(path) :].lstrip("/"): int(info["size"] or 0)
                for name, info in found.items()
                if not name.endswith("/")  # an object that only marks a folder
            }

        return with_retries(attempt, f"list {self.url}", self.deadline_seconds, None)

    def remove(self, name: str) -> None:
        """Remove an object, or a folder with everything in it; content that is gone already is fine.

        A link is removed and not what it leads to. Raises DataError (exit code 77) for a name that leads out of this
        folder, by ``..`` or through a link.
        """
        filesystem, path = open_filesystem(self.url), self._path(name)
        if not name or {".", ".."} & set(name.split("/")):
            raise DataError(f"cannot remove {self.url_of(name)}: it is not inside of {self.url}", EXIT_REFUSED)

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                if not self.is_local:
                    remove_objects(filesystem, path)
                elif is_inside(self._root or "/", path):
                    remove_local(path)
                else:
                    raise DataError(
                        f"cannot remove {self.url_of(name)}: a link leads out of {self.url}; remove it by hand",
                        EXIT_REFUSED,
                    )

        with_retries(attempt, f"remove {self.url_of(name)}", self.deadline_seconds, None)

    def missing_part(self) -> str | None:
        """The bucket or folder of this URL that does not exist, as a phrase for a message; None if all is there."""
        filesystem, path = open_filesystem(self.url), self._path("")
        missing = "there is no such folder"
        if scheme_of(self.url) in ("s3", "s3a", "gs", "gcs"):
            path = path.partition("/")[0]
            missing = f"there is no bucket {path}, or no access to it"
        found = with_retries(lambda: filesystem.exists(path), f"look for {self.url}", self.deadline_seconds, None)
        return None if found else missing

    @property
    def is_local(self) -> bool:
        return scheme_of(self.url) == "file"

    @property
    def local_path(self) -> str:
        """The folder as a path of this machine's filesystem; only for local stores."""
        assert self.is_local, self.url
        return self._path("")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @cached_property
    def _root(self) -> str:
        return path_of(self.url)


class CorruptRead(Exception):
    """A read returned the wrong bytes. That is worth another try; if it stays so, the data is damaged."""


class RangeIgnored(Exception):
    """A server sent more than the part of an object that it was asked for."""


def lacks_memory(error: Exception, needed_bytes: int) -> bool:
    """Whether an error says that the memory ran out, and not that a damaged file asked for more than there is anywhere.

    ``needed_bytes``: what a whole file of that kind needs.
    """
    if not isinstance(error, MemoryError):
        return False
    try:
        bytearray(needed_bytes)
    except MemoryError:
        return True
    return False


def scheme_of(url: str) -> str:
    """The filesystem a URL names; ``DataError`` for one that is not for data, or that carries a secret."""
    if not url.strip():
        raise DataError("the URL of the data is empty: give a folder or something like s3://bucket/prefix")
    scheme, separator, rest = url.partition("://")
    if url.startswith(("pipe:", "cmd:")) or "::" in url or "|" in url:
        raise DataError(f"{url} would start a program or chain filesystems; only plain folders are read", EXIT_REFUSED)
    if not separator:
        return "file"
    if scheme not in SCHEMES:
        raise DataError(f"{url}: {scheme}:// is not a known storage; use a folder or one of {', '.join(SCHEMES)}")
    if scheme not in ("file", "memory") and not rest.partition("/")[0]:
        raise DataError(f"{url} names no bucket: write {scheme}://bucket/prefix")
    if "@" in rest.partition("/")[0]:
        raise DataError(
            f"{scheme}://{rest.rpartition('@')[2]} came with a password in the URL: give it in the environment instead",
            EXIT_REFUSED,
        )
    return scheme


def normalised(url: str) -> str:
    """The URL without trailing slashes, as it appears in messages and is compared."""
    scheme_of(url)
    return url.rstrip("/") or "/"


def split_url(url: str) -> tuple[str, str]:
    """The folder and the name of the object at a URL."""
    folder, _, name = normalised(url).rpartition("/")
    return folder or ".", name


def path_of(url: str) -> str:
    """The path a filesystem object of fsspec takes for a URL."""
    scheme = scheme_of(url)
    return str(fsspec.get_filesystem_class(scheme)._strip_protocol(url)).rstrip("/")


def open_filesystem(url: str) -> Any:
    """The fsspec filesystem of a URL: one per process and scheme, so never inherited over a fork."""
    return filesystem_of(scheme_of(url), os.getpid())


@cache
def filesystem_of(scheme: str, process: int) -> Any:
    """``process`` only keeps a forked child from using its parent's connections."""
    try:
        if scheme in ("s3", "s3a"):
            filesystem = fsspec.filesystem(scheme, **S3_SETTINGS)
            filesystem.retries = 1
            filesystem.split_path = literal_split(filesystem.split_path)
            return filesystem
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise DataError(f"{scheme}:// needs another package: {error}") from error


def literal_split(split_path: Callable[[str], tuple[str, str, str | None]]) -> Callable[[str], tuple[str, str, None]]:
    """s3fs's way to split a path into bucket and key, except that ``?versionId=`` in it means nothing special."""

    def split(path: str) -> tuple[str, str, None]:
        bucket = split_path(path)[0]
        return bucket, path.lstrip("/")[len(bucket) + 1 :], None

    return split


def remove_objects(filesystem: Any, path: str) -> None:
    """Remove the object at a path and all below it, except on a local disk.

    fsspec's own ``rm`` takes brackets, stars and question marks in the path for a pattern.
    """
    below = f"{path}/"
    paths = [path, *(found for found in filesystem.find(path) if found.startswith(below))]
    if filesystem.async_impl:

        async def remove_some(some: list[str]) -> None:
            answers = await asyncio.gather(*map(filesystem._rm_file, some), return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException) and not isinstance(answer, FileNotFoundError):
                    raise answer

        for begin in range(0, len(paths), REMOVALS_AT_ONCE):
            sync(filesystem.loop, remove_some, paths[begin : begin + REMOVALS_AT_ONCE], timeout=REQUEST_SECONDS)
        return
    for found in paths:
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(found)
    folders = [found for found in filesystem.find(path, withdirs=True) if found == path or found.startswith(below)]
    for folder in sorted(folders, reverse=True):
        filesystem.rmdir(folder)


def is_inside(folder: str, path: str) -> bool:
    """Whether the local file or link at a path lies below the folder, when links on the way to it are followed."""
    real = os.path.realpath(folder)
    return os.path.commonpath([real, os.path.realpath(os.path.dirname(path))]) == real


def remove_local(path: str) -> None:
    """Remove a file, a link or a folder. What another process removes at the same time is fine."""

    def gone_is_fine(_: Any, __: str, info: tuple[Any, BaseException, Any]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, onerror=gone_is_fine)
    else:
        os.unlink(path)


def bytes_of(filesystem: Any, path: str, begin: int | None, end: int | None) -> bytes:
    """One read of fsspec; a single request on object stores when the range is given."""
    if filesystem.async_impl:
        # A dying server may send a byte now and then, which a socket's read timeout never ends; this limit does.
        read = filesystem._cat_file
        try:
            data = bytes(sync(filesystem.loop, read, path, start=begin, end=end, timeout=REQUEST_SECONDS))
        except Exception as error:
            if s3_code(error) == "InvalidRange" or status_of(error) == RANGE_NOT_SATISFIABLE:
                return b""  # the object ends before the range begins
            raise
        if begin is not None and end is not None and len(data) > end - begin:
            raise RangeIgnored(f"{len(data)} bytes came instead of {end - begin}")
        return data
    if type(filesystem) is LocalFileSystem:  # what its cat_file does, in a third of the time
        with open(path, "rb") as file:
            file.seek(begin or 0)
            return file.read() if end is None else file.read(end - (begin or 0))
    return bytes(filesystem.cat_file(path, start=begin, end=end))


def read_into(filesystem: Any, path: str, begin: int, into: memoryview) -> tuple[int, str]:
    """Like ``bytes_of``, but into the memory of the caller. Returns how many bytes came, and their XXH3-64."""
    if type(filesystem) is LocalFileSystem:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            return fill(into, file)
    data = bytes_of(filesystem, path, begin, begin + len(into))
    into[: len(data)] = data[: len(into)]
    return len(data), xxhash.xxh3_64_hexdigest(data)


def fill(into: memoryview, file: io.FileIO) -> tuple[int, str]:
    """Read from a file until the memory is full. Returns how many bytes came, and their XXH3-64.

    The pieces are so small that each is still in the processor's cache when its checksum is computed.
    """
    checksum, filled = xxhash.xxh3_64(), 0
    while filled < len(into) and (count := file.readinto(into[filled : filled + PIECE_BYTES])):
        checksum.update(into[filled : filled + count])
        filled += count
    return filled, checksum.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A local file to write. It appears whole when the block ends, or not at all if the block fails.

    ``durable`` waits until the file would survive a loss of power.
    """
    temporary = f"{path}{TORN_FILE}{random.getrandbits(64):016x}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # what has this name after the replacement is somebody else's
        with contextlib.suppress(OSError):  # gone already, or on a disk of which the error tells
            os.unlink(temporary)
        raise


def create_local(path: str, data: bytes) -> bool:
    """Write a local file, whole, unless there is one; returns whether it was written."""
    temporary = f"{path}{TORN_FILE}{random.getrandbits(64):016x}"
    with atomic_file(temporary) as file:
        file.write(data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A filesystem without links: the file is created alone, and filled afterwards.
        try:
            with open(path, "xb") as alone:
                alone.write(data)
        except FileExistsError:
            return False
    finally:
        os.unlink(temporary)
    return True


@contextlib.contextmanager
def upload(filesystem: Any, path: str) -> Iterator[BinaryIO]:
    """An object of an object store to write, which appears when the block ends, and not at all when it fails."""
    file = filesystem.open(path, "wb")
    try:
        yield file
    except BaseException:
        # Closing it would make an object of what has been written so far, and so would Python when it drops the file.
        file.discard()
        file.closed = True
        raise
    file.close()


def with_retries(
    attempt: Callable[[], Result], what: str, deadline_seconds: float, stop: threading.Event | None
) -> Result:
    """Call ``attempt`` until it succeeds; ``what`` completes the sentence "cannot ...".

    Waits between tries with full jitter, doubling from 0.2 s to 30 s, and gives up at the deadline. A try counts for
    the time that a request may take, or half of the deadline, at most: what is beyond was a suspension of the process.
    """
    longest = min(REQUEST_SECONDS, deadline_seconds / 2)
    elapsed, tries = 0.0, 0
    while True:
        begun = time.monotonic()
        try:
            return attempt()
        except DataError:
            raise
        # s3fs lets through the errors of botocore and aiohttp, which share no base class with OSError.
        except Exception as error:  # noqa: BLE001
            tries += 1
            elapsed += min(time.monotonic() - begun, longest)
            final = classify(error)
            if final is not None and tries >= PERMANENT_ATTEMPTS:
                raise DataError(f"cannot {what}: {final[0]}", final[1]) from error
            if elapsed >= deadline_seconds or (stop is not None and stop.is_set()):
                code = EXIT_CORRUPT if isinstance(error, CorruptRead) else EXIT_UNREACHABLE
                effort = f"{elapsed:.0f} s and {counted(tries, 'try', 'tries')}"
                raise DataError(f"cannot {what}: gave up after {effort}; last: {reason_of(error)}", code) from error
            ceiling = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(tries, 10))
            delay = min(random.uniform(0, ceiling), max(0.0, deadline_seconds - elapsed))
            if final is None:  # the other kind gets one more try and is then raised
                log.warning("cannot %s (%s); trying again in %.1f s", what, reason_of(error), delay)
        elapsed += delay
        if stop is None:
            time.sleep(delay)
        else:
            stop.wait(delay)


def classify(error: Exception) -> tuple[str, int] | None:
    """Why another try cannot help, with the exit code; None when the failure may pass."""
    status, code = status_of(error), s3_code(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, folder or object", EXIT_USAGE
    if status == INSUFFICIENT_STORAGE or code in FULL_S3_CODES:
        return f"the store has no space left ({reason_of(error)})", EXIT_CANNOT_WRITE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"the disk is full or not writable ({reason_of(error)})", EXIT_CANNOT_WRITE
    if isinstance(error, OSError) and error.errno == errno.EREMCHG:  # what s3fs makes of S3's redirects
        return f"the bucket is in another region: set AWS_DEFAULT_REGION ({reason_of(error)})", EXIT_USAGE
    if isinstance(error, PermissionError):
        return f"access is denied ({reason_of(error)})", EXIT_USAGE
    if isinstance(error, IsADirectoryError):
        return "it is a folder, and a file is expected", EXIT_USAGE
    if isinstance(error, NotADirectoryError):
        return "a part of this path is a file, not a folder", EXIT_USAGE
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"there can be no such path ({error.strerror})", EXIT_USAGE
    refused = status is not None and 400 <= status < 500 and status not in PASSING_STATUSES
    if status == NOT_IMPLEMENTED or (refused and code not in PASSING_S3_CODES):
        return f"the store refuses it ({reason_of(error)})", EXIT_USAGE
    if type(error).__name__ in SETTINGS_ERRORS or (isinstance(error, ValueError) and "nvalid endpoint" in str(error)):
        return f"the settings for the store are wrong ({reason_of(error)})", EXIT_USAGE
    if isinstance(error, RangeIgnored):
        return f"the server ignores byte ranges, which reading parts of a file needs ({error})", EXIT_USAGE
    if isinstance(error, NotImplementedError):
        return "this kind of storage can only be read", EXIT_USAGE
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", EXIT_USAGE
    return None


def s3_answer(error: Exception) -> Mapping[str, Any]:
    """The answer of S3 that an error was made of; empty when it did not come from there."""
    for source in (error, error.__cause__, error.__context__):
        if isinstance(answer := getattr(source, "response", None), Mapping):
            return answer
    return {}


def s3_code(error: Exception) -> str:
    """The code that S3 gave to an error, e.g. InvalidRange; empty when it did not come from there."""
    return str(s3_answer(error).get("Error", {}).get("Code", ""))


def status_of(error: Exception) -> int | None:
    """The HTTP status of the answer that an error was made of; None when it was not made of one."""
    # The clients of other stores than S3 have it in the error itself.
    of_clients = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    of_s3 = s3_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return next((status for status in (of_s3, *of_clients) if isinstance(status, int)), None)


def reason_of(error: Exception) -> str:
    """The error on one line, never empty."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_json(store: Store, name: str, limit_bytes: int) -> dict[str, Any]:
    """A JSON object of bounded size; ``DataError`` when it does not parse."""
    return parse_json(store.read_whole(name, limit_bytes), store.url_of(name))


def parse_json(data: bytes, url: str) -> dict[str, Any]:
    try:
        return parse_object(data)
    except ValueError as error:
        raise DataError(f"{url} is not JSON: {error}", EXIT_CORRUPT) from error
