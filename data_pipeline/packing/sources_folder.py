"""Which images and labels are in a folder of image files, whose subfolders are the classes?"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from data_pipeline.archives import READ_DEADLINE_SECONDS
from data_pipeline.packing.input_files import input_files, is_of_programs
from data_pipeline.packing.source import GROUP_IMAGES, LARGEST_IMAGE_BYTES, Group, Item, Source, listing_digest
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, normalised
from data_pipeline.wording import counted

log = logging.getLogger(__name__)

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
    """Every image below a folder; the first level of subfolders, if there is one, names the classes.

    A warning names subfolders that hold no image: they are no classes.
    """
    url = normalised(url)
    files = input_files(url)
    found = images_of(files, url)
    names = sorted(found)
    loose = [name for name in names if "/" not in name]
    classes = tuple(sorted({name.partition("/")[0] for name in names if "/" in name}))
    if loose and classes:
        raise DataError(f"{url} has images both in subfolders ({classes[0]}, ...) and beside them ({loose[0]}, ...)")
    if classes and (empty := sorted(folders_of(url, files) - set(classes))):
        log.warning(
            "%s: left out %s without an image, as classes have some: %s",
            url,
            counted(len(empty), "folder"),
            ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else ""),
        )
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
    return images_of(input_files(url), url)


def images_of(files: Mapping[str, int], url: str) -> dict[str, int]:
    """The images among the files of an input; DataError when there is none, or one is too large."""
    images = {name: size for name, size in files.items() if name.lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise DataError(f"no images at {url}: none of its files ends in {', '.join(IMAGE_SUFFIXES)}")
    if (largest := max(images, key=lambda name: images[name])) and images[largest] > LARGEST_IMAGE_BYTES:
        raise DataError(f"{url}/{largest} has {images[largest]} bytes, too many for an image", EXIT_CORRUPT)
    return images


def folders_of(url: str, files: Iterable[str]) -> set[str]:
    """Names of the folders directly in an input with these files. In object stores there are none that are empty."""
    folders = {name.partition("/")[0] for name in files if "/" in name}
    store = Store(url, READ_DEADLINE_SECONDS)
    if store.is_local:
        names = (name for name in store.names() if not is_of_programs(f"{name}/"))
        folders |= {name for name in names if os.path.isdir(os.path.join(store.local_path, name))}
    return folders
