"""What is the Diagonal BiLSTM (van den Oord et al. 2016, Pixel Recurrent Neural Networks, section 3.2)?

A PixelRNN: between the masked convolutions of PixelCNN (models/masked_convolution.py), layers of two LSTMs that go
through the image along its diagonals, one from the upper left corner and one from the upper right. A state depends on
those of the left (or right) neighbour and of the one above, so that both together see all that is past. To compute a
diagonal at once, rows are moved by one each: what was a diagonal is a column then. The map of the LSTM from the right,
which has seen pixels to the right in its own row, is moved down by one row before the two are added.

As the first convolution hides the pixel itself already, the last pixel of the row above stays out of sight of all but
the last columns: that is a property of the paper's architecture. What the paper leaves open: states outside of the
image are 0, and biases begin at 0.

Shapes: B batch, H rows, W columns, T diagonals, H + W - 1, and h features of a state.
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
from models.likelihood import CategoricalOutput
from models.linear import product_dtype
from models.lstm_cell import lstm_cell
from models.masked_convolution import ColourHead, Grouping, MaskedConvolution, intensities
from models.model import (
    Account,
    Entrance,
    Flops,
    Model,
    Recompute,
    ToldNothing,
    check_inputs,
    check_sizes,
    num_parameters,
)
from models.pixel_decoder import ConvolutionByPixel, PixelDecoder


@dataclass(frozen=True, kw_only=True)
class DiagonalBiLSTMConfig(ToldNothing):
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["diagonal_bilstm"] = "diagonal_bilstm"
    image_size: int
    """Rows and columns of the square images."""
    output: CategoricalOutput = CategoricalOutput()
    """256 probabilities of a sub-pixel: the paper has no other."""
    features: int
    """Features of a state (h in the paper: 128); twice as many between the layers."""
    layers: int
    """LSTM layers of both directions (the paper: up to 12)."""
    head_features: int
    """Features of the layer before the probabilities (the paper: 1024)."""
    first_kernel: int = 7
    """Rows and columns of the first convolution's kernel."""
    grouping: Grouping = "interleaved"
    """Which features belong to red, green and blue: by turns, or a block of them each."""

    def __post_init__(self) -> None:
        check_sizes(self, odd=("first_kernel",), for_each_colour=("features", "head_features"))

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

    def build(self, recompute: Recompute = Recompute()) -> "DiagonalBiLSTM":  # noqa: B008 (immutable)
        return DiagonalBiLSTM(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = DiagonalBiLSTM(self, recompute)
        size, pixels = self.image_size, self.image_size**2
        first, head = pixels * model.first.flops_of_a_pixel, pixels * model.head.flops_of_a_pixel
        layer = model.layers[0]
        assert isinstance(layer, Layer)
        up = pixels * layer.up.flops_of_a_pixel
        a_layer = pixels * layer.lstm.input_to_state.flops_of_a_pixel + up
        # Of each diagonal but the first, which has nothing before it, all H cells are computed.
        a_layer += (2 * size - 2) * size * 2 * (layer.lstm.from_left.numel() + layer.lstm.from_right.numel())
        layers = self.layers * a_layer
        # Nothing after the last product of a layer needs its result, so torch stops before it.
        again = (a_layer - up) * sum(recompute.includes(unit) for unit in range(self.layers))
        parts = {
            "first convolution": Flops(first, first, 0),  # the image needs no gradient
            "layers": Flops(layers, 2 * layers, again),
            "head": Flops(head, 2 * head, 0),
        }
        return Account(parameters=num_parameters(model), positions=3 * pixels, parts=parts)


class DiagonalBiLSTM(Model):
    """Images -> logits of every sub-pixel given all that it sees."""

    config: DiagonalBiLSTMConfig

    def __init__(self, config: DiagonalBiLSTMConfig, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            self.generation_order = torch.arange(3 * config.image_size**2)
        width, kernel = 2 * config.features, (config.first_kernel, config.first_kernel)
        self.first = MaskedConvolution(3, width, kernel, mask="A", grouping=config.grouping)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = ColourHead(width, config.head_features, config.grouping)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        check_inputs(self.config, images, given)
        return self.logits(intensities(images, self.first.weight.dtype))

    def logits(self, x: Tensor) -> Tensor:
        """Those [B, H, W, 3, 256] of intensities [B, H, W, 3], H and W of any size."""
        x = self.first(x)
        for index, layer in enumerate(self.layers):
            x = self.through(index, layer, x)
        logits: Tensor = self.head(x)
        return logits

    def entrances(self) -> tuple[Entrance, ...]:
        return (Entrance(self.first, torch.arange(len(self.generation_order))),)

    def units(self) -> Iterator[nn.Module]:
        yield from self.layers

    def decoder(self, canvas: Canvas) -> PixelDecoder:
        return PixelDecoder(partial(DiagonalBiLSTMByPixel, self), self.head, canvas, self.config.image_size)


class Layer(nn.Module):
    """x [B, H, W, 2h] -> x + what the LSTMs make of it."""

    def __init__(self, config: DiagonalBiLSTMConfig) -> None:
        super().__init__()
        features, grouping = config.features, config.grouping
        self.lstm = DiagonalBiLSTMLayer(2 * features, features, grouping)
        gain = config.layers**-0.5
        self.up = MaskedConvolution(features, 2 * features, (1, 1), mask="B", grouping=grouping, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.lstm(x)
        return x + self.up(left + down_a_row(right))


class DiagonalBiLSTMLayer(nn.Module):
    """The recurrences from diagonal to diagonal, of both directions."""

    def __init__(self, features_in: int, features: int, grouping: Grouping) -> None:
        super().__init__()
        # Their inputs are not rectified: half the variance of the first weights.
        self.input_to_state = MaskedConvolution(
            features_in, 8 * features, (1, 1), mask="B", grouping=grouping, gates=8, gain=0.5**0.5
        )
        """Four gates of the LSTM from the left, then those of the one from the right."""
        self.from_left = nn.Parameter(torch.empty(4 * features, 2 * features))
        """Of the states above, and then to the left."""
        self.from_right = nn.Parameter(torch.empty(4 * features, 2 * features))
        """Of the states above, and then to the right."""
        for weight in (self.from_left, self.from_right):
            nn.init.normal_(weight, std=(2 * features) ** -0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The states [B, H, W, h] of both LSTMs for x [B, H, W, features_in], that from the right not yet moved."""
        batch, rows, columns, _ = x.shape
        # The bias is in these gates: added later, it would give states to what lies beside the moved rows.
        left, right = self.input_to_state(x).chunk(2, dim=-1)
        gates = skew(torch.stack([left, right.flip(2)]))
        dtype = product_dtype(x)
        weight = torch.stack([self.from_left, self.from_right]).to(dtype).mT
        hidden, cell = lstm_cell(gates[:, :, :, 0], None)
        diagonals = [hidden]
        for of_diagonal in gates.unbind(3)[1:]:
            neighbours = torch.cat([F.pad(hidden, (0, 0, 1, -1)), hidden], dim=-1).flatten(1, 2)
            products = torch.bmm(neighbours.to(dtype), weight).to(x.dtype).unflatten(1, (batch, rows))
            hidden, cell = lstm_cell(of_diagonal + products, cell)
            diagonals.append(hidden)
        states = unskew(torch.stack(diagonals, dim=3), columns)
        return states[0], states[1].flip(2)


def skew(x: Tensor) -> Tensor:
    """[..., H, W, F] -> [..., H, T, F]: row r moved to the right by r, with zeros beside it."""
    rows, columns, features = x.shape[-3:]
    diagonals = rows + columns - 1
    # A row that is one longer than a row of the result begins one later in the result.
    longer = F.pad(x, (0, 0, 0, rows)).flatten(-3, -2)
    return longer[..., : rows * diagonals, :].unflatten(-2, (rows, diagonals))


def unskew(x: Tensor, columns: int) -> Tensor:
    """[..., H, T, F] -> [..., H, W, F]: skew undone."""
    rows, diagonals, _ = x.shape[-3:]
    longer = F.pad(x.flatten(-3, -2), (0, 0, 0, rows)).unflatten(-2, (rows, diagonals + 1))
    return longer[..., :columns, :]


def down_a_row(x: Tensor) -> Tensor:
    """[B, H, W, F]: each row gets what the one above it had, the first one zeros."""
    return F.pad(x, (0, 0, 0, 0, 1, -1))


class DiagonalBiLSTMByPixel:
    """See ByPixel (models/pixel_decoder.py). Of each layer, the states of the row above are kept; those of the LSTM
    from the right are computed when a row is complete, since the row below is the first to see them."""

    def __init__(self, model: DiagonalBiLSTM, images: int) -> None:
        size = model.config.image_size
        self._first = ConvolutionByPixel(model.first, images, size)
        self._layers = [_LayerByPixel(layer, images, size) for layer in model.units() if isinstance(layer, Layer)]

    def begin_row(self, row: int) -> None:
        if row > 0:
            for layer in self._layers:
                layer.begin_row()

    def features(self, x: Tensor, row: int, column: int) -> Tensor:
        x = self._first.at(x, row, column)
        for layer in self._layers:
            x = x + layer.at(x, column)
        return x

    def complete(self, x: Tensor, row: int, column: int) -> None:
        self._first.keep(x, row, column)


class _LayerByPixel:
    """Columns of states begin with one that stands for what lies outside of the image."""

    def __init__(self, layer: Layer, images: int, size: int) -> None:
        self._input_to_state, self._up = ConvolutionByPixel(layer.lstm.input_to_state), ConvolutionByPixel(layer.up)
        weight = layer.lstm.from_left
        dtype, self._features = product_dtype(weight), weight.shape[1] // 2
        self._weights = (layer.lstm.from_left.to(dtype), layer.lstm.from_right.to(dtype))
        shape = (images, 1 + size, self._features)
        self._left, self._left_above, self._right = (weight.new_zeros(shape) for _ in range(3))
        """Hidden states: from the left in this row and in that above, and from the right in that above."""
        self._cells = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        self._right_gates = weight.new_zeros(images, size, 4 * self._features)
        """Of this row, as the input gives them."""

    def begin_row(self) -> None:
        self._left_above = self._left.clone()
        cell = torch.zeros_like(self._cells[:, 0])
        beside = torch.zeros_like(self._right[:, 0])
        for column in reversed(range(self._right_gates.shape[1])):
            gates = self._right_gates[:, column] + self._products(self._right[:, 1 + column], beside, 1)
            beside, cell = lstm_cell(gates, cell)
            self._right[:, 1 + column] = beside

    def at(self, x: Tensor, column: int) -> Tensor:
        """What the layer adds to its input x [N, 2h] at a pixel of this row."""
        gates, self._right_gates[:, column] = self._input_to_state.at(x).chunk(2, dim=-1)
        gates = gates + self._products(self._left_above[:, 1 + column], self._left[:, column], 0)
        self._left[:, 1 + column], self._cells[:, 1 + column] = lstm_cell(gates, self._cells[:, column])
        return self._up.at(self._left[:, 1 + column] + self._right[:, 1 + column])

    def _products(self, above: Tensor, beside: Tensor, direction: int) -> Tensor:
        """What two states [N, h] add to the gates [N, 4h] of the LSTM from the left (0) or from the right (1)."""
        neighbours = torch.cat([above, beside], dim=-1)
        weight = self._weights[direction]
        return F.linear(neighbours.to(weight.dtype), weight).to(above.dtype)
