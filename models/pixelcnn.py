"""What is PixelCNN (van den Oord et al. 2016, Pixel Recurrent Neural Networks, section 3), as small as it can be said?

A stack of convolutions, whose kernels are masked so that a sub-pixel is predicted from those before it: pixels above
and to the left, and the colours before its own in the same pixel. As in the paper, part of the pixels above and to the
right stays out of sight, however many layers there are (the blind spot that later models remove).

What the paper leaves open: feature c belongs to colour c modulo 3, so that any width will do; ReLUs stand before each
convolution of a block. Features are last: images and everything computed of them are [B, H, W, features].

Shapes: B batch, H rows, W columns, k side of a kernel.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.drawing.canvas import Canvas
from models.given import NOTHING, Given
from models.likelihood import CategoricalOutput
from models.linear import product_dtype
from models.model import Account, Flops, Model, Recompute, check_inputs, num_parameters
from models.recompute_decoder import RecomputeDecoder

FIRST_KERNEL, KERNEL = 7, 3
LARGEST = {"image_size": 1024, "features": 1 << 16, "layers": 4096, "head_features": 1 << 18}
"""Far beyond what anybody trains. A config may come from a stranger, and its sizes decide what a computer does."""


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig:
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["pixelcnn"] = "pixelcnn"
    image_size: int
    """Rows and columns of the square images."""
    output: CategoricalOutput = CategoricalOutput()
    """256 probabilities of a sub-pixel: the paper has no other."""
    features: int
    """Features of the 3x3 convolutions inside a block (h in the paper: 128); twice as many between the blocks."""
    layers: int
    """Residual blocks (the paper: 15)."""
    head_features: int
    """Features of the layer before the probabilities (the paper: 1024)."""

    def __post_init__(self) -> None:
        smallest = {"image_size": 1, "features": 3, "layers": 1, "head_features": 3}
        problems = [
            f"{name}: {getattr(self, name)} is less than {least}" + (", one for each colour" if least == 3 else "")
            for name, least in smallest.items()
            if getattr(self, name) < least
        ]
        problems += [
            f"{name}: {getattr(self, name)} is more than {most}"
            for name, most in LARGEST.items()
            if getattr(self, name) > most
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def num_classes(self) -> int:
        return 0

    @property
    def label_dropout(self) -> float:
        return 0.0

    @property
    def small_size(self) -> int:
        return 0

    @property
    def num_units(self) -> int:
        return self.layers

    @property
    def unit_period(self) -> int:
        return 1

    def with_units(self, count: int) -> Self:
        return dataclasses.replace(self, layers=count)

    def build(self, recompute: Recompute = Recompute()) -> "PixelCNN":  # noqa: B008 (immutable)
        return PixelCNN(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = PixelCNN(self, recompute)
        pixels = self.image_size**2
        products = {part: pixels * flops_of_a_pixel(module) for part, module in model.named_children()}
        # Nothing after the last product of a block needs its result, so torch stops before it.
        again = products["blocks"] // self.layers - pixels * 2 * self.features * 2 * self.features
        recomputed = again * sum(recompute.includes(unit) for unit in range(self.layers))
        first = products["first"]
        parts = {
            "first convolution": Flops(first, first, 0),  # the image needs no gradient
            "blocks": Flops(products["blocks"], 2 * products["blocks"], recomputed),
            "head": Flops(products["head"], 2 * products["head"], 0),
        }
        return Account(parameters=num_parameters(model), positions=3 * pixels, parts=parts)


class PixelCNN(Model):
    """Images -> logits of every sub-pixel given all that it sees."""

    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            self.generation_order = torch.arange(3 * config.image_size**2)
        width = 2 * config.features
        self.first = MaskedConvolution(3, width, FIRST_KERNEL, mask="A")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(width, config.head_features)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        check_inputs(self.config, images, given)
        x = self.first((images.float() / 127.5 - 1).to(self.first.weight.dtype))
        for index, block in enumerate(self.blocks):
            if self.training and self.recompute.includes(index):
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return self.head(x)

    def units(self) -> Iterator[nn.Module]:
        yield from self.blocks

    def decoder(self, canvas: Canvas) -> RecomputeDecoder:
        return RecomputeDecoder(self, canvas)


class Block(nn.Module):
    """x -> x + what three convolutions make of it: to half the features, 3x3, and back."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.reduce = MaskedConvolution(2 * config.features, config.features, 1, mask="B")
        self.convolve = MaskedConvolution(config.features, config.features, KERNEL, mask="B")
        self.out = MaskedConvolution(config.features, 2 * config.features, 1, mask="B", gain=config.layers**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.convolve(F.relu(self.reduce(F.relu(x))))))


class Head(nn.Module):
    """Features [B, H, W, width] -> logits in fp32 [B, H, W, 3, 256]."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.hidden = MaskedConvolution(width, features, 1, mask="B")
        # Almost no opinion at first.
        self.logits = MaskedConvolution(features, 3 * 256, 1, mask="B", gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(F.relu(self.hidden(F.relu(x))), in_fp32=True)
        return logits.unflatten(-1, (256, 3)).transpose(-1, -2)


class MaskedConvolution(nn.Module):
    """[B, H, W, features_in] -> [B, H, W, features_out]: what lies above and to the left and, of the pixel itself,
    colours before that of the result (mask A) or also its own (mask B). Rows of the kernel below the pixel are not
    stored."""

    visible: Tensor

    def __init__(self, features_in: int, features_out: int, kernel: int, *, mask: Literal["A", "B"], gain: float = 1.0):
        super().__init__()
        self.kernel = kernel
        visible = kernel_mask(features_in, features_out, kernel, mask)
        shape = visible.shape if kernel > 1 else visible.shape[:2]  # a matrix, as the optimizer should know
        self.register_buffer("visible", visible.view(shape), persistent=False)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(features_out))
        # In the constructor of the leaf: ZeRO-3 splits a module's weights among ranks as soon as it is constructed.
        half_visible = (kernel**2 // 2 + 0.5) * features_in  # about what a result sees
        nn.init.normal_(self.weight, std=gain * math.sqrt(2 / half_visible))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, in_fp32: bool = False) -> Tensor:
        dtype = torch.float32 if in_fp32 else product_dtype(x)
        weight, bias, inputs = (self.weight * self.visible).to(dtype), self.bias.to(dtype), x.to(dtype)
        if self.kernel == 1:
            out = F.linear(inputs, weight, bias)
        else:
            margin = self.kernel // 2
            padded = F.pad(inputs.permute(0, 3, 1, 2), (margin, margin, margin, 0))
            out = F.conv2d(padded, weight, bias).permute(0, 2, 3, 1)
        return out if in_fp32 else out.to(x.dtype)


def kernel_mask(features_in: int, features_out: int, kernel: int, mask: Literal["A", "B"]) -> Tensor:
    """bool [features_out, features_in, k // 2 + 1, k]: rows above the pixel, and its own row last."""
    colour_in, colour_out = torch.arange(features_in) % 3, torch.arange(features_out)[:, None] % 3
    visible = torch.ones(features_out, features_in, kernel // 2 + 1, kernel, dtype=torch.bool)
    visible[:, :, -1, kernel // 2 + 1 :] = False
    visible[:, :, -1, kernel // 2] = colour_in < colour_out if mask == "A" else colour_in <= colour_out
    return visible


def flops_of_a_pixel(module: nn.Module) -> int:
    """Products for one pixel in all convolutions of a module. Masked ones count, because they are computed, too."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, MaskedConvolution))
