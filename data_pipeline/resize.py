"""How does an image of any size become a square of pixels, exactly as in a published data set?

Likelihoods measured on differently resized images are not comparable, so the protocols carry the names of
the data sets they reproduce and are recorded, with the version of Pillow, in the manifest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from PIL import Image
from PIL.Image import Resampling


def chrabaszcz(image: Image.Image, size: int) -> Image.Image:
    """Squash the whole image to size x size with Pillow's BOX filter.

    The protocol of "A Downsampled Variant of ImageNet as an Alternative to the CIFAR datasets" (Chrabaszcz,
    Loshchilov and Hutter, 2017). Pillow's BOX is not exact averaging over areas at ratios that are no integers,
    so other libraries' area filters give other pixels.
    """
    return image.resize((size, size), Resampling.BOX)


def adm(image: Image.Image, size: int) -> Image.Image:
    """Halve with BOX while the short side is at least twice the size, then BICUBIC, then crop the centre.

    The protocol of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol, 2021).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


PROTOCOLS: dict[str, Callable[[Image.Image, int], Image.Image]] = {"chrabaszcz": chrabaszcz, "adm": adm}

DESCRIPTIONS = {
    "chrabaszcz": {"filter": "Pillow BOX", "crop": "none, squashed"},
    "adm": {"filter": "Pillow BOX halvings, then BICUBIC", "crop": "centre"},
}


def describe(protocol: str) -> dict[str, Any]:
    """What the manifest records about a protocol."""
    return {
        "name": protocol,
        **DESCRIPTIONS[protocol],
        "exif_orientation": "ignored",
        "pillow_version": PIL.__version__,
    }


def to_pixels(image: Image.Image, protocol: str, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of an image of any mode; EXIF orientation is ignored, as in the published sets."""
    return np.asarray(PROTOCOLS[protocol](image.convert("RGB"), size))
