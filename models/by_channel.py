"""How likely are the intensities of a channel, given those of the channels before it in the same position?

Shapes: C channels of a position (1 sub-pixel or the 3 of a pixel), K mixtures.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.likelihood import (
    LEVELS_PER_UNIT,
    Categorical,
    Mixture,
    Output,
    log_bin_probability,
    split_mixture,
)


def means_given(mixture: Mixture, earlier: Sequence[Tensor]) -> Tensor:
    """[..., K]: means of the next channel, given the intensities [...] of those before it."""
    channel = len(earlier)
    means = mixture.means[..., channel]
    of_channel = {0: (), 1: (0,), 2: (1, 2)}[channel]
    for values, coefficient in zip(earlier, of_channel, strict=True):
        intensities = values.to(means.dtype) / LEVELS_PER_UNIT - 1
        means = means + mixture.coefficients[..., coefficient] * intensities[..., None]
    return means


class ByChannel:
    """The distributions of a position's channels, one after the other."""

    def __init__(self, output: Output, parameters: Tensor) -> None:
        """parameters: [..., C, 256] (categorical) or [..., 10 K] (mixture)."""
        self._earlier: list[Tensor] = []
        self._logits = parameters if isinstance(output, Categorical) else None
        if self._logits is None:
            self._mixture = split_mixture(parameters)
            self._log_weights = self._mixture.logits.log_softmax(-1)

    def cumulative(self) -> Tensor:
        """[..., 257]: the probabilities that the next channel is below each of the intensities 0 to 256."""
        if self._logits is not None:
            p = self._logits[..., len(self._earlier), :].softmax(-1)
            return F.pad(p.cumsum(-1), (1, 0)).clamp(max=1)
        means, scales = self._next()
        edges = torch.arange(1, 256, device=means.device) - 0.5
        below = torch.sigmoid((edges - ((means + 1) * LEVELS_PER_UNIT)[..., None]) / scales[..., None])
        inside = (self._log_weights.exp()[..., None, :] @ below).squeeze(-2)
        return F.pad(F.pad(inside, (1, 0)), (0, 1), value=1.0)

    def take(self, intensities: Tensor) -> None:
        """The next channel has these intensities [...]; go on to the one after it."""
        if self._logits is None:
            means, _ = self._next()
            log_scales = self._mixture.log_scales[..., len(self._earlier)]
            given = log_bin_probability(intensities[..., None], means, log_scales)
            self._log_weights = (self._log_weights + given).log_softmax(-1)
        self._earlier.append(intensities)

    def _next(self) -> tuple[Tensor, Tensor]:
        """Means on [-1, 1] and scales in levels of the next channel's logistics, [..., K]."""
        scales = self._mixture.log_scales[..., len(self._earlier)].exp() * LEVELS_PER_UNIT
        return means_given(self._mixture, self._earlier), scales
