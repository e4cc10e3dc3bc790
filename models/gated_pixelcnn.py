"""What is Gated PixelCNN (van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, section 2)?

Two stacks of convolutions: the vertical one sees the rows above, the horizontal one its own row to the left and, by way
of the vertical one, all that is above. So nothing past stays out of sight, as part of it does in PixelCNN. Features are
gated, tanh times sigmoid, and the class of an image enters every gate. Masks and colours are those of
models/masked_convolution.py; what is strictly above needs none.

Only the horizontal stack is residual, so that the head reads a sum over all layers. What the paper leaves open: how the
class enters is one product for each stack, and it may be hidden in training, for guidance.

Shapes: B batch, H rows, W columns, p features.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.drawing.canvas import Canvas
from models.given import NOTHING, Given
from models.likelihood import CategoricalOutput, Mixtures, PredictorMixtureOutput, around_guesses
from models.linear import Linear, product_dtype
from models.masked_convolution import ColourHead, Colours, Grouping, MaskedConvolution, colours, head
from models.model import (
    Account,
    Entrance,
    Flops,
    Intensities,
    Model,
    Recompute,
    check_inputs,
    check_sizes,
    num_parameters,
)
from models.neighbours import NeighbourhoodStem, Predictors, Stem, flops_at_a_pixel
from models.pixel_decoder import ConvolutionByPixel, PixelDecoder
from models.recompute_decoder import RecomputeDecoder


@dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig:
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["gated_pixelcnn"] = "gated_pixelcnn"
    image_size: int
    """Rows and columns of the square images."""
    output: CategoricalOutput | Mixtures = CategoricalOutput()
    """256 probabilities of a sub-pixel, as in the paper, or a mixture of logistics of a pixel, also around guesses from
    its neighbours. With mixtures no feature belongs to a colour, and a pixel sees nothing of itself."""
    stem: Stem = "previous"
    """What the first features are made of. "previous": of the pixels that the first convolutions see, as in the paper.
    "neighbourhood": also of the known pixels around, their differences, and how far off their own guesses were
    (models/neighbours.py)."""
    num_classes: int = 0
    """Classes that the model can be asked for; 0 for none."""
    label_dropout: float = 0.0
    """Rate at which training hides the class, for guidance; 0 where every image is drawn with its class."""
    features: int
    """Features of each stack (p in the paper); twice as many before the gates."""
    layers: int
    """Residual layers after the first one."""
    head_features: int
    """Features of the layer before the probabilities."""
    first_kernel: int = 7
    """Rows and columns of the first layer's kernel, of which the vertical stack has those above the pixel, and the
    horizontal one those to the left in its row."""
    kernel: int = 3
    """The same of the other layers."""
    grouping: Grouping = "interleaved"
    """Which features belong to red, green and blue: by turns, or a block of them each. No matter with mixtures."""

    def __post_init__(self) -> None:
        check_sizes(self, odd=("first_kernel", "kernel"), for_each_colour=("features", "head_features"))
        problems = []
        if not 0 <= self.num_classes <= 1 << 20:
            problems.append(f"num_classes: {self.num_classes} is not between 0 and {1 << 20}")
        if not 0 <= self.label_dropout < 1:
            problems.append(f"label_dropout: {self.label_dropout} is not at least 0 and below 1")
        if self.label_dropout and not self.num_classes:
            problems.append(
                f"label_dropout: {self.label_dropout}, but the model has no classes to hide; set it to 0, or "
                "num_classes"
            )
        if self.first_kernel < 3:
            problems.append("first_kernel: 1 leaves nothing above the pixel; take 3 or more")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def colours(self) -> Colours:
        return colours(self.grouping, self.output)

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

    def narrow(self) -> Self:
        return dataclasses.replace(self, features=12, head_features=24, num_classes=0, label_dropout=0.0)

    def build(self, recompute: Recompute = Recompute()) -> "GatedPixelCNN":  # noqa: B008 (immutable)
        return GatedPixelCNN(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = GatedPixelCNN(self, recompute)
        pixels, head = self.image_size**2, self.image_size**2 * model.head.flops_of_a_pixel
        first, layer = model.first, model.layers[0]
        assert isinstance(layer, Layer)
        of_image = first.vertical.flops_of_a_pixel + first.horizontal.flops_of_a_pixel + flops_at_a_pixel(model)
        of_image *= pixels
        of_features = pixels * (first.flops_of_a_pixel - first.vertical.flops_of_a_pixel)
        of_features -= pixels * first.horizontal.flops_of_a_pixel
        layers = self.layers * pixels * layer.flops_of_a_pixel
        # Nothing after the last product of a layer needs its result, so torch stops before it.
        again = pixels * (layer.flops_of_a_pixel - layer.out.flops_of_a_pixel)
        again *= sum(recompute.includes(unit) for unit in range(self.layers))
        parts = {
            "first layer": Flops(of_image + of_features, of_image + 2 * of_features, 0),  # the image needs no gradient
            "layers": Flops(layers, 2 * layers, again),
            "head": Flops(head, 2 * head, 0),
        }
        return Account(parameters=num_parameters(model), positions=len(model.generation_order), parts=parts)


class GatedPixelCNN(Model):
    """Images and their classes -> the distribution of every sub-pixel, or of every pixel, given all that it sees."""

    config: GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            pixels = torch.arange(config.image_size**2)
            is_categorical = isinstance(config.output, CategoricalOutput)
            self.generation_order = torch.arange(3 * len(pixels)) if is_categorical else pixels
        features, grouping, gain = config.features, config.colours, config.layers**-0.5
        self.enter = Intensities()
        self.first = Layer(3, features, config.first_kernel, grouping, mask="A")
        if config.stem == "neighbourhood":
            self.stem = NeighbourhoodStem(config.image_size, pixels, features)
        self.layers = nn.ModuleList(
            Layer(features, features, config.kernel, grouping, mask="B", gain=gain) for _ in range(config.layers)
        )
        if config.num_classes:
            classes = config.num_classes + (config.label_dropout > 0)  # the last row is no class
            self.classes = nn.Parameter(torch.zeros(classes, (1 + config.layers) * 4 * features))
            """What each class adds in each layer to the vertical stack before its gate, and to the horizontal one."""
        self.head = head(config.features, config.head_features, config.output, config.grouping)
        if isinstance(config.output, PredictorMixtureOutput):
            self.predictors = Predictors(config.output.predictors, config.image_size, pixels)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        """As in Model. In training, labels are hidden at the rate of label_dropout."""
        check_inputs(self.config, images, given)
        labels = given.labels
        if labels is not None and self.training and self.config.label_dropout:
            hidden = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(hidden, self.config.num_classes)
        return self.parameters_of(self.enter(images), labels)

    def parameters_of(self, values: Tensor, labels: Tensor | None = None) -> Tensor:
        """As forward, of intensities [B, H, W, 3] on [-1, 1], of any size where no neighbours are looked at."""
        _, horizontal = self.stacks(values, labels)
        parameters: Tensor = self.head(horizontal)
        if isinstance(self.config.output, PredictorMixtureOutput):
            parameters = around_guesses(parameters, self.predictors.of_images(values))
        return parameters

    def stacks(self, values: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features [B, H, W, p] of the vertical and of the horizontal stack after the last layer."""
        of_first, *of_layers = self.of_class(labels)
        vertical, horizontal = self.first(values.to(self.first.horizontal.weight.dtype), None, of_first)
        if self.config.stem == "neighbourhood":  # the vertical stack must not know what is in its own row
            horizontal = horizontal + self.stem.of_images(values)
        for index, (layer, of_class) in enumerate(zip(self.layers, of_layers, strict=True)):
            vertical, horizontal = self.through(index, layer, horizontal, vertical, of_class)
        return vertical, horizontal

    def of_class(self, labels: Tensor | None) -> Sequence[Tensor | None]:
        """For each layer, what the classes of images add to its gates: [B, 1, 1, 4p]."""
        num_layers = 1 + len(self.layers)
        if labels is None:
            return [None] * num_layers
        return F.embedding(labels, self.classes)[:, None, None].chunk(num_layers, dim=-1)

    def entrances(self) -> tuple[Entrance, ...]:
        return (Entrance(self.enter, torch.arange(len(self.generation_order)), looks_up=True),)

    def units(self) -> Iterator[nn.Module]:
        yield from self.layers

    def decoder(self, canvas: Canvas) -> PixelDecoder | RecomputeDecoder:
        if not isinstance(self.head, ColourHead) or self.config.stem == "neighbourhood":
            return RecomputeDecoder(self, canvas)
        return PixelDecoder(
            partial(GatedPixelCNNByPixel, self, canvas.given.labels), self.head, canvas, self.config.image_size
        )


class Layer(nn.Module):
    """One step of both stacks. The first layer, with mask A, reads the image in both and is not residual."""

    def __init__(
        self,
        features_in: int,
        features: int,
        kernel: int,
        grouping: Colours,
        *,
        mask: Literal["A", "B"],
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.is_residual = mask == "B"
        self.vertical = RowsAbove(features_in, 2 * features, kernel, with_own_row=mask == "B")
        self.to_horizontal = Linear(2 * features, 2 * features, std=(2 * features) ** -0.5, bias=True)
        # No ReLUs before these: half the variance of the first weights.
        self.horizontal = MaskedConvolution(
            features_in, 2 * features, (1, kernel), mask=mask, grouping=grouping, gates=2, gain=0.5**0.5
        )
        self.out = MaskedConvolution(features, features, (1, 1), mask="B", grouping=grouping, gain=gain)

    def forward(self, horizontal: Tensor, vertical: Tensor | None, of_class: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertical and the horizontal stack [B, H, W, p] after the layer; the former reads the latter's input
        where it has none of its own. of_class [B, 1, 1, 4p]: added to both before their gates."""
        above = self.vertical(horizontal if vertical is None else vertical)
        own = self.horizontal(horizontal)
        if of_class is not None:
            of_above, of_own = of_class.chunk(2, dim=-1)
            above, own = above + of_above, own + of_own
        own = own + self.to_horizontal(above)
        vertical = gated(above)
        out = self.out(gated(own))
        return vertical, horizontal + out if self.is_residual else out

    @property
    def flops_of_a_pixel(self) -> int:
        convolutions = (self.vertical, self.horizontal, self.out)
        return sum(part.flops_of_a_pixel for part in convolutions) + 2 * self.to_horizontal.weight.numel()


class RowsAbove(nn.Module):
    """[B, H, W, features_in] -> [B, H, W, features_out]: a convolution over the rows above the pixel, as many as half
    of the kernel's; with_own_row: and over its own, where the input holds only what is above it."""

    def __init__(self, features_in: int, features_out: int, kernel: int, *, with_own_row: bool) -> None:
        super().__init__()
        self._side, self._with_own_row = kernel // 2, with_own_row
        self.weight = nn.Parameter(torch.empty(features_out, features_in, kernel // 2 + with_own_row, kernel))
        self.bias = nn.Parameter(torch.empty(features_out))
        # In the constructor of the leaf: ZeRO-3 splits a module's weights among ranks as soon as it is constructed.
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        below = 0 if self._with_own_row else -1  # the last row is above nothing
        padding = (self._side, self._side, self._side, below)
        return self.convolved(F.pad(x, (0, 0, *padding)))

    def convolved(self, padded: Tensor) -> Tensor:
        """The result for as many rows and columns as the kernel fits into those that are given."""
        dtype = product_dtype(padded)
        inputs = padded.to(dtype).permute(0, 3, 1, 2)
        return F.conv2d(inputs, self.weight.to(dtype), self.bias.to(dtype)).permute(0, 2, 3, 1).to(padded.dtype)

    @property
    def flops_of_a_pixel(self) -> int:
        return 2 * self.weight.numel()


def gated(x: Tensor) -> Tensor:
    """[..., 2p] -> [..., p]."""
    features, gates = x.chunk(2, dim=-1)
    return features.tanh() * gates.sigmoid()


class GatedPixelCNNByPixel:
    """See ByPixel (models/pixel_decoder.py). The vertical stack is computed for a whole row when the one above it is
    complete."""

    def __init__(self, model: GatedPixelCNN, labels: Tensor | None, images: int) -> None:
        if labels is not None:
            labels = F.pad(labels, (0, images - len(labels)))
        of_layers = model.of_class(labels)
        size = model.config.image_size
        layers = [model.first, *(layer for layer in model.units() if isinstance(layer, Layer))]
        self._layers = [
            _LayerByPixel(layer, of_class, images, size) for layer, of_class in zip(layers, of_layers, strict=True)
        ]

    def begin_row(self, row: int) -> None:
        first, *rest = self._layers
        vertical = first.begin_row(None, row)
        for layer in rest:
            vertical = layer.begin_row(vertical, row)

    def features(self, x: Tensor, row: int, column: int) -> Tensor:
        for layer in self._layers:
            x = layer.at(x, row, column)
        return x

    def complete(self, x: Tensor, row: int, column: int) -> None:
        self._layers[0].keep(x, row, column)


class _LayerByPixel:
    def __init__(self, layer: Layer, of_class: Tensor | None, images: int, size: int) -> None:
        self._layer = layer
        self._of_above: Tensor | None = None
        self._of_own: Tensor | None = None
        if of_class is not None:
            self._of_above, self._of_own = of_class.chunk(2, dim=-1)
        self._horizontal = ConvolutionByPixel(layer.horizontal, images, size)
        self._out = ConvolutionByPixel(layer.out)
        weight = layer.vertical.weight
        _, features_in, _, columns = weight.shape
        self._side, self._is_first = columns // 2, not layer.is_residual
        self._inputs = weight.new_zeros(images, self._side + size, 2 * self._side + size, features_in)
        """Of the vertical stack."""
        self._from_above = weight.new_zeros(0)
        """What the row's vertical stack adds to the horizontal one: [N, W, 2p]."""

    def begin_row(self, vertical: Tensor | None, row: int) -> Tensor:
        """The vertical stack [N, W, p] of a row after the layer, of which it has given row `vertical` to the layer; the
        first one has got the rows above pixel by pixel."""
        side = self._side
        if vertical is not None:
            self._inputs[:, side + row, side:-side] = vertical
        rows = self._inputs[:, row : row + side + (vertical is not None)]
        above = self._layer.vertical.convolved(rows)
        if self._of_above is not None:
            above = above + self._of_above
        self._from_above = self._layer.to_horizontal(above)[:, 0]
        if self._of_own is not None:
            self._from_above = self._from_above + self._of_own[:, 0]
        return gated(above)[:, 0]

    def keep(self, x: Tensor, row: int, column: int) -> None:
        """The intensities x [N, 3] of a pixel, which the first layer's stacks both read."""
        self._horizontal.keep(x, row, column)
        self._inputs[:, self._side + row, self._side + column] = x

    def at(self, x: Tensor, row: int, column: int) -> Tensor:
        """The horizontal stack [N, p] at a pixel, of which the layer before has given x."""
        out = self._out.at(gated(self._horizontal.at(x, row, column) + self._from_above[:, column]))
        return out if self._is_first else x + out
