"""Which images and labels are in the published sets that hold small pixels already: nothing is resized here.

The Imagenet32/64 batches of Chrabaszcz et al. 2017, the "small" ImageNet of van den Oord et al. 2016 with its npy
mirrors, and CIFAR-10's python batches.
"""

import io
import math
import pickle
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.archives import READ_DEADLINE_SECONDS, open_range, tar_members
from data_pipeline.decode import decode_image
from data_pipeline.packing.archive_groups import DAMAGE_OF_TARS, DAMAGE_OF_ZIPS, open_zip, read_member, tar_groups
from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES, WNIDS_IN_DEVKIT_ORDER
from data_pipeline.packing.input_files import input_files
from data_pipeline.packing.source import GROUP_IMAGES, Group, Item, Source, listing_digest
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, lacks_memory, normalised, split_url
from data_pipeline.wording import counted

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}
LARGEST_LABELS_BYTES = 1 << 26
LARGEST_BATCH_BYTES = 4 << 30
ROWS_AT_ONCE = 1024
CHRABASZCZ_BATCHES = 10  # of the training set
CHRABASZCZ_NAME = re.compile(r"(train_data_batch_\d+|val_data)(\.npz)?")


@dataclass(frozen=True)
class PlanarBatch:
    """A batch file whose rows are all red, all green, all blue values of an image."""

    url: str
    member: str | None
    """Name inside the tar.gz at the URL, when it is one."""
    size: int
    labels: tuple[int, ...] | None
    """Class index of each label in the file, counted from ``first_label``; None when the label is the index."""
    first_label: int

    @property
    def name(self) -> str:
        return self.member or self.url

    def read(self) -> Iterator[Item]:
        where = self.url if self.member is None else f"{self.url}:{self.member}"
        if self.url.endswith(".npz"):
            rows, labels = npz_batch(self.url, self.size)
        else:
            rows, labels = pickled_batch(self.url, self.member, self.size)
        number = 0
        for chunk in rows:
            images = chunk.reshape(-1, 3, self.size, self.size).transpose(0, 2, 3, 1)
            for image in images:
                if number >= len(labels):
                    raise DataError(f"{where} has more images than labels ({len(labels)})", EXIT_CORRUPT)
                yield Item(f"{where} row {number}", self._label(labels[number], where), np.ascontiguousarray(image))
                number += 1
        if number != len(labels):
            raise DataError(f"{where} has {counted(number, 'image')} and {counted(len(labels), 'label')}", EXIT_CORRUPT)

    def _label(self, stored: int, where: str) -> int:
        index = stored - self.first_label
        count = len(self.labels) if self.labels else len(CIFAR10_CLASSES)
        if not 0 <= index < count:
            last = self.first_label + count - 1
            raise DataError(f"{where} has the label {stored}, not one of {self.first_label} to {last}", EXIT_CORRUPT)
        return self.labels[index] if self.labels else index


@dataclass(frozen=True)
class NpyRows:
    """Some rows of an array file of images."""

    url: str
    begin: int
    """Byte at which the first row starts."""
    count: int
    size: int
    planar: bool
    """Whether a row is [3, S, S] instead of [S, S, 3]."""

    @property
    def name(self) -> str:
        return f"{self.count} rows of {self.url}"

    def read(self) -> Iterator[Item]:
        row_bytes = 3 * self.size**2
        with open_range(self.url, self.begin, self.begin + self.count * row_bytes) as file:
            for number in range(self.count):
                row = np.frombuffer(file.read(row_bytes), np.uint8)
                image = row.reshape(3, self.size, self.size).transpose(1, 2, 0) if self.planar else row
                pixels = np.ascontiguousarray(image).reshape(self.size, self.size, 3)
                yield Item(f"{self.url} row {number}", 0, pixels)


def chrabaszcz(url: str, split: str, size: int) -> Source:
    """``train_data_batch_1..10`` or ``val_data`` below a folder, pickled or npz; labels 1 to 1000 in devkit order."""
    url = normalised(url)
    found = input_files(url)
    prefix = {"train": "train_data_batch_", "validation": "val_data"}.get(split)
    if prefix is None:
        raise DataError(f"--split {split}: the Imagenet32/64 batches are train and validation")
    batches = [name for name in found if CHRABASZCZ_NAME.fullmatch(base(name)) and base(name).startswith(prefix)]
    names = sorted(batches, key=lambda name: (int(re.sub(r"\D", "", base(name).removesuffix(".npz")) or 0), name))
    if not names:
        raise DataError(f"{url} holds no {prefix}... batches (pickled or .npz; unpack the zip files first)")
    if len({base(name).removesuffix(".npz") for name in names}) != len(names):
        raise DataError(f"{url} holds a batch twice: {', '.join(names)}")
    wanted = [f"{prefix}{number}" for number in range(1, CHRABASZCZ_BATCHES + 1)] if split == "train" else [prefix]
    if missing := [batch for batch in wanted if batch not in {base(name).removesuffix(".npz") for name in names}]:
        raise DataError(
            f"{url} lacks {' and '.join(missing[:2])}{' and others' if missing[2:] else ''}: the training set has "
            f"{CHRABASZCZ_BATCHES} batches"
        )
    rank = {wnid: index for index, wnid in enumerate(IMAGENET_CLASSES)}
    labels = tuple(rank[wnid] for wnid in WNIDS_IN_DEVKIT_ORDER)
    groups = [PlanarBatch(f"{url}/{name}", None, size, labels, 1) for name in names]
    origin = {"batches": [base(name) for name in names], "listing_sha256": listing_digest((n, found[n]) for n in names)}
    return Source("imagenet", IMAGENET_CLASSES, groups, None, origin, "chrabaszcz")


def cifar10(url: str, split: str, size: int) -> Source:
    """CIFAR-10's python version, as ``cifar-10-python.tar.gz`` or the folder in it; the test set is ``validation``."""
    url = normalised(url)
    if split not in CIFAR10_FILES:
        raise DataError(f"--split {split}: CIFAR-10 has train and validation (its test set)")
    if size != 32:
        raise DataError(f"--size {size}: the images of CIFAR-10 have 32 x 32 pixels and are not resized")
    wanted = CIFAR10_FILES[split]
    if url.endswith((".tar.gz", ".tgz")):
        groups: list[Group] = [PlanarBatch(url, name, 32, None, 0) for name in wanted]
        folder, name = split_url(url)
        listing = [(name, Store(folder, READ_DEADLINE_SECONDS).size(name))]
    else:
        found = input_files(url)
        missing = [name for name in wanted if name not in found]
        if missing:
            raise DataError(f"{url} holds no {missing[0]}: give cifar-10-python.tar.gz or the folder in it")
        groups = [PlanarBatch(f"{url}/{name}", None, 32, None, 0) for name in wanted]
        listing = [(name, found[name]) for name in wanted]
    return Source("cifar10", CIFAR10_CLASSES, groups, None, {"listing_sha256": listing_digest(listing)}, "cifar10")


def oord(url: str, size: int) -> Source:
    """``train_64x64.tar`` of PNG files, or a npy mirror of it with rows [S, S, 3] or [3, S, S]; no labels."""
    url = normalised(url)
    folder, name = split_url(url)
    if url.endswith(".npy"):
        with open_range(url, buffer_bytes=1 << 16) as file:
            shape, begin = npy_shape(file, url)
        planar = shape[1:] == (3, size, size)
        if not planar and shape[1:] != (size, size, 3):
            raise DataError(f"{url} holds an array of shape {shape}, not images of --size {size}")
        length = Store(folder, READ_DEADLINE_SECONDS).size(name)
        if length != begin + math.prod(shape):
            raise DataError(f"{url} is cut off: {length} of {begin + math.prod(shape)} bytes", EXIT_CORRUPT)
        row_bytes = 3 * size**2
        groups: list[Group] = [
            NpyRows(url, begin + row * row_bytes, min(GROUP_IMAGES, shape[0] - row), size, planar)
            for row in range(0, shape[0], GROUP_IMAGES)
        ]
        return Source("imagenet", (), groups, shape[0], {"archive": name, "bytes": length}, "oord")
    with open_range(url, buffer_bytes=1 << 20) as file:
        members = [member for member in tar_members(file, url) if member.name.lower().endswith(".png")]
        if not members:
            raise DataError(f"{url} holds no PNG files")
        file.seek(members[0].offset)
        check_size(read_member(file, members[0].size, members[0].name), f"{url}:{members[0].name}", size)
    listing = listing_digest((member.name, member.size) for member in members)
    groups = list(tar_groups(url, members, [0] * len(members)))
    return Source("imagenet", (), groups, len(members), {"archive": name, "listing_sha256": listing}, "oord")


def check_size(data: bytes, name: str, size: int) -> None:
    """DataError when an image file has another size than it is to be packed at; before anything is written."""
    try:
        image, _ = decode_image(data, name)
    except DataError:
        return  # a damaged file is for the packing to report, or to leave out where that is allowed
    if image.size != (size, size):
        raise DataError(f"{name} has {image.width} x {image.height} pixels, not --size {size}")


def npz_batch(url: str, size: int) -> tuple[Iterator[np.ndarray], Sequence[int]]:
    """Rows and labels of an npz batch. The pixels are decompressed a few megabytes at a time."""
    archive = open_zip(url)
    try:
        with archive.open("labels.npy") as file:
            labels = np.lib.format.read_array(io.BytesIO(file.read(LARGEST_LABELS_BYTES)), allow_pickle=False)
        data = archive.open("data.npy")
        shape, _ = npy_shape(data, url)
    except (KeyError, ValueError, MemoryError, *DAMAGE_OF_ZIPS) as error:
        if lacks_memory(error, 2 * LARGEST_LABELS_BYTES):
            raise
        raise DataError(f"{url} is not a batch with the arrays data and labels: {error}", EXIT_CORRUPT) from error
    if shape[1:] != (3 * size**2,):
        raise DataError(f"{url} holds rows of {shape[1:]} values, not images of --size {size}")

    def rows() -> Iterator[np.ndarray]:
        with archive, data:
            for first in range(0, shape[0], ROWS_AT_ONCE):
                wanted = min(ROWS_AT_ONCE, shape[0] - first) * shape[1]
                try:
                    chunk = data.read(wanted)
                except DAMAGE_OF_ZIPS as error:
                    raise DataError(f"{url} is damaged: {error}", EXIT_CORRUPT) from error
                if len(chunk) != wanted:
                    raise DataError(f"{url} is cut off", EXIT_CORRUPT)
                yield np.frombuffer(chunk, np.uint8).reshape(-1, shape[1])

    return rows(), whole_numbers(labels.ravel(), url)


def npy_shape(file: Any, url: str) -> tuple[tuple[int, ...], int]:
    """The shape of a uint8 array file and the length of its header, without reading the array."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(file)
    except ValueError as error:
        raise DataError(f"{url} is not a npy array: {error}", EXIT_CORRUPT) from error
    if fortran or kind != np.uint8 or len(shape) < 2:
        raise DataError(f"{url} holds {kind} of shape {shape}, not rows of uint8 pixels", EXIT_CORRUPT)
    return shape, file.tell()


def pickled_batch(url: str, member: str | None, size: int) -> tuple[Iterator[np.ndarray], Sequence[int]]:
    """Rows and labels of a pickled batch. Only objects of the known types are ever made."""
    where = url if member is None else f"{url}:{member}"
    folder, name = split_url(url)
    data = Store(folder, READ_DEADLINE_SECONDS).read_whole(name, LARGEST_BATCH_BYTES)
    if member is not None:
        data = gzipped_member(data, member, url)
    try:
        batch = BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    # A pickle is a program; a damaged one fails in any way.
    except Exception as error:  # noqa: BLE001
        if lacks_memory(error, 2 * len(data)):
            raise
        raise DataError(f"{where} is not a pickled batch of pixels and labels: {error}", EXIT_CORRUPT) from error
    rows, labels = fields.get("data"), fields.get("labels")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or not isinstance(labels, list):
        raise DataError(f"{where} does not hold the array data and the list labels", EXIT_CORRUPT)
    if rows.shape[1] != 3 * size**2:
        raise DataError(f"{where} holds rows of {rows.shape[1]} values, not images of --size {size}")
    return iter([rows]), whole_numbers(labels, where)


def whole_numbers(labels: Any, where: str) -> list[int]:
    """Labels as integers, which some programs write as 5.0. Raises DataError (exit code 65) for anything else."""
    try:
        values = np.asarray(labels)
    except ValueError:  # lists of several lengths
        values = np.array(None)
    with np.errstate(invalid="ignore"):
        if values.ndim == 1 and (values.dtype.kind in "iu" or values.dtype.kind == "f" and (values % 1 == 0).all()):
            return [int(value) for value in values]
    raise DataError(f"{where} has labels that are no whole numbers", EXIT_CORRUPT)


def gzipped_member(data: bytes, member: str, url: str) -> bytes:
    """A file, by its base name, inside a tar.gz."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for info in archive:
                if base(info.name) == member and info.isfile() and info.size <= LARGEST_BATCH_BYTES:
                    file = archive.extractfile(info)
                    assert file is not None
                    return file.read()
    except DAMAGE_OF_TARS as error:
        raise DataError(f"{url} is not a tar.gz file, or is cut off: {error}", EXIT_CORRUPT) from error
    raise DataError(f"{url} holds no {member}; give cifar-10-python.tar.gz")


class BatchUnpickler(pickle._Unpickler):
    """Builds arrays of plain numbers, lists, strings and dictionaries, and refuses every other name.

    This is pickle's implementation in Python. The one in C makes a table as long as the largest number that the pickle
    gives to an object: ten bytes could ask for sixty gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return plain_dtype
        if (module, name) == ("_codecs", "encode"):
            return encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")


def empty_array(kind: type, shape: tuple[int, ...], letter: object) -> np.ndarray:
    """The empty array that numpy's pickles begin with. The pixels follow as bytes."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("it is not an array as numpy pickles it")
    return np.ndarray((0,), np.uint8)


def plain_dtype(name: str | bytes, *_: object) -> np.dtype:
    text = name.decode() if isinstance(name, bytes) else name
    if text not in ("u1", "i4", "i8", "f4", "f8"):
        raise pickle.UnpicklingError(f"it holds values of type {text!r}")
    return np.dtype(text)


def encode_latin1(text: str, encoding: str | bytes) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


def base(name: str) -> str:
    return name.rpartition("/")[2]
