"""Does every family of models keep what models/model.py promises?

A family joins by a line in FAMILIES.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import diagonal_bilstm, masked_convolution, neighbours, pixelcnnpp, pixelsnail
from models.attention.local_attention import local_attention
from models.decoding import Decoding, generate
from models.diagonal_bilstm import DiagonalBiLSTM, DiagonalBiLSTMConfig
from models.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig, RowsAbove
from models.image_transformer import channel_tokens, network
from models.image_transformer.family import ImageTransformer
from models.image_transformer.layer import attend_in_turn
from models.image_transformer.shape import Attention, Dilated1D, Fixed1D, Full, Local1D, Local2D, Sliding1D, Strided1D
from models.likelihood import (
    CategoricalOutput,
    MixtureOutput,
    PredictorCategoricalOutput,
    PredictorMixtureOutput,
    bits_per_dim,
    nats,
    nats_by_channel,
)
from models.masked_convolution import PixelHead
from models.model import Model, ModelConfig, Recompute
from models.pixelcnn import PixelCNN, PixelCNNConfig
from models.pixelcnnpp import PixelCNNPP, PixelCNNPPConfig
from models.pixelsnail import PixelSNAIL, PixelSNAILConfig
from models.receptive_field import seen_by
from models.recompute_decoder import RecomputeDecoder
from models.row_lstm import RowLSTM, RowLSTMConfig, RowLSTMLayer
from models.weight_norm import layers
from tests.support.tiny_model import (
    CHANNELS_OF_PIXELS,
    GIVEN,
    MIXTURE,
    MODERN,
    NEIGHBOURS_OF_SUBPIXELS,
    PIXELS,
    random_given,
    random_images,
    tiny_config,
)
from trainer.exported_model import Origin, load_exported, write_exported
from trainer.model_card import ModelCard

TURNS = (Local1D(query_block=8, memory=8), Full(), Dilated1D(query_block=4, memory=2, gap=1, chunks=2))
FLANGES = (Local2D(query_block=(2, 2), memory=(2, 1)), Local2D(query_block=(2, 2), memory=(1, 4)))
WHOLE_PIXELS = Local2D(query_block=(2, 6), memory=(2, 3))
SPARSE = (Strided1D(stride=12), Sliding1D(window=5), Fixed1D(query_block=12, summary=2, groups=2))
PIXELCNN: dict[str, Any] = {"image_size": 4, "features": 6, "layers": 3, "head_features": 12}
PIXELCNNPP: dict[str, Any] = {"image_size": 4, "output": MixtureOutput(components=3), "features": 5, "blocks": 2}
PIXELSNAIL: dict[str, Any] = {
    "image_size": 4,
    "output": MixtureOutput(components=3),
    "features": 8,
    "blocks": 3,
    "convolutions": 2,
}
AROUND: dict[str, Any] = {
    "output": PredictorMixtureOutput(predictors=("median", "learned"), scales=2),
    "stem": "neighbourhood",
}
ODD = {"features": 5, "head_features": 8, "layers": 2}
FAMILIES: dict[str, ModelConfig] = {
    "image_transformer": tiny_config(),
    "image_transformer, modern, classes": tiny_config(**MODERN, **GIVEN["classes"]),
    "image_transformer, pixels, 2d": tiny_config(**PIXELS, attention=FLANGES[0]),
    "image_transformer, mixture, super-resolution": tiny_config(**MIXTURE, **MODERN, **GIVEN["super-resolution"]),
    "image_transformer, patterns in turn": tiny_config(attention=TURNS, layers=4),
    "image_transformer, 2d patterns in turn": tiny_config(**MODERN, attention=FLANGES, layers=3),
    "image_transformer, sparse patterns in turn": tiny_config(attention=SPARSE, layers=3),
    "image_transformer, predictors": tiny_config(
        input="ordinal", output=PredictorMixtureOutput(scales=1), **GIVEN["super-resolution"]
    ),
    "image_transformer, predictors, 2d": tiny_config(
        input="ordinal", output=PredictorMixtureOutput(scales=1), attention=FLANGES[0]
    ),
    "image_transformer, stem": tiny_config(**PIXELS, **MODERN, stem="neighbourhood", attention=FLANGES[0]),
    "image_transformer, predictors and stem": tiny_config(
        input="ordinal",
        output=PredictorMixtureOutput(predictors=("median", "learned"), scales=2),
        stem="neighbourhood",
        attention=Local2D(query_block=(2, 2), memory=(1, 2), shift="block"),
        **MODERN,
        **GIVEN["classes"],
    ),
    "image_transformer, predictors of sub-pixels": tiny_config(output=PredictorCategoricalOutput()),
    "image_transformer, stem of sub-pixels": tiny_config(**MODERN, stem="neighbourhood", attention=WHOLE_PIXELS),
    "image_transformer, predictors and stem of sub-pixels": tiny_config(
        **NEIGHBOURS_OF_SUBPIXELS, **MODERN, **GIVEN["classes"], attention=WHOLE_PIXELS
    ),
    "image_transformer, channels of pixels": tiny_config(input="ordinal", output=PredictorCategoricalOutput()),
    "image_transformer, channels of pixels, 2d, stem": tiny_config(
        **CHANNELS_OF_PIXELS, **MODERN, **GIVEN["super-resolution"], attention=FLANGES[0]
    ),
    "pixelcnn": PixelCNNConfig(**PIXELCNN),
    "pixelcnn, no multiple of three": PixelCNNConfig(**PIXELCNN | ODD),
    "gated_pixelcnn": GatedPixelCNNConfig(**PIXELCNN),
    "gated_pixelcnn, no multiple of three, classes": GatedPixelCNNConfig(
        **PIXELCNN | ODD, num_classes=3, label_dropout=0.2, grouping="blocks"
    ),
    "row_lstm": RowLSTMConfig(**PIXELCNN),
    "row_lstm, no multiple of three": RowLSTMConfig(**PIXELCNN | ODD, kernel=5, grouping="blocks"),
    "diagonal_bilstm": DiagonalBiLSTMConfig(**PIXELCNN),
    "diagonal_bilstm, no multiple of three": DiagonalBiLSTMConfig(**PIXELCNN | ODD, grouping="blocks"),
    "pixelcnnpp": PixelCNNPPConfig(**PIXELCNNPP),
    "pixelsnail": PixelSNAILConfig(**PIXELSNAIL),
    "pixelsnail, pooled keys": PixelSNAILConfig(**PIXELSNAIL | {"key_pooling": 2, "nonlinearity": "relu", "blocks": 2}),
    "pixelcnn, predictors and stem": PixelCNNConfig(**PIXELCNN | AROUND),
    "gated_pixelcnn, mixture": GatedPixelCNNConfig(**PIXELCNN, output=MixtureOutput(components=3)),
    "gated_pixelcnn, stem": GatedPixelCNNConfig(
        **PIXELCNN | {"features": 12, "head_features": 24, "stem": "neighbourhood"}
    ),
    "gated_pixelcnn, predictors and stem, classes": GatedPixelCNNConfig(**PIXELCNN | AROUND | ODD, num_classes=3),
    "pixelcnnpp, predictors and stem": PixelCNNPPConfig(**PIXELCNNPP | AROUND | {"blocks": 1}),
    "pixelsnail, predictors and stem": PixelSNAILConfig(**PIXELSNAIL | AROUND | {"blocks": 2}),
    "pixelcnnpp, elu, classes": PixelCNNPPConfig(**PIXELCNNPP | {"nonlinearity": "elu", "num_classes": 5, "blocks": 1}),
}
families = pytest.mark.parametrize("family", FAMILIES)


def built(family: str, recompute: Recompute = Recompute()) -> Model:  # noqa: B008 (immutable)
    torch.manual_seed(0)
    model = FAMILIES[family].build(recompute)
    for layer in layers(model):  # whose biases are 0 until they have seen images, for which these are too small
        nn.init.normal_(layer.b, std=0.3)
    for module in model.modules():
        if isinstance(module, neighbours.LearnedPredictor):  # whose weights begin at 0
            nn.init.normal_(module.weight)
    return model


def opinionated(model: Model) -> Model:
    """With a head that makes some values much likelier than others."""
    match model:
        case ImageTransformer():
            last = model.head.weight
        case PixelCNN() | GatedPixelCNN() if isinstance(model.head, PixelHead):
            last = model.head.mixture.weight
        case PixelCNN() | GatedPixelCNN() | RowLSTM() | DiagonalBiLSTM():
            last = model.head.logits.weight
        case PixelCNNPP() | PixelSNAIL():
            last = model.head.g
        case _:
            raise NotImplementedError(type(model))
    with torch.no_grad():
        last.mul_(8)
    return model.eval()


def seen_by_each(model: Model) -> Tensor:
    """bool [L, L]: whether the output of the one position depends on the value of the other."""
    return seen_by(model, list(range(len(model.generation_order))), num_images=16)


def in_order(seen: Tensor, model: Model) -> Tensor:
    return seen[model.generation_order][:, model.generation_order]


@families
def test_a_position_depends_on_nothing_at_or_after_itself_and_on_something_before(family: str) -> None:
    model = built(family).eval()
    order = model.generation_order
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    seen = in_order(seen_by_each(model), model)
    assert not seen.triu().any()
    assert seen[1:].any(1).all() and seen[:, :-1].any(0).all()


def with_mask_b_first(monkeypatch: pytest.MonkeyPatch) -> None:
    original = masked_convolution.kernel_mask
    monkeypatch.setattr(masked_convolution, "kernel_mask", lambda *sizes: original(*sizes[:3], "B", *sizes[4:]))


def with_gates_that_share_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if four gates of 5 features were 20 features."""
    original = masked_convolution.kernel_mask
    monkeypatch.setattr(masked_convolution, "kernel_mask", lambda *sizes: original(*sizes[:5], 1))


def with_two_groupings(monkeypatch: pytest.MonkeyPatch) -> None:
    original = masked_convolution.kernel_mask

    def mask(*sizes: Any) -> Tensor:
        return original(*sizes[:4], "interleaved" if sizes[2] == (1, 1) else "blocks", sizes[5])

    monkeypatch.setattr(masked_convolution, "kernel_mask", mask)


def with_a_map_that_is_not_moved_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagonal_bilstm, "down_a_row", lambda x: x)


def with_a_vertical_stack_that_reads_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RowsAbove.forward
    monkeypatch.setattr(RowsAbove, "forward", lambda self, x: original(self, x.roll(-1, dims=1)))


def with_states_of_the_same_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row begins with gates that the row below it should have got."""
    original = RowLSTMLayer.row
    monkeypatch.setattr(
        RowLSTMLayer, "row", lambda self, gates, above: original(self, gates, original(self, gates, above))
    )


def with_a_stream_that_is_not_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixelcnnpp, "right_shift", lambda x: x)


def with_attention_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixelsnail, "earlier", lambda *arguments: torch.ones(16, 16, dtype=torch.bool).tril())


def with_the_pixel_as_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    original = neighbours.known_neighbours

    def found(size: int, generation_order: Tensor) -> Tensor:
        positions = original(size, generation_order)
        positions[:, 1] = torch.arange(len(positions))
        return positions

    monkeypatch.setattr(neighbours, "known_neighbours", found)


def with_neighbours_of_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = neighbours.known_neighbours
    monkeypatch.setattr(neighbours, "known_neighbours", lambda size, order: original(size, order.sort().values))


def with_all_channels_known(monkeypatch: pytest.MonkeyPatch) -> None:
    original = network.logits_around_guesses

    def logits(parameters: Tensor, guesses: Tensor, pixels: Tensor, channels: Tensor) -> Tensor:
        return original(parameters, guesses, pixels, torch.full_like(channels, 2))

    monkeypatch.setattr(network, "logits_around_guesses", logits)


def with_channels_that_are_one_further(monkeypatch: pytest.MonkeyPatch) -> None:
    original = neighbours.SubpixelStem.tokens
    monkeypatch.setattr(
        neighbours.SubpixelStem, "tokens", lambda self, values, positions: original(self, values, positions.roll(-1))
    )


def with_all_channels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    original = channel_tokens.of_own_pixel
    monkeypatch.setattr(
        channel_tokens,
        "of_own_pixel",
        lambda pixels, missed, channels: original(pixels, missed, torch.full_like(channels, 2)),
    )


def with_neighbours_of_its_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stem says of the pixel to the right, whose own left neighbour is the pixel itself."""
    original = neighbours.NeighbourhoodStem.of_images
    monkeypatch.setattr(neighbours.NeighbourhoodStem, "of_images", lambda self, x: original(self, x).roll(-1, dims=2))


LEAKS = [
    ("image_transformer, predictors", with_the_pixel_as_its_neighbour),
    ("image_transformer, stem", with_the_pixel_as_its_neighbour),
    ("image_transformer, stem", with_neighbours_of_another_order),
    ("image_transformer, predictors, 2d", with_neighbours_of_another_order),
    ("image_transformer, predictors of sub-pixels", with_the_pixel_as_its_neighbour),
    ("image_transformer, predictors of sub-pixels", with_all_channels_known),
    ("image_transformer, stem of sub-pixels", with_neighbours_of_another_order),
    ("image_transformer, stem of sub-pixels", with_channels_that_are_one_further),
    ("image_transformer, channels of pixels", with_the_pixel_as_its_neighbour),
    ("image_transformer, channels of pixels", with_all_channels_known),
    ("image_transformer, channels of pixels", with_all_channels_of_its_own),
    ("image_transformer, channels of pixels, 2d, stem", with_neighbours_of_another_order),
    ("pixelcnn", with_mask_b_first),
    ("pixelcnn", with_two_groupings),
    ("gated_pixelcnn", with_mask_b_first),
    ("gated_pixelcnn, no multiple of three, classes", with_gates_that_share_the_colours),
    ("gated_pixelcnn", with_a_vertical_stack_that_reads_its_own_row),
    ("row_lstm", with_mask_b_first),
    ("row_lstm, no multiple of three", with_gates_that_share_the_colours),
    ("row_lstm", with_states_of_the_same_row),
    ("diagonal_bilstm", with_mask_b_first),
    ("diagonal_bilstm", with_a_map_that_is_not_moved_down),
    ("gated_pixelcnn, mixture", with_mask_b_first),
    ("pixelcnn, predictors and stem", with_the_pixel_as_its_neighbour),
    ("gated_pixelcnn, stem", with_the_pixel_as_its_neighbour),
    ("gated_pixelcnn, stem", with_neighbours_of_its_right),
    ("gated_pixelcnn, predictors and stem, classes", with_mask_b_first),
    ("pixelcnnpp, predictors and stem", with_neighbours_of_its_right),
    ("pixelsnail, predictors and stem", with_the_pixel_as_its_neighbour),
    ("pixelcnnpp", with_a_stream_that_is_not_shifted),
    ("pixelsnail", with_attention_to_itself),
]


def test_a_leak_is_seen_where_inputs_are_not_moved_on_by_one() -> None:
    model = built("image_transformer").eval()
    assert isinstance(model, ImageTransformer)
    model.sources.copy_(model.positions)
    assert in_order(seen_by_each(model), model).diagonal().any()


@pytest.mark.parametrize(("family", "leak"), LEAKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_leak_is_seen(
    family: str, leak: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    leak(monkeypatch)
    model = built(family).eval()
    assert in_order(seen_by_each(model), model).triu().any()


@families
def test_the_narrow_model_sees_all_of_the_past_that_the_model_sees(family: str) -> None:
    config = FAMILIES[family]
    wide, narrow = (in_order(seen_by_each(jittered(each)), each.build()) for each in (config, config.narrow()))
    # These models are so small that closed ReLUs hide some of it; the narrow ones are wide enough to be open.
    assert not (wide & ~narrow).any() and not narrow.triu().any()
    assert config.narrow().narrow() == config.narrow()


def jittered(config: ModelConfig) -> Model:
    """In float64, with random numbers added to all weights, so that those that begin as zero let gradients pass."""
    torch.manual_seed(0)
    model = config.build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("attention", SPARSE, ids=lambda attention: attention.kind)
def test_a_leak_in_a_sparse_pattern_is_seen(attention: Attention) -> None:
    model = tiny_config(attention=attention).build().eval()
    assert not in_order(seen_by_each(model), model).triu().any()
    leaking = [replace(pattern, causal=False, window=0) for pattern in model.patterns[1]]
    model.attends[1] = attend_in_turn([partial(local_attention, pattern=pattern) for pattern in leaking])
    assert in_order(seen_by_each(model), model).triu(1).any()


@families
def test_the_decoder_draws_from_the_forward_pass_what_the_plainest_decoder_draws(family: str) -> None:
    model = opinionated(built(family))
    config, length = model.config, len(model.generation_order)
    generator = torch.Generator().manual_seed(2)
    masks = (None, torch.arange(length) < 5, torch.rand(length, generator=generator) < 0.5, torch.arange(length) >= 9)
    for known in masks:
        told = {"given": random_given(config, 2), "images": random_images(2, config.image_size), "known": known}
        decodings = [
            Decoding(model, 2, seed=1, decoder=decoder, **told) for decoder in (None, partial(RecomputeDecoder, model))
        ]
        parameters = [decoded(decoding, model) for decoding in decodings]
        assert torch.equal(decodings[0].images, decodings[1].images)
        with torch.no_grad():
            full = model(decodings[0].images, told["given"]).reshape(2, length, -1)
        drawn = model.generation_order if known is None else model.generation_order[~known]
        for each in parameters:
            torch.testing.assert_close(each[:, drawn], full[:, drawn], rtol=0, atol=1e-4)
        if known is not None:
            kept = model.generation_order[known]
            images, given = (pictures.reshape(2, length, -1) for pictures in (decodings[0].images, told["images"]))
            assert torch.equal(images[:, kept], given[:, kept])


def decoded(decoding: Decoding, model: Model) -> Tensor:
    """[B, L, ...]: what the values were drawn from, by position."""
    length = len(model.generation_order)
    found: dict[int, Tensor] = {}
    for step in decoding:
        for index, position in enumerate(step.positions.tolist()):
            assert position not in found
            found[position] = decoding.parameters[:, index].flatten(1).clone()
    assert step.done == length
    nothing = torch.full_like(next(iter(found.values())), math.nan)
    return torch.stack([found.get(position, nothing) for position in range(length)], dim=1)


@families
def test_a_single_image_is_that_of_the_batch(family: str) -> None:
    model = opinionated(built(family))
    given = random_given(model.config, 3)
    images = generate(model, 3, seed=1, given=given)
    alone = generate(model, 1, seed=1, first_image=2, given=given.select(slice(2, 3)))
    assert torch.equal(alone[0], images[2])


def counted_flops(model: Model, *, backward: bool) -> int:
    """What torch counts outside of attention, whose products depend on the pattern."""
    images = random_images(1, model.config.image_size)
    with FlopCounterMode(display=False) as counter:
        output = model(images, random_given(model.config, 1))
        if backward:
            nats(model.config.output, output, images).sum().backward()
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    # PixelSNAIL's attention is written out, as products of batches of matrices; nothing else of it is such a product.
    attention = ("scaled_dot_product", "bmm") if isinstance(model, PixelSNAIL) else ("scaled_dot_product",)
    return sum(flops for name, flops in by_operator.items() if not any(part in name for part in attention))


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("family", [name for name, config in FAMILIES.items() if not config.small_size])
def test_flops_outside_of_attention_are_those_that_torch_counts(family: str, every: int) -> None:
    recompute = Recompute(every=every)
    account = FAMILIES[family].account(recompute)
    model = built(family, recompute)
    parts = [part for name, part in account.parts.items() if name != account.attention]
    assert sum(part.forward for part in parts) == counted_flops(model.eval(), backward=False)
    assert sum(part.training + part.recomputed for part in parts) == counted_flops(model.train(), backward=True)


@families
def test_the_account_has_the_model_s_own_numbers(family: str) -> None:
    config, model = FAMILIES[family], built(family)
    account = config.account()
    assert account.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert account.positions == len(model.generation_order)
    assert account.flops.recomputed == 0 < account.flops.forward
    assert account.attention is None or account.attention in account.parts
    more = config.with_units(config.num_units + config.unit_period)
    assert more.num_units == config.num_units + config.unit_period
    assert more.account().flops.forward > account.flops.forward


@pytest.mark.parametrize(
    "family", [name for name, config in FAMILIES.items() if isinstance(config.output, CategoricalOutput)]
)
def test_an_untrained_model_costs_eight_bits(family: str) -> None:
    model, images = built(family).eval(), random_images(8, 4)
    with torch.no_grad():
        total = nats(CategoricalOutput(), model(images, random_given(model.config, 8)), images).sum().item()
    assert bits_per_dim(total, images.numel()) == pytest.approx(8, abs=0.1)


@families
def test_the_probabilities_of_all_values_of_the_last_sub_pixel_sum_to_one(family: str) -> None:
    """Also as a sum over whole images: nothing that was generated before depends on that value."""
    model = opinionated(built(family))
    size, last = model.config.image_size, int(model.generation_order[-1])
    images = random_images(1, size).repeat(256, 1, 1, 1)
    values = images.view(256, len(model.generation_order), -1)
    values[:, last, -1] = torch.arange(256)
    given = random_given(model.config, 1).repeat(256)
    with torch.no_grad():
        cost = nats_by_channel(model.config.output, model(images, given), images).double()
    of_last = cost.reshape(values.shape)[:, last, -1]
    assert torch.logsumexp(-of_last, 0).item() == pytest.approx(0, abs=1e-4)
    others = cost.flatten(1).sum(1) - of_last
    torch.testing.assert_close(others, others[:1].expand(256), rtol=0, atol=1e-3)


@families
def test_recomputation_gives_the_same_gradients(family: str) -> None:
    config = FAMILIES[family]
    images, given = random_images(2, config.image_size), random_given(config, 2)
    gradients = []
    for recompute in (Recompute(), Recompute(every=1), Recompute(every=2), Recompute(every=1, keeps_attention=True)):
        model = built(family, recompute).train()
        nats(config.output, model(images, given), images).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None and expected.abs().max() > 0, f"{name} does nothing"
        for recomputed in gradients[1:]:
            torch.testing.assert_close(recomputed[name], expected, rtol=1e-6, atol=1e-8)


@families
def test_units_are_repeated_parts_with_most_of_the_matrices(family: str) -> None:
    config, model = FAMILIES[family], built(family)
    units = list(model.units())
    assert len({id(unit) for unit in units}) == len(units) >= config.num_units
    own = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(set(own)) == len(own), "a parameter belongs to one unit"
    assert set(own) < {id(parameter) for parameter in model.parameters()}, "embedding and head are no units"
    assert all(any(parameter.ndim == 2 for parameter in unit.parameters()) for unit in units)


@families
def test_what_does_not_fit_is_refused(family: str) -> None:
    model = built(family)
    with pytest.raises(ValueError, match=r"images: shape \(1, 5, 5, 3\), but the model reads \[B, 4, 4, 3\]"):
        model(random_images(1, 5), random_given(model.config, 1))
    other = tiny_config(num_classes=0 if model.config.num_classes else 3)
    with pytest.raises(ValueError, match="labels: (given|missing), but num_classes is"):
        given = random_given(model.config, 1)
        model(random_images(1, 4), type(given)(labels=random_given(other, 1).labels, small_images=given.small_images))


@families
def test_bf16_weights_give_nearly_the_same_fp32_output(family: str) -> None:
    model = built(family).eval()
    images, given = random_images(2, 4), random_given(model.config, 2)
    expected = model(images, given)
    actual = model.bfloat16()(images, given)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1 * expected.std().item())


LEARNERS: dict[str, ModelConfig] = {
    "image_transformer": tiny_config(**MODERN, width=32, attention_width=32, ff_width=64),
    "pixelcnn": PixelCNNConfig(image_size=4, features=16, layers=2, head_features=32),
    "gated_pixelcnn": GatedPixelCNNConfig(image_size=4, features=32, layers=2, head_features=32),
    "row_lstm": RowLSTMConfig(image_size=4, features=16, layers=2, head_features=32),
    "diagonal_bilstm": DiagonalBiLSTMConfig(image_size=4, features=16, layers=2, head_features=32),
}


@pytest.mark.parametrize("family", LEARNERS)
def test_a_few_images_can_be_learnt_by_heart(family: str) -> None:
    torch.manual_seed(0)
    model, images = LEARNERS[family].build(), random_images(2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(300):
        total = nats(model.config.output, model(images), images).sum()
        if (bits := bits_per_dim(total.item(), images.numel())) < 0.5:
            return
        optimizer.zero_grad()
        (total / images.numel()).backward()
        optimizer.step()
    pytest.fail(f"{bits:.3f} bits/dim after 300 steps")


@families
def test_an_exported_model_computes_the_same(family: str, tmp_path: Path) -> None:
    model = built(family).eval()
    card = ModelCard(
        model=model.config,  # type: ignore[arg-type]
        precision="fp32",
        train_url="here",
        validation_url="there",
        batch_images=4,
    )
    origin = Origin(run="a", mlflow_run_id="", step=1, weights="raw", checkpoints=1, data_digest="0", bits_per_dim=None)
    write_exported(tmp_path / "exported", card, origin, model.state_dict())
    exported = load_exported(tmp_path / "exported")
    assert exported.card == card
    again = exported.card.model.build().eval()
    again.load_state_dict(exported.state)
    images, given = random_images(2, 4), random_given(model.config, 2)
    assert torch.equal(again(images, given), model(images, given))
