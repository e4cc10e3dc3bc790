"""What does a model say of every value in turn, where the values come from elsewhere, as from a compressed file?

The decoders that draw (models/drawing/canvas.py) compute it, so that whoever knows the values already and whoever
learns them one by one get the same numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.drawing.canvas import Canvas
from models.drawing.draw import Sampling
from models.given import Given
from models.model import Model


class BlankCanvas(Canvas):
    """Of which nothing is known, and on which a decoder's values are replaced by others before they count."""

    @property
    def can_be_guessed(self) -> bool:
        return False

    @property
    def numbers_per_position(self) -> int:
        return 1

    def noise(self, positions: Tensor) -> Tensor:
        return torch.zeros(len(self.values), len(positions), 1, dtype=torch.float64)

    def draw(self, parameters: Tensor, noise: Tensor) -> Tensor:
        return self.values.new_zeros(len(self.values), noise.shape[1], self.values.shape[2])


@torch.no_grad()
def parameters_in_turn(model: Model, values: Tensor, given: Given) -> Iterator[tuple[Tensor, Tensor]]:
    """Raster positions int64 [T], some at a time, and what the model says of them: [B, T, C, 256] or [B, T, 10
    components].

    values: uint8 [B, L, C], in raster order, written by the caller: those of the positions that came must be there
    before the next ones are asked for. On a CPU, of a model in evaluation mode.
    """
    canvas = BlankCanvas(
        values=values,
        known=torch.zeros(values.shape[1], dtype=torch.bool),
        given=given,
        copies=1,
        output=model.config.output,
        sampling=Sampling(),
        seed=0,
        image_numbers=torch.arange(len(values)),
    )
    decoder = model.decoder(canvas)
    for positions in decoder.steps():
        yield positions, decoder.parameters
