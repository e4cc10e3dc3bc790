"""Which crops of the photographs inside installed packages make a small data set for a first try?"""

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.decode import decode_image
from data_pipeline.order import hash_of, mix
from data_pipeline.packing.source import GROUP_IMAGES, Item, Source
from data_pipeline.storage import DataError

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
# A crop is so many tenths of the target size, then reduced to it: small ones show details, large ones whole objects.
CROP_TENTHS = (10, 15, 20, 30, 40)


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
            f"{path} ships with {PACKAGE_NAMES[package]}, which is not installed: "
            f"run `pip install {PACKAGE_NAMES[package]}`"
        )
    found = Path(spec.origin).parent / path
    if not found.is_file():
        raise DataError(f"this version of {PACKAGE_NAMES[package]} does not ship {path}; install another version")
    return found


@lru_cache(maxsize=16)
def photograph_at(path: str) -> Image.Image:
    """A decoded photograph; a few dozen megabytes for all of them."""
    return decode_image(Path(path).read_bytes(), path)[0]
