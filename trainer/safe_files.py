"""How are files of a folder read and written that a stranger may have prepared?

A run's folder is passed on from hand to hand. In it, a link could lead a write to a file outside, or show a private
file; a pipe or a device could hold a reader up for ever. So nothing here follows a link below the folder, only regular
files of bounded size are read, and a file is written beside its place and then renamed.
"""

import contextlib
import errno
import fcntl
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TypeVar

from data_pipeline.storage import TORN_FILE
from trainer.errors import UnfitDisk, UnsafeFile, is_foreseen

Result = TypeVar("Result")

_OF_DISKS = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM})

LARGEST_READ = 64 << 20
"""Bytes of a file that is read as a whole."""
LARGEST_JOURNAL = 16 << 30
"""Bytes of a file that is read piece by piece."""
TORN_SECONDS = 3600.0
"""An unfinished file that is older, on a file system without locks, was left by a process that was killed."""
_TORN_NAME = re.compile(rf".+{re.escape(TORN_FILE)}[0-9a-f]{{16}}")


def worded(error: Exception) -> Exception:
    """UnfitDisk in place of what the system says of a disk; any other error as it is."""
    if not isinstance(error, OSError) or is_foreseen(error) or error.errno not in _OF_DISKS:
        return error
    place = f"{error.filename}: " if error.filename else ""
    unfit = UnfitDisk(f"{place}the disk cannot be used ({error.strerror}); the same command goes on when it can")
    unfit.__cause__ = error
    return unfit


def tried_twice(call: Callable[[], Result]) -> Result:
    """What a call on files returns; after an OSError it is made once more, at once.

    For calls that no later one makes up for. What a second try meets, too, is no error of a moment, and is raised.
    """
    try:
        return call()
    except OSError:
        return call()


def read_file(path: Path, *, within: Path | None = None, largest: int = LARGEST_READ) -> bytes:
    """The content of a regular file.

    No part of the path below the folder `within` may be a link; by default that is the file alone. Raises UnsafeFile,
    FileNotFoundError, or another OSError.
    """
    with open_to_read(path, within=within, largest=largest) as file, _named(path):
        content = file.read(largest + 1)
    if len(content) > largest:  # it has grown meanwhile
        raise _too_large(path, largest)
    return content


def open_to_read(path: Path, *, within: Path | None = None, largest: int) -> "BufferedReader[FileIO]":
    """A regular file of at most so many bytes, opened; arguments and errors are those of read_file."""
    file = BufferedReader(FileIO(_open(path, within or path.parent, os.O_RDONLY), "rb"))
    if os.fstat(file.fileno()).st_size > largest:
        file.close()
        raise _too_large(path, largest)
    return file


def open_to_append(path: Path, *, shared: bool = False) -> FileIO:
    """A regular file to add to, made if it is missing; `shared` opens it for reading, too. Errors: see read_file."""
    flags = (os.O_RDWR if shared else os.O_WRONLY) | os.O_APPEND | os.O_CREAT
    return FileIO(_open(path, path.parent, flags), "a+b" if shared else "ab")


def write_file(path: Path, content: bytes, *, within: Path | None = None, mode: int = 0o666) -> None:
    """Replace a file by a new one, which appears whole or not at all. Folders below `within` are made where missing.

    A link in the place of the file is replaced, too. Raises UnsafeFile for one on the way there, or another OSError.
    """
    temporary = f"{path.name}{TORN_FILE}{random.getrandbits(64):016x}"
    with _named(path), _folder_of(path, within or path.parent, make=True) as folder:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, mode, dir_fd=folder), "wb") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells remove_torn_files that somebody writes it
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            with contextlib.suppress(OSError):  # gone already, or on a disk of which the error above tells
                os.unlink(temporary, dir_fd=folder)


def check_room(folder: Path, size: int) -> None:
    """Raise OSError if so many bytes do not fit into a folder any more."""
    temporary = f"room{TORN_FILE}{random.getrandbits(64):016x}"
    with _folder_of(folder / temporary, folder, make=False) as opened:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=opened), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=opened)


def remove_torn_files(folder: Path, within: Path) -> None:
    """Remove the unfinished files of write_file that killed processes have left in a folder. Errors of it are ignored.

    Whoever writes one holds a lock on it. Where there are no locks, one that is an hour old has no writer any more.
    """
    with contextlib.suppress(OSError), _folder_of(folder / "any", within, make=False) as opened:
        for name in os.listdir(opened):
            if _TORN_NAME.fullmatch(name) and _is_regular(name, opened):
                with contextlib.suppress(OSError):
                    _remove_if_torn(name, opened)


def _remove_if_torn(name: str, folder: int) -> None:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        age = time.time() - os.fstat(file).st_mtime
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            needed = TORN_SECONDS
        else:
            needed = 1.0  # between making it and locking it
        if age > needed:
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(file)


def file_inside(folder: Path, name: str) -> Path:
    """The regular file of this relative name in a folder, behind no link. Raises UnsafeFile, or another OSError."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UnsafeFile(f"{folder}: {name[:200]!r} is no name of a file in this folder")
    path = folder.joinpath(*parts)
    os.close(_open(path, folder, os.O_RDONLY))
    return path


def files_inside(folder: Path, within: Path) -> list[Path]:
    """The regular files of a folder that is itself in `within`, by name, without those behind links."""
    with _folder_of(folder / "any", within, make=False) as opened:
        return [folder / name for name in sorted(os.listdir(opened)) if _is_regular(name, opened)]


def refuse_links(folder: Path) -> None:
    """Raise UnsafeFile if there is anything but folders and regular files in a folder, or if it is a link itself."""
    if folder.is_symlink():
        raise _no_regular_file(folder)
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # a job at work has removed it
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise _no_regular_file(path)


def _open(path: Path, within: Path, flags: int) -> int:
    with _folder_of(path, within, make=False) as folder:
        try:
            # A device is not even opened, if it can be known before: with some of them that does something.
            with contextlib.suppress(FileNotFoundError):
                if not _is_regular(path.name, folder):
                    raise _no_regular_file(path)
            # O_NONBLOCK: to open a pipe would wait for its other end.
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            descriptor = os.open(path.name, flags, 0o666, dir_fd=folder)
        except OSError as error:
            raise _explained(error, path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_regular_file(path)
    return descriptor


@contextlib.contextmanager
def _folder_of(path: Path, within: Path, *, make: bool) -> Iterator[int]:
    """The folder that holds a file, opened without following a link below `within`."""
    steps = path.parent.relative_to(within).parts
    try:
        here = os.open(within, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError as error:  # the user names a file, or something below one: there is no such folder
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(within)) from error
    try:
        place = within
        for step in steps:
            place /= step
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(step, dir_fd=here)
            try:
                below = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            except OSError as error:
                raise _explained(error, place) from error
            os.close(here)
            here = below
        yield here
    finally:
        os.close(here)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of the system name the file that it is about, even where it has only its number."""
    try:
        yield
    except OSError as error:
        if error.errno and not isinstance(error, UnsafeFile):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _is_regular(name: str, folder: int) -> bool:
    return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _explained(error: OSError, path: Path) -> OSError:
    """An error of the system, in words where it means that something else lies in the place of a file or a folder."""
    # ENXIO: a socket, or a pipe that nobody reads. EISDIR is worded by the callers.
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
        return _no_regular_file(path)
    return OSError(error.errno, error.strerror, str(path)) if error.errno else error


def _no_regular_file(path: Path) -> UnsafeFile:
    return UnsafeFile(
        f"{path}: is a link or another special file, which is not followed in a folder that may come from somebody "
        "else; put the file or folder itself there"
    )


def _too_large(path: Path, largest: int) -> UnsafeFile:
    return UnsafeFile(f"{path}: has more than the {largest:,} bytes that are read of such a file")
