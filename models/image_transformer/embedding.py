"""How do intensities and positions become tokens?

Shapes: B batch, T positions, C values per position (1 sub-pixel or the 3 channels of a pixel), D width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.image_transformer.pixel_order import Input
from models.linear import Linear
from models.neighbours import NeighbourhoodStem, SubpixelStem

Position = Literal["sine", "learned", "rotary"]

SINE_LONGEST_WAVELENGTH = 1e4


class Embedding(nn.Embedding):
    """nn.Embedding whose output is scaled by sqrt(width) and starts with unit variance, as in the original code.

    The factor matters under Adam. Its steps have the same size for all entries, so what is looked up moves sqrt(width)
    times as far.
    """

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__(num_embeddings, width)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, indices: Tensor) -> Tensor:
        return super().forward(indices) * math.sqrt(self.embedding_dim)


class InputEmbedding(nn.Module):
    """The value generated before a position (section 3.2 of the paper) or what a stem sees around it, and the position
    itself, as one token."""

    def __init__(
        self,
        input: Input,
        grid: tuple[int, int],
        width: int,
        position: Position,
        stem: NeighbourhoodStem | None = None,
    ) -> None:
        super().__init__()
        self.grid_columns = grid[1]
        if stem is not None:
            self.values: Embedding | Linear | NeighbourhoodStem = stem
        elif input == "categorical":
            self.values = Embedding(3 * 256, width)
        else:
            self.values = Linear(3, width, std=1.0, bias=True)
        if position == "sine":
            self.position: SineCode | LearnedCode = SineCode(width)
        else:
            self.position = LearnedCode(grid, width)

    def forward(self, values: Tensor, sources: Tensor, positions: Tensor) -> Tensor:
        """values [B, T, C], categories in uint8 or intensities on [-1, 1], were at raster positions `sources` [T]
        (-1: no value, a zero vector) and are used to predict raster positions `positions` [T]; the result is [B, T, D].
        With a stem, values are its features or, of sub-pixels, its tokens."""
        code = self.position(*self.rows_and_columns(positions))
        if isinstance(self.values, NeighbourhoodStem):
            x = values if isinstance(self.values, SubpixelStem) else self.values(values)
            return x + code.to(x.dtype)
        if isinstance(self.values, Embedding):
            x = self.values(values.squeeze(-1).long() + 256 * (sources % 3))
        else:
            # Linear, as in the paper; the original code adds a ReLU.
            x = self.values(values.to(self.values.weight.dtype))
        return x * (sources >= 0)[:, None] + code.to(x.dtype)

    def rows_and_columns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Raster positions -> rows and columns of the grid; a column is a sub-pixel where a position is
        one."""
        return positions // self.grid_columns, positions % self.grid_columns


class SineCode(nn.Module):
    """Half the width codes the row, half the column, each by sines and cosines of geometric wavelengths
    (Vaswani 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        num_frequencies = self.width // 4
        exponents = torch.arange(num_frequencies, device=rows.device) / max(num_frequencies - 1, 1)
        frequencies = SINE_LONGEST_WAVELENGTH**-exponents
        angles = [axis[:, None] * frequencies for axis in (rows, columns)]
        return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)


class LearnedCode(nn.Module):
    """Half the width is looked up by row, half by column, as the paper has it; the original code adds two
    full widths."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.rows = Embedding(grid[0], width // 2)
        self.columns = Embedding(grid[1], width // 2)

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.cat([self.rows(rows), self.columns(columns)], dim=-1)
