"""Do the resize protocols give the pixels of the data sets whose names they bear?"""

import numpy as np
import PIL
import pytest
from PIL import Image
from PIL.Image import Resampling

from data_pipeline.resize import PROTOCOLS, describe, to_pixels

RNG = np.random.default_rng(0)


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def box_by_hand(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Mean over factor x factor squares, rounded half up after each axis, as Pillow does with 8-bit images."""
    for axis in (1, 0):
        shape = list(pixels.shape)
        shape[axis : axis + 1] = [shape[axis] // factor, factor]
        sums = pixels.reshape(shape).astype(np.int64).sum(axis=axis + 1)
        pixels = (2 * sums + factor) // (2 * factor)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_chrabaszcz_averages_squares_at_integer_factors(factor: int) -> None:
    image = random_image(16 * factor, 16 * factor)
    assert (to_pixels(image, "chrabaszcz", 16) == box_by_hand(np.asarray(image), factor)).all()


def test_chrabaszcz_squashes_the_whole_image() -> None:
    wide = Image.fromarray(np.repeat(np.arange(0, 64, dtype=np.uint8), 3).reshape(1, 64, 3).repeat(16, 0))
    squashed = to_pixels(wide, "chrabaszcz", 16)
    assert squashed.shape == (16, 16, 3)
    # Each pixel is the mean of four columns 4i .. 4i + 3, which is 4i + 1.5, rounded up.
    assert squashed[0, :, 0].tolist() == [4 * i + 2 for i in range(16)]


def centre_crop_as_published(image: Image.Image, size: int) -> np.ndarray:
    """Independent statement of the procedure: halve, scale the short side, cut from the array."""
    side = min(image.size)
    while side >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Resampling.BOX)
        side = min(image.size)
    factor = size / side
    image = image.resize((round(image.size[0] * factor), round(image.size[1] * factor)), resample=Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (500, 375), (375, 500), (130, 64), (33, 200), (20, 10)])
def test_adm_halves_then_crops_the_centre(width: int, height: int) -> None:
    image = random_image(width, height)
    assert (to_pixels(image, "adm", 32) == centre_crop_as_published(image, 32)).all()


def test_adm_keeps_the_centre_and_drops_the_sides() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert (to_pixels(Image.fromarray(pixels), "adm", 32)[:, 2:-2] == 255).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(protocol: str, mode: str) -> None:
    image = random_image(40, 40).convert(mode)
    assert (to_pixels(image, protocol, 16) == to_pixels(image.convert("RGB"), protocol, 16)).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_manifest_says_which_protocol_and_which_pillow(protocol: str) -> None:
    described = describe(protocol)
    assert described["name"] == protocol and described["pillow_version"] == PIL.__version__
    assert described["exif_orientation"] == "ignored"
