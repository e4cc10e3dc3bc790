"""What is the plainest way to draw from a model: one forward pass of whole images for each position.

Serves any family, and is the oracle of every faster decoder.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.drawing.canvas import Canvas
from models.model import Model


class RecomputeDecoder:
    """Draws position after position, in the model's order of generation."""

    def __init__(self, model: Model, canvas: Canvas) -> None:
        self._model, self._canvas = model, canvas
        self.parameters = torch.empty(0)

    def steps(self) -> Iterator[Tensor]:
        values, size = self._canvas.values, self._model.config.image_size
        order = self._model.generation_order
        for position in order[~self._canvas.known[order]].split(1):
            images = values.reshape(-1, size, size, 3).repeat(self._canvas.copies, 1, 1, 1)
            parameters = self._model(images, self._canvas.given)
            place = position.to(values.device)
            self.parameters = parameters.reshape(len(images), values.shape[1], *_of_a_position(parameters, values))[
                :, place
            ]
            values[:, place] = self._canvas.draw(self.parameters, self._canvas.noise(place))
            yield position


def _of_a_position(parameters: Tensor, values: Tensor) -> tuple[int, ...]:
    """The shape of one position's parameters, of an output [B, H, W, 3, 256] or [B, H, W, 10 components]."""
    return (values.shape[2], 256) if parameters.ndim == 5 else (parameters.shape[-1],)
