"""Does every variant of the model see all of the past, none of the future, have the right size, and learn?"""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.attention.local_attention import local_attention
from models.given import Given
from models.image_transformer.family import ImageTransformer
from models.image_transformer.layer import attend_in_turn
from models.image_transformer.shape import (
    Dilated1D,
    Fixed1D,
    Full,
    Local1D,
    Local2D,
    Sliding1D,
    Strided1D,
    SuperResolution,
)
from models.likelihood import (
    CategoricalOutput,
    MixtureOutput,
    PredictorCategoricalOutput,
    PredictorMixtureOutput,
    bits_per_dim,
    nats,
)
from models.model import Recompute
from tests.support.tiny_model import (
    BLOCKS,
    GIVEN,
    HEADS,
    MIXTURE,
    MODERN,
    PATTERNS,
    PIXELS,
    random_given,
    random_images,
    tiny_config,
)


def build(seed: int = 0, **changes: Any) -> ImageTransformer:
    torch.manual_seed(seed)
    return tiny_config(**changes).build().eval()


def use_backend(model: ImageTransformer, backend: Any) -> None:
    model.attends = [
        attend_in_turn([partial(local_attention, pattern=pattern, backend=backend) for pattern in of_layer])
        for of_layer in model.patterns
    ]


def by_position(parameters: Tensor, num_positions: int) -> Tensor:
    """[B, H, W, ...] -> [B, L, everything predicted at a position]."""
    return parameters.reshape(len(parameters), num_positions, -1)


def lost_ranks(model: ImageTransformer) -> set[int]:
    """Generation ranks whose value no later position sees: the last, with the shift inside blocks each block's last."""
    length = model.length
    if model.config.shift == "generation":
        return {length - 1}
    return {block.stop - 1 for block in model.patterns[0][0].blocks}


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_value_changes_nothing_generated_before_it_or_with_it_and_something_after(
    pattern: str, head: str, block: str, backend: str
) -> None:
    model = build(**PATTERNS[pattern], **HEADS[head], **BLOCKS[block])
    use_backend(model, backend)
    length, rank_of_position = model.length, model.patterns[0][0].rank[model.patterns[0][0].slot_of_position]
    image = random_images(1, 4)
    # One image for each sub-pixel, which is changed in it.
    changed = image.flatten().repeat(image.numel(), 1)
    changed.diagonal().add_(128)
    with torch.no_grad():
        outputs = by_position(model(torch.cat([image, changed.view(-1, 4, 4, 3)])), length)
    difference = (outputs[1:] - outputs[:1]).abs().amax(-1)

    values_per_position = image.numel() // length
    for subpixel in range(image.numel()):
        rank = rank_of_position[subpixel // values_per_position]
        later = rank_of_position > rank
        assert difference[subpixel][~later].max() < 1e-6
        if int(rank) not in lost_ranks(model):
            assert difference[subpixel][later].max() > 1e-4


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", ["classes", "super-resolution"])
def test_every_position_depends_on_what_is_given(what: str, block: str) -> None:
    model = build(**GIVEN[what], **BLOCKS[block])
    images, given = random_images(1, 4), random_given(model.config, 1)
    changed = Given(
        labels=None if given.labels is None else (given.labels + 1) % 5,
        small_images=None if given.small_images is None else given.small_images + 100,
    )
    with torch.no_grad():
        difference = (model(images, given) - model(images, changed)).abs()
    assert by_position(difference, 48).amax(-1).min() > 1e-5


def test_the_vector_of_a_class_is_added_to_every_token_before_the_first_layer() -> None:
    model = build(num_classes=5)
    inputs: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(random_images(1, 4).expand(2, -1, -1, -1), Given(labels=torch.tensor([1, 3])))
        one, other = inputs[0]
        # As the original scales it: by the square root of the width of 16.
        expected = 4 * (model.embed_class.weight[3] - model.embed_class.weight[1])
    torch.testing.assert_close(other - one, expected.expand(48, 16))


def test_every_value_of_the_small_image_is_seen() -> None:
    model = build(**GIVEN["super-resolution"])
    images, small = random_images(1, 4), random_images(1, 2)
    changed = small.flatten().repeat(12, 1)
    changed.diagonal().add_(128)
    with torch.no_grad():
        given = Given(small_images=torch.cat([small, changed.view(12, 2, 2, 3)]))
        outputs = model(images.expand(13, -1, -1, -1), given)
    assert (outputs[1:] - outputs[:1]).abs().flatten(1).amax(1).min() > 1e-5


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_backends_give_the_same_model(pattern: str, block: str) -> None:
    images = random_images(2, 4)
    gradients = []
    for backend in ("reference", "blocked"):
        model = build(**PATTERNS[pattern], **BLOCKS[block])
        use_backend(model, backend)
        nats(CategoricalOutput(), model(images), images).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, f"{name} does nothing"
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", GIVEN)
@pytest.mark.parametrize("head", HEADS)
def test_recomputed_activations_give_the_same_gradients(head: str, what: str, block: str) -> None:
    config = tiny_config(**HEADS[head], **GIVEN[what], **BLOCKS[block], dropout=0.2, layers=3)
    images, given = random_images(2, 4), random_given(config, 2)
    gradients = []
    for every in (0, 1, 2):
        torch.manual_seed(0)
        model = config.build(Recompute(every=every))
        torch.manual_seed(1)  # of dropout
        nats(config.output, model(images, given), images).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for recomputed in gradients[1:]:
        for one, other in zip(recomputed, gradients[0], strict=True):
            assert torch.equal(one, other)


def test_dropout_changes_training_and_not_evaluation() -> None:
    model = build(dropout=0.5)
    images = random_images(1, 4)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_dropout_is_on_the_embedded_input_of_decoder_and_encoder() -> None:
    model = build(**GIVEN["super-resolution"], dropout=0.5, width=256).train()
    inputs: list[Tensor] = []
    for layers in (model.layers, model.encoder.layers):
        layers[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(random_images(1, 4), random_given(model.config, 1))
    assert len(inputs) == 2
    for x in inputs:
        assert (x == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", GIVEN)
def test_bf16_weights_give_nearly_the_same_fp32_output(block: str, what: str) -> None:
    model = build(**GIVEN[what], **BLOCKS[block])
    images, given = random_images(2, 4), random_given(model.config, 2)
    expected = model(images, given)
    actual = model.bfloat16()(images, given)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1 * expected.std().item())


def test_bf16_weights_give_nearly_the_same_bits_and_gradients_around_guesses() -> None:
    """With the stem, too, which is what configs/imagenet64_big.yaml trains in bf16; of images that are easy to guess,
    since there a slip of a level costs most."""
    changes = {**HEADS["sub-pixels"], **BLOCKS["modern"], "output": PredictorCategoricalOutput()}
    model = build(**changes, stem="neighbourhood")
    smooth = (random_images(2, 1).float() + torch.arange(4)[:, None, None] + torch.arange(4)[:, None]).clamp(max=255)
    images = smooth.to(torch.uint8)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).zero_grad()
        total = nats(PredictorCategoricalOutput(), model(images), images).sum()
        total.backward()
        gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        found[dtype] = bits_per_dim(total.item(), images.numel()), torch.cat(gradients)
    (expected, gradient), (actual, rounded) = found.values()
    assert expected < 7 and actual == pytest.approx(expected, rel=0.004)
    assert torch.nn.functional.cosine_similarity(gradient, rounded, dim=0) > 0.99


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head", ["sub-pixels", "pixels"])
def test_an_untrained_categorical_model_costs_eight_bits(head: str, block: str) -> None:
    images = random_images(8, 4)
    total = nats(CategoricalOutput(), build(**HEADS[head], **BLOCKS[block])(images), images).sum().item()
    assert bits_per_dim(total, images.numel()) == pytest.approx(8, abs=0.05)


def test_a_whole_image_of_two_by_two_pixels_has_the_probability_of_its_parts() -> None:
    """Summed over the last sub-pixel, p(image) is the probability of all the others: no probability is lost or made."""
    model = build(image_size=2, attention=Local1D(query_block=4, memory=4))
    image = random_images(1, 2)
    with torch.no_grad():
        cost = nats(CategoricalOutput(), model(image), image).flatten()
        last = image.flatten().repeat(256, 1)
        last[:, -1] = torch.arange(256)
        last = last.view(256, 2, 2, 3)
        summed = torch.logsumexp(-nats(CategoricalOutput(), model(last), last).flatten(1).double().sum(1), 0)
    assert summed.item() == pytest.approx(-cost[:-1].double().sum().item(), abs=1e-4)


# Published sizes, computed from the shapes in the original code, without its embedding of positions and end token.
PAPER = {
    "image_size": 32,
    "attention": Local1D(query_block=256, memory=256),
    "heads": 8,
    "width": 512,
    "attention_width": 512,
    "ff_width": 2048,
}
PAPER_MIXTURE = {
    **PAPER,
    **MIXTURE,
    "output": MixtureOutput(components=10),
    "width": 256,
    "ff_width": 512,
    "position": "learned",
}


@pytest.mark.parametrize(
    "millions, changes",
    [
        (38.3, {**PAPER, "layers": 12, "heads": 4}),
        (17.3, {**PAPER, "layers": 8, "ff_width": 1024}),
        (25.7, {**PAPER, "layers": 8}),
        (11.1, {**PAPER_MIXTURE, "layers": 14}),
        (9.5, {**PAPER_MIXTURE, "layers": 12}),
        (127, {**PAPER, "layers": 10, "width": 1024, "attention_width": 1024, "ff_width": 4096}),
        (202.5, {**PAPER, "image_size": 64, "layers": 24, "width": 1024, "attention_width": 1024}),
        (151.7, {**PAPER, "image_size": 64, "layers": 48}),
    ],
)
def test_the_models_of_the_paper_have_their_published_sizes(millions: float, changes: dict[str, Any]) -> None:
    assert tiny_config(**changes).account().parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_fewer_heads_of_keys_have_fewer_weights() -> None:
    big = {**MODERN, **PAPER, "width": 64, "attention_width": 64, **GIVEN["super-resolution"], "layers": 3}
    all_heads, fewer = (tiny_config(**big, key_heads=key_heads).account().parameters for key_heads in (0, 2))
    assert tiny_config(**big, key_heads=8).account().parameters == all_heads
    # Three layers attend to themselves and to the encoder, whose one layer attends to itself.
    assert all_heads - fewer == 7 * 2 * 64 * (8 - 2) * 8


@pytest.mark.parametrize(
    "giga, changes",
    [
        (233 + 27, {**PAPER, "layers": 12}),
        (931 + 115, {**PAPER, "layers": 12, "image_size": 64}),
        (
            4954 + 903,
            {**PAPER, "layers": 24, "image_size": 64, "width": 1024, "attention_width": 1024}
            | {"attention": Local1D(query_block=512, memory=512)},
        ),
    ],
)
def test_the_models_of_the_paper_take_their_known_flops(giga: float, changes: dict[str, Any]) -> None:
    assert tiny_config(**changes).account().flops.forward / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", GIVEN)
@pytest.mark.parametrize("head", HEADS)
def test_flops_are_those_that_torch_counts_with_only_visible_pairs_of_attention(head, what, block) -> None:
    model = build(**HEADS[head], **GIVEN[what], **BLOCKS[block])
    config, length = model.config, model.length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(1, 4), random_given(config, 1))
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    matrices = sum(flops for name, flops in by_operator.items() if name in ("aten.mm", "aten.addmm"))
    encoder_length = 3 * config.small_size**2
    pairs = config.layers * (int(model.patterns[0][0].mask().sum()) + length * encoder_length)
    pairs += config.encoder_layers * encoder_length**2
    assert config.account().flops.forward == matrices + 4 * config.attention_width * pairs


def test_each_part_takes_the_flops_that_torch_counts_in_its_modules() -> None:
    config = tiny_config(**PIXELS, **MODERN, **GIVEN["super-resolution"])
    model = config.build()
    use_backend(model, "reference")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(1, 4), random_given(config, 1))
    counted = {name.removeprefix("ImageTransformer."): sum(f.values()) for name, f in counter.get_flop_counts().items()}
    parts = {name: part.forward for name, part in config.account().parts.items()}
    modules = {
        "embedding": counted["embed_input"],
        "encoder": counted["encoder"],
        "feed-forward": sum(counted[f"layers.{index}.feed_forward"] for index in range(config.layers)),
        "head": counted["head"],
    }
    assert {name: parts[name] for name in modules} == modules
    dense = 4 * config.attention_width * config.layers * (model.length**2 - model.patterns[0][0].num_pairs)
    attention = counter.get_total_flops() - sum(modules.values()) - dense
    assert parts["attention projections"] + parts["attention scores"] == attention


def test_no_more_than_the_visible_pairs_are_counted_and_the_backward_pass_takes_twice_as_much() -> None:
    local, everything = (tiny_config(**PATTERNS[name]) for name in ("1d", "full"))
    pairs = {config: int(config.build().patterns[0][0].mask().sum()) for config in (local, everything)}
    difference = 4 * local.layers * local.attention_width * (pairs[everything] - pairs[local])
    assert everything.account().flops.forward - local.account().flops.forward == difference > 0
    assert local.account().flops.training == 3 * local.account().flops.forward


def test_each_layer_attends_by_its_own_pattern_and_is_counted_so() -> None:
    patterns = [PATTERNS[name].get("attention", Local1D(query_block=8, memory=8)) for name in ("1d", "full", "dilated")]
    config = tiny_config(attention=tuple(patterns), layers=4)
    account = config.account(Recompute(every=3))
    alone = [tiny_config(attention=pattern, layers=1).account() for pattern in patterns]
    scores = [of_one.parts["attention scores"].forward for of_one in alone]
    assert len(set(scores)) == 3
    assert account.parts["attention scores"].forward == sum(scores) + scores[0]
    assert account.parts["attention scores"].recomputed == scores[2]
    # With the dense masks of these patterns it is the same model.
    blocked, dense = config.build().eval(), config.build().eval()
    dense.load_state_dict(blocked.state_dict())
    use_backend(dense, "reference")
    images = random_images(2, 4)
    torch.testing.assert_close(blocked(images), dense(images))


RECOMPUTED = [("1d", "sub-pixels"), ("2d", "mixture"), ("dilated", "pixels")]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", GIVEN)
@pytest.mark.parametrize(
    "pattern, head, every",
    [(pattern, head, 0) for pattern in PATTERNS for head in HEADS]
    + [(pattern, head, every) for pattern, head in RECOMPUTED for every in (1, 2)],
)
def test_training_takes_the_flops_that_torch_counts_where_scores_are_matrices(pattern, head, every, what, block):
    """With dense scores torch's counter sees every product; those of invisible pairs are subtracted."""
    config = tiny_config(**PATTERNS[pattern], **HEADS[head], **GIVEN[what], **BLOCKS[block], layers=3)
    model = config.build(Recompute(every=every))
    use_backend(model, "reference")
    images = random_images(1, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        nats(config.output, model(images, random_given(config, 1)), images).sum().backward()
    expected = config.account(Recompute(every=every)).flops
    invisible = model.length**2 - model.patterns[0][0].num_pairs
    times = 3 * config.layers + (config.layers // every if every else 0)
    dense = times * 4 * config.attention_width * invisible
    assert counter.get_total_flops() - dense == expected.training + expected.recomputed
    assert (expected.recomputed > 0) == (every > 0)


def smooth_images(num_images: int, size: int) -> Tensor:
    """Images that differ from each other and, as photographs, little between neighbours."""
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(num_images, 3, 3, 3, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return fine.permute(0, 2, 3, 1).round().to(torch.uint8)


WIDE = Local1D(query_block=48, memory=48)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"attention": WIDE}, id="1d"),
        pytest.param(
            {"attention": WIDE, "block": "paper", "norm": "post", "position": "sine"},
            id="1d paper",
        ),
        pytest.param({"attention": Local2D(query_block=(4, 12), memory=(4, 6))}, id="2d"),
        pytest.param({"attention": WIDE, "num_classes": 8}, id="classes"),
        pytest.param(
            {
                "attention": WIDE,
                "super_resolution": SuperResolution(small_size=4, encoder_layers=1),
            },
            id="super-resolution",
        ),
    ],
)
def test_eight_images_can_be_learnt_by_heart(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        image_size=8, layers=2, width=64, heads=4, attention_width=64, ff_width=128, **{**MODERN, **changes}
    )
    model = config.build()
    images, given = smooth_images(8, 8), random_given(config, 8)
    if config.small_size:
        given = dataclasses.replace(given, small_images=images[:, ::2, ::2])
    steps = 300
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20, 2 * (1 - step / steps))
    )
    for _ in range(steps):
        total = nats(CategoricalOutput(), model(images, given), images).sum()
        optimizer.zero_grad()
        (total / images.numel()).backward()
        optimizer.step()
        schedule.step()
        if bits_per_dim(total.item(), images.numel()) < 0.1:
            return
    pytest.fail(f"{bits_per_dim(total.item(), images.numel()):.3f} bits/dim after {steps} steps")


def test_training_hides_classes_at_the_given_rate_and_evaluation_never() -> None:
    model = build(num_classes=5, label_dropout=0.3)
    seen: list[Tensor] = []
    model.embed_class.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    labels = torch.arange(2000) % 5
    with torch.no_grad():
        model.train()(random_images(1, 4).expand(2000, -1, -1, -1), Given(labels=labels))
        model.eval()(random_images(1, 4).expand(2000, -1, -1, -1), Given(labels=labels))
    in_training, in_evaluation = seen
    assert torch.equal(in_evaluation, labels)
    hidden = in_training == 5
    assert torch.equal(in_training[~hidden], labels[~hidden])
    assert abs(hidden.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


BAD = [
    ({"heads": 3}, "heads: 3 does not divide attention_width 16"),
    ({**MODERN, "heads": 4, "key_heads": 3}, "key_heads: 3 does not divide heads 4"),
    ({**MODERN, "key_heads": 4}, "key_heads: 4 does not divide heads 2"),
    ({"key_heads": -1}, "key_heads: -1 is negative"),
    ({"key_heads": 1}, "key_heads: 1 for 2 heads, but in the paper's block each has its own; set key_heads to 0"),
    (
        {"attention": Local1D(query_block=7, memory=8)},
        "attention.query_block: 7 does not divide the image's 48 positions; choose e.g. one of .*8",
    ),
    (
        {"attention": Local2D(query_block=(3, 2), memory=(1, 1))},
        "attention.query_block: 3 does not divide the image's 4 rows",
    ),
    (
        {"attention": Local2D(query_block=(2, 5), memory=(1, 1))},
        "attention.query_block: 5 does not divide the image's 12 columns",
    ),
    (
        {"attention": Local1D(query_block=8, memory=100)},
        "attention.memory: reaches 100 positions beyond a block of 8, but the image has 48 in all; choose 0 to 40",
    ),
    ({"attention": Local1D(query_block=8, memory=-1)}, "attention.memory: reaches -1"),
    ({"attention": Local1D(query_block=0, memory=8)}, "attention.query_block: 0 does not divide"),
    ({"attention": Dilated1D(query_block=8, memory=8, gap=0, chunks=0)}, "attention.memory: dilated_1d .* at least 1"),
    ({"attention": Dilated1D(query_block=8, memory=8, gap=0, chunks=9)}, "attention.memory: reaches 72"),
    ({"attention": Dilated1D(query_block=8, memory=1, gap=-1, chunks=1)}, "attention.gap: -1 is negative"),
    ({"attention": Sliding1D(window=0)}, "attention.window: 0, but the image has 48 positions; choose 1 to 48"),
    ({"attention": Strided1D(stride=49)}, "attention.stride: 49, but the image has 48 positions; choose 1 to 48"),
    ({"attention": Fixed1D(query_block=9, summary=1)}, "attention.query_block: 9 does not divide"),
    ({"attention": Fixed1D(query_block=8, summary=3, groups=3)}, "attention.summary: 3 positions for each of 3 groups"),
    ({"attention": Fixed1D(query_block=8, summary=1, groups=3)}, "attention.groups: 3 groups do not .* among 2 heads"),
    (
        {**MODERN, "heads": 4, "key_heads": 4, "attention": Fixed1D(query_block=8, summary=1, groups=3)},
        "attention.groups: 3 groups do not .* among 4 heads",
    ),
    ({"attention": ()}, "attention: the list is empty"),
    ({"attention": (Full(),) * 3}, "attention: a list of 3 patterns, but the model has 2 layers"),
    ({"attention": (Full(), Local1D(query_block=7, memory=0))}, "attention.1.query_block: 7 does not divide"),
    ({"attention": (Full(), Local2D(query_block=(2, 2), memory=(0, 0)))}, "attention.1: generates or stores"),
    ({"output": MixtureOutput()}, "makes a sequence of sub-pixels; set input to 'ordinal'"),
    ({"output": PredictorMixtureOutput()}, "makes a sequence of sub-pixels; set input to 'ordinal'"),
    ({"stem": "neighbourhood", "attention": Local2D(query_block=(2, 2), memory=(0, 0))}, "sub-pixels cuts a pixel"),
    ({**MODERN, "norm": "post"}, "the modern block is made for 'pre'"),
    ({"width": 18}, "width: 18 is not a multiple of 4"),
    ({"position": "rotary", "heads": 8}, "rotary needs attention_width / heads, 2, to be a multiple of 4"),
    (
        {"super_resolution": SuperResolution(small_size=2, encoder_layers=0)},
        "super_resolution.encoder_layers: 0 is not positive",
    ),
    *(
        (
            {"super_resolution": SuperResolution(small_size=size, encoder_layers=1)},
            f"super_resolution.small_size: {size} is not a proper divisor of image_size 4",
        )
        for size in (0, 3, 4)
    ),
    ({"dropout": 1.0}, r"dropout: 1.0 is not in \[0, 1\)"),
    ({"layers": 0}, "layers: 0 is not positive"),
    ({"num_classes": -1}, "num_classes: -1 is negative"),
    ({"num_classes": 5, "label_dropout": 1.0}, r"label_dropout: 1.0 is not in \[0, 1\)"),
    ({"label_dropout": 0.1}, "label_dropout: 0.1, but the model has no classes to hide"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_config_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_all_problems_of_a_config_are_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        tiny_config(heads=3, attention=Local1D(query_block=7, memory=0), output=MixtureOutput())
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "attention.query_block",
        "heads",
        "output",
    ]


def test_an_output_has_components() -> None:
    with pytest.raises(ValueError, match="components: 0 is not positive"):
        MixtureOutput(components=0)


def test_inputs_that_do_not_fit_the_model_are_refused() -> None:
    images = random_images(2, 4)
    with pytest.raises(ValueError, match=r"images: shape \(2, 8, 8, 3\), but the model reads \[B, 4, 4, 3\]"):
        build()(random_images(2, 8))
    with pytest.raises(ValueError, match="labels: missing, but num_classes is 5"):
        build(num_classes=5)(images)
    with pytest.raises(ValueError, match="labels: given, but num_classes is 0"):
        build()(images, Given(labels=torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="small_images: missing, but their size in the config is 2"):
        build(**GIVEN["super-resolution"])(images)
