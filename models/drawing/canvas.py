"""What do the images that are being drawn consist of, and how does a value get into them?

A decoder (of a family, or models/recompute_decoder.py) computes parameters; the canvas makes values of them,
with noise that belongs to the position. So every decoder of a model draws the same images.

Shapes: B images, L positions, C values per position (1 sub-pixel or the 3 of a pixel), T of the positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.drawing.draw import Sampling, draw
from models.drawing.keyed_noise import keyed_uniforms
from models.given import Given
from models.likelihood import Categorical, Output


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A batch of images, some values of which are known. The decoder writes the others."""

    values: Tensor
    """uint8 [B, L, C], positions in raster order; right where a position is known or drawn."""
    known: Tensor
    """bool [L] on the CPU: positions whose values are given, the same of all images."""
    given: Given
    """What the model is told of `copies` times B images."""
    copies: int
    """2 where each image is computed with its class, and then without, for guidance; else 1."""
    output: Output
    sampling: Sampling
    seed: int
    image_numbers: Tensor
    """int64 [B]: with seed and position, what the noise of a value depends on."""

    @property
    def can_be_guessed(self) -> bool:
        """Whether a decoder may draw a value from guesses of those before it, and again where they were wrong."""
        return True

    @property
    def numbers_per_position(self) -> int:
        """Random numbers that a position takes."""
        return 256 * self.values.shape[2] if isinstance(self.output, Categorical) else 4

    def noise(self, positions: Tensor) -> Tensor:
        """float64 [B, T, numbers_per_position] in (0, 1), for positions int64 [T] on the canvas's device."""
        return keyed_uniforms(self.seed, self.image_numbers, positions, self.numbers_per_position)

    def draw(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Values uint8 [B, T, C] drawn with noise [B, T, numbers_per_position]; does not look at a value on the host.

        parameters: [copies B, T, C, 256] (categorical) or [copies B, T, 10 components] (mixture).
        """
        parameters, without_class = parameters.chunk(2) if self.copies == 2 else (parameters, None)
        if isinstance(self.output, Categorical):
            noise = noise.unflatten(2, (-1, 256))
        return draw(self.output, parameters, noise, self.sampling, without_class)


class Decoder(Protocol):
    """Draws a canvas, a few positions a step."""

    def steps(self) -> Iterator[Tensor]:
        """Positions int64 on the CPU that have got their values in each step; known ones may be among them.

        Each position that is not known comes once, after all before it in the order of generation that the model lets
        it see.
        """
        ...

    @property
    def parameters(self) -> Tensor:
        """What the values of the last step were drawn from, in the order of its positions: [copies B, positions, C,
        256] or [copies B, positions, 10 components]; overwritten by the next step."""
        ...
