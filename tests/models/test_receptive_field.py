"""Is the receptive field that is measured the one that follows from the architecture?"""

from dataclasses import replace

import pytest
import torch

from models.image_transformer.shape import Local1D, Local2D, Strided1D
from models.model import ModelConfig
from models.pixelcnn import PixelCNNConfig
from models.receptive_field import ReceptiveField, receptive_field
from tests.support.tiny_model import PIXELS, tiny_config

ONE_LAYER = tiny_config(**PIXELS, image_size=8, layers=1, attention=Local1D(query_block=8, memory=8))


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        # The query of pixel 36 is in the block from 32 on and sees tokens 24 to 36, each of which holds the pixel
        # before it.
        (ONE_LAYER, 13),
        (replace(ONE_LAYER, layers=2), 13 + 8),
        # Pixels 35, 31, 27, ...: of one remainder in all layers.
        (replace(ONE_LAYER, attention=Strided1D(stride=4), layers=3), 9),
        # Its block of 2 x 2, to which (4, 4) comes first, holds the last value of the block before.
        (replace(ONE_LAYER, attention=Local2D(query_block=(2, 2), memory=(0, 0))), 1),
        # Two kernels of 3 x 3: columns 2 to 6 two rows up, 2 to 5 one row up (the blind spot begins), and two pixels.
        (PixelCNNConfig(image_size=8, features=8, layers=1, head_features=8, first_kernel=3), 5 + 4 + 2),
    ],
)
def test_as_many_pixels_are_seen_as_follows_from_kernels_and_patterns(config: ModelConfig, seen: int) -> None:
    field = receptive_field(config)
    assert field == ReceptiveField(seen, 36 if not isinstance(getattr(config, "attention", None), Local2D) else 40)


def test_the_random_numbers_of_the_caller_stay_and_widths_do_not_matter() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    wide = replace(ONE_LAYER, width=64, attention_width=32, ff_width=64)
    receptive_field.cache_clear()
    assert receptive_field(wide) == receptive_field(ONE_LAYER)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_too_large_is_not_measured() -> None:
    assert receptive_field(replace(ONE_LAYER, image_size=256)) is None
    assert receptive_field(replace(ONE_LAYER, layers=1000)) is None
