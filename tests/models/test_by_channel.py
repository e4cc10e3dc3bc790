"""Are the probabilities of a channel's intensities those of the likelihood?"""

import pytest
import torch
from torch import Tensor

from models.by_channel import ByChannel
from models.likelihood import CategoricalOutput, MixtureOutput, Output, initial_mixture, nats_by_channel

NARROW = -7.0


def of_every_output() -> list[tuple[Output, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mixtures = initial_mixture(3) + torch.randn(6, 30, generator=generator, dtype=torch.float64)
    mixtures[3:, 12:21] = NARROW  # log-scales
    logits = 3 * torch.randn(6, 3, 256, generator=generator, dtype=torch.float64)
    return [(CategoricalOutput(), logits), (MixtureOutput(components=3), mixtures)]


@pytest.mark.parametrize(("output", "parameters"), of_every_output(), ids=["categorical", "mixture"])
def test_every_intensity_of_every_channel_has_the_probability_of_the_likelihood(
    output: Output, parameters: Tensor
) -> None:
    colours = torch.randint(0, 256, (len(parameters), 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    distributions = ByChannel(output, parameters)
    for channel in range(3):
        cumulative = distributions.cumulative()
        assert cumulative.shape == (len(parameters), 257)
        assert (cumulative[:, 0] == 0).all()
        torch.testing.assert_close(cumulative[:, -1], torch.ones(len(parameters)).double(), rtol=0, atol=1e-12)
        images = colours[:, None].repeat(1, 256, 1)
        images[:, :, channel] = torch.arange(256)
        repeated = parameters[:, None].expand(-1, 256, *parameters.shape[1:])
        expected = (-nats_by_channel(output, repeated[:, None], images[:, None])[:, 0, :, channel]).exp()
        torch.testing.assert_close(cumulative.diff(dim=-1), expected, rtol=0, atol=1e-12)
        distributions.take(colours[:, channel])
