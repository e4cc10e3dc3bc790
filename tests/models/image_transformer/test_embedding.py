"""Are intensities and positions coded as the paper says?"""

import math

import pytest
import torch

from models.image_transformer.embedding import Embedding, InputEmbedding, LearnedCode, SineCode
from models.model import Intensities


def test_a_sub_pixel_is_looked_up_by_channel_and_intensity() -> None:
    embed = InputEmbedding("categorical", (2, 6), 8, "sine")
    values = torch.tensor([[[7], [7], [200]]], dtype=torch.uint8)
    sources, positions = torch.tensor([0, 1, 5]), torch.tensor([1, 2, 6])
    code = embed.position(*embed.rows_and_columns(positions))
    looked_up = embed(values, sources, positions) - code
    for index, row in enumerate((7, 256 + 7, 512 + 200)):
        torch.testing.assert_close(looked_up[0, index], embed.values.weight[row] * math.sqrt(8))


def test_a_pixel_is_a_linear_combination_of_its_intensities_on_minus_one_to_one() -> None:
    embed = InputEmbedding("ordinal", (2, 2), 8, "sine")
    values = Intensities()(torch.tensor([[[0, 255, 51]]], dtype=torch.uint8))
    positions = torch.tensor([1])
    token = embed(values, torch.tensor([0]), positions) - embed.position(*embed.rows_and_columns(positions))
    expected = torch.tensor([-1.0, 1.0, -0.6]) @ embed.values.weight.T + embed.values.bias
    torch.testing.assert_close(token[0, 0], expected)


@pytest.mark.parametrize("input", ["categorical", "ordinal"])
def test_where_there_is_no_value_only_the_position_is_left(input) -> None:
    embed = InputEmbedding(input, (2, 6), 8, "learned")
    values = torch.full((1, 1, 1 if input == "categorical" else 3), 99, dtype=torch.uint8)
    token = embed(values, torch.tensor([-1]), torch.tensor([4]))
    torch.testing.assert_close(token[0], embed.position(*embed.rows_and_columns(torch.tensor([4]))))


def test_sines_have_wavelengths_from_two_pi_to_ten_thousand_of_them() -> None:
    code = SineCode(16)(torch.tensor([3]), torch.tensor([5]))[0]
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    expected = [f(position * w) for position in (3, 5) for f in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(code, torch.tensor(expected))


@pytest.mark.parametrize("code", [SineCode(16), LearnedCode((4, 12), 16)])
def test_every_position_has_its_own_code_half_of_it_by_row(code) -> None:
    rows, columns = torch.arange(48) // 12, torch.arange(48) % 12
    codes = code(rows, columns)
    assert (torch.cdist(codes, codes) + 9 * torch.eye(48)).min() > 1e-3
    assert torch.equal(codes[:12, :8], codes[:1, :8].expand(12, 8))
    assert torch.equal(codes[::12, 8:], codes[:1, 8:].expand(4, 8))


def test_an_embedding_starts_with_unit_variance() -> None:
    assert Embedding(1000, 64)(torch.arange(1000)).std().item() == pytest.approx(1, rel=0.02)
