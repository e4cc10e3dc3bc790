"""Does the model get what its config asks for: labels where it has classes, small images where it super-resolves?"""

import pytest
import torch

from data_pipeline.batch import Batch
from models.image_transformer.shape import SuperResolution
from tests.support.tiny_model import GIVEN, random_images, tiny_config
from trainer.model_inputs import model_inputs


@pytest.mark.parametrize("what", GIVEN)
def test_labels_and_small_images_are_given_where_the_config_asks_for_them(what: str) -> None:
    config = tiny_config(**GIVEN[what])
    batch = Batch(images=random_images(2, 4), labels=torch.tensor([3, 1]), valid=None, position=0)
    images, given = model_inputs(batch, config)
    assert images is batch.images
    assert given.labels is (batch.labels if what == "classes" else None)
    assert (given.small_images is not None) == (what == "super-resolution")


def test_a_small_image_is_the_rounded_mean_of_each_square() -> None:
    images = random_images(3, 8)
    config = tiny_config(image_size=8, super_resolution=SuperResolution(small_size=4, encoder_layers=1))
    small = model_inputs(Batch(images, None, None, 0), config)[1].small_images
    assert small is not None and small.dtype == torch.uint8 and small.shape == (3, 4, 4, 3)
    for row in range(4):
        for column in range(4):
            square = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].double()
            assert torch.equal(small[:, row, column].double(), square.mean((1, 2)).round())
