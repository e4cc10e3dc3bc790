"""What is PixelCNN (van den Oord et al. 2016, Pixel Recurrent Neural Networks, sections 3.3 and 3.5)?

A stack of masked convolutions (models/masked_convolution.py): a 7x7 one, residual blocks of 2h -> h -> 2h features, and
two 1x1 ones up to 256 logits for each sub-pixel. As in the paper, part of the pixels above and to the right stays out
of sight, however many layers there are: the blind spot that Gated PixelCNN removes (models/gated_pixelcnn.py).

What the paper leaves open: ReLUs stand before each convolution of a block.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.drawing.canvas import Canvas
from models.given import NOTHING, Given
from models.likelihood import CategoricalOutput, Mixtures, PredictorMixtureOutput, around_guesses
from models.masked_convolution import ColourHead, Colours, Grouping, MaskedConvolution, colours, head
from models.model import (
    Account,
    Entrance,
    Flops,
    Intensities,
    Model,
    Recompute,
    ToldNothing,
    check_inputs,
    check_sizes,
    num_parameters,
)
from models.neighbours import NeighbourhoodStem, Predictors, Stem, flops_at_a_pixel
from models.pixel_decoder import ConvolutionByPixel, PixelDecoder
from models.recompute_decoder import RecomputeDecoder


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(ToldNothing):
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["pixelcnn"] = "pixelcnn"
    image_size: int
    """Rows and columns of the square images."""
    output: CategoricalOutput | Mixtures = CategoricalOutput()
    """256 probabilities of a sub-pixel, as in the paper, or a mixture of logistics of a pixel, also around guesses from
    its neighbours. With mixtures no feature belongs to a colour, and a pixel sees nothing of itself."""
    stem: Stem = "previous"
    """What the first features are made of. "previous": of the pixels that the first convolutions see, as in the paper.
    "neighbourhood": also of the known pixels around, their differences, and how far off their own guesses were
    (models/neighbours.py)."""
    features: int
    """Features of the convolutions inside a block (h in the paper: 128); twice as many between the blocks."""
    layers: int
    """Residual blocks (the paper: 15)."""
    head_features: int
    """Features of the layer before the probabilities (the paper: 1024)."""
    first_kernel: int = 7
    """Rows and columns of the first convolution's kernel."""
    kernel: int = 3
    """The same of the convolution inside a block."""
    grouping: Grouping = "interleaved"
    """Which features belong to red, green and blue: by turns, or a block of them each. No matter with mixtures."""

    def __post_init__(self) -> None:
        check_sizes(self, odd=("first_kernel", "kernel"), for_each_colour=("features", "head_features"))

    @property
    def colours(self) -> Colours:
        return colours(self.grouping, self.output)

    @property
    def num_units(self) -> int:
        return self.layers

    @property
    def unit_period(self) -> int:
        return 1

    def with_units(self, count: int) -> Self:
        return dataclasses.replace(self, layers=count)

    def narrow(self) -> Self:
        return dataclasses.replace(self, features=12, head_features=24)

    def build(self, recompute: Recompute = Recompute()) -> "PixelCNN":  # noqa: B008 (immutable)
        return PixelCNN(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = PixelCNN(self, recompute)
        pixels = self.image_size**2
        first = pixels * (model.first.flops_of_a_pixel + flops_at_a_pixel(model))
        head = pixels * model.head.flops_of_a_pixel
        block = model.blocks[0]
        assert isinstance(block, Block)
        up = block.out.flops_of_a_pixel
        a_block = block.reduce.flops_of_a_pixel + block.convolve.flops_of_a_pixel + up
        blocks = self.layers * pixels * a_block
        # Nothing after the last product of a block needs its result, so torch stops before it.
        again = pixels * (a_block - up) * sum(recompute.includes(unit) for unit in range(self.layers))
        parts = {
            "first convolution": Flops(first, first, 0),  # the image needs no gradient
            "blocks": Flops(blocks, 2 * blocks, again),
            "head": Flops(head, 2 * head, 0),
        }
        return Account(parameters=num_parameters(model), positions=len(model.generation_order), parts=parts)


class PixelCNN(Model):
    """Images -> the distribution of every sub-pixel, or of every pixel, given all that it sees."""

    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            pixels = torch.arange(config.image_size**2)
            is_categorical = isinstance(config.output, CategoricalOutput)
            self.generation_order = torch.arange(3 * len(pixels)) if is_categorical else pixels
        width, kernel = 2 * config.features, (config.first_kernel, config.first_kernel)
        self.enter = Intensities()
        self.first = MaskedConvolution(3, width, kernel, mask="A", grouping=config.colours)
        if config.stem == "neighbourhood":
            self.stem = NeighbourhoodStem(config.image_size, pixels, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = head(width, config.head_features, config.output, config.grouping)
        if isinstance(config.output, PredictorMixtureOutput):
            self.predictors = Predictors(config.output.predictors, config.image_size, pixels)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        check_inputs(self.config, images, given)
        return self.parameters_of(self.enter(images))

    def parameters_of(self, values: Tensor) -> Tensor:
        """As forward, of intensities [B, H, W, 3] on [-1, 1]; of any size where no neighbours are looked at."""
        x = self.first(values.to(self.first.weight.dtype))
        if self.config.stem == "neighbourhood":
            x = x + self.stem.of_images(values)
        for index, block in enumerate(self.blocks):
            x = self.through(index, block, x)
        parameters: Tensor = self.head(x)
        if isinstance(self.config.output, PredictorMixtureOutput):
            parameters = around_guesses(parameters, self.predictors.of_images(values))
        return parameters

    def entrances(self) -> tuple[Entrance, ...]:
        return (Entrance(self.enter, torch.arange(len(self.generation_order)), looks_up=True),)

    def units(self) -> Iterator[nn.Module]:
        yield from self.blocks

    def decoder(self, canvas: Canvas) -> PixelDecoder | RecomputeDecoder:
        if not isinstance(self.head, ColourHead) or self.config.stem == "neighbourhood":
            return RecomputeDecoder(self, canvas)
        return PixelDecoder(partial(PixelCNNByPixel, self), self.head, canvas, self.config.image_size)


class Block(nn.Module):
    """x -> x + what three convolutions make of it: to half the features, over neighbours, and back."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        features, grouping, gain = config.features, config.colours, config.layers**-0.5
        kernel = (config.kernel, config.kernel)
        self.reduce = MaskedConvolution(2 * features, features, (1, 1), mask="B", grouping=grouping)
        self.convolve = MaskedConvolution(features, features, kernel, mask="B", grouping=grouping)
        self.out = MaskedConvolution(features, 2 * features, (1, 1), mask="B", grouping=grouping, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.convolve(F.relu(self.reduce(F.relu(x))))))


class PixelCNNByPixel:
    """See ByPixel (models/pixel_decoder.py)."""

    def __init__(self, model: PixelCNN, images: int) -> None:
        size = model.config.image_size
        self._first = ConvolutionByPixel(model.first, images, size)
        self._blocks = [
            [ConvolutionByPixel(part, images, size) for part in (block.reduce, block.convolve, block.out)]
            for block in model.units()
            if isinstance(block, Block)
        ]

    def begin_row(self, row: int) -> None:
        pass

    def features(self, x: Tensor, row: int, column: int) -> Tensor:
        x = self._first.at(x, row, column)
        for block in self._blocks:
            inside = x
            for convolution in block:
                inside = convolution.at(F.relu(inside), row, column)
            x = x + inside
        return x

    def complete(self, x: Tensor, row: int, column: int) -> None:
        self._first.keep(x, row, column)
