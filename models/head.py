"""What do the last features of a model become? The parameters of its output distribution (models/likelihood.py)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.likelihood import Categorical, CategoricalOutput, Output, PredictorCategoricalOutput, initial_parameters


class Head(nn.Linear):
    """Features [..., D] -> parameters of the output distribution, [..., C, 256] or [..., 10 components]; of
    "predictor_categorical" what `logits_around_guesses` takes, [..., 256 + 5 predictors]. In fp32 or wider."""

    def __init__(self, width: int, output: Output, values_per_position: int) -> None:
        """values_per_position: C, 1 sub-pixel or the 3 of a pixel; of mixtures a position is a pixel."""
        match output:
            case CategoricalOutput():
                parameters = 256 * values_per_position
            case PredictorCategoricalOutput():
                parameters = 256 + 5 * len(output.predictors)
            case _:
                parameters = 10 * output.components
        super().__init__(width, parameters)
        self.is_of_channels = isinstance(output, CategoricalOutput)
        # Almost no opinion at first: uniform intensities, or what is typical.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(width))
        with torch.no_grad():
            nn.init.zeros_(self.bias)
            if not isinstance(output, Categorical):
                self.bias.copy_(initial_parameters(output))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))
        return parameters.unflatten(-1, (-1, 256)) if self.is_of_channels else parameters
