"""Do the pictures that people look at show what was drawn?"""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile

from tests.support.tiny_model import random_images
from trainer.pictures import FORMATS, GAP, enlarged, grid, interleave, open_picture, to_picture, to_tensor


def test_a_grid_shows_each_image_in_its_place_enlarged() -> None:
    images = torch.arange(3 * 2 * 2 * 3, dtype=torch.uint8).view(3, 2, 2, 3)
    picture = np.asarray(grid(images, columns=2, enlarge=3))
    pitch = 2 + GAP
    assert picture.shape == (3 * (GAP + 2 * pitch), 3 * (GAP + 2 * pitch), 3)
    small = picture[::3, ::3]
    assert np.array_equal(small.repeat(3, 0).repeat(3, 1), picture)
    for index, image in enumerate(images.numpy()):
        top, left = GAP + index // 2 * pitch, GAP + index % 2 * pitch
        assert np.array_equal(small[top : top + 2, left : left + 2], image)
    assert (small[:GAP] == 255).all()
    assert (small[-2 - GAP :, -2 - GAP :] == 255).all()  # the empty last place


def test_interleaved_groups_stand_side_by_side() -> None:
    a, b = torch.tensor([[1], [2]]), torch.tensor([[10], [20]])
    assert interleave(a, b).flatten().tolist() == [1, 10, 2, 20]


def test_an_enlarged_pixel_is_a_square() -> None:
    small = random_images(2, 2)
    large = enlarged(small, 6)
    assert large.shape == (2, 6, 6, 3)
    assert torch.equal(large[:, 4, 1], small[:, 1, 0])


def test_a_picture_survives_a_file() -> None:
    image = random_images(1, 5)[0]
    file = io.BytesIO()
    to_picture(image).save(file, "PNG")
    assert torch.equal(to_tensor(open_picture(file.getvalue())), image)


def test_a_picture_of_too_many_pixels_is_not_decoded() -> None:
    file = io.BytesIO()
    Image.new("1", (3000, 3000)).save(file, "PNG")
    with pytest.raises(ValueError, match="has 3000 x 3000 pixels; more than 1000000 are not read"):
        open_picture(file.getvalue(), max_pixels=1_000_000)


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode image"), struct.error(), IndexError(), ValueError()])
def test_whatever_a_decoder_raises_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    to_picture(random_images(1, 16)[0]).save(file, "AVIF")

    def damaged(self: object) -> None:
        raise error

    monkeypatch.setattr(AvifImageFile, "load", damaged)
    with pytest.raises(ValueError, match=rf"^is not an image that can be read \({type(error).__name__}\)"):
        open_picture(file.getvalue())


def test_all_formats_that_are_read_are_known() -> None:
    Image.init()
    assert set(FORMATS) <= Image.OPEN.keys()
    assert not {"EPS", "WMF", "FITS"} & set(FORMATS)
