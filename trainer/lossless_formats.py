"""What do lossless image formats need for the same images, in bits per dimension? A model should need less."""

import importlib
import importlib.util
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

UNIFORM_BITS_PER_DIM = 8.0
"""A model that knows nothing: 256 equally likely values."""

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("PNG", {"optimize": True}),
    "WebP lossless": ("WEBP", {"lossless": True}),
    "JPEG-XL lossless": ("JXL", {"lossless": True, "effort": 9}),
}


def available_codecs() -> list[str]:
    """Formats this Pillow can write; JPEG-XL only where the package pillow-jxl-plugin is installed."""
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # registers the format with Pillow
    Image.init()
    return [name for name, (pillow_name, _) in _FORMATS.items() if pillow_name in Image.SAVE]


def codec_bits_per_dim(codec: str, images: Iterable[np.ndarray]) -> float:
    """Mean bits per sub-pixel of uint8 [H, W, 3] images, each stored as one file of the given format."""
    pillow_name, options = _FORMATS[codec]
    bits = subpixels = 0
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, pillow_name, **options)
        bits += 8 * file.tell()
        subpixels += image.size
    return bits / subpixels
