"""Do the resize protocols give the pixels of the data sets whose names they bear?"""

import numpy as np
import PIL
import pytest
from PIL import Image
from PIL.Image import Resampling

from data_pipeline.packing.resize import PROTOCOLS, describe, to_pixels

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


@pytest.mark.parametrize("size", [8, 32, 46, 64])
def test_celeba_averages_areas_of_the_cropped_face(size: int) -> None:
    image = random_image(178, 218)
    # Oracle: blow every pixel up size times; an output pixel is then the mean of 138 x 138 whole pixels.
    face = np.asarray(image)[40:178, 20:158].astype(np.int64)
    rows = face.repeat(size, 0).reshape(size, 138, 138, 3).sum(1)
    sums = rows.repeat(size, 1).reshape(size, size, 138, 3).sum(2)
    assert (to_pixels(image, "celeba", size) == sums // 138**2).all()


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="178 x 218 pixels, this one 100 x 100"):
        to_pixels(random_image(100, 100), "celeba", 8)
    with pytest.raises(ValueError, match=r"of shape \(65, 63, 3\), not uint8 of 64 x 64 x 3"):
        to_pixels(random_image(63, 65), "oord", 64)
    with pytest.raises(ValueError, match="float32"):
        to_pixels(np.zeros((8, 8, 3), np.float32), "cifar10", 8)


def test_images_published_at_their_size_pass_unchanged() -> None:
    pixels = np.asarray(random_image(8, 8))
    assert (to_pixels(pixels, "chrabaszcz", 8) == pixels).all()
    assert (to_pixels(Image.fromarray(pixels), "oord", 8) == pixels).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_manifest_says_which_protocol_and_which_pillow(protocol: str) -> None:
    described = describe(protocol, resized_here=True, imagenet=False)
    assert described["name"] == protocol and described["applied_by"] == f"Pillow {PIL.__version__}"
    assert described["exif_orientation"] == "ignored" and "imagenet_version" not in described


def test_the_three_imagenets_are_told_apart() -> None:
    for name, version in {"oord": "A", "chrabaszcz": "B", "adm": "C"}.items():
        assert describe(name, resized_here=False, imagenet=True)["imagenet_version"] == version
