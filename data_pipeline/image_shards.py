"""What is inside shards that others made: image files with their labels, one WebDataset sample after the other?"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from webdataset.tariterators import base_plus_ext

from data_pipeline.archives import HEADER_BYTES, Member, tar_members
from data_pipeline.decode import SUFFIXES, decode_image
from data_pipeline.shard_format import LABEL_DIGITS
from data_pipeline.storage import EXIT_CORRUPT, DataError
from data_pipeline.wording import counted

IMAGE_EXTENSIONS = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
LARGEST_IMAGE_BYTES = 64 << 20
LARGEST_LABEL_BYTES = 64
MOST_MEMBERS = 64  # of one sample


@dataclass(frozen=True)
class ImageSample:
    """Where the members of a sample are; offsets are those of the tar file that was read."""

    key: str
    image: Member
    label: Member | None
    end: int
    """Where the next sample begins."""
    ignored: tuple[str, ...]
    """Extensions of members that are neither image nor label; nothing of them is ever decoded."""


def samples_in(file: IO[bytes], where: str, *, complete: bool = True) -> Iterator[ImageSample]:
    """The samples of a tar file, as webdataset groups them: members that follow each other and share a key.

    DataError (exit code 65) for a sample without an image or with two, and for a key that comes back later.
    """
    seen: set[str] = set()
    key: str | None = None
    members: list[Member] = []
    for member in tar_members(file, where, complete=complete):
        base, _ = base_plus_ext(member.name)
        if base is None:  # no extension: webdataset skips it too
            continue
        if base != key and members:
            yield sample_of(str(key), members, where)
            members = []
        if base != key and base in seen:
            raise DataError(f"{where}: the key {base!r} comes twice, or between members of another", EXIT_CORRUPT)
        key = base
        seen.add(base)
        members.append(member)
        if len(members) > MOST_MEMBERS:
            raise DataError(f"{where}: sample {key!r} has more than {MOST_MEMBERS} members", EXIT_CORRUPT)
    if members:
        yield sample_of(str(key), members, where)


def sample_of(key: str, members: list[Member], where: str) -> ImageSample:
    """Sort the members of one sample by what they are."""
    extensions = [base_plus_ext(member.name)[1].lower() for member in members]
    images = [m for m, extension in zip(members, extensions, strict=True) if extension in IMAGE_EXTENSIONS]
    labels = [m for m, extension in zip(members, extensions, strict=True) if extension == "cls"]
    if len(images) != 1 or len(labels) > 1:
        raise DataError(
            f"{where}: sample {key!r} has {counted(len(images), 'image')} and {counted(len(labels), 'label')} "
            f"(members: {', '.join(extensions)}); one image and at most one .cls are expected",
            EXIT_CORRUPT,
        )
    known = {*IMAGE_EXTENSIONS, "cls"}
    ignored = tuple(extension for extension in extensions if extension not in known)
    last = members[-1]
    end = last.offset + -(-last.size // HEADER_BYTES) * HEADER_BYTES
    return ImageSample(key, images[0], labels[0] if labels else None, end, ignored)


def images_in(data: bytes, size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, S, S, 3] and labels int64 [n] (0 where there is none) of a run of samples."""
    images, labels = [], []
    for sample in samples_in(io.BytesIO(data), where, complete=False):
        images.append(image_of(data, sample, size, where))
        labels.append(class_number_of(data, sample, where) if sample.label else 0)
    return np.stack(images), np.array(labels, np.int64)


def image_of(data: bytes, sample: ImageSample, size: int, where: str) -> np.ndarray:
    """uint8 [size, size, 3]"""
    name = f"{where}: {sample.image.name}"
    if sample.image.size > LARGEST_IMAGE_BYTES:
        raise DataError(f"{name} has {sample.image.size} bytes, too many for an image", EXIT_CORRUPT)
    image, _ = decode_image(data[sample.image.offset : sample.image.offset + sample.image.size], name, size)
    return np.asarray(image)


def class_number_of(data: bytes, sample: ImageSample, where: str) -> int:
    """The class number of a sample that has one."""
    assert sample.label is not None
    text = data[sample.label.offset : sample.label.offset + min(sample.label.size, LARGEST_LABEL_BYTES)].strip()
    if not text.isdigit() or len(text) > LABEL_DIGITS:
        shown = text[:20].decode("ascii", "replace")
        raise DataError(f"{where}: {sample.label.name} is {shown!r}, not a class number", EXIT_CORRUPT)
    return int(text)
