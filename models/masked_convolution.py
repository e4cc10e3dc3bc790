"""How does a convolution see of every sub-pixel only what was generated before it (van den Oord et al. 2016, Pixel
Recurrent Neural Networks, section 3.4)?

Kernels are masked: a sub-pixel is predicted from pixels above and to the left, and from the colours before its own in
the same pixel. For that every feature of every layer belongs to a colour. Features are last: images and everything
computed of them are [B, H, W, features].

Shapes: B batch, H rows, W columns, F features.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head import Head
from models.likelihood import CategoricalOutput, Mixtures
from models.linear import Linear, product_dtype

Grouping = Literal["interleaved", "blocks"]
"""Which features belong to red, green and blue, which the paper leaves open: by turns, or a third of them each. All
layers of a model must have the same: mixed ones leak."""
Colours = Grouping | Literal["together"]
"""together: features belong to no colour, and nothing of the pixel itself is seen."""


def colours_of(features: int, grouping: Colours) -> Tensor:
    """int64 [F]: the colour of each feature. Where F is no multiple of three, red has one more, and then green."""
    numbers = torch.arange(features)
    if grouping == "together":
        return torch.zeros_like(numbers)
    return numbers % 3 if grouping == "interleaved" else numbers * 3 // features


def kernel_mask(
    features_in: int,
    features_out: int,
    kernel: tuple[int, int],
    mask: Literal["A", "B"],
    grouping: Colours,
    gates: int = 1,
) -> Tensor:
    """bool [features_out, features_in, rows, columns]: what a kernel of rows x columns, both odd, may see. Rows below
    the pixel are left out; of a kernel of one row, columns to the right of the pixel, too.

    gates: the features that come out are so many times the same ones, for as many gates.
    """
    rows, columns = kernel
    colour_in = colours_of(features_in, grouping)
    colour_out = colours_of(features_out // gates, grouping).repeat(gates)[:, None]
    visible = torch.ones(features_out, features_in, rows // 2 + 1, columns, dtype=torch.bool)
    visible[:, :, -1, columns // 2 + 1 :] = False
    visible[:, :, -1, columns // 2] = colour_in < colour_out if mask == "A" else colour_in <= colour_out
    return visible if rows > 1 else visible[..., : columns // 2 + 1]


class MaskedConvolution(nn.Module):
    """[B, H, W, features_in] -> [B, H, W, features_out]: what lies above and to the left and, of the pixel itself,
    colours before that of the result (mask A) or also its own (mask B). What no pixel sees of a kernel is not stored.
    """

    visible: Tensor

    def __init__(
        self,
        features_in: int,
        features_out: int,
        kernel: tuple[int, int],
        *,
        mask: Literal["A", "B"],
        grouping: Colours,
        gates: int = 1,
        gain: float = 1.0,
    ) -> None:
        """kernel, mask, gates: see kernel_mask. gain: factor of the first weights, which for 1 keep the variance of
        rectified inputs."""
        super().__init__()
        rows, columns = kernel
        side = columns // 2
        self.padding = (side, side if rows > 1 else 0, rows // 2, 0)
        """What the kernel sees around the pixel: columns to the left and right, rows above and below."""
        visible = kernel_mask(features_in, features_out, kernel, mask, grouping, gates)
        shape = visible.shape if kernel != (1, 1) else visible.shape[:2]  # a matrix, as the optimizer should know
        self.register_buffer("visible", visible.reshape(shape), persistent=False)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(features_out))
        # In the constructor of the leaf: ZeRO-3 splits a module's weights among ranks as soon as it is constructed.
        half_visible = (rows * columns // 2 + 0.5) * features_in  # about what a result sees
        nn.init.normal_(self.weight, std=gain * math.sqrt(2 / half_visible))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, in_fp32: bool = False) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32) if in_fp32 else product_dtype(x)
        weight, bias, inputs = (self.weight * self.visible).to(dtype), self.bias.to(dtype), x.to(dtype)
        if weight.ndim == 2:
            out = F.linear(inputs, weight, bias)
        else:
            padded = F.pad(inputs.permute(0, 3, 1, 2), self.padding)
            out = F.conv2d(padded, weight, bias).permute(0, 2, 3, 1)
        return out if in_fp32 else out.to(x.dtype)

    @property
    def flops_of_a_pixel(self) -> int:
        """Of its products, those of masked weights included, because they are computed, too."""
        return 2 * self.weight.numel()


class ColourHead(nn.Module):
    """Features [B, H, W, width] -> logits [B, H, W, 3, 256] of each colour, from the features of its own and of those
    before it; fp32."""

    def __init__(self, width: int, features: int, grouping: Grouping) -> None:
        super().__init__()
        self._grouping = grouping
        self.hidden = MaskedConvolution(width, features, (1, 1), mask="B", grouping=grouping)
        # Almost no opinion at first.
        self.logits = MaskedConvolution(features, 3 * 256, (1, 1), mask="B", grouping=grouping, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_colour(self.logits(F.relu(self.hidden(F.relu(x))), in_fp32=True))

    def by_colour(self, logits: Tensor) -> Tensor:
        """[..., 768] -> [..., 3, 256]."""
        return logits.unflatten(-1, (3, 256)) if self._grouping == "blocks" else logits.unflatten(-1, (256, 3)).mT

    @property
    def flops_of_a_pixel(self) -> int:
        return self.hidden.flops_of_a_pixel + self.logits.flops_of_a_pixel


class PixelHead(nn.Module):
    """Features [B, H, W, width] that belong to no colour -> parameters of a mixture [B, H, W, 10 components]; fp32."""

    def __init__(self, width: int, features: int, output: Mixtures) -> None:
        super().__init__()
        self.hidden = Linear(width, features, std=math.sqrt(2 / width), bias=True)
        self.mixture = Head(features, output, values_per_position=3)

    def forward(self, x: Tensor) -> Tensor:
        parameters: Tensor = self.mixture(F.relu(self.hidden(F.relu(x))))
        return parameters

    @property
    def flops_of_a_pixel(self) -> int:
        return 2 * (self.hidden.weight.numel() + self.mixture.weight.numel())


def colours(grouping: Grouping, output: CategoricalOutput | Mixtures) -> Colours:
    """How the features of a model belong to colours. A mixture describes a whole pixel."""
    return grouping if isinstance(output, CategoricalOutput) else "together"


def head(width: int, features: int, output: CategoricalOutput | Mixtures, grouping: Grouping) -> ColourHead | PixelHead:
    """Features [B, H, W, width] -> parameters of the output distribution; fp32."""
    if isinstance(output, CategoricalOutput):
        return ColourHead(width, features, grouping)
    return PixelHead(width, features, output)


def intensities(images: Tensor, dtype: torch.dtype) -> Tensor:
    """What the first convolution reads of images uint8 [B, H, W, 3]: values from -1 to 1."""
    return (images.float() / 127.5 - 1).to(dtype)
