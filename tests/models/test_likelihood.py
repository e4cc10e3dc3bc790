"""Are probabilities exact, do they sum to one, and where are they not those of the original code?"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.likelihood import (
    CategoricalOutput,
    MixtureOutput,
    Output,
    bits_per_dim,
    initial_mixture,
    log_bin_probability,
    mixture_nats,
    nats,
    nats_by_channel,
    split_mixture,
)

REFERENCE = sorted((Path(__file__).parents[1] / "reference").glob("dmol*.npz"))


SMALL_PROBABILITY = 1e-5
"""Below it the original gives a bin the density at its centre."""


def formula(parameters: Tensor, images: Tensor, *, original: bool = False) -> Tensor:
    """The mixture's loss in fp64 by differences of sigmoids: exact, or with the original's rule for improbable bins."""
    k = parameters.shape[-1] // 10
    logits = parameters[..., :k].double()
    means, log_scales, coefficients = (
        parameters[..., (1 + 3 * i) * k : (4 + 3 * i) * k].double().unflatten(-1, (k, 3)) for i in range(3)
    )
    log_scales, coefficients = log_scales.clamp(min=-7), coefficients.tanh()
    x = (images.double() / 127.5 - 1)[..., None, :]
    means = means + torch.stack(
        [
            torch.zeros_like(logits),
            coefficients[..., 0] * x[..., 0],
            coefficients[..., 1] * x[..., 0] + coefficients[..., 2] * x[..., 1],
        ],
        dim=-1,
    )
    scales = log_scales.exp()
    upper, lower, middle = (x - means + 1 / 255) / scales, (x - means - 1 / 255) / scales, (x - means) / scales
    softplus, log_sigmoid = torch.nn.functional.softplus, torch.nn.functional.logsigmoid
    # On the side of the mean where both sigmoids are small, so that their difference keeps its digits.
    far, near = torch.where(middle > 0, -upper, lower), torch.where(middle > 0, -lower, upper)
    log_ratio = log_sigmoid(far) - log_sigmoid(near)
    # Of bins that are narrow beside the scale, the density at the centre is the mean over the bin.
    density = middle - log_scales - 2 * softplus(middle) - math.log(127.5)
    is_narrow = upper - lower < 1e-6
    exact = log_sigmoid(near) + (-torch.expm1(log_ratio.masked_fill(is_narrow, -1.0))).log()
    inside = torch.where(is_narrow, density, exact)
    if original:
        inside = torch.where(inside.exp() > SMALL_PROBABILITY, inside, density)
    log_bins = torch.where(x < -0.999, upper - softplus(upper), torch.where(x > 0.999, -softplus(lower), inside))
    return -torch.logsumexp(logits.log_softmax(-1) + log_bins.sum(-1), dim=-1)


def loss_and_gradients(compute: Callable[..., Tensor], data: Any, **options: bool) -> tuple[Tensor, Tensor]:
    parameters = torch.from_numpy(data["pred"]).requires_grad_()
    loss = compute(parameters, torch.from_numpy(data["labels"]), **options)
    loss.backward(torch.from_numpy(data["dnll"]).to(loss.dtype))
    assert parameters.grad is not None
    return loss.detach().double(), parameters.grad


@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_mixture_nats_and_gradients_are_those_of_the_formula(path: Path) -> None:
    data = np.load(path)
    for actual, expected in zip(loss_and_gradients(mixture_nats, data), loss_and_gradients(formula, data), strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_with_the_original_s_rule_the_formula_is_its_code_up_to_its_rounding(path: Path) -> None:
    """The original subtracts two fp32 sigmoids: an error of one unit in the last place of 1 (6e-8) in a difference
    down to 1e-5 is 6e-3 of it, per channel. That is the precision of the files themselves."""
    data = np.load(path)
    loss, gradient = loss_and_gradients(formula, data, original=True)
    np.testing.assert_allclose(loss, data["nll_nats_per_pixel"], atol=6e-3)
    np.testing.assert_allclose(gradient, data["dpred"], atol=6e-3)


def test_only_the_rule_for_improbable_bins_is_not_the_original_s() -> None:
    """The rule costs up to log(sinh(w) / w) of a bin that is 2 w scales wide, 2.15 nats at the floor of the scales."""
    torch.manual_seed(0)
    images = torch.randint(1, 255, (4, 8, 8, 3), dtype=torch.uint8)
    wide, narrow = torch.randn(2, 4, 8, 8, 50)
    wide[..., 20:35] = -1.0
    expected = formula(wide, images, original=True)
    torch.testing.assert_close(mixture_nats(wide, images).double(), expected, rtol=1e-6, atol=1e-5)
    narrow[..., 20:35] = -7.0
    half_width = math.exp(7) / 255
    most = 3 * math.log(math.sinh(half_width) / half_width)
    difference = formula(narrow, images, original=True) - mixture_nats(narrow, images)
    assert most - 0.1 < difference.max().item() < most + 1e-2


@pytest.mark.parametrize("log_scale", [-7.0, -6.3, -5.0, -3.0, -1.0, 0.0, 2.0, 9.0, 30.0, 90.0, 200.0])
def test_probabilities_of_a_logistic_sum_to_one_whatever_its_parameters(log_scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    far = torch.tensor([0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4, 1e30, -1e30])
    means = torch.cat([far, 0.7 * torch.randn(1000, generator=generator)])
    log_p = log_bin_probability(torch.arange(256), means[:, None], torch.tensor([log_scale]))
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.double().exp().sum(-1), torch.ones(len(means)).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "extremes",
    [
        {"log_scales": -100.0},
        {"log_scales": -7.0, "means": 30.0},
        {"log_scales": -7.0, "means": -1e4},
        {"log_scales": 5.0},
        {"log_scales": 90.0},
        {"log_scales": 200.0},
        {"logits": 1e4},
        {"coefficients": -1e3},
    ],
    ids=str,
)
def test_extreme_parameters_keep_nats_right_and_gradients_finite(
    extremes: dict[str, float], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    mixtures = 5
    parameters = torch.randn(1, 3, 6, 10 * mixtures)
    ranges = {"logits": (0, 1), "means": (mixtures, 4 * mixtures), "log_scales": (4 * mixtures, 7 * mixtures)}
    for name, value in extremes.items():
        parameters[..., slice(*ranges.get(name, (7 * mixtures, 10 * mixtures)))] = value
    parameters = parameters.to(dtype).requires_grad_()
    # The edges and an intensity between them, in most of their combinations over the channels.
    images = torch.cartesian_prod(*[torch.tensor([0, 100, 255])] * 3)[:18].view(1, 3, 6, 3).to(torch.uint8)
    loss = mixture_nats(parameters, images)
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), formula(parameters, images), rtol=1e-5, atol=1e-4)
    assert parameters.grad.isfinite().all()


def test_categorical_nats_are_the_negative_log_of_softmax() -> None:
    logits, images = torch.randn(2, 4, 4, 3, 256), torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    expected = -logits.log_softmax(-1).gather(-1, images.long()[..., None]).squeeze(-1)
    torch.testing.assert_close(nats(CategoricalOutput(), logits, images), expected)


def test_the_uniform_distribution_costs_eight_bits() -> None:
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    total = nats(CategoricalOutput(), torch.zeros(2, 4, 4, 3, 256), images).sum().item()
    assert bits_per_dim(total, images.numel()) == pytest.approx(8)


def channel_distributions(parameters: Tensor, colours: Tensor) -> list[Tensor]:
    """Exact probabilities [n, 256] of red, of green given red and of blue given both, for colours uint8 [n, 3]; fp64,
    from the definition of the distribution."""
    logits, means, log_scales, coefficients = (part.double() for part in split_mixture(parameters))
    values = colours.double() / 127.5 - 1
    edges = (torch.arange(257).double() - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -math.inf, math.inf
    shifts = [
        torch.zeros_like(logits),
        coefficients[..., 0] * values[:, :1],
        coefficients[..., 1] * values[:, :1] + coefficients[..., 2] * values[:, 1:2],
    ]
    log_weights = logits.log_softmax(-1)
    distributions = []
    for channel, shift in enumerate(shifts):
        scaled = (edges - (means[..., channel] + shift)[..., None]) / log_scales[..., channel].exp()[..., None]
        bins = scaled.sigmoid().diff(dim=-1)
        distributions.append((log_weights.exp()[..., None] * bins).sum(-2))
        # What was drawn tells which component it came from.
        drawn = bins.gather(-1, colours[:, channel].long()[:, None, None].expand(-1, bins.shape[-2], 1)).squeeze(-1)
        log_weights = (log_weights + drawn.log()).log_softmax(-1)
    return distributions


def test_probabilities_of_all_colours_sum_to_one() -> None:
    """Summed over blue, the probability of a colour is that of its red and green; those sum to one."""
    generator = torch.Generator().manual_seed(0)
    parameters = initial_mixture(4) + 0.5 * torch.randn(40, generator=generator)
    corners = torch.tensor([[0, 0], [0, 255], [255, 0], [255, 255]])
    pairs = torch.cat([corners, torch.randint(0, 256, (60, 2), generator=generator)]).to(torch.uint8)
    blues = torch.arange(256, dtype=torch.uint8).expand(len(pairs), 256)
    colours = torch.cat([pairs[:, None].expand(-1, 256, -1), blues[..., None]], dim=-1)
    summed = mixture_nats(parameters.expand(1, *blues.shape, 40), colours[None])[0].neg().exp().sum(-1)

    red, green, _ = channel_distributions(parameters.expand(len(pairs), 40), colours[:, 0])
    for distribution in (red, green):
        torch.testing.assert_close(distribution.sum(-1), torch.ones(len(pairs), dtype=torch.float64))
    of_pair = red.gather(-1, pairs[:, :1].long()) * green.gather(-1, pairs[:, 1:].long())
    torch.testing.assert_close(summed.double(), of_pair.flatten(), rtol=1e-4, atol=1e-12)


def test_a_number_of_parameters_that_is_no_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="10 parameters per component, got 25"):
        mixture_nats(torch.zeros(1, 1, 1, 25), torch.zeros(1, 1, 1, 3, dtype=torch.uint8))


def test_nats_by_channel_follow_the_chain_rule() -> None:
    """The probabilities of red, of green given red, and of blue given both each sum to one over the 256 intensities."""
    torch.manual_seed(0)
    parameters = torch.randn(1, 1, 1, 10 * 4)
    for channel, given in enumerate(((0, 0, 0), (90, 0, 0), (90, 180, 0))):
        images = torch.tensor(given, dtype=torch.uint8).repeat(256, 1, 1, 1)
        images[..., channel] = torch.arange(256, dtype=torch.uint8).view(256, 1, 1)
        found = nats_by_channel(MixtureOutput(), parameters.expand(256, 1, 1, -1), images)
        assert (-found[..., channel].double()).exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("output", [MixtureOutput(), CategoricalOutput()], ids=lambda output: output.kind)
def test_nats_by_channel_add_up_to_the_nats(output: Output) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 4, 3), dtype=torch.uint8)
    parameters = torch.randn(2, 3, 4, 50) if isinstance(output, MixtureOutput) else torch.randn(2, 3, 4, 3, 256)
    total = nats(output, parameters, images)
    expected = total if isinstance(output, MixtureOutput) else total.sum(-1)
    torch.testing.assert_close(nats_by_channel(output, parameters, images).sum(-1), expected)
