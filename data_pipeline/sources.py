"""Where do the images to pack come from: each source is a list of groups that are read one after the other.

A group is the unit of work and of restarting: small enough to redo, read front to back. Reading the same group
again gives the same samples in the same order.
"""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_pipeline.decode import decode
from data_pipeline.order import hash_of, mix
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, normalised

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
GROUP_IMAGES = 512
LARGEST_IMAGE_BYTES = 1 << 30
READ_DEADLINE_SECONDS = 600.0

# Real RGB photographs inside packages that are installed anyway: class name -> (package, path, split).
# The split is by photograph, so that validation shows scenes that training never saw; the two views of the
# motorcycle show the same scene and stay together.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", "train"),  # NASA, public domain
    "cat": ("skimage", "data/chelsea.png", "validation"),  # CC0
    "coffee": ("skimage", "data/coffee.png", "train"),  # CC0
    "flower": ("sklearn", "datasets/images/flower.jpg", "train"),  # CC BY 2.0, vultilion on flickr
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", "train"),  # NASA, public domain
    "motorcycle-left": ("skimage", "data/motorcycle_left.png", "train"),  # Middlebury stereo benchmark
    "motorcycle-right": ("skimage", "data/motorcycle_right.png", "train"),  # Middlebury stereo benchmark
    "pagoda": ("sklearn", "datasets/images/china.jpg", "validation"),  # CC BY 2.0, danielbuechele on flickr
    "portrait": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "train"),  # US Navy, public domain
    "retina": ("skimage", "data/retina.jpg", "train"),  # CC0
    "rocket": ("skimage", "data/rocket.jpg", "train"),  # SpaceX, public domain
    "tissue": ("skimage", "data/ihc.png", "train"),  # no known copyright restrictions
}
PACKAGE_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
# Crops of these many tenths of the target size are taken, then reduced: details and whole objects.
CROP_TENTHS = (10, 15, 20, 30, 40)


@dataclass(frozen=True)
class Item:
    """One image before resizing."""

    name: str
    """What an error message calls it."""
    label: int
    image: bytes | Image.Image | np.ndarray
    """The bytes of an image file, or an RGB image, or uint8 [S, S, 3] that has its final size already."""


class Group(Protocol):
    """A run of images that is read front to back; small enough to send to a worker process."""

    @property
    def name(self) -> str: ...

    def read(self) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Source:
    """Images to pack."""

    form: str
    classes: tuple[str, ...]
    """Class names in the order of their labels; empty when the images have no classes."""
    groups: Sequence[Group]
    count: int | None
    """Number of images, when it is known before reading."""
    origin: Mapping[str, Any]
    """What identifies the data; goes into the manifest. Equal origins mean equal images."""
    protocol: str | None = None
    """How the images came to their size, when the source holds them at that size; None when they are resized here."""
    options: tuple[str, ...] = ()
    """What names this source on the command line, without the places where it lies; for the command of a repair."""


@dataclass(frozen=True)
class Crops:
    """Square crops of photographs: number i is a function of (seed, i)."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    size: int
    seed: int
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"crops {self.first}-{self.first + self.count}"

    def read(self) -> Iterator[Item]:
        numbers = np.arange(4 * self.first, 4 * (self.first + self.count), dtype=np.uint64)
        draws = mix(hash_of(self.seed, 3) ^ numbers).reshape(-1, 4).tolist()
        for number, (which, tenths, x, y) in enumerate(draws, self.first):
            which %= len(self.paths)
            photograph = photograph_at(self.paths[which])
            edge = min(self.size * CROP_TENTHS[tenths % len(CROP_TENTHS)] // 10, *photograph.size)
            left, top = x % (photograph.width - edge + 1), y % (photograph.height - edge + 1)
            crop = photograph.crop((left, top, left + edge, top + edge))
            yield Item(f"crop {number} of {self.paths[which]}", self.labels[which], crop)


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


def photographs(*, split: str, size: int, images: int, seed: int) -> Source:
    """``images`` random crops of the photographs of a split; label = which photograph."""
    splits = sorted({split for _, _, split in PHOTOGRAPHS.values()})
    if split not in splits:
        raise DataError(f"--split {split}: the photographs are divided into {' and '.join(splits)}")
    if images < 1:
        raise DataError(f"--images {images}: say how many crops to take from the photographs, at least 1")
    chosen = {name: locate(*PHOTOGRAPHS[name][:2]) for name in PHOTOGRAPHS if PHOTOGRAPHS[name][2] == split}
    too_small = [name for name, path in chosen.items() if min(photograph_at(str(path)).size) < size]
    if too_small:
        raise DataError(f"--size {size}: the photograph {too_small[0]!r} is smaller; choose a smaller size")
    classes = tuple(sorted(PHOTOGRAPHS))
    paths = tuple(str(path) for path in chosen.values())
    labels = tuple(classes.index(name) for name in chosen)
    groups = [
        Crops(paths, labels, size, seed, first, min(GROUP_IMAGES, images - first))
        for first in range(0, images, GROUP_IMAGES)
    ]
    sha256 = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in chosen.items()}
    return Source("photographs", classes, groups, images, {"images": images, "photographs_sha256": sha256})


def locate(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"the photographs ship with {PACKAGE_NAMES[package]}, which is not installed: "
            f"run `pip install {PACKAGE_NAMES[package]}`"
        )
    found = Path(spec.origin).parent / path
    if not found.is_file():
        raise DataError(f"this version of {PACKAGE_NAMES[package]} does not ship {path}; install another version")
    return found


@lru_cache(maxsize=16)
def photograph_at(path: str) -> Image.Image:
    """A decoded photograph; a few dozen megabytes for all of them."""
    return decode(Path(path).read_bytes(), path)[0]


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
    groups = [
        Files(url, tuple(names[i : i + GROUP_IMAGES]), tuple(labels[i : i + GROUP_IMAGES]))
        for i in range(0, len(names), GROUP_IMAGES)
    ]
    listing = "".join(f"{name}\t{found[name]}\n" for name in names)
    origin = {"files": len(names), "listing_sha256": hashlib.sha256(listing.encode()).hexdigest()}
    return Source("folder", classes, groups, len(names), origin)


def image_names(url: str) -> dict[str, int]:
    """Size in bytes of every image below a folder by its name; DataError when there is none."""
    found = Store(url, READ_DEADLINE_SECONDS).files()
    images = {name: size for name, size in found.items() if name.lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise DataError(f"no images at {url}: none of its files ends in {', '.join(IMAGE_SUFFIXES)}")
    if (largest := max(images, key=lambda name: images[name])) and images[largest] > LARGEST_IMAGE_BYTES:
        raise DataError(f"{url}/{largest} has {images[largest]} bytes, too many for an image", EXIT_CORRUPT)
    return images
