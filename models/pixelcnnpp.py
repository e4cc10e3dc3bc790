"""What is PixelCNN++ (Salimans et al. 2017), as its authors wrote it?

Two streams of gated residual blocks: u sees the rows above a pixel, ul also what is to its left. Down through three
resolutions, and up again, where each block is handed what its mirror image gave (openai/pixel-cnn, bbc1568). A pixel's
three colours are one mixture of logistics.

Every pixel depends on pixels before it only, but not on all of them: at 8x8 and one block a stage, eight pairs of 2016
do not see each other, in the authors' code as in this.

Shapes: B batch, F features, H rows, W columns, K mixtures.
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
from models.likelihood import MixtureOutput, PredictorMixtureOutput, around_guesses
from models.model import Account, Entrance, Flops, Model, Recompute, check_inputs, num_parameters
from models.neighbours import NeighbourhoodStem, Predictors, Stem, flops_at_a_pixel
from models.pixel_decoder import WholePixelDecoder
from models.weight_norm import (
    VARIANCE_FLOOR,
    Convolution,
    Entry,
    GatedResnet,
    Nonlinearity,
    TransposedConvolution,
    down_shift,
    layer_flops,
    mixture_head,
    right_shift,
    set_scales_from_images,
)
from models.weight_norm_by_pixel import ConvolutionByPixel, GatedResnetByPixel, TransposedConvolutionByPixel

STAGES = 3
"""Resolutions, each half as fine as the one before."""


@dataclass(frozen=True, kw_only=True)
class PixelCNNPPConfig:
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["pixelcnnpp"] = "pixelcnnpp"
    image_size: int
    """Rows and columns of the square images; a multiple of 4."""
    output: MixtureOutput | PredictorMixtureOutput = MixtureOutput()
    """A mixture of logistics for each pixel, as in the paper, or one around guesses from its neighbours."""
    stem: Stem = "previous"
    """What the first features are made of. "previous": of the pixels that the first convolutions see, as in the paper.
    "neighbourhood": also of the known pixels around, their differences, and how far off their own guesses were
    (models/neighbours.py)."""
    features: int
    """Features of every layer (the authors: 160)."""
    blocks: int
    """Gated residual blocks of each stream in each stage (the authors: 5)."""
    nonlinearity: Nonlinearity = "concat_elu"
    """What stands before each layer of a block."""
    dropout: float = 0.0
    """Rate between the two layers of a block (the authors: 0.5)."""
    num_classes: int = 0
    """Classes that the model can be asked for; 0 for none."""
    initial_images: int = 16
    """Images by which the first scales and biases are set (the authors: 16)."""

    def __post_init__(self) -> None:
        smallest = {"features": 1, "blocks": 1, "num_classes": 0, "initial_images": 1}
        problems = [
            f"{name}: {getattr(self, name)} is less than {least}"
            for name, least in smallest.items()
            if getattr(self, name) < least
        ]
        if self.image_size < 4 or self.image_size % 4:
            problems.append(f"image_size: {self.image_size} is not a multiple of 4: rows and columns are halved twice")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: {self.dropout} is not at least 0 and below 1")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def label_dropout(self) -> float:
        return 0.0

    @property
    def small_size(self) -> int:
        return 0

    @property
    def num_units(self) -> int:
        return 2 * STAGES * self.blocks  # and two more blocks on the way up, however many these are

    @property
    def unit_period(self) -> int:
        return 2 * STAGES

    def with_units(self, count: int) -> Self:
        return dataclasses.replace(self, blocks=count // (2 * STAGES))

    def narrow(self) -> Self:
        return dataclasses.replace(self, features=4, dropout=0.0, num_classes=0)

    def build(self, recompute: Recompute = Recompute()) -> "PixelCNNPP":  # noqa: B008 (immutable)
        return PixelCNNPP(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = PixelCNNPP(self, recompute).to("meta")
            labels = torch.zeros(1, dtype=torch.int64) if self.num_classes else None
            images = torch.zeros(1, self.image_size, self.image_size, 3)
        products = layer_flops(model, lambda: model.parameters_of(images, labels))
        blocks = [f"{name}.{index}." for name in ("down", "up") for index in range(len(getattr(model, name)))]
        of_blocks = [sum(n for name, n in products.items() if name.startswith(block)) for block in blocks]
        first = sum(n for name, n in products.items() if name.startswith("first_"))
        head = products["head"]
        between = sum(products.values()) - sum(of_blocks) - first - head
        first += self.image_size**2 * flops_at_a_pixel(model)
        recomputed = sum(flops for unit, flops in enumerate(of_blocks) if recompute.includes(unit))
        parts = {
            "first convolutions": Flops(first, first, 0),  # the image needs no gradient
            "blocks": Flops(sum(of_blocks), 2 * sum(of_blocks), recomputed),
            "between resolutions": Flops(between, 2 * between, 0),
            "head": Flops(head, 2 * head, 0),
        }
        return Account(parameters=num_parameters(model), positions=self.image_size**2, parts=parts)


class PixelCNNPP(Model):
    """Images -> the mixture of every pixel given the pixels that it sees."""

    config: PixelCNNPPConfig

    def __init__(self, config: PixelCNNPPConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            self.generation_order = torch.arange(config.image_size**2)
        features, between = config.features, range(STAGES - 1)
        self.entry = Entry()
        self.first_u = Convolution(4, features, (2, 3), sees="above")
        self.first_ul_above = Convolution(4, features, (1, 3), sees="above")
        self.first_ul_left = Convolution(4, features, (2, 1), sees="above and left")
        self.down = nn.ModuleList(Block(config, beside=False) for _ in range(STAGES * config.blocks))
        self.shrink_u = nn.ModuleList(Convolution(features, features, (2, 3), sees="above", stride=2) for _ in between)
        self.shrink_ul = nn.ModuleList(
            Convolution(features, features, (2, 2), sees="above and left", stride=2) for _ in between
        )
        self.up = nn.ModuleList(Block(config, beside=True) for _ in range(STAGES * config.blocks + STAGES - 1))
        self.grow_u = nn.ModuleList(TransposedConvolution(features, features, sees="above") for _ in between)
        self.grow_ul = nn.ModuleList(TransposedConvolution(features, features, sees="above and left") for _ in between)
        self.head = mixture_head(features, config.output)
        if config.stem == "neighbourhood":
            self.stem = NeighbourhoodStem(config.image_size, self.generation_order, features)
        if isinstance(config.output, PredictorMixtureOutput):
            self.predictors = Predictors(config.output.predictors, config.image_size, self.generation_order)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        check_inputs(self.config, images, given)
        return self.parameters_of((images.float() - 127.5) / 127.5, given.labels)

    def parameters_of(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """As forward, of intensities on [-1, 1], [B, H, W, 3]; H and W are multiples of 4, and the image's size where
        neighbours are looked at."""
        entered = self.entry(x)
        x, values = entered.to(self.head.v.dtype), entered[:, :3].permute(0, 2, 3, 1)
        u = down_shift(self.first_u(x))
        ul = down_shift(self.first_ul_above(x)) + right_shift(self.first_ul_left(x))
        if self.config.stem == "neighbourhood":  # u must not know what is in its own row
            ul = ul + self.stem.of_images(values).permute(0, 3, 1, 2)
        seen_u, seen_ul = [u], [ul]
        through = partial(self.through, draws_random=self.config.dropout > 0)
        for index, block in enumerate(self.down):
            stage, start = divmod(index, self.config.blocks)
            if stage and not start:
                u, ul = self.shrink_u[stage - 1](u), self.shrink_ul[stage - 1](ul)
                seen_u.append(u)
                seen_ul.append(ul)
            u, ul = through(index, block, u, ul, None, None, labels)
            seen_u.append(u)
            seen_ul.append(ul)
        u, ul = seen_u.pop(), seen_ul.pop()
        for index, block in enumerate(self.up):
            stage, start = divmod(index + 1, self.config.blocks + 1)
            if stage and not start:
                u, ul = self.grow_u[stage - 1](u), self.grow_ul[stage - 1](ul)
            u, ul = through(len(self.down) + index, block, u, ul, seen_u.pop(), seen_ul.pop(), labels)
        assert not seen_u and not seen_ul
        x = F.elu(ul)  # whatever stands before the layers of blocks
        parameters = self.head(x.to(torch.promote_types(x.dtype, torch.float32))).permute(0, 2, 3, 1)
        if isinstance(self.config.output, PredictorMixtureOutput):
            parameters = around_guesses(parameters, self.predictors.of_images(values))
        return parameters

    @property
    def initial_images(self) -> int:
        return self.config.initial_images

    def initialise(self, images: Tensor, given: Given = NOTHING) -> None:
        """As in Model; as in the authors' run, dropout is on in training mode."""
        x = (images.float() - 127.5) / 127.5
        set_scales_from_images(self, lambda: self.parameters_of(x, given.labels), lambda layer: VARIANCE_FLOOR)

    def entrances(self) -> tuple[Entrance, ...]:
        return (Entrance(self.entry, torch.arange(len(self.generation_order))),)

    def units(self) -> Iterator[nn.Module]:
        yield from self.down
        yield from self.up

    def decoder(self, canvas: Canvas) -> WholePixelDecoder:
        config = self.config
        return WholePixelDecoder(
            partial(PixelCNNPPByPixel, self, canvas.given.labels),
            self.head,
            canvas,
            config.image_size,
            stem=self.stem if config.stem == "neighbourhood" else None,
            predictors=self.predictors if isinstance(config.output, PredictorMixtureOutput) else None,
        )


class Block(nn.Module):
    """A gated residual block of u, and one of ul, which looks at what that one gave; on the way up (`beside`) both are
    also handed what their mirror images gave."""

    def __init__(self, config: PixelCNNPPConfig, *, beside: bool) -> None:
        super().__init__()
        above = partial(Convolution, kernel=(2, 3), sees="above")
        left = partial(Convolution, kernel=(2, 2), sees="above and left")
        make = partial(
            GatedResnet,
            config.features,
            nonlinearity=config.nonlinearity,
            dropout=config.dropout,
            num_classes=config.num_classes,
        )
        self.u = make(above, features_beside=config.features if beside else 0)
        self.ul = make(left, features_beside=config.features * (2 if beside else 1))

    def forward(
        self, u: Tensor, ul: Tensor, seen_u: Tensor | None, seen_ul: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        u = self.u(u, seen_u, labels)
        return u, self.ul(ul, u if seen_ul is None else torch.cat([u, seen_ul], dim=1), labels)


class PixelCNNPPByPixel:
    """See ByWholePixel (models/pixel_decoder.py). u is computed for a whole row when the one above it is complete; both
    streams at coarser resolutions only at rows and columns of even numbers there (as Ramachandran et al. 2017, Fast
    Generation for Convolutional Autoregressive Models, do)."""

    def __init__(self, model: PixelCNNPP, labels: Tensor | None, images: int) -> None:
        if labels is not None:
            labels = F.pad(labels, (0, images - len(labels)))
        self._entry, self._size = model.entry, model.config.image_size
        self._first_u, self._first_above, self._first_left = self._first = [
            ConvolutionByPixel(layer, images, self._size)
            for layer in (model.first_u, model.first_ul_above, model.first_ul_left)
        ]
        self._from_above = model.head.v.new_zeros(images, self._size, model.config.features)
        """What the row's first features of ul have from above."""
        self._finest = _StageByPixel(model, 0, labels, images)

    def begin_row(self, row: int) -> None:
        u = torch.zeros_like(self._from_above)
        if row > 0:
            u = self._first_u.result(row - 1, 0, self._size)
            self._from_above = self._first_above.result(row - 1, 0, self._size)
        self._finest.begin_row(u, row)

    def features(self, stem: Tensor | None, row: int, column: int) -> Tensor:
        ul = self._from_above[:, column : column + 1]
        if column > 0:
            ul = ul + self._first_left.result(row, column - 1, 1)
        if stem is not None:
            ul = ul + stem
        return self._finest.at(ul, row, column)

    def complete(self, x: Tensor, row: int, column: int) -> None:
        entered = self._entry(x[:, None])[..., 0].mT.to(self._from_above.dtype)
        for first in self._first:
            first.keep(entered, row, column)


class _StageByPixel:
    """The blocks of one resolution, on the way down and up, and between them all that is coarser."""

    def __init__(self, model: PixelCNNPP, stage: int, labels: Tensor | None, images: int) -> None:
        """stage: 0 is the finest."""
        turn, down, up = STAGES - 1 - stage, model.config.blocks, model.config.blocks + 1
        self._down, self._up = (
            [
                _BlockByPixel(block, images, model.config.image_size >> stage, labels)
                for block in blocks
                if isinstance(block, Block)
            ]
            for blocks in (
                model.down[stage * down : (stage + 1) * down],
                model.up[max(turn * up - 1, 0) : (turn + 1) * up - 1],  # the coarsest has one less
            )
        )
        self._coarser = _CoarserByPixel(model, stage, labels, images) if turn else None

    def begin_row(self, u: Tensor, row: int) -> Tensor:
        """u [N, W, F] of a row after the stage, for what it was before."""
        seen = [u]
        for block in self._down:
            seen.append(block.begin_row(seen[-1], None, row))
        u = seen.pop() if self._coarser is None else self._coarser.begin_row(seen[-1], row)
        for block in self._up:
            u = block.begin_row(u, seen.pop(), row)
        return u

    def at(self, ul: Tensor, row: int, column: int) -> Tensor:
        """ul [N, 1, F] at a pixel after the stage, for what it was before."""
        seen = [ul]
        for block in self._down:
            seen.append(block.at(seen[-1], None, row, column))
        ul = seen.pop() if self._coarser is None else self._coarser.at(seen[-1], row, column)
        for block in self._up:
            ul = block.at(ul, seen.pop(), row, column)
        return ul


class _CoarserByPixel:
    """From a stage to the coarser one and back. A coarse pixel sees of its four fine ones the first alone, and is
    computed at its turn."""

    def __init__(self, model: PixelCNNPP, stage: int, labels: Tensor | None, images: int) -> None:
        """stage: the finer one."""
        columns, grow = model.config.image_size >> stage, STAGES - 2 - stage
        self._shrink_u, self._shrink_ul = (
            ConvolutionByPixel(layer, images, columns)
            for layer in (model.shrink_u[stage], model.shrink_ul[stage])
            if isinstance(layer, Convolution)
        )
        self._grow_u, self._grow_ul = (
            TransposedConvolutionByPixel(layer)
            for layer in (model.grow_u[grow], model.grow_ul[grow])
            if isinstance(layer, TransposedConvolution)
        )
        self._coarser = _StageByPixel(model, stage + 1, labels, images)
        self._u, self._ul = (model.head.v.new_zeros(images, 2, columns, model.config.features) for _ in range(2))
        """What has come back, of the last even row and of the next one."""

    def begin_row(self, u: Tensor, row: int) -> Tensor:
        self._shrink_u.keep(u, row, 0)
        if row % 2 == 0:
            shrunk = self._shrink_u.result(row, 0, u.shape[1] // 2)
            self._u = self._grow_u.at(self._coarser.begin_row(shrunk, row // 2))
        return self._u[:, row % 2]

    def at(self, ul: Tensor, row: int, column: int) -> Tensor:
        self._shrink_ul.keep(ul, row, column)
        if row % 2 == column % 2 == 0:
            shrunk = self._shrink_ul.result(row, column, 1)
            self._ul[:, :, column : column + 2] = self._grow_ul.at(self._coarser.at(shrunk, row // 2, column // 2))
        return self._ul[:, row % 2, column : column + 1]


class _BlockByPixel:
    def __init__(self, block: Block, images: int, columns: int, labels: Tensor | None) -> None:
        self._of_u = GatedResnetByPixel(block.u, images, columns, labels)
        self._of_ul = GatedResnetByPixel(block.ul, images, columns, labels)
        self._u = block.u.first.v.new_zeros(0)
        """Of the row, after the block."""

    def begin_row(self, u: Tensor, seen: Tensor | None, row: int) -> Tensor:
        """u [N, W, F] of a row after the block; seen: what its mirror image gave."""
        self._u = self._of_u.at(u, row, 0, seen)
        return self._u

    def at(self, ul: Tensor, seen: Tensor | None, row: int, column: int) -> Tensor:
        """ul [N, 1, F] at a pixel after the block; seen: what its mirror image gave."""
        u = self._u[:, column : column + 1]
        return self._of_ul.at(ul, row, column, u if seen is None else torch.cat([u, seen], dim=2))
