"""Is decoding position by position the same model as the full forward pass, in any batch and in any order?"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.decoding import Decoding, generate
from models.drawing import canvas as canvas_module
from models.drawing.draw import Sampling
from models.given import Given
from models.image_transformer.family import ImageTransformer
from models.image_transformer.shape import Dilated1D, Fixed1D, Full, Local1D, Local2D, Sliding1D, Strided1D
from models.image_transformer.wave_decoder import WaveDecoder
from models.likelihood import CategoricalOutput, nats
from models.recompute_decoder import RecomputeDecoder
from tests.models.test_likelihood import channel_distributions
from tests.support.tiny_model import (
    BLOCKS,
    CHANNELS_OF_PIXELS,
    GIVEN,
    HEADS,
    MODERN,
    NEIGHBOURS,
    NEIGHBOURS_OF_SUBPIXELS,
    PATTERNS,
    random_given,
    random_images,
    tiny_config,
)


def build(seed: int = 0, **changes: Any) -> ImageTransformer:
    torch.manual_seed(seed)
    return tiny_config(**changes).build().eval()


def opinionated(model: ImageTransformer) -> ImageTransformer:
    """With a head that makes some values much likelier than others."""
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model


def decoding_of(model: ImageTransformer, num_images: int, *, keep: int = 0, **options: Any) -> Decoding:
    """The decoding of which the first `keep` values are known, and of which options may be those of the decoder."""
    how = {name: options.pop(name) for name in ("in_waves", "look_ahead") if name in options}
    known = torch.arange(len(model.generation_order)) < keep
    return Decoding(model, num_images, seed=0, known=known, decoder=partial(model.decoder, **how), **options)


def decoded_parameters(model: ImageTransformer, num_images: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The images, the parameters [B, L, ...] that their values were drawn from, and the positions drawn in order."""
    decoding = decoding_of(model, num_images, **options)
    steps = [(step.positions, decoding.parameters.clone()) for step in decoding]
    positions, parameters = torch.cat([p for p, _ in steps]), torch.cat([p for _, p in steps], dim=1).flatten(2)
    by_position = parameters.new_full((num_images, len(model.generation_order), parameters.shape[2]), math.nan)
    assert len(positions.unique()) == len(positions) == parameters.shape[1]
    by_position[:, positions] = parameters
    return decoding.images, by_position, positions


def decoder_of(decoding: Decoding) -> WaveDecoder:
    assert isinstance(decoding._decoder, WaveDecoder)
    return decoding._decoder


GUIDED = {"num_classes": 5, "label_dropout": 0.2}
SCHEDULES = [*((name, True) for name in PATTERNS), ("2d block shift", False)]


@pytest.mark.parametrize("keep", [0, 5, 21])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", GIVEN)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("pattern", "in_waves"), SCHEDULES)
def test_cached_parameters_are_those_of_the_full_forward_pass(
    pattern: str, in_waves: bool, head: str, what: str, block: str, keep: int
) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head], **GIVEN[what], **BLOCKS[block])
    keep = min(keep, model.length - 1)
    given = random_given(model.config, 2)
    images, decoded, positions = decoded_parameters(
        model, 2, images=random_images(2, 4), keep=keep, in_waves=in_waves, given=given
    )
    with torch.no_grad():
        full = model(images, given).reshape(2, model.length, -1)
    not_given = model.generation_order[keep:]
    assert set(not_given.tolist()) <= set(positions.tolist())
    torch.testing.assert_close(decoded[:, not_given], full[:, not_given], rtol=0, atol=1e-5)


SEEING = {
    **{name: {**changes, **NEIGHBOURS} for name, changes in PATTERNS.items()},
    "sub-pixels": NEIGHBOURS_OF_SUBPIXELS,
    "sub-pixels, 2d": {**NEIGHBOURS_OF_SUBPIXELS, "attention": Local2D(query_block=(2, 6), memory=(2, 3))},
    **{f"channels, {name}": {**changes, **CHANNELS_OF_PIXELS} for name, changes in PATTERNS.items()},
}


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("seeing", SEEING)
def test_what_sees_neighbours_draws_what_the_plainest_decoder_draws(seeing: str, number: int, guided: bool) -> None:
    """Looking ahead, neighbours are guesses, too."""
    model = opinionated(build(**{**SEEING[seeing], **MODERN}, **(GUIDED if guided else {})))
    generator = torch.Generator().manual_seed(0)
    told = {
        "images": random_images(number, 4),
        "known": torch.rand(len(model.generation_order), generator=generator) < 0.3,
        "given": random_given(model.config, number),
        "sampling": Sampling(guidance=1.5 if guided else 1.0),
    }
    expected = generate(model, number, seed=4, decoder=partial(RecomputeDecoder, model), **told)
    assert torch.equal(generate(model, number, seed=4, **told), expected)
    plain = partial(model.decoder, look_ahead=False)
    assert torch.equal(generate(model, number, seed=4, decoder=plain, **told), expected)
    alone = {**told, "images": told["images"][-1:], "given": told["given"].select(slice(-1, None))}
    assert torch.equal(generate(model, 1, seed=4, first_image=number - 1, **alone), expected[-1:])


TURNS: dict[str, tuple[Any, ...]] = {
    "1d": (Local1D(query_block=8, memory=3), Full(), Dilated1D(query_block=4, memory=2, gap=1, chunks=2)),
    "sparse": (Strided1D(stride=12), Sliding1D(window=7), Fixed1D(query_block=12, summary=2, groups=2)),
    "2d, in waves": tuple(
        Local2D(query_block=(2, 2), memory=memory, shift="block") for memory in ((2, 4), (1, 2), (2, 1))
    ),
}


@pytest.mark.parametrize("known", [None, "first", "some"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("turns", TURNS)
def test_layers_of_different_patterns_draw_what_the_plainest_decoder_draws(
    turns: str, number: int, known: str | None
) -> None:
    model = opinionated(build(attention=TURNS[turns], layers=4, **MODERN))
    generator = torch.Generator().manual_seed(0)
    masks = {"first": torch.arange(48) < 9, "some": torch.rand(48, generator=generator) < 0.6, None: None}
    told = {"images": random_images(number, 4), "known": masks[known]}
    options: tuple[Any, ...] = (None, partial(model.decoder, in_waves=False, look_ahead=False))
    expected = generate(model, number, seed=4, decoder=partial(RecomputeDecoder, model), **told)
    for decoder in options:
        assert torch.equal(generate(model, number, seed=4, decoder=decoder, **told), expected)
    steps = [sum(1 for _ in Decoding(model, 3, seed=0, decoder=decoder)) for decoder in options]
    assert steps == [36 if turns == "2d, in waves" else 48, 48]


@pytest.mark.parametrize("pattern", ["1d", "2d block shift", "2d"])
@pytest.mark.parametrize("number", [1, 2])
def test_known_values_in_the_middle_stay_and_looking_ahead_and_waves_change_nothing(pattern: str, number: int) -> None:
    model = opinionated(build(image_size=8, **PATTERNS[pattern]))
    images = random_images(number, 8)
    known = torch.zeros(model.length, dtype=torch.bool)
    known[20:90] = known[101] = known[140:] = True
    order = model.generation_order
    drawn = [
        generate(model, number, seed=0, images=images, known=known, decoder=partial(model.decoder, **how))
        for how in ({}, {"look_ahead": False}, {"in_waves": False})
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    values, given = (each.reshape(number, model.length)[:, order] for each in (drawn[0], images))
    assert torch.equal(values[:, known], given[:, known])
    assert not torch.equal(values[:, ~known], given[:, ~known])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cache_is_as_long_as_the_window_and_has_the_heads_of_the_keys(pattern: str) -> None:
    """Whatever the height of the image; rows that are twice as long have twice as many keys that later blocks see."""
    numbers = []
    for size, key_heads in ((4, 4), (8, 4), (16, 4), (16, 1)):
        changes = {**MODERN, "heads": 4, "key_heads": key_heads, "image_size": size, **PATTERNS[pattern]}
        caches = decoder_of(decoding_of(build(**changes), 1, in_waves=False))._caches
        numbers.append(sum(cache.windows.numel() + cache.kept.numel() for cache in caches))
    small, medium, large, one_head = numbers
    if pattern in ("full", "strided"):
        assert (medium, large) == (4 * small, 16 * small)
    elif pattern == "fixed":  # an eighth of the keys of each image, twice, and a block
        assert medium < 4 * small and large < 4 * medium
    elif pattern == "dilated":
        assert small <= medium == large
    elif pattern.startswith("1d") or pattern == "sliding":
        assert small == medium == large
    else:
        assert large < 2 * medium < 4 * small
    # What heads take in turn, they keep apart, also where they share keys.
    assert large == (2 if pattern == "fixed" else 4) * one_head


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
        waves, sequential = (decoding_of(model, 1, in_waves=in_waves, look_ahead=False) for in_waves in (True, False))
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
    given = {"given": Given(labels=torch.tensor([3])), "sampling": Sampling(**options)}
    given |= {"images": random_images(1, 8), "keep": 13}
    num_steps, results = [], []
    for look_ahead in (True, False):
        results.append(decoded_parameters(model, 1, look_ahead=look_ahead, **given))
        num_steps.append(sum(1 for _ in decoding_of(model, 1, look_ahead=look_ahead, **given)))
    (images, parameters, positions), (expected, expected_parameters, in_order) = results
    assert torch.equal(images, expected)
    drawn = model.generation_order[13:]
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
    assert sum(drawn) == model.length and max(drawn) == 4
    expected, ahead = [], 0  # tokens that were computed, and so guessed, beyond the last final one
    while sum(expected) < model.length:
        left = 8 - sum(expected) % 8  # in the block
        expected.append(min(ahead + 1, 4, left))
        ahead = max(min(4, left) - expected[-1], 0)
    assert drawn == expected


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_kept_stays_and_the_rest_is_drawn_given_it(pattern: str, head: str) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head])
    complete = generate(model, 3, seed=1)
    keep = model.length // 2
    known = torch.arange(model.length) < keep
    # Given the beginning of an image and its noise, the rest is that of the image.
    prefix = random_images(3, 4)
    values = model.generation_order[:keep]
    flat, original = prefix.view(3, model.length, -1), complete.view(3, model.length, -1)
    flat[:, values] = original[:, values]
    assert torch.equal(generate(model, 3, seed=1, images=prefix, known=known), complete)
    assert torch.equal(
        generate(model, 3, seed=1, images=complete, known=torch.ones(model.length, dtype=torch.bool)), complete
    )
    other = random_images(3, 4, seed=9)
    drawn = generate(model, 3, seed=1, images=other, known=known)
    assert torch.equal(drawn.view_as(flat)[:, values], other.view_as(flat)[:, values])


def test_half_of_the_positions_is_the_upper_half_of_the_image() -> None:
    for name in ("1d", "2d"):
        model = build(**PATTERNS[name])
        half = model.length // 2
        assert set(model.generation_order[:half].tolist()) == set(range(half))


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
    original = canvas_module.draw

    def recording_draw(output: Any, parameters: Tensor, noise: Tensor, sampling: Sampling, without: Tensor) -> Tensor:
        recorded.append((parameters, without))
        return original(output, parameters, noise, sampling, without)

    monkeypatch.setattr(canvas_module, "draw", recording_draw)
    labels = torch.tensor([3, 0])
    decoding = Decoding(model, 2, seed=0, given=Given(labels=labels), sampling=Sampling(guidance=2.5))
    positions = torch.cat([step.positions for step in decoding])
    for parts, classes in zip(zip(*recorded, strict=True), (labels, torch.tensor([5, 5])), strict=True):
        with torch.no_grad():
            full = model(decoding.images, Given(labels=classes)).reshape(2, model.length, -1)[:, positions]
        torch.testing.assert_close(torch.cat(parts, dim=1).flatten(2), full, rtol=0, atol=1e-5)


def test_guidance_by_0_draws_what_no_class_does() -> None:
    model = opinionated(build(**GUIDED))
    with torch.no_grad():
        model.embed_class.weight.mul_(5)
    drawn = [
        generate(model, 8, seed=0, given=Given(labels=torch.full((8,), label)), sampling=Sampling(guidance=guidance))
        for label, guidance in ((0, 0.0), (4, 0.0), (0, 1.0), (0, 3.0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[2], drawn[3])


DRAWN = {**HEADS, "channels": CHANNELS_OF_PIXELS}


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "guidance": 2.0}], ids=["plain", "all options"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", DRAWN)
def test_a_step_can_be_captured(head: str, block: str, options: dict[str, Any]) -> None:
    """What a graph needs: no look at a value on the host, which tensors without values show, and a step that can be
    done again, as it is before the capture."""
    model = build(**PATTERNS["2d block shift"], **DRAWN[head], **BLOCKS[block], **GUIDED)
    given, sampling = Given(labels=torch.tensor([1, 4])), Sampling(**options)
    decoding = decoding_of(model, 2, given=given, sampling=sampling, look_ahead=False)
    decoder = decoder_of(decoding)
    for number, _ in enumerate(decoding):
        after, (rows, turn) = decoder._step.clone(), decoder._last
        if number < decoder._turns:
            hidden = decoder._hidden_of[rows]
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
                decoder._draw_next(rows, turn)
            decoder._step.copy_(after)
            decoder._hidden_of[rows] = hidden
        if number % 4 == 1:
            decoder._step.copy_(after - 1 if turn == decoder._turns - 1 else after)
            with torch.no_grad():
                decoder._draw_next(rows, turn)
            assert torch.equal(decoder._step, after)
    assert torch.equal(decoding.images, generate(model, 2, seed=0, given=given, sampling=sampling))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", DRAWN)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_captured_steps_are_the_full_forward_pass(pattern: str, head: str, block: str) -> None:
    model = build(**PATTERNS[pattern], **DRAWN[head], **BLOCKS[block]).cuda()
    images, decoded, _ = decoded_parameters(model, 3)
    with torch.no_grad():
        full = model(images).reshape(3, len(model.generation_order), -1)
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-4)
