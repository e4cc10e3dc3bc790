"""What is a source of images to pack: groups of items that are read one after the other.

A group is the unit of work and of restarting: small enough to redo, read front to back. Reading the same group
again gives the same samples in the same order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

GROUP_IMAGES = 512
LARGEST_IMAGE_BYTES = 1 << 30


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
    """The options that name this source on the command line, without its URLs. The command of a repair repeats them."""


def listing_digest(listing: Iterable[tuple[str, object]]) -> str:
    """SHA-256 of names with their sizes or values."""
    return hashlib.sha256("".join(f"{name}\t{value}\n" for name, value in listing).encode()).hexdigest()
