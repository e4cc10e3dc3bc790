"""What is PixelSNAIL (Chen et al. 2018), as its authors wrote it?

Blocks of gated convolutions that see up and left, and after each block attention of one head to all pixels before the
own one (neocxi/pixelsnail-public, 05a70fb, `_base_noup_smallkey_spec`). What is attended to holds the pixel's own
intensities, so the own pixel is left out, and the first one attends to nothing. A pixel's three colours are one mixture
of logistics.

Shapes: B batch, F features, H rows, W columns, L = H W pixels, M of them (fewer where keys are pooled), K mixtures.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.drawing.canvas import Canvas
from models.given import NOTHING, Given
from models.likelihood import MixtureOutput, PredictorMixtureOutput, around_guesses
from models.model import Account, Entrance, Flops, Model, Recompute, check_inputs, num_parameters
from models.neighbours import NeighbourhoodStem, Predictors, Stem, flops_at_a_pixel
from models.pixel_decoder import WholePixelDecoder
from models.weight_norm import (
    VARIANCE_FLOOR,
    Convolution,
    Dense,
    Entry,
    GatedResnet,
    Nonlinearity,
    down_shift,
    layer_flops,
    mixture_head,
    right_shift,
    set_scales_from_images,
)
from models.weight_norm_by_pixel import ConvolutionByPixel, DenseByPixel, GatedResnetByPixel

KEY_FEATURES = 16
SMALLEST_SUM = 1e-6
"""Added to the sum that divides the weights of attention, whose largest term is 1 (0 where nothing is seen)."""
VARIANCE_FLOOR_OF_CONVOLUTIONS = 1e-8


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig:
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["pixelsnail"] = "pixelsnail"
    image_size: int
    """Rows and columns of the square images."""
    output: MixtureOutput | PredictorMixtureOutput = MixtureOutput()
    """A mixture of logistics for each pixel, as in the paper (the authors: 10 components, of ImageNet 32), or one
    around guesses from its neighbours."""
    stem: Stem = "previous"
    """What the first features are made of. "previous": of the pixels that the first convolutions see, as in the paper.
    "neighbourhood": also of the known pixels around, their differences, and how far off their own guesses were
    (models/neighbours.py)."""
    features: int
    """Features of every layer (the authors: 256); even."""
    blocks: int
    """Blocks, each of which ends with attention (the authors: 12)."""
    convolutions: int
    """Gated residual blocks of convolutions before each attention (the authors: 4)."""
    nonlinearity: Nonlinearity = "elu"
    """What stands before each layer of a gated residual block."""
    dropout: float = 0.0
    """Rate between the two layers of a gated residual block (the authors: 0.5 for CIFAR-10, 0 for ImageNet)."""
    key_pooling: int = 1
    """Keys and values are the largest of squares of so many rows and columns (the authors: 1)."""
    initial_images: int = 8
    """Images by which the first scales and biases are set (the authors: 8)."""

    def __post_init__(self) -> None:
        smallest = {
            "image_size": 1,
            "features": 2,
            "blocks": 1,
            "convolutions": 1,
            "key_pooling": 1,
            "initial_images": 1,
        }
        problems = [
            f"{name}: {getattr(self, name)} is less than {least}"
            for name, least in smallest.items()
            if getattr(self, name) < least
        ]
        if self.features % 2:
            problems.append(f"features: {self.features} is not even: values have half as many")
        if self.key_pooling > 1 and self.image_size % self.key_pooling:
            problems.append(f"key_pooling: {self.key_pooling} does not divide image_size {self.image_size}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: {self.dropout} is not at least 0 and below 1")
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
        return self.blocks

    @property
    def unit_period(self) -> int:
        return 1

    def with_units(self, count: int) -> Self:
        return dataclasses.replace(self, blocks=count)

    def narrow(self) -> Self:
        return dataclasses.replace(self, features=4, dropout=0.0)

    def build(self, recompute: Recompute = Recompute()) -> "PixelSNAIL":  # noqa: B008 (immutable)
        return PixelSNAIL(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = PixelSNAIL(self, recompute).to("meta")
            images = torch.zeros(1, self.image_size, self.image_size, 3)
        products = layer_flops(model, lambda: model.parameters_of(images))
        of_blocks = sum(flops for name, flops in products.items() if name.startswith("blocks."))
        first = sum(flops for name, flops in products.items() if name.startswith("first_"))
        first += self.image_size**2 * flops_at_a_pixel(model)
        pairs = int(earlier(self.image_size, self.image_size, self.key_pooling, torch.device("cpu")).sum())
        scores = self.blocks * 2 * pairs * (KEY_FEATURES + self.features // 2)
        again = sum(recompute.includes(unit) for unit in range(self.blocks))
        parts = {
            "first convolutions": Flops(first, first, 0),  # the image needs no gradient
            "blocks": Flops(of_blocks, 2 * of_blocks, of_blocks // self.blocks * again),
            "attention scores": Flops(
                scores, 2 * scores, 0 if recompute.keeps_attention else scores // self.blocks * again
            ),
            "head": Flops(products["head"], 2 * products["head"], 0),
        }
        return Account(
            parameters=num_parameters(model),
            positions=self.image_size**2,
            parts=parts,
            attention="attention scores",
        )


class PixelSNAIL(Model):
    """Images -> the mixture of every pixel given all before it."""

    config: PixelSNAILConfig

    def __init__(self, config: PixelSNAILConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            self.generation_order = torch.arange(config.image_size**2)
        self.entry = Entry()
        self.first_above = Convolution(4, config.features, (1, 3), sees="above")
        self.first_left = Convolution(4, config.features, (2, 1), sees="above and left")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.head = mixture_head(config.features, config.output)
        if config.stem == "neighbourhood":
            self.stem = NeighbourhoodStem(config.image_size, self.generation_order, config.features)
        if isinstance(config.output, PredictorMixtureOutput):
            self.predictors = Predictors(config.output.predictors, config.image_size, self.generation_order)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        check_inputs(self.config, images, given)
        return self.parameters_of((images.float() - 127.5) / 127.5)

    def parameters_of(self, x: Tensor, labels: None = None) -> Tensor:
        """As forward, of intensities on [-1, 1], [B, H, W, 3]; of the image's size where neighbours are looked at."""
        entered = self.entry(x)
        x, values = entered.to(self.head.v.dtype), entered[:, :3].permute(0, 2, 3, 1)
        h = down_shift(self.first_above(x)) + right_shift(self.first_left(x))
        if self.config.stem == "neighbourhood":
            h = h + self.stem.of_images(values).permute(0, 3, 1, 2)
        place = places(x)
        for unit, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            h = self._through(block, self.training and self.recompute.includes(unit), h, x[:, :3], place)
        h = F.elu(h)  # whatever stands before the layers of blocks
        parameters = self.head(h.to(torch.promote_types(h.dtype, torch.float32))).permute(0, 2, 3, 1)
        if isinstance(self.config.output, PredictorMixtureOutput):
            parameters = around_guesses(parameters, self.predictors.of_images(values))
        return parameters

    def _through(self, block: "Block", recomputed: bool, h: Tensor, x: Tensor, place: Tensor) -> Tensor:
        if not recomputed:
            return block(h, x, place)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
        result: Tensor
        if self.recompute.keeps_attention:
            h, q, k, v = again(block.before_attention, h, x, place)
            result = again(block.after_attention, h, block.attention(h, q, k, v))
        else:
            result = again(block, h, x, place)
        return result

    @property
    def initial_images(self) -> int:
        return self.config.initial_images

    def initialise(self, images: Tensor, given: Given = NOTHING) -> None:
        """As in Model; as in the authors' run, dropout is on in training mode."""
        set_scales_from_images(
            self,
            lambda: self.parameters_of((images.float() - 127.5) / 127.5),
            lambda layer: VARIANCE_FLOOR_OF_CONVOLUTIONS if isinstance(layer, Convolution) else VARIANCE_FLOOR,
        )

    def entrances(self) -> tuple[Entrance, ...]:
        return (Entrance(self.entry, torch.arange(len(self.generation_order))),)

    def units(self) -> Iterator[nn.Module]:
        yield from self.blocks

    def decoder(self, canvas: Canvas) -> WholePixelDecoder:
        config = self.config
        return WholePixelDecoder(
            partial(PixelSNAILByPixel, self),
            self.head,
            canvas,
            config.image_size,
            stem=self.stem if config.stem == "neighbourhood" else None,
            predictors=self.predictors if isinstance(config.output, PredictorMixtureOutput) else None,
        )


class Block(nn.Module):
    """Gated convolutions of h [B, F, H, W], and then what attention finds among all pixels before each one."""

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__()
        self.key_pooling = config.key_pooling
        features, colours, place = config.features, 3, 6
        left = partial(Convolution, kernel=(2, 2), sees="above and left")
        dense = Dense
        make = partial(GatedResnet, nonlinearity=config.nonlinearity, dropout=config.dropout)
        self.convolutions = nn.ModuleList(make(features, left) for _ in range(config.convolutions))
        self.content = make(colours + features + place, dense)
        self.key_value = Dense(colours + features + place, KEY_FEATURES + features // 2)
        self.question = make(features + place, dense)
        self.query = Dense(features + place, KEY_FEATURES)
        self.result = make(features, dense, features_beside=features // 2)

    def forward(self, h: Tensor, x: Tensor, place: Tensor) -> Tensor:
        """x [B, 3, H, W]: the intensities; place [B, 6, H, W] as of `places`."""
        h, q, k, v = self.before_attention(h, x, place)
        return self.after_attention(h, self.attention(h, q, k, v))

    def before_attention(self, h: Tensor, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h after the convolutions; queries [B, L, 16], keys [B, M, 16], values [B, M, F / 2]."""
        for convolution in self.convolutions:
            h = convolution(h)
        key_value = self.key_value(self.content(torch.cat([x, h, place], dim=1)))
        if self.key_pooling > 1:
            key_value = F.max_pool2d(key_value, self.key_pooling)
        query = self.query(self.question(torch.cat([h, place], dim=1)))
        k, v = key_value.flatten(2).transpose(1, 2).split([KEY_FEATURES, key_value.shape[1] - KEY_FEATURES], dim=2)
        return h, query.flatten(2).transpose(1, 2), k, v

    def attention(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, F / 2]: the mean of the values of earlier pixels, by how well their keys answer the query."""
        rows, columns = h.shape[2:]
        return attend(q, k, v, earlier(rows, columns, self.key_pooling, h.device))

    def after_attention(self, h: Tensor, mixed: Tensor) -> Tensor:
        """mixed as of `attention`."""
        result: Tensor = self.result(h, mixed.transpose(1, 2).unflatten(2, h.shape[2:]))
        return result


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """[B, L, 16], [B, M, 16], [B, M, F] -> [B, L, F], at least in fp32; visible: bool [L, M]; 0 where none is.

    Written out, because torch's fused attention neither adds to the sum nor has a query that sees nothing.
    """
    dtype = v.dtype
    q, k, v = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (q, k, v))
    scores = (q @ k.transpose(1, 2)).masked_fill(~visible, -1e10)
    # The gradient goes through the largest score, too: with something added to the sum it is not 0.
    weights = ((scores - scores.amax(2, keepdim=True)) / math.sqrt(KEY_FEATURES)).exp() * visible
    return (weights / (weights.sum(2, keepdim=True) + SMALLEST_SUM) @ v).to(dtype)


def earlier(rows: int, columns: int, pooling: int, device: torch.device) -> Tensor:
    """bool [L, M]: whether all pixels of a key's square come before the query's pixel."""
    pixels = torch.arange(rows * columns, device=device)
    last = pixels.view(rows, columns)[pooling - 1 :: pooling, pooling - 1 :: pooling]
    return last.flatten() < pixels[:, None]


def places(x: Tensor) -> Tensor:
    """[B, 6, H, W]: the row three times and the column three times, from -1/2 in steps of 1/H and 1/W: the authors give
    each colour its own."""
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) / n - 0.5 for n in x.shape[2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([row] * 3 + [column] * 3).expand(x.shape[0], -1, -1, -1)


class PixelSNAILByPixel:
    """See ByWholePixel (models/pixel_decoder.py). Of each block, the keys and values of all pixels are kept."""

    def __init__(self, model: PixelSNAIL, images: int) -> None:
        self._size = model.config.image_size
        self._first_above, self._first_left = (
            ConvolutionByPixel(first, images, self._size) for first in (model.first_above, model.first_left)
        )
        self._from_above = model.head.v.new_zeros(images, self._size, model.config.features)
        """What the row's first features have from above."""
        self._place = places(model.head.v.new_zeros(images, 1, self._size, self._size)).permute(0, 2, 3, 1)
        self._entry = model.entry
        self._blocks = [_BlockByPixel(block, images, self._size) for block in model.units() if isinstance(block, Block)]

    def begin_row(self, row: int) -> None:
        if row > 0:
            self._from_above = self._first_above.result(row - 1, 0, self._size)

    def features(self, stem: Tensor | None, row: int, column: int) -> Tensor:
        h = self._from_above[:, column : column + 1]
        if column > 0:
            h = h + self._first_left.result(row, column - 1, 1)
        if stem is not None:
            h = h + stem
        place = self._place[:, row, column : column + 1]
        for block in self._blocks:
            h = block.at(h, place, row, column)
        return h

    def complete(self, x: Tensor, row: int, column: int) -> None:
        entered = self._entry(x[:, None])[..., 0].mT.to(self._from_above.dtype)
        self._first_above.keep(entered, row, column)
        self._first_left.keep(entered, row, column)
        place = self._place[:, row, column : column + 1]
        for block in self._blocks:
            block.complete(entered[..., :3], place, row, column)


class _BlockByPixel:
    """Squares whose largest keys and values are taken are complete in raster order, too: after their last pixel."""

    def __init__(self, block: Block, images: int, size: int) -> None:
        make = partial(GatedResnetByPixel, images=images, columns=size)
        self._convolutions = [make(each) for each in block.convolutions if isinstance(each, GatedResnet)]
        self._content, self._question, self._result = make(block.content), make(block.question), make(block.result)
        self._key_value, self._query = DenseByPixel(block.key_value), DenseByPixel(block.query)
        self._pooling = pooling = block.key_pooling
        self._features = len(block.key_value.b)
        make_empty = block.key_value.v.new_empty
        self._of_rows = make_empty(images, pooling, size, self._features)
        """Keys and values of the pixels of a row of squares."""
        self._of_squares = make_empty(images, (size // pooling) ** 2, self._features)
        self._squares = 0
        """That are complete."""
        self._h = make_empty(0)
        """After the convolutions, at the pixel that was asked for last."""

    def at(self, h: Tensor, place: Tensor, row: int, column: int) -> Tensor:
        """h [N, 1, F] after the block, at a pixel; place [N, 1, 6]."""
        for convolution in self._convolutions:
            h = convolution.at(h, row, column)
        self._h = h
        query = self._query.at(self._question.at(torch.cat([h, place], dim=2), row, column))
        seen = self._of_squares[:, : self._squares]
        keys, values = seen.split([KEY_FEATURES, self._features - KEY_FEATURES], dim=2)
        if self._squares:
            visible = torch.ones(1, self._squares, dtype=torch.bool, device=h.device)
            mixed = attend(query, keys, values, visible)
        else:
            mixed = values.new_zeros(len(h), 1, values.shape[2])
        return self._result.at(h, row, column, beside=mixed)

    def complete(self, x: Tensor, place: Tensor, row: int, column: int) -> None:
        """x [N, 1, 3]: the intensities of that pixel."""
        content = self._content.at(torch.cat([x, self._h, place], dim=2), row, column)
        side, bottom, right = self._pooling, row % self._pooling, column % self._pooling
        self._of_rows[:, bottom, column] = self._key_value.at(content)[:, 0]
        if bottom == right == side - 1:
            square = self._of_rows[:, :, column - right : column + 1]
            self._of_squares[:, self._squares] = square.amax((1, 2))
            self._squares += 1
