"""How do image files become tensors, and tensors files and grids that people look at?"""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from trainer.errors import UsageError
from trainer.safe_files import read_file, write_file

UNKNOWN = 127
"""Grey: what a model that completes images is not given."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Of Pillow's: it gives others to programs (EPS to Ghostscript), and few people check their decoders."""
EXACT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Those that say how deep their values are, or have 8 bits."""
LARGEST_PICTURE_FILE = 1 << 30
"""Bytes."""
GAP = 2
"""Pixels between the images of a grid, before enlarging."""


def read_picture(path: Path, size: int) -> Tensor:
    """An image file of size x size pixels, mode RGB, as uint8 [size, size, 3]; UsageError for anything else."""
    picture = open_file(path)
    if picture.size != (size, size):
        raise UsageError(
            f"{path}: {picture.width} x {picture.height} pixels; the model reads {size} x {size}, resize it"
        )
    if picture.mode != "RGB":
        raise UsageError(f"{path}: mode {picture.mode}; the model reads RGB, convert it")
    return to_tensor(picture)


def open_file(path: Path, *, exactly: bool = False) -> Image.Image:
    """Decode an image file; UsageError if that cannot be done. `exactly` is that of open_picture."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; name an image file")
        return open_picture(read_file(path.resolve(), largest=LARGEST_PICTURE_FILE), exactly=exactly)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def open_picture(content: bytes, max_pixels: int = 1 << 26, *, exactly: bool = False) -> Image.Image:
    """Decode an image file; ValueError with a reason that a user understands.

    exactly: refuse files of which Pillow gives a part only, without a word: 8 bits of 16, one picture of several.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=EXACT_FORMATS if exactly else FORMATS)
            if picture.width * picture.height > max_pixels:
                raise Unsuitable(f"has {picture.width} x {picture.height} pixels; more than {max_pixels} are not read")
            if exactly:
                _refuse_more_than_pillow_gives(picture)
            picture.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"has more than the {max_pixels} pixels that are read") from None
    except Unsuitable as error:
        raise ValueError(str(error)) from None
    # Each of Pillow's decoders has errors of its own for files that are no images, or damaged.
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"is not an image that can be read ({type(error).__name__})") from None
    return picture


class Unsuitable(Exception):
    """Why an image is not read that could be."""


def _refuse_more_than_pillow_gives(picture: ImageFile.ImageFile) -> None:
    if getattr(picture, "n_frames", 1) > 1:
        raise Unsuitable("holds several pictures; save the one that you want as a file of its own")
    for tile in picture.tile:  # how the file's values are laid out
        layout, *numbers = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        is_deep = re.search(";1[26][BLNS]?$", str(layout)) and str(layout) != "BGR;16"
        if is_deep or picture.mode.startswith(("I", "F")) or (tile.codec_name == "ppm" and max(numbers) > 255):
            raise Unsuitable("has more than 8 bits for each value, and the model reads 8; convert it")


def read_pictures(path: Path, size: int) -> list[Tensor]:
    """The images of a folder, by name, or one file; as of read_picture."""
    if not path.is_dir():
        return [read_picture(path, size)]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UsageError(f"{path}: the folder holds no files; put images of {size} x {size} pixels there")
    return [read_picture(file, size) for file in files]


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8))


def to_picture(image: Tensor) -> Image.Image:
    """uint8 [H, W, 3] as a picture."""
    return Image.fromarray(image.cpu().numpy())


def grid(images: Tensor, columns: int, enlarge: int) -> Image.Image:
    """One picture of uint8 [N, H, W, 3] images, row by row on white, each pixel enlarged to a square of `enlarge`."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    shape = (GAP + rows * (height + GAP), GAP + columns * (width + GAP), 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images.cpu().numpy()):
        top, left = GAP + index // columns * (height + GAP), GAP + index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.repeat(enlarge, axis=0).repeat(enlarge, axis=1))


def interleave(*groups: Tensor) -> Tensor:
    """Image i of every group side by side: [N, ...] x G -> [N * G, ...]."""
    return torch.stack(groups, dim=1).flatten(0, 1)


def enlarged(images: Tensor, size: int) -> Tensor:
    """uint8 [N, h, w, 3] -> [N, size, size, 3]: each pixel a square."""
    factor = size // images.shape[1]
    return images.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def png(picture: Image.Image) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def save_picture(picture: Image.Image, path: Path, *, within: Path | None = None) -> None:
    """Write a PNG, with the folders it needs; UsageError if that cannot be done.

    The folders below `within`, and the file, are not written through links (trainer/safe_files.py).
    """
    try:
        if within is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, png(picture), within=within)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None
