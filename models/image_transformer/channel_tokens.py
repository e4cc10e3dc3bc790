"""How do tokens of pixels become what the channels of a pixel are drawn from, one after the other?

A pixel costs one token in the layers, whatever is drawn of it. What its channels say of each other is learned here, by
a network that sees no other pixel: what the layers found out, the channels before, and by how much their guess missed
them.

Shapes: B batch, L pixels, T of them, C of the 3 channels, D width.
"""

import math

import torch
from torch import Tensor, nn

from models.image_transformer.layer import FeedForward, norm
from models.image_transformer.shape import ImageTransformerShape
from models.linear import Linear
from models.neighbours import OWN_FEATURES, gather, known_neighbours, median, of_own_pixel, stand_ins


class ChannelTokens(nn.Module):
    """One feed-forward network for all pixels and channels, as wide as the tokens."""

    stand_ins: Tensor

    def __init__(self, config: ImageTransformerShape, generation_order: Tensor) -> None:
        """generation_order: of pixels."""
        super().__init__()
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            near = stand_ins(known_neighbours(config.image_size, generation_order))
            self.register_buffer("stand_ins", near, persistent=False)
        self.combine_own = Linear(OWN_FEATURES, config.width, std=3**-0.5)
        self.norm = norm(config.block, config.width)
        self.feed_forward = FeedForward(config.block, config.width, config.width, _std_in, _std_out)

    def forward(self, x: Tensor, values: Tensor, positions: Tensor, channels: Tensor) -> Tensor:
        """Tokens [B, T, D] of pixels [T], intensities [B, L, 3] on [-1, 1] and channels int64 [C] -> [B, T, C, D]."""
        values = values.to(torch.promote_types(values.dtype, self.combine_own.weight.dtype))
        pixels = values.index_select(1, positions)
        missed = pixels - median(gather(values, self.stand_ins[positions]))
        pixels, missed = (each.repeat_interleave(len(channels), dim=1) for each in (pixels, missed))
        own = of_own_pixel(pixels, missed, channels.repeat(len(positions))).unflatten(1, (-1, len(channels)))
        tokens: Tensor = x[:, :, None] + self.combine_own(own.to(self.combine_own.weight.dtype))
        return tokens + self.feed_forward(self.norm(tokens))


def _std_in(fan_in: int, fan_out: int) -> float:
    return 1 / math.sqrt(fan_in)


def _std_out(fan_in: int, fan_out: int) -> float:
    """So that what is added has half the variance of the tokens."""
    return 1 / math.sqrt(2 * fan_in)
