"""Which images and labels are in a folder of image files, whose subfolders are the classes?"""

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.archives import READ_DEADLINE_SECONDS
from data_pipeline.packing.input_files import input_files
from data_pipeline.packing.source import GROUP_IMAGES, LARGEST_IMAGE_BYTES, Group, Item, Source, listing_digest
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, normalised

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Files:
    """Image files below a folder."""

    url: str
    names: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.names[0]} and {len(self.names) - 1} more"

    def read(self) -> Iterator[Item]:
        store = Store(self.url, READ_DEADLINE_SECONDS)
        for name, label in zip(self.names, self.labels, strict=True):
            yield Item(f"{self.url}/{name}", label, store.read(name))


def folder(url: str) -> Source:
    """Every image below a folder; the first level of subfolders, if there is one, names the classes."""
    url = normalised(url)
    found = image_names(url)
    names = sorted(found)
    loose = [name for name in names if "/" not in name]
    classes = tuple(sorted({name.partition("/")[0] for name in names if "/" in name}))
    if loose and classes:
        raise DataError(f"{url} has images both in subfolders ({classes[0]}, ...) and beside them ({loose[0]}, ...)")
    index = {name: label for label, name in enumerate(classes)}
    labels = [index.get(name.partition("/")[0], 0) for name in names]
    origin = {"files": len(names), "listing_sha256": listing_digest((name, found[name]) for name in names)}
    return Source("folder", classes, file_groups(url, names, labels), len(names), origin)


def file_groups(url: str, names: list[str], labels: list[int]) -> list[Group]:
    return [
        Files(url, tuple(names[i : i + GROUP_IMAGES]), tuple(labels[i : i + GROUP_IMAGES]))
        for i in range(0, len(names), GROUP_IMAGES)
    ]


def image_names(url: str) -> dict[str, int]:
    """Size in bytes of every image below a folder by its name; DataError when there is none."""
    found = input_files(url)
    images = {name: size for name, size in found.items() if name.lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise DataError(f"no images at {url}: none of its files ends in {', '.join(IMAGE_SUFFIXES)}")
    if (largest := max(images, key=lambda name: images[name])) and images[largest] > LARGEST_IMAGE_BYTES:
        raise DataError(f"{url}/{largest} has {images[largest]} bytes, too many for an image", EXIT_CORRUPT)
    return images
