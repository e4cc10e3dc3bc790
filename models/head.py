"""What do the last features of a model become? The parameters of its output distribution (models/likelihood.py)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.likelihood import CategoricalOutput, Output, initial_parameters


class Head(nn.Linear):
    """Features [..., D] -> parameters of the output distribution, [..., C, 256] or [..., 10 components], in fp32 or
    wider."""

    def __init__(self, width: int, output: Output, values_per_position: int) -> None:
        """values_per_position: C, 1 sub-pixel or the 3 of a pixel; of mixtures a position is a pixel."""
        components = 0 if isinstance(output, CategoricalOutput) else output.components
        super().__init__(width, 10 * components if components else 256 * values_per_position)
        self.is_mixture = components > 0
        # Almost no opinion at first: uniform intensities, or the mixture to start from.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(width))
        with torch.no_grad():
            self.bias.copy_(
                torch.zeros_like(self.bias) if isinstance(output, CategoricalOutput) else initial_parameters(output)
            )

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))
        return parameters if self.is_mixture else parameters.unflatten(-1, (-1, 256))
