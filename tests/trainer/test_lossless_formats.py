"""Are the figures of lossless formats those of real files?"""

import io

import numpy as np
import pytest
from PIL import Image

from trainer.lossless_formats import available_codecs, codec_bits_per_dim


def test_png_and_webp_are_always_there() -> None:
    assert available_codecs()[:2] == ["PNG", "WebP lossless"]


@pytest.mark.parametrize("codec", available_codecs())
def test_a_format_is_lossless_and_counts_the_bits_of_its_files(codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    flat = np.full((2, 32, 32, 3), 9, dtype=np.uint8)
    # Noise cannot be compressed, a single colour nearly to nothing; the mean over both lies half-way.
    assert 8.0 <= codec_bits_per_dim(codec, noise) < 8.5
    assert codec_bits_per_dim(codec, flat) < 0.5
    both = codec_bits_per_dim(codec, [*noise, *flat])
    assert both == pytest.approx((codec_bits_per_dim(codec, noise) + codec_bits_per_dim(codec, flat)) / 2)


def test_the_png_figure_is_that_of_a_file_on_disk() -> None:
    image = np.arange(16 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    assert codec_bits_per_dim("PNG", [image]) == len(file.getvalue()) * 8 / image.size
