"""Does a layer compute the paper's equations, and the modern block what its parts are known for?"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.local_attention import attend_to_all
from models.image_transformer.layer import Block, Layer, norm, rotary, rotate

WIDTH, HEADS, ATTENTION_WIDTH, FF_WIDTH = 8, 2, 12, 20


def build(
    block: str, norm_place: str, attends_to_encoder: bool = False, dropout: float = 0.0, key_heads: int = HEADS
) -> Layer:
    torch.manual_seed(0)
    layer = Layer(
        block=block,  # type: ignore[arg-type]
        norm_place=norm_place,  # type: ignore[arg-type]
        width=WIDTH,
        heads=HEADS,
        key_heads=key_heads,
        attention_width=ATTENTION_WIDTH,
        ff_width=FF_WIDTH,
        dropout=dropout,
        attends_to_encoder=attends_to_encoder,
        num_sublayers=2,
    )
    with torch.no_grad():  # so that forgetting a bias or a gain shows
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def attention_by_hand(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, memory: Tensor | None = None) -> Tensor:
    """One sequence [T, D], head by head."""
    memory = x if memory is None else memory
    head_width = ATTENTION_WIDTH // HEADS
    heads = []
    for head in range(HEADS):
        rows = slice(head * head_width, (head + 1) * head_width)
        scores = (x @ q[rows].T) @ (memory @ k[rows].T).T / math.sqrt(head_width)
        heads.append(scores.softmax(-1) @ (memory @ v[rows].T))
    return torch.cat(heads, dim=-1) @ out.T


def test_the_papers_layer_is_equations_1_and_2() -> None:
    layer = build("paper", "post")
    x = torch.randn(5, WIDTH)
    q, k, v = layer.attention.qkv.weight.chunk(3)
    attended = attention_by_hand(x, q, k, v, layer.attention.out.weight)
    a = layer.attention_norm(x + attended)
    ff = layer.feed_forward
    inner = F.relu(a @ ff.hidden.weight.T + ff.hidden.bias) @ ff.out.weight.T + ff.out.bias
    expected = layer.feed_forward_norm(a + inner)
    torch.testing.assert_close(layer(x[None], attend_to_all, None, None)[0], expected)


def test_norm_first_leaves_the_sum_itself_alone() -> None:
    layer = build("paper", "pre")
    x = torch.randn(5, WIDTH)
    q, k, v = layer.attention.qkv.weight.chunk(3)
    a = x + attention_by_hand(layer.attention_norm(x), q, k, v, layer.attention.out.weight)
    expected = a + layer.feed_forward(layer.feed_forward_norm(a))
    torch.testing.assert_close(layer(x[None], attend_to_all, None, None)[0], expected)


def test_attention_to_the_encoder_comes_between() -> None:
    layer = build("paper", "post", attends_to_encoder=True)
    x, encoded = torch.randn(5, WIDTH), torch.randn(7, WIDTH)
    q, k, v = layer.attention.qkv.weight.chunk(3)
    a = layer.attention_norm(x + attention_by_hand(x, q, k, v, layer.attention.out.weight))
    cross = layer.encoder_attention
    k, v = cross.kv.weight.chunk(2)
    b = layer.encoder_attention_norm(a + attention_by_hand(a, cross.q.weight, k, v, cross.out.weight, encoded))
    expected = layer.feed_forward_norm(b + layer.feed_forward(b))
    kv = cross.keys_values(encoded[None])
    torch.testing.assert_close(layer(x[None], attend_to_all, None, kv)[0], expected)


@pytest.mark.parametrize("block", ["paper", "modern"])
def test_norms_divide_by_the_deviation_with_the_originals_epsilon(block: Block) -> None:
    x = 1e-3 * torch.randn(5, 64)  # so small that the epsilon of 1e-6 is half of what is divided by
    centred = x - x.mean(-1, keepdim=True) if block == "paper" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(block, 64)(x), expected)


def test_the_papers_block_starts_as_the_original_and_the_modern_one_keeps_the_variance_of_the_sum() -> None:
    width, attention_width, ff_width, sublayers = 256, 512, 1024, 6

    def initial_stds(block: Block) -> list[float]:
        torch.manual_seed(0)
        layer = Layer(
            block=block,
            norm_place="pre",
            width=width,
            heads=8,
            key_heads=8,
            attention_width=attention_width,
            ff_width=ff_width,
            dropout=0.0,
            attends_to_encoder=False,
            num_sublayers=sublayers,
        )
        attention, ff = layer.attention, layer.feed_forward
        return [m.weight.std().item() for m in (attention.qkv, attention.out, ff.hidden, ff.out)]

    # tensor2tensor: variance scaling by 0.2 over the mean of fan-in and fan-out; q, k and v are matrices of their own.
    of_attention, of_ff = (math.sqrt(0.2 / ((width + inner) / 2)) for inner in (attention_width, ff_width))
    assert initial_stds("paper") == pytest.approx([of_attention, of_attention, of_ff, of_ff], rel=0.01)
    reads = width**-0.5
    writes = [(inner * sublayers) ** -0.5 for inner in (attention_width, ff_width)]
    assert initial_stds("modern") == pytest.approx([reads, writes[0], reads, writes[1]], rel=0.01)


def test_the_modern_block_has_no_biases_and_the_papers_has_them_in_the_feed_forward_network_only() -> None:
    def biases(block: str) -> set[str]:
        names = [name for name, _ in build(block, "pre").named_parameters()]
        return {name for name in names if name.endswith("bias") and "norm" not in name}

    assert biases("modern") == set()
    assert biases("paper") == {"feed_forward.hidden.bias", "feed_forward.out.bias"}


def test_the_modern_feed_forward_network_is_swiglu() -> None:
    ff = build("modern", "pre").feed_forward
    x = torch.randn(5, WIDTH)
    gate, value = ff.hidden.weight.chunk(2)
    torch.testing.assert_close(ff(x), (F.silu(x @ gate.T) * (x @ value.T)) @ ff.out.weight.T)


def test_modern_attention_does_not_grow_with_its_queries_and_keys() -> None:
    layer = build("modern", "pre")
    x = torch.randn(1, 5, WIDTH)
    before = layer.attention(x, attend_to_all, None)
    with torch.no_grad():
        layer.attention.qkv.weight[: 2 * ATTENTION_WIDTH] *= 1000
    torch.testing.assert_close(layer.attention(x, attend_to_all, None), before, rtol=1e-3, atol=1e-3)


def test_products_of_rotated_vectors_depend_on_differences_of_rows_and_columns_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).double().unbind(0)

    def product(query: tuple[int, int], key: tuple[int, int]) -> float:
        rotations = [rotary(torch.tensor([row]), torch.tensor([column]), 16) for row, column in (query, key)]
        return float((rotate(q, rotations[0]) * rotate(k, rotations[1])).sum())

    assert product((5, 9), (3, 2)) == pytest.approx(product((12, 20), (10, 13)), abs=1e-4)
    assert product((5, 9), (3, 2)) != pytest.approx(product((5, 9), (2, 2)), abs=1e-2)
    assert product((5, 9), (3, 2)) != pytest.approx(product((5, 9), (3, 1)), abs=1e-2)
    assert product((5, 9), (5, 9)) == pytest.approx(float((q * k).sum()), abs=1e-4)


def test_angles_turn_by_one_radian_to_a_hundredth_of_it_for_each_row_and_column() -> None:
    frequencies = [1, 100 ** (-1 / 3), 100 ** (-2 / 3), 0.01]
    angles = torch.tensor([position * frequency for position in (3, 5) for frequency in frequencies])
    cosines, sines = rotary(torch.tensor([3]), torch.tensor([5]), 16)
    torch.testing.assert_close(cosines[0], angles.cos())
    torch.testing.assert_close(sines[0], angles.sin())


def test_heads_that_share_keys_and_values_are_heads_with_equal_weights_of_them() -> None:
    shared, ordinary = build("modern", "pre", True, key_heads=1), build("modern", "pre", True)
    state = shared.state_dict()
    for name, parts in (("attention.qkv.weight", [ATTENTION_WIDTH, 6, 6]), ("encoder_attention.kv.weight", [6, 6])):
        *own, k, v = state[name].split(parts)
        state[name] = torch.cat([*own, k, k, v, v])
    ordinary.load_state_dict(state)
    x, encoded = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    one, other = (
        layer(x, attend_to_all, None, layer.encoder_attention.keys_values(encoded)) for layer in (shared, ordinary)
    )
    torch.testing.assert_close(one, other)
    keys, values = shared.encoder_attention.keys_values(encoded)
    assert keys.shape == values.shape == (2, 1, 7, 6)


@pytest.mark.parametrize("norm_place", ["post", "pre"])
def test_dropout_is_on_what_each_sublayer_adds_before_the_sum(norm_place: str) -> None:
    layer = build("paper", norm_place, dropout=0.999999)
    x = torch.randn(1, 5, WIDTH)
    expected = layer.feed_forward_norm(layer.attention_norm(x)) if norm_place == "post" else x
    torch.testing.assert_close(layer(x, attend_to_all, None, None), expected)
