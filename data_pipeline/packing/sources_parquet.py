"""Which images and labels are in the parquet files that Hugging Face serves ImageNet, and sets like it, in?

Needs pyarrow, which MLflow brings; it is imported only when parquet files are packed.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.archives import open_range
from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES
from data_pipeline.packing.input_files import input_files, refuse_gaps, warn_of_gaps
from data_pipeline.packing.source import Item, Source, listing_digest
from data_pipeline.packing.sources_imagenet import WNID
from data_pipeline.storage import EXIT_CORRUPT, DataError, lacks_memory, normalised
from data_pipeline.typed_records import parse_object

COLUMNS = ["image", "label"]
FOOTER_BYTES = 1 << 26  # more than a file's directory has
METADATA_KEY = b"huggingface"  # of the schema; its value is JSON
# How Hugging Face calls some of ILSVRC2012's classes, whose order is that of their WordNet ids.
IMAGENET_NAMES = {0: "tench", 1: "goldfish", len(IMAGENET_CLASSES) - 1: "toilet tissue"}


@dataclass(frozen=True)
class RowGroup:
    """The part of a parquet file that is compressed in one piece."""

    url: str
    number: int
    num_classes: int

    @property
    def name(self) -> str:
        return f"row group {self.number} of {self.url}"

    def read(self) -> Iterator[Item]:
        file = open_parquet(self.url)
        try:
            table = file.read_row_group(self.number, columns=COLUMNS)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  # pyarrow has OSError, ArrowInvalid and others for damage
            if lacks_memory(error, 2 * file.metadata.row_group(self.number).total_byte_size):
                raise
            raise DataError(f"{self.name} is damaged: {error}", EXIT_CORRUPT) from error
        for row, (image, label) in enumerate(zip(table["image"], table["label"], strict=True)):
            where = f"{self.url} row group {self.number} row {row}"
            number, fields = label.as_py(), image.as_py() or {}
            if not isinstance(number, int) or not 0 <= number < self.num_classes:
                raise DataError(f"{where} has the label {number}; it cannot be packed", EXIT_CORRUPT)
            data, path = fields.get("bytes"), fields.get("path")
            if not isinstance(data, bytes):
                raise DataError(f"{where} holds no image (its path is {path}); it cannot be packed", EXIT_CORRUPT)
            yield Item(f"{where}: {path}" if path else where, number, data)  # the name tells a PNG called JPEG


def imagenet_parquet(url: str, split: str) -> Source:
    """Files like ``train-00000-of-00294.parquet`` below a folder; what they call their labels are the classes.

    Files without names hold sorted class indices of ImageNet. Raises DataError where two files have other names.
    """
    url = normalised(url)
    found = input_files(url)
    names = sorted(n for n in found if n.endswith(".parquet") and n.rpartition("/")[2].startswith(f"{split}-"))
    if not names:
        raise DataError(f"{url} holds no files {split}-*.parquet")
    refuse_gaps(names, url)
    warn_of_gaps(names, url)
    named, row_groups, count = {}, [], 0
    for name in names:
        file = open_parquet(f"{url}/{name}")
        named[name] = label_names(file, f"{url}/{name}")
        row_groups += [(f"{url}/{name}", number) for number in range(file.metadata.num_row_groups)]
        count += file.metadata.num_rows
    if other := [name for name in names if named[name] != named[names[0]]]:
        raise DataError(
            f"{url} holds files of two sets, {names[0]} and {other[0]}, whose labels have other names: keep one of "
            "them there"
        )
    form, classes = classes_of(named[names[0]])
    groups = [RowGroup(where, number, len(classes)) for where, number in row_groups]
    origin = {"files": len(names), "listing_sha256": listing_digest((name, found[name]) for name in names)}
    return Source(form, classes, groups, count, origin)


def label_names(file: Any, url: str) -> tuple[str, ...] | None:
    """What a parquet file calls the labels 0, 1, ...; None if it does not say.

    Raises DataError (exit code 65) for names that are not as the library of Hugging Face writes them.
    """
    try:
        stored = parse_object((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
        names = stored.get("info", {}).get("features", {}).get("label", {}).get("names")
    except (AttributeError, ValueError) as error:  # not JSON, or no objects
        raise DataError(
            f"{url} is damaged: what it says of its labels cannot be read ({error})", EXIT_CORRUPT
        ) from error
    if names is None:
        return None
    if not isinstance(names, list) or not names or len({name for name in names if isinstance(name, str)}) < len(names):
        raise DataError(f"{url} is damaged: its labels have no names, or one twice", EXIT_CORRUPT)
    return tuple(names)


def classes_of(names: tuple[str, ...] | None) -> tuple[str, tuple[str, ...]]:
    """The form of a set whose labels have these names, and its classes.

    ImageNet's have their WordNet ids, whether the file has these, or words, or nothing.
    """
    if names is None:
        return "imagenet", IMAGENET_CLASSES
    if len(names) == len(IMAGENET_CLASSES) and all(names[n].startswith(word) for n, word in IMAGENET_NAMES.items()):
        return "imagenet", IMAGENET_CLASSES
    return "imagenet" if all(map(WNID.fullmatch, names)) else "parquet", names


def open_parquet(url: str) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` with an image column of bytes and a label column."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("parquet files need pyarrow: run `pip install pyarrow`") from error
    arrow = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(open_range(url))
    except (arrow.ArrowException, OSError) as error:
        if lacks_memory(error, FOOTER_BYTES):
            raise
        raise DataError(f"{url} is not a parquet file, or is cut off: {error}", EXIT_CORRUPT) from error
    missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{url} has no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}")
    if not arrow.types.is_struct(kind := file.schema_arrow.field("image").type):
        raise DataError(f"{url} has {kind} in its column image, not bytes and a path as Hugging Face writes them")
    return file
