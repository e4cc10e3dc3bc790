"""How are images inside tar and zip archives read in place, from a disk or an object store?"""

import io
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

from data_pipeline.sources import GROUP_IMAGES, LARGEST_IMAGE_BYTES, READ_DEADLINE_SECONDS, Item
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, split_url

STREAM_BYTES = 8 << 20
HEADER_BYTES = 512


class Member(NamedTuple):
    """A file inside a tar archive."""

    name: str
    offset: int
    """Of its first byte."""
    size: int


class RangeReader(io.RawIOBase):
    """A part of an object as a file that can be read and sought; each read is a ranged one, checked and retried."""

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
    """The files of an uncompressed tar archive, in order; between two of them the caller may read and seek.

    ``complete`` expects the empty block that marks the end; without, the archive may end behind any file.
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


@dataclass(frozen=True)
class TarMembers:
    """Some files of a tar archive, one behind the other."""

    url: str
    members: tuple[Member, ...]
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.members[0].name} and {len(self.members) - 1} more of {self.url}"

    def read(self) -> Iterator[Item]:
        first, last = self.members[0], self.members[-1]
        with open_range(self.url, first.offset, last.offset + last.size) as file:
            for member, label in zip(self.members, self.labels, strict=True):
                where = f"{self.url}:{member.name}"
                file.seek(member.offset - first.offset)
                yield Item(where, label, read_member(file, member.size, where))


@dataclass(frozen=True)
class InnerTar:
    """All files of a tar archive that lies inside another: one class of ImageNet's training set."""

    url: str
    begin: int
    end: int
    inner_name: str
    label: int

    @property
    def name(self) -> str:
        return f"{self.inner_name} of {self.url}"

    def read(self) -> Iterator[Item]:
        with open_range(self.url, self.begin, self.end) as file:
            for member in tar_members(file, f"{self.url}:{self.inner_name}"):
                where = f"{self.url}:{self.inner_name}:{member.name}"
                file.seek(member.offset)
                yield Item(where, self.label, read_member(file, member.size, where))


@dataclass(frozen=True)
class ZipMembers:
    """Some files of a zip archive."""

    url: str
    names: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.names[0]} and {len(self.names) - 1} more of {self.url}"

    def read(self) -> Iterator[Item]:
        with open_zip(self.url) as archive:
            for name, label in zip(self.names, self.labels, strict=True):
                where = f"{self.url}:{name}"
                try:
                    with archive.open(name) as file:
                        data = read_member(file, archive.getinfo(name).file_size, where)
                except (zipfile.BadZipFile, EOFError) as error:
                    raise DataError(f"{where} is damaged: {error}", EXIT_CORRUPT) from error
                yield Item(where, label, data)


def open_zip(url: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(open_range(url))
    except zipfile.BadZipFile as error:
        raise DataError(f"{url} is not a zip file, or is cut off: {error}", EXIT_CORRUPT) from error


def read_member(file: IO[bytes] | io.BufferedReader, size: int, where: str) -> bytes:
    """Exactly ``size`` bytes."""
    if size > LARGEST_IMAGE_BYTES:
        raise DataError(f"{where} claims {size} bytes, too many for an image", EXIT_CORRUPT)
    data = file.read(size)
    if len(data) != size:
        raise DataError(f"{where} is cut off: {len(data)} of {size} bytes", EXIT_CORRUPT)
    return data


def tar_groups(url: str, members: Sequence[Member], labels: Sequence[int]) -> list[TarMembers]:
    """Cut the files of an archive into groups, in the order in which they lie there."""
    order = sorted(range(len(members)), key=lambda i: members[i].offset)
    runs = [order[i : i + GROUP_IMAGES] for i in range(0, len(order), GROUP_IMAGES)]
    return [TarMembers(url, tuple(members[i] for i in run), tuple(labels[i] for i in run)) for run in runs]
