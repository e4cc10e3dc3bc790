"""Which images and labels are in the parquet files that Hugging Face serves ImageNet in?

Needs pyarrow, which MLflow brings; it is imported only when parquet files are packed.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.archives import open_range
from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES
from data_pipeline.packing.input_files import input_files, refuse_gaps
from data_pipeline.packing.source import Item, Source, listing_digest
from data_pipeline.storage import EXIT_CORRUPT, DataError, normalised

COLUMNS = ["image", "label"]


@dataclass(frozen=True)
class RowGroup:
    """The part of a parquet file that is compressed in one piece."""

    url: str
    number: int

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
            raise DataError(f"{self.name} is damaged: {error}", EXIT_CORRUPT) from error
        for row, (image, label) in enumerate(zip(table["image"], table["label"], strict=True)):
            where = f"{self.url} row group {self.number} row {row}"
            number, fields = label.as_py(), image.as_py() or {}
            if not isinstance(number, int) or not 0 <= number < len(IMAGENET_CLASSES):
                raise DataError(f"{where} has the label {number}; it cannot be packed", EXIT_CORRUPT)
            data, path = fields.get("bytes"), fields.get("path")
            if not isinstance(data, bytes):
                raise DataError(f"{where} holds no image (its path is {path}); it cannot be packed", EXIT_CORRUPT)
            yield Item(f"{where}: {path}" if path else where, number, data)  # the name tells a PNG called JPEG


def imagenet_parquet(url: str, split: str) -> Source:
    """Files like ``train-00000-of-00294.parquet`` below a folder; their labels are sorted class indices."""
    url = normalised(url)
    found = input_files(url)
    names = sorted(n for n in found if n.endswith(".parquet") and n.rpartition("/")[2].startswith(f"{split}-"))
    if not names:
        raise DataError(f"{url} holds no files {split}-*.parquet")
    refuse_gaps(names, url)
    groups, count = [], 0
    for name in names:
        metadata = open_parquet(f"{url}/{name}").metadata
        count += metadata.num_rows
        groups += [RowGroup(f"{url}/{name}", number) for number in range(metadata.num_row_groups)]
    origin = {"files": len(names), "listing_sha256": listing_digest((name, found[name]) for name in names)}
    return Source("imagenet", IMAGENET_CLASSES, groups, count, origin)


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
        raise DataError(f"{url} is not a parquet file, or is cut off: {error}", EXIT_CORRUPT) from error
    missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{url} has no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}")
    if not arrow.types.is_struct(kind := file.schema_arrow.field("image").type):
        raise DataError(f"{url} has {kind} in its column image, not bytes and a path as Hugging Face writes them")
    return file
