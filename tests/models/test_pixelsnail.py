"""Is PixelSNAIL its authors' in size, and who is seen by its attention? tests/models/test_rivals_reference.py compares
what it computes with their code."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.likelihood import MixtureOutput
from models.pixelsnail import PixelSNAILConfig, attend, earlier
from tests.support.tiny_model import random_images

TINY: dict[str, Any] = {"image_size": 4, "features": 4, "blocks": 1, "convolutions": 1}


@pytest.mark.parametrize(
    ("blocks", "components", "parameters"), [(12, 10, 46_180_788), (12, 32, 46_237_548), (8, 10, 30_797_840)]
)
def test_it_has_as_many_parameters_as_the_running_original(blocks: int, components: int, parameters: int) -> None:
    output = MixtureOutput(components=components)
    config = PixelSNAILConfig(image_size=32, features=256, blocks=blocks, convolutions=4, output=output)
    with torch.device("meta"):
        model = config.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 5}, "features: 5 is not even"),
        ({"blocks": 0}, "blocks: 0 is less than 1"),
        ({"convolutions": 0}, "convolutions: 0 is less than 1"),
        ({"key_pooling": 3}, "key_pooling: 3 does not divide image_size 4"),
        ({"dropout": -0.1}, "dropout: -0.1 is not at least 0"),
    ],
)
def test_a_bad_config_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelSNAILConfig(**TINY | changes)


@pytest.mark.parametrize("pooling", [1, 2])
def test_a_pixel_attends_to_squares_that_lie_before_it(pooling: int) -> None:
    visible = earlier(4, 6, pooling, torch.device("cpu"))
    for query in range(24):
        for key in range(24 // pooling**2):
            row, column = (pooling * number for number in divmod(key, 6 // pooling))
            square = [(row + i) * 6 + column + j for i in range(pooling) for j in range(pooling)]
            assert visible[query, key] == all(pixel < query for pixel in square)


def test_what_sees_nothing_attends_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, n, generator=generator) for n in (16, 16, 3))
    mixed = attend(q, k, v, torch.ones(5, 5, dtype=torch.bool).tril(-1))
    assert torch.equal(mixed[:, 0], torch.zeros(2, 3))
    torch.testing.assert_close(mixed[:, 1], v[:, 0])
    mean = (q[:, 2:3] @ k[:, :2].transpose(1, 2) / 4).softmax(2) @ v[:, :2]
    torch.testing.assert_close(mixed[:, 2:3], mean)


def test_the_account_of_attention_has_the_visible_pairs_of_all_that_are_computed() -> None:
    config = PixelSNAILConfig(**TINY | {"features": 8, "blocks": 2})
    with FlopCounterMode(display=False) as counter:
        config.build().eval()(random_images(1, 4))
    counted = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert config.account().parts["attention scores"].forward == counted["aten.bmm"] * (16 * 15 // 2) // 16**2
