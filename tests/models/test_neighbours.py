"""Are the neighbours of a pixel those around it that are drawn before, and are the guesses what their names say?"""

import pytest
import torch
from torch import Tensor

from models.attention.pattern import local_2d
from models.likelihood import (
    CategoricalOutput,
    PredictorMixtureOutput,
    around_guesses,
    bits_per_dim,
    initial_predictor_mixture,
    logits_around_guesses,
    mixture_nats,
    nats,
    nats_by_channel,
    split_mixture,
)
from models.neighbours import (
    OFFSETS,
    PREDICTORS,
    NeighbourhoodStem,
    Predictors,
    known_neighbours,
    stand_ins,
)
from tests.support.tiny_model import random_images

ORDERS = {
    "raster": torch.arange(64),
    "2d": local_2d(8, 8, (2, 4), (2, 2)).generation_order,
    "backwards": torch.arange(64).flip(0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_neighbours_are_those_around_a_pixel_that_are_drawn_before(name: str) -> None:
    order = ORDERS[name].tolist()
    for position, found in enumerate(known_neighbours(8, ORDERS[name]).tolist()):
        for (up, side), neighbour in zip(OFFSETS, found, strict=True):
            row, column = position // 8 + up, position % 8 + side
            inside = 0 <= row < 8 and 0 <= column < 8
            is_known = inside and order.index(row * 8 + column) < order.index(position)
            assert neighbour == (row * 8 + column if is_known else -1)


@pytest.mark.parametrize("name", ORDERS)
def test_stand_ins_are_known_neighbours(name: str) -> None:
    known = known_neighbours(8, ORDERS[name])
    filled = stand_ins(known)
    assert torch.equal(torch.where(known >= 0, known, filled), filled)
    nearest = known[:, [OFFSETS.index((0, -1)), OFFSETS.index((-1, 0))]]
    for found, own, near in zip(filled.tolist(), known.tolist(), nearest.tolist(), strict=True):
        assert set(found) <= {*own, -1}
        assert (-1 in found) == (max(near) == -1)


def guesses_of(values: Tensor) -> dict[str, Tensor]:
    predictors = Predictors(PREDICTORS, values.shape[1], torch.arange(values.shape[1] ** 2))
    flat = values.flatten()[None, :, None].expand(1, -1, 3).float()
    found = predictors(flat, torch.arange(flat.shape[1]))[0, ..., 0].unflatten(0, values.shape)
    return dict(zip(PREDICTORS, found.unbind(-1), strict=True))


def test_guesses_are_what_their_names_say() -> None:
    torch.manual_seed(0)
    values = torch.rand(5, 5) / 2 - 0.25
    guesses = guesses_of(values)
    w, n, nw, ne = values[3, 1], values[2, 2], values[2, 1], values[2, 3]
    nn, nne = values[1, 2], values[1, 3]
    expected = {
        "median": torch.stack([w, n, w + n - nw]).median(),
        "average": (w + n) / 2,
        "left": w,
        "above": n,
        "gradient": w + (ne - nw) / 4 + (n - nw) / 4,
        "learned": (w + n) / 2 + (ne - nw) / 4,
        "plane": w + n - nw,
        "left_and_slope": w + ne - n,
        "above_and_slope": n + (ne - nne + n - nn) / 2,
        "above_right": ne,
    }
    assert expected.keys() == guesses.keys()
    for name, guess in expected.items():
        torch.testing.assert_close(guesses[name][3, 2], guess)
        # At the border, what is not there is like what is next to it.
        assert guesses[name][0, 0] == 0
        torch.testing.assert_close(guesses[name][0, 3], values[0, 2])
    torch.testing.assert_close(guesses["median"][3, 0], values[2, 0])


def test_a_mixture_around_guesses_moves_green_and_blue_with_what_is_left_of_the_channels_before() -> None:
    torch.manual_seed(0)
    parameters, guesses = torch.randn(2, 10 * 4), torch.rand(2, 2, 3) - 0.5
    mixture, moved = split_mixture(parameters), split_mixture(around_guesses(parameters, guesses))
    red, green = torch.tensor(0.3), torch.tensor(-0.2)
    for component in range(4):
        guess, c = guesses[:, component % 2], mixture.coefficients[:, component]
        left = mixture.means[:, component] * 0.1 + guess
        expected = [
            left[:, 0],
            left[:, 1] + c[:, 0] * (red - guess[:, 0]),
            left[:, 2] + c[:, 1] * (red - guess[:, 0]) + c[:, 2] * (green - guess[:, 1]),
        ]
        means, c = moved.means[:, component], moved.coefficients[:, component]
        actual = [
            means[:, 0],
            means[:, 1] + c[:, 0] * red,
            means[:, 2] + c[:, 1] * red + c[:, 2] * green,
        ]
        torch.testing.assert_close(actual, expected)


def test_logits_around_a_guess_are_those_of_a_mixture_of_one() -> None:
    torch.manual_seed(0)
    images, guess = random_images(1, 4), torch.rand(1, 16, 1, 3) * 2 - 1
    output = PredictorMixtureOutput(predictors=("left",), scales=1)
    changes = torch.randn(16, 3, 5)
    weights, means, scales, first, second = (each.contiguous() for each in changes.unbind(-1))
    coefficients = torch.stack([first[:, 1], first[:, 2], second[:, 2]], dim=-1)
    mixture = (initial_predictor_mixture(output) + torch.cat([weights[:, :1], means, scales, coefficients], dim=-1))[
        None
    ]
    expected = nats_by_channel(output, around_guesses(mixture, guess).view(1, 4, 4, 10), images)
    parameters = torch.cat([torch.zeros(16, 3, 256), changes], dim=-1).view(1, 48, -1)
    values = (images.flatten(1, 2).float() / 127.5 - 1).repeat_interleave(3, dim=1)
    logits = logits_around_guesses(parameters, guess.repeat_interleave(3, dim=1), values, torch.arange(48) % 3)
    actual = nats(CategoricalOutput(), logits.view(1, 4, 4, 3, 256), images)
    torch.testing.assert_close(actual.clamp(max=15), expected.clamp(max=15), rtol=1e-3, atol=1e-3)


def test_before_any_training_a_smooth_image_costs_little() -> None:
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    images = (100 + 4 * rows + 3 * columns)[None, ..., None].expand(1, 16, 16, 3).to(torch.uint8)
    output = PredictorMixtureOutput()
    predictors = Predictors(output.predictors, 16, torch.arange(256))
    values = images.reshape(1, 256, 3).float() / 127.5 - 1
    parameters = around_guesses(
        initial_predictor_mixture(output).expand(1, 256, -1), predictors(values, torch.arange(256))
    )
    cost = mixture_nats(parameters.view(1, 16, 16, -1), images).sum().item()
    assert bits_per_dim(cost, images.numel()) < 3.5


@pytest.mark.parametrize("name", ORDERS)
def test_features_of_some_pixels_are_those_of_all(name: str) -> None:
    stem = NeighbourhoodStem(8, ORDERS[name], 16)
    values = random_images(2, 8).reshape(2, 64, 3).float() / 127.5 - 1
    everywhere = stem.features(values, torch.arange(64))
    assert everywhere.shape == (2, 64, stem.FEATURES)
    some = torch.tensor([9, 0, 63, 9])
    assert torch.equal(stem.features(values, some), everywhere[:, some])


def test_features_say_what_is_there_and_how_it_differs() -> None:
    values = torch.zeros(1, 64, 3)
    values[0, 9 + 1] = 0.5  # W of position 11
    stem = NeighbourhoodStem(8, torch.arange(64), 16)
    there, around = stem.features(values, torch.tensor([11, 0]))[0, :, -12:], stem.features(values, torch.tensor([11]))
    assert there[0].tolist() == [float(up > -2) for up, _ in OFFSETS]
    assert there[1].sum() == 0
    assert around[0, 0, :3].tolist() == [0.5] * 3
    squashed = around[0, 0, 36 : 36 + 33].view(11, 3)  # differences of W's neighbours from it
    present = torch.tensor([up > -2 for up, _ in OFFSETS[1:]])
    torch.testing.assert_close(squashed, -torch.tanh(torch.tensor(4.0)) * present[:, None].expand(-1, 3).float())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predictors": ()}, "must be one or more"),
        ({"predictors": ("left", "left")}, "each once"),
        ({"scales": 0}, "scales: 0 is not positive"),
    ],
)
def test_an_output_that_makes_no_mixture_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PredictorMixtureOutput(**changes)  # type: ignore[arg-type]
