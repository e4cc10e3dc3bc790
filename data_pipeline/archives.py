"""How are the files inside a tar archive found and read in place, on a disk or an object store?"""

import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple

from data_pipeline.decode import SUFFIXES
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, split_url

READ_DEADLINE_SECONDS = 600.0
STREAM_BYTES = 8 << 20
HEADER_BYTES = 512
LARGEST_EXTENDED_HEADER_BYTES = 1 << 20
EXTENDED_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
WANTED = (".tar", ".cls", *(f".{suffix}" for suffixes in SUFFIXES.values() for suffix in suffixes))


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

    Archives that were joined, one behind the other, are read as one. Names and sizes are those of extended headers
    (GNU's, and those of POSIX.1-2001, called pax), where there are any.

    ``complete``: the empty block that marks the end must be there; if False, the archive may end after any file.
    Raises DataError (exit code 65) when the file is no tar archive, or is cut off, or holds an image as a sparse file
    or a link.
    """
    place, size = 0, file.seek(0, io.SEEK_END)
    ended = False  # whether the empty block was the last that was read
    for_all: dict[str, bytes] = {}  # pax records of all files that follow
    for_next: dict[str, bytes] = {}  # ... of the next one
    while True:
        file.seek(place)
        header = file.read(HEADER_BYTES)
        if not header and (ended or not complete):
            return
        if len(header) == HEADER_BYTES and not any(header):
            ended = True
            place += HEADER_BYTES
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if ended:
                return  # what lies behind an archive and is none belongs to others
            what = "is not an uncompressed tar file" if place == 0 else "is cut off or damaged"
            raise DataError(f"{where} {what} (byte {place}: {error})", EXIT_CORRUPT) from error
        ended = False
        place += HEADER_BYTES
        extended = info.type in EXTENDED_HEADERS
        records = {} if extended else for_all | for_next
        name, length = info.name, info.size
        try:
            name = records.get("path", name.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
            length = int(records.get("size", length))
        except ValueError as error:
            raise DataError(f"{where} is damaged: {name!r} has {records['size']!r} bytes", EXIT_CORRUPT) from error
        if not extended and not info.isreg() and info.type in tarfile.SUPPORTED_TYPES:
            length = 0  # of folders and links, whatever the header says
        if not 0 <= length <= size - place:
            raise DataError(f"{where} is cut off or damaged: {name!r} claims {length} bytes", EXIT_CORRUPT)
        if extended:
            if length > LARGEST_EXTENDED_HEADER_BYTES:
                raise DataError(
                    f"{where} is damaged: a header at byte {place - HEADER_BYTES} has {length} bytes", EXIT_CORRUPT
                )
            found = extended_header(
                info.type, file.read(length), f"{where} is damaged: a header at byte {place - HEADER_BYTES}"
            )
            (for_all if info.type == tarfile.XGLTYPE else for_next).update(found)
        else:
            for_next = {}
            refuse_what_is_elsewhere(info.type, name, records, where)
            if info.isreg():
                yield Member(name, place, length)
        place += -(-length // HEADER_BYTES) * HEADER_BYTES


def extended_header(kind: bytes, data: bytes, what: str) -> dict[str, bytes]:
    """The records of a header that says more about the files behind it; ``what`` begins the sentence of an error."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0]}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    records = {}
    place = 0
    while place < len(data) and data[place]:  # zeros may fill it up
        length = data[place : place + 20].partition(b" ")[0]  # in bytes, of the whole record: b"13 path=a.png\n"
        record = data[place : place + int(length)] if length.isdigit() else b""
        key, separator, value = record[len(length) + 1 :].partition(b"=")
        if not separator or not value.endswith(b"\n") or len(record) != int(length):
            raise DataError(f"{what} holds no records", EXIT_CORRUPT)
        records[key.decode("utf-8", "replace")] = value[:-1]
        place += len(record)
    return records


def refuse_what_is_elsewhere(kind: bytes, name: str, records: Mapping[str, bytes], where: str) -> None:
    """DataError for a file whose bytes do not lie behind its header as they are."""
    if kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
        raise DataError(f"{where} holds {name} as a sparse file: make the archive without --sparse", EXIT_CORRUPT)
    if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) and name.lower().endswith(WANTED):
        raise DataError(
            f"{where} holds {name} as a link: make the archive with --dereference --hard-dereference", EXIT_CORRUPT
        )
