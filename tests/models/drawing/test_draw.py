"""Do drawn values follow the model's distribution, and what temperature, top-k, top-p and guidance make of it?"""

import math

import pytest
import torch

from models.drawing.draw import Sampling, draw
from models.drawing.keyed_noise import keyed_uniforms
from models.likelihood import CategoricalOutput, MixtureOutput, Output, initial_mixture, mixture_nats, nats
from tests.models.test_likelihood import channel_distributions


@pytest.mark.parametrize("narrower", [0.0, 4.0])
def test_drawn_colours_cost_what_the_entropy_says_and_follow_each_conditional(narrower: float) -> None:
    """With scales far below a level, it shows whether a channel is rounded before it conditions the next."""
    generator = torch.Generator().manual_seed(0)
    num = 4000
    parameters = initial_mixture(4) + 0.5 * torch.randn(40, generator=generator)
    parameters[4 + 12 : 4 + 24] -= narrower  # log-scales
    parameters = parameters.expand(num, 40)
    uniforms = keyed_uniforms(7, torch.arange(num), torch.tensor([0]))[:, 0]
    colours = draw(MixtureOutput(), parameters, uniforms)

    distributions = channel_distributions(parameters, colours)
    entropy = sum(torch.special.entr(p).sum(-1) for p in distributions)
    cost = mixture_nats(parameters[:, None, None], colours[:, None, None]).flatten().double()
    excess = cost - entropy  # zero in expectation if colours follow the conditionals
    assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(num)

    for channel, p in enumerate(distributions):
        # The place of a draw in its distribution function, taken at random inside the bin, is uniform.
        index = colours[:, channel].long()[:, None]
        upper = p.cumsum(-1).gather(-1, index)
        place = upper - p.gather(-1, index) * torch.rand(num, 1, generator=generator)
        counts = torch.histc(place.clamp(0, 1), bins=20, min=0, max=1)
        chi_squared = ((counts - num / 20) ** 2 / (num / 20)).sum()
        assert chi_squared < 43.8  # 19 degrees of freedom, probability 0.001


def test_drawn_categories_have_their_probabilities() -> None:
    num = 20000
    logits = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    uniforms = uniforms_for(CategoricalOutput(), num)
    counts = draw(CategoricalOutput(), logits.expand(num, 1, 256), uniforms).long().flatten().bincount(minlength=256)
    expected = num * logits.double().softmax(-1)[0]
    assert ((counts - expected) ** 2 / expected).sum() < 330.5  # 255 degrees of freedom, probability 0.001


@pytest.mark.parametrize("output", [CategoricalOutput(), MixtureOutput()], ids=lambda output: output.kind)
def test_a_low_temperature_draws_likelier_values(output: Output) -> None:
    num = 4000
    uniforms = uniforms_for(output, num, channels=3)
    if isinstance(output, CategoricalOutput):
        parameters = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).expand(num, 3, 256)
    else:
        parameters = initial_mixture(3)
        parameters[12:21] = -4.0  # log-scales: narrow, so that little lies beyond black and white
        parameters = parameters.expand(num, 30)
    cost = []
    for temperature in (0.8, 0.9, 1.0):
        colours = draw(output, parameters, uniforms, Sampling(temperature=temperature))
        cost.append(nats(output, parameters[:, None, None], colours[:, None, None]).mean())
    assert cost[0] < cost[1] < cost[2]


def some_parameters(output: Output, num: int) -> torch.Tensor:
    """The same parameters num times, with means that depend on earlier channels for the mixture."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(output, CategoricalOutput):
        return torch.randn(1, 256, generator=generator).expand(num, 1, 256)
    return (initial_mixture(4) + 0.5 * torch.randn(40, generator=generator)).expand(num, 40)


def probabilities(output: Output, parameters: torch.Tensor, drawn: torch.Tensor) -> list[torch.Tensor]:
    """For each channel the probabilities [n, 256] that it was drawn from, without temperature and the like."""
    if isinstance(output, MixtureOutput):
        return channel_distributions(parameters, drawn)
    return [parameters[:, 0].double().softmax(-1)]


def uniforms_for(output: Output, num: int, channels: int = 1) -> torch.Tensor:
    """[num, channels, 256] or [num, 4]."""
    categorical = isinstance(output, CategoricalOutput)
    uniforms = keyed_uniforms(11, torch.arange(num), torch.tensor([0]), 256 * channels if categorical else 4)[:, 0]
    return uniforms.view(num, channels, 256) if categorical else uniforms


def assert_follows(drawn: torch.Tensor, p: torch.Tensor) -> None:
    """Kolmogorov and Smirnov's test of places in the distribution functions p [n, 256], taken at random in each bin."""
    generator = torch.Generator().manual_seed(1)
    index = drawn.long()[:, None]
    p = p / p.sum(-1, keepdim=True)
    place = p.cumsum(-1).gather(-1, index) - p.gather(-1, index) * torch.rand(len(p), 1, generator=generator)
    steps = torch.arange(1, len(p) + 1) / len(p)
    assert (place.flatten().sort().values - steps).abs().max() < 1.95 / math.sqrt(len(p))  # probability 0.001


@pytest.mark.parametrize("output", [CategoricalOutput(), MixtureOutput()], ids=lambda output: output.kind)
def test_top_k_draws_among_the_likeliest_by_their_probabilities(output: Output) -> None:
    num = 1000
    parameters = some_parameters(output, num)
    drawn = draw(output, parameters, uniforms_for(output, num), Sampling(top_k=7))
    for channel, p in enumerate(probabilities(output, parameters, drawn)):
        least = p.topk(7).values[:, -1:]
        assert (p.gather(-1, drawn[:, channel : channel + 1].long()) >= least * (1 - 1e-6)).all()
        assert_follows(drawn[:, channel], torch.where(p >= least * (1 - 1e-6), p, 0))


@pytest.mark.parametrize("output", [CategoricalOutput(), MixtureOutput()], ids=lambda output: output.kind)
def test_top_p_draws_among_the_fewest_with_that_probability(output: Output) -> None:
    num, top_p = 1000, 0.6
    parameters = some_parameters(output, num)
    drawn = draw(output, parameters, uniforms_for(output, num), Sampling(top_p=top_p))
    for channel, p in enumerate(probabilities(output, parameters, drawn)):
        for row in range(0, num, 50):
            likelier = p[row][p[row] > p[row, int(drawn[row, channel])] * (1 + 1e-6)]
            assert likelier.sum() < top_p
        ordered, order = p.sort(-1, descending=True)
        dropped = (ordered.cumsum(-1) - ordered >= top_p).gather(-1, order.argsort(-1))
        assert_follows(drawn[:, channel], p.masked_fill(dropped, 0))


@pytest.mark.parametrize("output", [CategoricalOutput(), MixtureOutput()], ids=lambda output: output.kind)
def test_guidance_extrapolates_log_probabilities(output: Output) -> None:
    num, guidance = 1000, 1.5
    parameters = some_parameters(output, num)
    without = parameters + torch.linspace(-1, 1, parameters.shape[-1])
    drawn = draw(output, parameters, uniforms_for(output, num), Sampling(guidance=guidance), without)
    pairs = (probabilities(output, given, drawn) for given in (parameters, without))
    for channel, (p, q) in enumerate(zip(*pairs, strict=True)):
        assert_follows(drawn[:, channel], p**guidance * q ** (1 - guidance))


@pytest.mark.parametrize("output", [CategoricalOutput(), MixtureOutput()], ids=lambda output: output.kind)
def test_options_that_exclude_nothing_draw_from_the_model(output: Output) -> None:
    num = 1000
    parameters = some_parameters(output, num)
    drawn = draw(output, parameters, uniforms_for(output, num), Sampling(top_k=256))
    for channel, p in enumerate(probabilities(output, parameters, drawn)):
        assert_follows(drawn[:, channel], p)


def test_of_equal_probabilities_top_k_takes_exactly_k() -> None:
    num = 500
    drawn = draw(
        CategoricalOutput(), torch.zeros(num, 1, 256), uniforms_for(CategoricalOutput(), num), Sampling(top_k=3)
    )
    assert set(drawn.flatten().tolist()) == {0, 1, 2}


def test_a_value_without_probability_is_never_drawn() -> None:
    logits = torch.full((1, 1, 256), -math.inf)
    logits[..., 9] = 0.0
    for u in (2.0**-33, 0.5, 1 - 2.0**-33):
        assert draw(CategoricalOutput(), logits, torch.tensor([[u]], dtype=torch.float64)).item() == 9


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", 0, "temperature: must be above 0 and finite, not 0"),
        ("temperature", math.nan, "temperature: must be above 0 and finite, not nan"),
        ("top_k", -1, "top_k: must be at least 1, or 0 for all intensities, not -1"),
        ("top_p", 0.0, "top_p: must be above 0 and at most 1, not 0.0"),
        ("top_p", 1.1, "top_p: must be above 0 and at most 1, not 1.1"),
        ("guidance", -1.0, "guidance: must be at least 0 and finite, not -1.0"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{option: value})
