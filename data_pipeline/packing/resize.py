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


def celeba(image: Image.Image, size: int) -> Image.Image:
    """Cut 138 x 138 pixels at row 40, column 20 out of an aligned CelebA image and average over areas.

    As in Tensor2Tensor's data generator for the Image Transformer's super-resolution (Parmar et al. 2018): exact
    area weights, fractions cut off by its conversion to integers.
    """
    pixels = np.asarray(image, np.int64)[40:178, 20:158]
    if pixels.shape != (138, 138, 3):
        raise ValueError(f"CelebA's aligned images have 178 x 218 pixels, this one {image.width} x {image.height}")
    # In units of 1/size of a pixel each output pixel covers 138 of the 138 * size units: integers, so exact.
    edges = np.arange(size + 1) * 138
    units = np.arange(139) * size
    overlap = np.minimum(edges[1:, None], units[None, 1:]) - np.maximum(edges[:-1, None], units[None, :-1])
    weights = np.maximum(overlap, 0)
    sums = np.einsum("yr,rcd,xc->yxd", weights, pixels, weights)
    return Image.fromarray((sums // 138**2).astype(np.uint8))


PROTOCOLS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "chrabaszcz": chrabaszcz,
    "adm": adm,
    "celeba": celeba,
}

DESCRIPTIONS = {
    "chrabaszcz": {"filter": "Pillow BOX", "crop": "none, squashed"},
    "adm": {"filter": "Pillow BOX halvings, then BICUBIC", "crop": "centre"},
    "celeba": {"filter": "exact area average", "crop": "138 x 138 at row 40, column 20"},
    "oord": {"filter": "not published", "crop": "not published"},
    "cifar10": {"filter": "none, collected at 32 x 32", "crop": "none"},
}

# The three "downsampled ImageNets" whose likelihoods must not be compared with each other.
IMAGENET_VERSIONS = {"oord": "A", "chrabaszcz": "B", "adm": "C"}


def describe(protocol: str, *, resized_here: bool, imagenet: bool) -> dict[str, Any]:
    """What the manifest records about how the images came to their size."""
    description: dict[str, Any] = {"name": protocol, **DESCRIPTIONS[protocol]}
    if resized_here:
        description |= {"applied_by": f"Pillow {PIL.__version__}", "exif_orientation": "ignored"}
    else:
        description |= {"applied_by": "whoever published the files"}
    if imagenet:
        description |= {"imagenet_version": IMAGENET_VERSIONS[protocol]}
    return description


def to_pixels(image: Image.Image | np.ndarray, protocol: str, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of an RGB image; an array has its size already and passes unchanged.

    Raises ValueError when the image cannot be brought to that size by the protocol.
    """
    if isinstance(image, np.ndarray):
        pixels = image
    elif protocol in PROTOCOLS:
        pixels = np.asarray(PROTOCOLS[protocol](image, size))
    else:
        pixels = np.asarray(image)  # published at its size
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"it is {pixels.dtype} of shape {pixels.shape}, not uint8 of {size} x {size} x 3")
    return pixels
