"""What do lossless image formats need for the same images, in bits per dimension? A model should need less."""

import importlib
import importlib.util
import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

UNIFORM_BITS_PER_DIM = 8.0
"""A model that knows nothing: 256 equally likely values."""
JPEG_XL = "JPEG-XL lossless"
JPEG_XL_EFFORT = 9
MOSAIC_PIXELS = 1 << 20
"""The most that a mosaic holds, and that JPEG-XL is asked for: it takes ten seconds of a core for so many."""

_PILLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("PNG", {"optimize": True}),
    "WebP lossless": ("WEBP", {"lossless": True}),
}


def available_codecs() -> list[str]:
    """Formats that can be written here; JPEG-XL only where the package pylibjxl is installed.

    Another libjxl gives other files: that of pillow-jxl-plugin 1.3.8 needed 0.2 % less than 0.11.2 of pylibjxl 0.5.0
    for one file an image of the quickstart, and 1 % less for a mosaic.
    """
    return [*_PILLOWS, *([JPEG_XL] if importlib.util.find_spec("pylibjxl") else [])]


def codec_bits_per_dim(codec: str, images: Iterable[np.ndarray]) -> float:
    """Mean bits per sub-pixel of uint8 [H, W, 3] images, each stored as one file of the given format."""
    bits = subpixels = 0
    for image in images:
        bits += 8 * len(encoded(codec, image))
        subpixels += image.size
    return bits / subpixels


def encoded(codec: str, image: np.ndarray) -> bytes:
    """A uint8 [H, W, 3] image as a file of the given format."""
    if codec == JPEG_XL:
        pylibjxl = importlib.import_module("pylibjxl")
        content: bytes = pylibjxl.encode(np.ascontiguousarray(image), effort=JPEG_XL_EFFORT, lossless=True)
        return content
    pillow_name, options = _PILLOWS[codec]
    file = io.BytesIO()
    Image.fromarray(image).save(file, pillow_name, **options)
    return file.getvalue()


def mosaic_shape(count: int) -> tuple[int, int]:
    """Rows and columns of a mosaic of up to so many images."""
    columns = 1 << (math.isqrt(count).bit_length() - 1)
    return count // columns, columns


def mosaic(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> [rows * H, columns * W, 3], side by side: one file has one header.

    The columns are a power of two; images of a last row that is not full are left out.
    """
    count, height, width, channels = images.shape
    rows, columns = mosaic_shape(count)
    tiles = images[: rows * columns].reshape(rows, columns, height, width, channels)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
