"""Is decoding position by position the same model as the full forward pass, and is its noise keyed as promised?"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import generate as generate_module
from models.generate import consistency, generate, keyed_uniforms
from models.image_transformer import ImageTransformer
from models.likelihood import nats
from tests.test_likelihood import channel_distributions
from tests.tiny_model import BLOCKS, CONDITIONS, HEADS, PATTERNS, random_conditions, random_images, tiny_config


def build(seed: int = 0, **changes: Any) -> ImageTransformer:
    torch.manual_seed(seed)
    return ImageTransformer(tiny_config(**changes)).eval()


def opinionated(model: ImageTransformer) -> ImageTransformer:
    """With a head that makes some values much likelier than others."""
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_parameters_are_those_of_the_full_forward_pass(
    pattern: str, head: str, condition: str, block: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head], **CONDITIONS[condition], **BLOCKS[block])
    inputs = random_conditions(model.config, 2)
    decoded: list[Tensor] = []
    draw = generate_module.draw

    def recording_draw(output: Any, parameters: Tensor, *others: Any) -> Tensor:
        decoded.append(parameters)
        return draw(output, parameters, *others)

    monkeypatch.setattr(generate_module, "draw", recording_draw)
    images = generate(model, 2, seed=0, prefix=random_images(2, 4), keep=keep, **inputs)

    length = model.pattern.length
    with torch.no_grad():
        full = model(images, **inputs).reshape(2, length, -1)[:, model.pattern.generation_order]
    assert len(decoded) == length - keep
    torch.testing.assert_close(torch.stack(decoded, 1).flatten(2), full[:, keep:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_seed_gives_the_same_image_in_any_batch(head: str) -> None:
    model = build(**HEADS[head])
    images = generate(model, 5, seed=3)
    assert torch.equal(generate(model, 2, seed=3, first_image=2), images[2:4])
    assert torch.equal(generate(model, 5, seed=3), images)
    assert not torch.equal(generate(model, 5, seed=4), images)
    assert len({image.numpy().tobytes() for image in images}) == 5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_kept_stays_and_the_rest_is_drawn_given_it(pattern: str, head: str) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head])
    complete = generate(model, 3, seed=1)
    keep = model.pattern.length // 2
    # Given the beginning of an image and its noise, the rest is that of the image.
    prefix = random_images(3, 4)
    values = model.pattern.generation_order[:keep]
    flat, original = prefix.view(3, model.pattern.length, -1), complete.view(3, model.pattern.length, -1)
    flat[:, values] = original[:, values]
    assert torch.equal(generate(model, 3, seed=1, prefix=prefix, keep=keep), complete)
    assert torch.equal(generate(model, 3, seed=1, prefix=complete, keep=model.pattern.length), complete)
    other = random_images(3, 4, seed=9)
    drawn = generate(model, 3, seed=1, prefix=other, keep=keep)
    assert torch.equal(drawn.view_as(flat)[:, values], other.view_as(flat)[:, values])


def test_half_of_the_positions_is_the_upper_half_of_the_image() -> None:
    for name in ("1d", "2d"):
        pattern = build(**PATTERNS[name]).pattern
        half = pattern.length // 2
        assert set(pattern.generation_order[:half].tolist()) == set(range(half))


def entropy_of(head: str, parameters: Tensor, images: Tensor) -> Tensor:
    """Entropy in nats [B] of the distributions that each value of the images [B, H, W, 3] was drawn from."""
    if head != "mixture":
        return torch.special.entr(parameters.double().softmax(-1)).flatten(1).sum(1)
    flat = parameters.flatten(0, -2)
    entropies = sum(torch.special.entr(p).sum(-1) for p in channel_distributions(flat, images.view(-1, 3)))
    return entropies.view(len(images), -1).sum(1)


@pytest.mark.parametrize("pattern", ["1d", "2d"])
@pytest.mark.parametrize("head", HEADS)
def test_samples_cost_what_the_entropy_of_the_model_says(head: str, pattern: str) -> None:
    """The mean over samples of -log p(x) - sum_t H(x_t | x_<t) is zero if x is drawn from p."""
    model = opinionated(build(**HEADS[head], **PATTERNS[pattern]))
    num = 256
    images = generate(model, num, seed=0)
    with torch.no_grad():
        parameters = model(images)
    cost = nats(model.config.output, parameters, images).double().flatten(1).sum(1)
    excess = cost - entropy_of(head, parameters, images)
    assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(num)
    assert excess.std() > 0


def test_a_low_temperature_draws_likelier_images() -> None:
    model = opinionated(build())
    cost = []
    for temperature in (0.5, 0.8, 1.0):
        images = generate(model, 64, seed=0, temperature=temperature)
        with torch.no_grad():
            cost.append(nats("categorical", model(images), images).mean())
    assert cost[0] < cost[1] < cost[2]


def test_consistency_is_the_distance_of_the_shrunk_image_to_the_small_one() -> None:
    small = random_images(2, 4)
    enlarged = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert consistency(enlarged, small).tolist() == [0, 0]
    brighter = (enlarged // 2 + 51).clone()
    torch.testing.assert_close(consistency(brighter, small // 2), torch.tensor([0.2, 0.2]))


def test_progress_is_told_after_each_position() -> None:
    calls: list[tuple[int, int]] = []
    generate(build(), 1, seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 48) for done in range(1, 49)]


def test_the_model_is_left_as_it_was() -> None:
    model = build(dropout=0.5).train()
    assert torch.equal(generate(model, 1, seed=0), generate(model, 1, seed=0))
    assert model.training


def test_bf16_weights_can_be_sampled() -> None:
    images = generate(build().bfloat16(), 2, seed=0)
    assert images.dtype == torch.uint8 and images.shape == (2, 4, 4, 3)


def test_what_cannot_be_done_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="keep: 49 is not between 0 and the image's 48 positions"):
        generate(model, 1, seed=0, prefix=random_images(1, 4), keep=49)
    with pytest.raises(ValueError, match="keep: 5 positions, but no prefix"):
        generate(model, 1, seed=0, keep=5)
    with pytest.raises(ValueError, match="temperature: 0 is not positive"):
        generate(model, 1, seed=0, temperature=0)
    with pytest.raises(ValueError, match="labels: given"):
        generate(model, 1, seed=0, labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="prefix: 2 images, but 3 are to be drawn"):
        generate(model, 3, seed=0, prefix=random_images(2, 4), keep=5)


def test_uniforms_are_philox() -> None:
    """Known answers of Random123 for Philox4x32-10: all counters and keys 0; digits of pi."""
    zeros = keyed_uniforms(0, torch.tensor([0]), torch.tensor([0]))
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ((zeros * 2**32).floor().long().flatten().tolist()) == expected


def test_uniforms_are_uniform_and_differ_by_seed_image_and_position() -> None:
    uniforms = keyed_uniforms(12345678901234, torch.arange(100), torch.arange(100))
    assert uniforms.min() > 0 and uniforms.max() < 1
    assert uniforms.unique().numel() > 0.999 * uniforms.numel()
    counts = torch.histc(uniforms, bins=50, min=0, max=1)
    assert ((counts - 800) ** 2 / 800).sum() < 85.4  # 49 degrees of freedom, probability 0.001
    correlations = torch.corrcoef(uniforms.view(100, -1))
    assert (correlations - torch.eye(100)).abs().max() < 5 / math.sqrt(400)
    assert not torch.equal(keyed_uniforms(12345678901235, torch.arange(100), torch.arange(100)), uniforms)
