"""What is the Row LSTM (van den Oord et al. 2016, Pixel Recurrent Neural Networks, section 3.1)?

A PixelRNN: between the masked convolutions of PixelCNN (models/masked_convolution.py), layers of LSTMs that go through
the image row by row, all pixels of a row at once. A pixel's gates depend on its neighbours in its row by a masked
convolution, computed for the whole image before, and on the states of three pixels of the row above, which are past in
all colours and need no mask. So it sees a triangle above it, which more layers do not widen to the right.

What the paper leaves open: the state above the image is 0, and biases begin at 0.

Shapes: B batch, H rows, W columns, h features of a state.
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
from models.linear import Linear
from models.lstm_cell import LSTMState, lstm_cell
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
class RowLSTMConfig(ToldNothing):
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    family: Literal["row_lstm"] = "row_lstm"
    image_size: int
    """Rows and columns of the square images."""
    output: CategoricalOutput = CategoricalOutput()
    """256 probabilities of a sub-pixel: the paper has no other."""
    features: int
    """Features of a state (h in the paper: 128); twice as many between the layers."""
    layers: int
    """LSTM layers (the paper: up to 12)."""
    head_features: int
    """Features of the layer before the probabilities (the paper: 1024)."""
    first_kernel: int = 7
    """Rows and columns of the first convolution's kernel."""
    kernel: int = 3
    """Columns of a layer's two convolutions: along its row, and over the states of the row above."""
    grouping: Grouping = "interleaved"
    """Which features belong to red, green and blue: by turns, or a block of them each."""

    def __post_init__(self) -> None:
        check_sizes(self, odd=("first_kernel", "kernel"), for_each_colour=("features", "head_features"))

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

    def build(self, recompute: Recompute = Recompute()) -> "RowLSTM":  # noqa: B008 (immutable)
        return RowLSTM(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            model = RowLSTM(self, recompute)
        size, pixels = self.image_size, self.image_size**2
        first, head = pixels * model.first.flops_of_a_pixel, pixels * model.head.flops_of_a_pixel
        layer = model.layers[0]
        assert isinstance(layer, Layer)
        up = pixels * layer.up.flops_of_a_pixel
        a_layer = pixels * layer.lstm.input_to_state.flops_of_a_pixel + up
        a_layer += (pixels - size) * 2 * layer.lstm.state_to_state.weight.numel()  # nothing is above the first row
        layers = self.layers * a_layer
        # Nothing after the last product of a layer needs its result, so torch stops before it.
        again = (a_layer - up) * sum(recompute.includes(unit) for unit in range(self.layers))
        parts = {
            "first convolution": Flops(first, first, 0),  # the image needs no gradient
            "layers": Flops(layers, 2 * layers, again),
            "head": Flops(head, 2 * head, 0),
        }
        return Account(parameters=num_parameters(model), positions=3 * pixels, parts=parts)


class RowLSTM(Model):
    """Images -> logits of every sub-pixel given all that it sees."""

    config: RowLSTMConfig

    def __init__(self, config: RowLSTMConfig, recompute: Recompute) -> None:
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
        return PixelDecoder(partial(RowLSTMByPixel, self), self.head, canvas, self.config.image_size)


class Layer(nn.Module):
    """x [B, H, W, 2h] -> x + what the LSTM makes of it."""

    def __init__(self, config: RowLSTMConfig) -> None:
        super().__init__()
        features, grouping = config.features, config.grouping
        self.lstm = RowLSTMLayer(2 * features, features, config.kernel, grouping)
        gain = config.layers**-0.5
        self.up = MaskedConvolution(features, 2 * features, (1, 1), mask="B", grouping=grouping, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        return x + self.up(hidden)


class RowLSTMLayer(nn.Module):
    """The recurrence from row to row."""

    def __init__(self, features_in: int, features: int, kernel: int, grouping: Grouping) -> None:
        super().__init__()
        self._kernel = kernel
        # Their inputs are not rectified: half the variance of the first weights.
        self.input_to_state = MaskedConvolution(
            features_in, 4 * features, (1, kernel), mask="B", grouping=grouping, gates=4, gain=0.5**0.5
        )
        self.state_to_state = Linear(kernel * features, 4 * features, std=(kernel * features) ** -0.5)
        """Of the states above, from left to right."""

    def forward(self, x: Tensor, above: LSTMState | None = None) -> LSTMState:
        """The states [B, H, W, h] of all pixels of x [B, H, W, features_in]; `above` [B, W, h] is that of the row above
        the image."""
        states: list[LSTMState] = []
        for gates in self.input_to_state(x).unbind(1):
            above = self.row(gates, above)
            states.append(above)
        return LSTMState(*(torch.stack(part, dim=1) for part in zip(*states, strict=True)))

    def row(self, gates: Tensor, above: LSTMState | None) -> LSTMState:
        """The states [B, W, h] of a row, of which the input has given gates [B, W, 4h]."""
        if above is None:
            return lstm_cell(gates, None)
        return lstm_cell(gates + self.from_above(above.hidden), above.cell)

    def from_above(self, hidden: Tensor) -> Tensor:
        """What the states [B, W, h] of the row above add to the gates of a row [B, W, 4h]."""
        columns, side = hidden.shape[1], self._kernel // 2
        padded = F.pad(hidden, (0, 0, side, side))
        neighbours = torch.cat([padded[:, tap : tap + columns] for tap in range(self._kernel)], dim=-1)
        products: Tensor = self.state_to_state(neighbours)
        return products


class RowLSTMByPixel:
    """See ByPixel (models/pixel_decoder.py). Of each layer, the states of the row above are kept."""

    def __init__(self, model: RowLSTM, images: int) -> None:
        size = model.config.image_size
        self._first = ConvolutionByPixel(model.first, images, size)
        self._layers = [_LayerByPixel(layer, images, size) for layer in model.units() if isinstance(layer, Layer)]

    def begin_row(self, row: int) -> None:
        for layer in self._layers:
            layer.begin_row(row)

    def features(self, x: Tensor, row: int, column: int) -> Tensor:
        x = self._first.at(x, row, column)
        for layer in self._layers:
            x = x + layer.at(x, row, column)
        return x

    def complete(self, x: Tensor, row: int, column: int) -> None:
        self._first.keep(x, row, column)


class _LayerByPixel:
    def __init__(self, layer: Layer, images: int, size: int) -> None:
        self._lstm = layer.lstm
        self._input_to_state = ConvolutionByPixel(layer.lstm.input_to_state, images, size)
        self._up = ConvolutionByPixel(layer.up)
        weight = layer.lstm.state_to_state.weight
        shape = (images, size, weight.shape[0] // 4)
        self._hidden = weight.new_zeros(shape)
        self._cell = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        self._above = weight.new_zeros(images, size, weight.shape[0])
        """What the states of the row above add to the gates."""
        self._above_cell = self._cell.clone()

    def begin_row(self, row: int) -> None:
        if row > 0:
            self._above, self._above_cell = self._lstm.from_above(self._hidden), self._cell.clone()

    def at(self, x: Tensor, row: int, column: int) -> Tensor:
        """What the layer adds to its input x [N, 2h] at a pixel."""
        gates = self._input_to_state.at(x, row, column)
        state = lstm_cell(gates + self._above[:, column], self._above_cell[:, column])
        self._hidden[:, column], self._cell[:, column] = state
        return self._up.at(state.hidden)
