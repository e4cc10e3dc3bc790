"""Is the mean bits/dim that over every valid image, each counted once?"""

import math

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from models.given import Given
from models.image_transformer.family import ImageTransformerConfig
from tests.support.launch import SMALL_JOB
from trainer.config import load_config
from trainer.scoring import score

CPU = torch.device("cpu")


def categorical() -> ImageTransformerConfig:
    return load_config(
        SMALL_JOB, ["model.input=categorical", "model.output=categorical", "model.image_size=4",
                     "model.attention.query_block=12", "model.attention.memory=12"]
    ).model  # fmt: skip


def batch(images: Tensor, valid: list[bool]) -> Batch:
    return Batch(images=images, labels=None, valid=torch.tensor(valid), position=0)


def sure_of_zero(images: Tensor, given: Given) -> Tensor:
    """A model that gives intensity 0 half of the probability and shares the rest among the others."""
    logits = torch.full((*images.shape, 256), math.log(0.5 / 255))
    logits[..., 0] = math.log(0.5)
    return logits


def test_the_mean_and_its_standard_error_count_valid_images_only() -> None:
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    white = torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    batches = [batch(black, [True, True]), batch(white, [True, False])]
    scores = score(sure_of_zero, categorical(), iter(batches), CPU, expected_images=3)
    white_bits = math.log2(255 / 0.5)
    values = torch.tensor([1.0, 1.0, white_bits], dtype=torch.float64)
    assert scores["val/images"] == 3
    assert scores["val/bits_per_dim"] == pytest.approx(values.mean().item(), rel=1e-6)
    assert scores["val/bits_per_dim_stderr"] == pytest.approx(values.std(correction=0).item() / 3**0.5, rel=1e-5)


def test_a_missing_image_is_an_error() -> None:
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="scored 1 validation images instead of 2"):
        score(sure_of_zero, categorical(), iter([batch(black, [True, False])]), CPU, expected_images=2)


def test_nats_by_position_are_those_of_each_sub_pixel_of_the_valid_images() -> None:
    half_white = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    half_white[:, :2, :, 1] = 255  # green of the upper rows
    found = torch.zeros(4, 4, 3, dtype=torch.float64)
    score(sure_of_zero, categorical(), iter([batch(half_white, [True, False])]), CPU, 1, found)
    expected = torch.full((4, 4, 3), math.log(2), dtype=torch.float64)
    expected[:2, :, 1] = math.log(255 / 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
