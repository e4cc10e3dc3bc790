"""Do images become sequences and back, and does every slot hold the value generated just before its own?"""

import pytest
import torch

from models.attention.pattern import local_1d, local_2d
from models.image_transformer.pixel_order import grid_shape, source_positions, to_images, to_positions


def test_sub_pixels_come_row_by_row_column_by_column_channel_by_channel() -> None:
    images = torch.arange(2 * 4 * 4 * 3).view(2, 4, 4, 3)
    values = to_positions(images, "categorical")
    assert grid_shape(4, "categorical") == (4, 12)
    for row in range(4):
        for column in range(4):
            for channel in range(3):
                position = row * 12 + column * 3 + channel
                assert values[1, position, 0] == images[1, row, column, channel]
    assert torch.equal(to_images(values, 4), images)


def test_pixels_come_row_by_row_with_their_channels_together() -> None:
    images = torch.arange(2 * 4 * 4 * 3).view(2, 4, 4, 3)
    values = to_positions(images, "ordinal")
    assert grid_shape(4, "ordinal") == (4, 4)
    assert torch.equal(values[1, 2 * 4 + 3], images[1, 2, 3])
    assert torch.equal(to_images(values, 4), images)


@pytest.mark.parametrize(
    "pattern", [local_1d(24, 8, 8), local_2d(4, 6, (2, 3), (2, 1)), local_2d(8, 8, (4, 4), (2, 2))]
)
def test_a_slot_holds_the_value_generated_just_before_its_position(pattern) -> None:
    sources = source_positions(pattern, "generation")
    order = pattern.generation_order.tolist()
    for slot in range(pattern.length):
        place = order.index(int(pattern.storage_order[slot]))
        assert sources[slot] == (order[place - 1] if place else -1)


def test_a_shift_inside_blocks_hides_each_blocks_last_value_and_no_other() -> None:
    pattern = local_2d(4, 6, (2, 3), (2, 1))
    sources = source_positions(pattern, "block")
    order = pattern.generation_order.tolist()
    last_of_blocks = {order[5], order[11], order[17], order[23]}
    assert (sources == -1).sum() == 4
    assert set(sources[sources >= 0].tolist()) == set(order) - last_of_blocks
