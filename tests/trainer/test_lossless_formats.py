"""Are the figures of lossless formats those of real files?"""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from trainer.lossless_formats import JPEG_XL, available_codecs, codec_bits_per_dim, encoded, mosaic


def test_png_and_webp_are_always_there_and_jpeg_xl_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available_codecs() == ["PNG", "WebP lossless"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "pylibjxl")
    assert available_codecs() == ["PNG", "WebP lossless", JPEG_XL]


@pytest.mark.parametrize("codec", available_codecs())
def test_a_format_is_lossless_and_counts_the_bits_of_its_files(codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    flat = np.full((2, 32, 32, 3), 9, dtype=np.uint8)
    # Noise cannot be compressed, a single colour nearly to nothing; the mean over both lies half-way.
    # JPEG-XL alone codes noise even where that costs more than the pixels.
    assert 8.0 <= codec_bits_per_dim(codec, noise) < (9.5 if codec == JPEG_XL else 8.5)
    assert codec_bits_per_dim(codec, flat) < 0.5
    both = codec_bits_per_dim(codec, [*noise, *flat])
    assert both == pytest.approx((codec_bits_per_dim(codec, noise) + codec_bits_per_dim(codec, flat)) / 2)


def test_the_png_figure_is_that_of_a_file_on_disk() -> None:
    image = np.arange(16 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    assert codec_bits_per_dim("PNG", [image]) == len(file.getvalue()) * 8 / image.size


def test_jpeg_xl_gives_the_image_back() -> None:
    pylibjxl = pytest.importorskip("pylibjxl")
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pylibjxl.decode(encoded(JPEG_XL, image)), image)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (3, 3, 1), (8, 4, 2), (37, 9, 4), (512, 32, 16)])
def test_a_mosaic_shows_each_image_once_in_its_place(count: int, rows: int, columns: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)
    tiles = mosaic(images)
    assert tiles.shape == (rows * 2, columns * 3, 3)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        np.testing.assert_array_equal(tiles[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], images[index])
