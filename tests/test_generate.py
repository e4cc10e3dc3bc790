"""Is decoding position by position the same model as the full forward pass, in any batch and in any order?"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models import generate as generate_module
from models.draw import Sampling
from models.generate import Decoding, consistency, generate
from models.image_transformer import ImageTransformer
from models.image_transformer_config import Local2D
from models.likelihood import CategoricalOutput, nats
from tests.support.tiny_model import (
    BLOCKS,
    CONDITIONS,
    HEADS,
    MODERN,
    PATTERNS,
    random_conditions,
    random_images,
    tiny_config,
)
from tests.test_likelihood import channel_distributions


def build(seed: int = 0, **changes: Any) -> ImageTransformer:
    torch.manual_seed(seed)
    return ImageTransformer(tiny_config(**changes)).eval()


def opinionated(model: ImageTransformer) -> ImageTransformer:
    """With a head that makes some values much likelier than others."""
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model


def decoded_parameters(model: ImageTransformer, num_images: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The images, the parameters [B, L, ...] that their values were drawn from, and the positions drawn in order."""
    decoding = Decoding(model, num_images, seed=0, **options)
    steps = [(step.positions, decoding.parameters.clone()) for step in decoding]
    positions, parameters = torch.cat([p for p, _ in steps]), torch.cat([p for _, p in steps], dim=1).flatten(2)
    by_position = parameters.new_full((num_images, model.pattern.length, parameters.shape[2]), math.nan)
    assert len(positions.unique()) == len(positions) == parameters.shape[1]
    by_position[:, positions] = parameters
    return decoding.images, by_position, positions


GUIDED = {"num_classes": 5, "label_dropout": 0.2}
SCHEDULES = [*((name, True) for name in PATTERNS), ("2d block shift", False)]


@pytest.mark.parametrize("keep", [0, 5, 21])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("pattern", "in_waves"), SCHEDULES)
def test_cached_parameters_are_those_of_the_full_forward_pass(
    pattern: str, in_waves: bool, head: str, condition: str, block: str, keep: int
) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head], **CONDITIONS[condition], **BLOCKS[block])
    keep = min(keep, model.pattern.length - 1)
    inputs = random_conditions(model.config, 2)
    images, decoded, positions = decoded_parameters(
        model, 2, prefix=random_images(2, 4), keep=keep, in_waves=in_waves, **inputs
    )
    with torch.no_grad():
        full = model(images, **inputs).reshape(2, model.pattern.length, -1)
    not_given = model.pattern.generation_order[keep:]
    assert set(not_given.tolist()) <= set(positions.tolist())
    torch.testing.assert_close(decoded[:, not_given], full[:, not_given], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cache_is_as_long_as_the_window_and_has_the_heads_of_the_keys(pattern: str) -> None:
    """Whatever the height of the image; rows that are twice as long have twice as many keys that later blocks see."""
    numbers = []
    for size, key_heads in ((4, 4), (8, 4), (16, 4), (16, 1)):
        changes = {**MODERN, "heads": 4, "key_heads": key_heads, "image_size": size, **PATTERNS[pattern]}
        cache = Decoding(build(**changes), 1, seed=0, in_waves=False)._cache
        numbers.append(cache.windows.numel() + cache.kept.numel())
    small, medium, large, one_head = numbers
    if pattern == "full":
        assert (medium, large) == (4 * small, 16 * small)
    elif pattern == "dilated":
        assert small <= medium == large
    elif pattern.startswith("1d"):
        assert small == medium == large
    else:
        assert large < 2 * medium < 4 * small
    assert large == 4 * one_head


@pytest.mark.parametrize("head", HEADS)
def test_a_seed_gives_the_same_image_in_any_batch(head: str) -> None:
    model = build(**HEADS[head])
    images = generate(model, 5, seed=3)
    assert torch.equal(generate(model, 2, seed=3, first_image=2), images[2:4])
    assert torch.equal(generate(model, 5, seed=3), images)
    assert not torch.equal(generate(model, 5, seed=4), images)
    assert len({image.numpy().tobytes() for image in images}) == 5


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", HEADS)
def test_parameters_are_the_same_bits_in_any_batch_and_any_order(head: str, block: str) -> None:
    model = build(**PATTERNS["2d block shift"], **HEADS[head], **BLOCKS[block])
    everything = decoded_parameters(model, 7)[:2]
    for in_waves in (True, False):
        for first, number in ((0, 7), (2, 1), (1, 3)):
            options = {"first_image": first, "in_waves": in_waves}
            part = decoded_parameters(model, number, **options)[:2]
            for one, other in zip(part, everything, strict=True):
                assert torch.equal(one, other[first : first + number])


@pytest.mark.parametrize("threads", [1, 2])
def test_waves_draw_the_same_image_as_one_block_after_the_other(threads: int) -> None:
    """benchmarks/sampling.py does this with 64x64 images."""
    model = opinionated(build(image_size=8, attention=Local2D(query_block=(2, 4), memory=(2, 2), shift="block")))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        waves, sequential = (
            Decoding(model, 1, seed=0, in_waves=in_waves, look_ahead=False) for in_waves in (True, False)
        )
        num_steps = [sum(1 for _ in decoding) for decoding in (waves, sequential)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(waves.images, sequential.images)
    assert num_steps[1] >= 1.8 * num_steps[0]


@pytest.mark.parametrize("options", [{}, {"top_k": 9, "guidance": 2.0}], ids=["plain", "guided"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_looking_ahead_draws_the_same_image_from_the_same_bits_in_fewer_steps(
    pattern: str, head: str, options: dict[str, Any]
) -> None:
    model = build(image_size=8, **{**MODERN, **PATTERNS[pattern]}, **HEADS[head], **GUIDED)
    with torch.no_grad():  # some guesses are right, and many are wrong
        model.head.weight.mul_(4)
    given = {"prefix": random_images(1, 8), "keep": 13, "labels": torch.tensor([3]), "sampling": Sampling(**options)}
    num_steps, results = [], []
    for look_ahead in (True, False):
        results.append(decoded_parameters(model, 1, look_ahead=look_ahead, **given))
        num_steps.append(sum(1 for _ in Decoding(model, 1, seed=0, look_ahead=look_ahead, **given)))
    (images, parameters, positions), (expected, expected_parameters, in_order) = results
    assert torch.equal(images, expected)
    drawn = model.pattern.generation_order[13:]
    assert torch.equal(parameters[:, drawn], expected_parameters[:, drawn])
    assert sorted(positions.tolist()) == sorted(in_order.tolist())
    if head == "sub-pixels" and not options and pattern != "2d block shift":
        assert num_steps[0] < 0.95 * num_steps[1]


def test_looking_ahead_takes_as_many_steps_as_guesses_are_wrong() -> None:
    """Where values do not depend on those before, every guess is right once its noise has been seen: a step draws four
    values at once, and guesses for the next four are those of the step before."""
    model = build(image_size=8)
    with torch.no_grad():
        model.head.weight.zero_()
    decoding = Decoding(model, 1, seed=0)
    drawn = [len(step.positions) for step in decoding]
    assert sum(drawn) == model.pattern.length and max(drawn) == 4
    expected, ahead = [], 0  # tokens that were computed, and so guessed, beyond the last final one
    while sum(expected) < model.pattern.length:
        left = 8 - sum(expected) % 8  # in the block
        expected.append(min(ahead + 1, 4, left))
        ahead = max(min(4, left) - expected[-1], 0)
    assert drawn == expected


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
        images = generate(model, 64, seed=0, sampling=Sampling(temperature=temperature))
        with torch.no_grad():
            cost.append(nats(CategoricalOutput(), model(images), images).mean())
    assert cost[0] < cost[1] < cost[2]


@pytest.mark.parametrize("pattern", ["1d", "2d block shift"])
@pytest.mark.parametrize("head", HEADS)
def test_guidance_sees_the_full_forward_pass_with_and_without_the_class(
    head: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head], **GUIDED)
    recorded: list[tuple[Tensor, Tensor]] = []
    original = generate_module.draw

    def recording_draw(output: Any, parameters: Tensor, noise: Tensor, sampling: Sampling, without: Tensor) -> Tensor:
        recorded.append((parameters, without))
        return original(output, parameters, noise, sampling, without)

    monkeypatch.setattr(generate_module, "draw", recording_draw)
    labels = torch.tensor([3, 0])
    decoding = Decoding(model, 2, seed=0, labels=labels, sampling=Sampling(guidance=2.5))
    positions = torch.cat([step.positions for step in decoding])
    for parts, classes in zip(zip(*recorded, strict=True), (labels, torch.tensor([5, 5])), strict=True):
        with torch.no_grad():
            full = model(decoding.images, classes).reshape(2, model.pattern.length, -1)[:, positions]
        torch.testing.assert_close(torch.cat(parts, dim=1).flatten(2), full, rtol=0, atol=1e-5)


def test_guidance_by_0_draws_what_no_class_does() -> None:
    model = opinionated(build(**GUIDED))
    with torch.no_grad():
        model.embed_class.weight.mul_(5)
    drawn = [
        generate(model, 8, seed=0, labels=torch.full((8,), label), sampling=Sampling(guidance=guidance))
        for label, guidance in ((0, 0.0), (4, 0.0), (0, 1.0), (0, 3.0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[2], drawn[3])


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "guidance": 2.0}], ids=["plain", "all options"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", HEADS)
def test_a_step_can_be_captured(head: str, block: str, options: dict[str, Any]) -> None:
    """What a graph needs: no look at a value on the host, which tensors without values show, and a step that can be
    done again, as it is before the capture."""
    model = build(**PATTERNS["2d block shift"], **HEADS[head], **BLOCKS[block], **GUIDED)
    labels, sampling = torch.tensor([1, 4]), Sampling(**options)
    decoding = Decoding(model, 2, seed=0, labels=labels, sampling=sampling, look_ahead=False)
    for number, _ in enumerate(decoding):
        after = decoding._step.clone()
        if number == 0:
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
                decoding._draw_next(1)
            decoding._step.copy_(after)
        if number % 3 == 1:
            decoding._step.copy_(after - 1)
            with torch.no_grad():
                decoding._draw_next(decoding._num_rows)
            assert torch.equal(decoding._step, after)
    assert torch.equal(decoding.images, generate(model, 2, seed=0, labels=labels, sampling=sampling))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_captured_steps_are_the_full_forward_pass(pattern: str, head: str, block: str) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head], **BLOCKS[block]).cuda()
    images, decoded, _ = decoded_parameters(model, 3)
    with torch.no_grad():
        full = model(images).reshape(3, model.pattern.length, -1)
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-4)


def test_consistency_is_the_distance_of_the_shrunk_image_to_the_small_one() -> None:
    small = random_images(2, 4)
    enlarged = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert consistency(enlarged, small).tolist() == [0, 0]
    brighter = (enlarged // 2 + 51).clone()
    torch.testing.assert_close(consistency(brighter, small // 2), torch.tensor([0.2, 0.2]))


def test_progress_is_told_after_each_position() -> None:
    calls: list[tuple[int, int]] = []
    generate(build(), 4, seed=0, progress=lambda done, total: calls.append((done, total)))
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
    with pytest.raises(ValueError, match="labels: given"):
        generate(model, 1, seed=0, labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="labels: from 1 to 5, but classes are 0 to 4"):
        generate(build(num_classes=5), 2, seed=0, labels=torch.tensor([1, 5]))
    with pytest.raises(ValueError, match="guidance: 2.0, but the model knows no images without a class"):
        generate(build(num_classes=5), 1, seed=0, labels=torch.tensor([0]), sampling=Sampling(guidance=2.0))
    with pytest.raises(ValueError, match="prefix: 2 images, but 3 are to be drawn"):
        generate(model, 3, seed=0, prefix=random_images(2, 4), keep=5)
