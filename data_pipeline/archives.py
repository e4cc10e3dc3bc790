"""How are the files inside a tar archive found and read in place, on a disk or an object store?"""

import io
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, split_url

READ_DEADLINE_SECONDS = 600.0
STREAM_BYTES = 8 << 20
HEADER_BYTES = 512


class Member(NamedTuple):
    """A file inside a tar archive."""

    name: str
    offset: int
    """Of its first byte in the archive."""
    size: int


class RangeReader(io.RawIOBase):
    """A part of an object as a seekable file. Each read asks for a range of bytes, checks its length and retries."""

    def __init__(self, store: Store, name: str, begin: int, end: int) -> None:
        self.store, self.name, self.begin, self.end = store, name, begin, end
        self.place = begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: self.begin, io.SEEK_CUR: self.place, io.SEEK_END: self.end}[whence]
        self.place = max(self.begin, origin + offset)
        return self.place - self.begin

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        stop = min(self.end, self.place + len(buffer))
        if stop <= self.place:
            return 0
        data = self.store.read(self.name, self.place, stop)
        buffer[: len(data)] = data
        self.place = stop
        return len(data)


def open_range(url: str, begin: int = 0, end: int | None = None, buffer_bytes: int = STREAM_BYTES) -> io.BufferedReader:
    """The bytes [begin, end) of the object at a URL, as a file that reads ahead."""
    folder, name = split_url(url)
    store = Store(folder, READ_DEADLINE_SECONDS)
    return io.BufferedReader(RangeReader(store, name, begin, store.size(name) if end is None else end), buffer_bytes)


def tar_members(file: IO[bytes], where: str, *, complete: bool = True) -> Iterator[Member]:
    """The files of an uncompressed tar archive, in order. Between two of them the caller may read and seek.

    ``complete``: the empty block that marks the end must be there; if False, the archive may end after any file.
    Raises DataError (exit code 65) when the file is no tar archive, or is cut off.
    """
    place, size = 0, file.seek(0, io.SEEK_END)
    long_name = None
    while True:
        file.seek(place)
        header = file.read(HEADER_BYTES)
        if len(header) == HEADER_BYTES and not any(header) or not header and not complete:
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            what = "is not an uncompressed tar file" if place == 0 else "is cut off or damaged"
            raise DataError(f"{where} {what} (byte {place}: {error})", EXIT_CORRUPT) from error
        place += HEADER_BYTES
        if not 0 <= info.size <= size - place:
            raise DataError(f"{where} is cut off or damaged: {info.name!r} claims {info.size} bytes", EXIT_CORRUPT)
        if info.type == tarfile.GNUTYPE_LONGNAME and info.size <= 4096:
            long_name = file.read(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.isreg():
            yield Member(long_name or info.name, place, info.size)
            long_name = None
        place += -(-info.size // HEADER_BYTES) * HEADER_BYTES
