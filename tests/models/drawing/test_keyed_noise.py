"""Are the random numbers of an image those of Philox, uniform, and different for each seed, image and position?"""

import math

import torch

from models.drawing.keyed_noise import keyed_uniforms


def test_uniforms_are_philox() -> None:
    """Known answers of Random123 for Philox4x32-10: all counters and keys 0; digits of pi."""
    zeros = keyed_uniforms(0, torch.tensor([0]), torch.tensor([0]))
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ((zeros * 2**32).floor().long().flatten().tolist()) == expected


def test_more_of_them_begin_with_the_same_ones_and_go_on_with_others() -> None:
    few, many = (keyed_uniforms(5, torch.arange(3), torch.arange(7), count) for count in (4, 256))
    assert torch.equal(many[..., :4], few)
    assert many.unique().numel() == 3 * 7 * 256


def test_uniforms_are_uniform_and_differ_by_seed_image_and_position() -> None:
    uniforms = keyed_uniforms(12345678901234, torch.arange(100), torch.arange(100))
    assert uniforms.min() > 0 and uniforms.max() < 1
    assert uniforms.unique().numel() > 0.999 * uniforms.numel()
    counts = torch.histc(uniforms, bins=50, min=0, max=1)
    assert ((counts - 800) ** 2 / 800).sum() < 85.4  # 49 degrees of freedom, probability 0.001
    correlations = torch.corrcoef(uniforms.view(100, -1))
    assert (correlations - torch.eye(100)).abs().max() < 5 / math.sqrt(400)
    assert not torch.equal(keyed_uniforms(12345678901235, torch.arange(100), torch.arange(100)), uniforms)
