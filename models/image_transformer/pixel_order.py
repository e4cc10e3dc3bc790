"""In which order do the values of an image become a sequence, and which value does each slot of it hold?

Shapes: B batch, H rows, W columns, C = 3 channels, L positions of the sequence.
"""

from typing import Literal

import torch
from torch import Tensor

from models.attention.pattern import Pattern

Input = Literal["categorical", "ordinal"]
Shift = Literal["generation", "block"]


def grid_shape(image_size: int, input: Input) -> tuple[int, int]:
    """Rows and columns of the grid of positions: a position is a sub-pixel (categorical) or a pixel
    (ordinal)."""
    return image_size, image_size * 3 if input == "categorical" else image_size


def to_positions(images: Tensor, input: Input) -> Tensor:
    """[B, H, W, 3] -> values in raster order: [B, L, 1] sub-pixels (row, column, channel) or [B, L, 3]
    pixels."""
    return images.reshape(len(images), -1, 1 if input == "categorical" else 3)


def to_images(values: Tensor, image_size: int) -> Tensor:
    """Inverse of to_positions."""
    return values.reshape(len(values), image_size, image_size, 3)


def source_positions(pattern: Pattern, shift: Shift) -> Tensor:
    """int64 [L]: storage slot -> raster position of the value it holds as input; -1 where a slot holds the
    start.

    The slot of position t holds the value generated just before t. So a query that sees itself sees only the past.
    "generation" shifts along the generation order. "block" restarts in every query block, like the original's 2D code:
    no position sees the value that is generated last in a block.
    """
    previous = torch.cat([torch.tensor([-1]), pattern.generation_order[:-1]])
    if shift == "block":
        previous[torch.tensor([block.start for block in pattern.blocks])] = -1
    return previous[pattern.rank]
