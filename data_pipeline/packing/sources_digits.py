"""Which pictures of handwritten digits make a small data set with classes that anyone can judge?"""

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.order import hash_of, mix
from data_pipeline.packing.source import GROUP_IMAGES, Item, Source
from data_pipeline.packing.sources_photographs import locate
from data_pipeline.storage import DataError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_DIGITS, NUM_TRAINING, EDGE, STRONGEST = 1797, 1500, 8, 16
"""Of the file that ships with scikit-learn (the test set of UCI's "Optical recognition of handwritten digits", CC BY
4.0): images, the first of them that are for training while the last 297 are for validation, their edge in pixels, and
the value of full ink."""
INKS = ("red", "lime", "yellow", "blue", "magenta", "cyan", "white")
"""Names of colours with channels of 0 and 255 only: nothing has to be learned of a colour but which one it is."""


@dataclass(frozen=True)
class Drawings:
    """Digits of a split in turn, each in an ink of its own on black: number i is a function of (seed, i)."""

    path: str
    split: slice
    size: int
    seed: int
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"digits {self.first}-{self.first + self.count}"

    def read(self) -> Iterator[Item]:
        strengths, labels = (values[self.split] for values in digits_at(self.path))
        numbers = np.arange(self.first, self.first + self.count, dtype=np.uint64)
        inks = (mix(hash_of(self.seed, 4) ^ numbers) % np.uint64(len(INKS))).tolist()
        for number, ink in enumerate(inks, self.first):
            which = number % len(labels)
            yield Item(f"digit {number}", int(labels[which]), painted(strengths[which], INKS[ink], self.size))


def digits(*, split: str, size: int, images: int, seed: int) -> Source:
    """``images`` coloured digits of ``size`` rows and columns, those of the split in turn; label = the digit."""
    splits = {"train": slice(0, NUM_TRAINING), "validation": slice(NUM_TRAINING, NUM_DIGITS)}
    if split not in splits:
        raise DataError(f"--split {split}: the digits are divided into {' and '.join(splits)}")
    if images < 1:
        raise DataError(f"--images {images}: say how many coloured digits to make, at least 1")
    path = locate("sklearn", "datasets/data/digits.csv.gz")
    groups = [
        Drawings(str(path), splits[split], size, seed, first, min(GROUP_IMAGES, images - first))
        for first in range(0, images, GROUP_IMAGES)
    ]
    origin = {"images": images, "digits_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Source("digits", NAMES, groups, images, origin)


@lru_cache(maxsize=1)
def digits_at(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Strengths of the ink from 0 to 16, uint8 [1797, 8, 8], and labels, int64 [1797]; DataError if the file holds
    something else."""
    with gzip.open(Path(path), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    if table.shape != (NUM_DIGITS, EDGE * EDGE + 1) or table.min() < 0 or table[:, :-1].max() > STRONGEST:
        raise DataError(f"{path}: is not the set of {NUM_DIGITS} digits; install another version of scikit-learn")
    return table[:, :-1].astype(np.uint8).reshape(-1, EDGE, EDGE), table[:, -1]


def painted(strengths: np.ndarray, ink: str, size: int) -> Image.Image:
    """A digit of 8 x 8 strengths as a picture of two colours, ``ink`` where at least half of it is and black
    elsewhere; a sixteenth of ``size`` on each side stays black, because the digits fill their squares."""
    margin = size // 16
    small = Image.fromarray((strengths.astype(np.float32) * (255 / STRONGEST)).round().astype(np.uint8))
    large = small.resize((size - 2 * margin, size - 2 * margin), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (size, size))
    picture.paste(ink, (margin, margin), large.point(lambda strength: 255 * (strength >= 128)))
    return picture
