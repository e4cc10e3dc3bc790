"""Do drawn values follow the model's distribution, and what temperature, top-k, top-p and guidance make of it?"""

import math

import pytest
import torch

from models.draw import Sampling, draw
from models.keyed_noise import keyed_uniforms
from models.likelihood import Output, initial_mixture, mixture_nats, nats
from tests.test_likelihood import channel_distributions


@pytest.mark.parametrize("narrower", [0.0, 4.0])
def test_drawn_colours_cost_what_the_entropy_says_and_follow_each_conditional(narrower: float) -> None:
    """With scales far below a level, it shows whether a channel is rounded before it conditions the next."""
    generator = torch.Generator().manual_seed(0)
    num = 4000
    parameters = initial_mixture(4) + 0.5 * torch.randn(40, generator=generator)
    parameters[4 + 12 : 4 + 24] -= narrower  # log-scales
    parameters = parameters.expand(num, 40)
    uniforms = keyed_uniforms(7, torch.arange(num), torch.tensor([0]))[:, 0]
    colours = draw("mixture", parameters, uniforms)

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
    uniforms = keyed_uniforms(3, torch.arange(num), torch.tensor([0]))[:, 0, :1]
    counts = draw("categorical", logits.expand(num, 1, 256), uniforms).long().flatten().bincount(minlength=256)
    expected = num * logits.double().softmax(-1)[0]
    assert ((counts - expected) ** 2 / expected).sum() < 330.5  # 255 degrees of freedom, probability 0.001


@pytest.mark.parametrize("output", ["categorical", "mixture"])
def test_a_low_temperature_draws_likelier_values(output: Output) -> None:
    num = 4000
    uniforms = keyed_uniforms(3, torch.arange(num), torch.tensor([0]))[:, 0]
    if output == "categorical":
        uniforms = uniforms[:, :3]
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
