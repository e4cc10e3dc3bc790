"""Which groups of images are inside a tar or zip archive, read in place?"""

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from data_pipeline.archives import Member, open_range, tar_members
from data_pipeline.packing.source import GROUP_IMAGES, LARGEST_IMAGE_BYTES, Item
from data_pipeline.storage import EXIT_CORRUPT, DataError

# What the standard library raises for a damaged zip or tar.gz: zlib and LZMA have errors of their own, and a damaged
# header may ask for a password (RuntimeError) or for a method that nobody uses (NotImplementedError).
DAMAGE_OF_ZIPS = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError)
DAMAGE_OF_TARS = (tarfile.TarError, EOFError, OSError, zlib.error)


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
                except DAMAGE_OF_ZIPS as error:
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
