"""How do models of causal convolutions draw pixel by pixel, without computing anything of earlier pixels again?

The features of a pixel depend on those of pixels up to it alone, so each is computed when its turn comes and kept for
those after it. A pixel has its turn once for each colour to be drawn: red shows in the features of green and blue,
green in those of blue. Blue shows in none of its own pixel, but in those after it. Where a mixture describes all three
colours (`WholePixelDecoder`), nothing of a pixel shows in its own features, and it has one turn.

Shapes: N images that are computed together, F features, W columns.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.drawing.canvas import Canvas
from models.likelihood import around_guesses
from models.linear import ROWS_OF_A_PRODUCT, product_dtype
from models.masked_convolution import ColourHead, MaskedConvolution, intensities
from models.neighbours import NeighbourhoodStem, Predictors
from models.weight_norm import Dense
from models.weight_norm_by_pixel import DenseByPixel


class ByPixel(Protocol):
    """A network up to its head that is computed in raster order, and keeps what later pixels need."""

    def begin_row(self, row: int) -> None:
        """All pixels of the rows above are complete."""
        ...

    def features(self, x: Tensor, row: int, column: int) -> Tensor:
        """What the head reads of a pixel [N, F], of its intensities [N, 3], of which those not drawn yet do not
        count. Asked again for the same pixel, it forgets what it kept the time before."""
        ...

    def complete(self, x: Tensor, row: int, column: int) -> None:
        """Keep the intensities [N, 3] of a pixel, of which blue alone may have changed since it was asked for
        features."""
        ...


class PixelDecoder:
    """Draws a canvas: see Decoder."""

    def __init__(self, network: Callable[[int], ByPixel], head: ColourHead, canvas: Canvas, size: int) -> None:
        """network: makes what computes so many images of size x size."""
        self._network, self._head, self._canvas, self._size = network, head, canvas, size
        self.parameters = torch.empty(0)

    def steps(self) -> Iterator[Tensor]:
        canvas, size, dtype = self._canvas, self._size, self._head.logits.weight.dtype
        values = canvas.values
        count, padding = images_computed(canvas)
        network = self._network(count + padding)
        hidden, logits = ConvolutionByPixel(self._head.hidden), ConvolutionByPixel(self._head.logits, in_fp32=True)
        last = int((~canvas.known).nonzero()[-1]) if not canvas.known.all() else -1
        for pixel in range(last // 3 + 1):
            row, column = divmod(pixel, size)
            if column == 0:
                network.begin_row(row)
            positions = torch.arange(3 * pixel, 3 * pixel + 3)
            for colour in (~canvas.known[positions]).nonzero().flatten().tolist():
                x = network.features(self._pixel(pixel, padding, dtype), row, column)
                of_colours = self._head.by_colour(logits.at(F.relu(hidden.at(F.relu(x)))))
                self.parameters = of_colours[:count, colour, None, None]
                place = positions[colour : colour + 1].to(values.device)
                values[:, place] = canvas.draw(self.parameters, canvas.noise(place))
                yield positions[colour : colour + 1]
            x = self._pixel(pixel, padding, dtype)
            if canvas.known[positions[2]]:  # red and green may have been drawn since features were asked for, if at all
                network.features(x, row, column)
            network.complete(x, row, column)

    def _pixel(self, pixel: int, padding: int, dtype: torch.dtype) -> Tensor:
        """Its intensities in all images that are computed [N, 3]."""
        x = intensities(self._canvas.values[:, 3 * pixel : 3 * pixel + 3, 0], dtype)
        return F.pad(x.repeat(self._canvas.copies, 1), (0, 0, 0, padding))


class ByWholePixel(Protocol):
    """A network up to its head that is computed in raster order, and keeps what later pixels need."""

    def begin_row(self, row: int) -> None:
        """All pixels of the rows above are complete."""
        ...

    def features(self, stem: Tensor | None, row: int, column: int) -> Tensor:
        """What the head reads of a pixel [N, 1, F], before its nonlinearity; stem [N, 1, F]: what the pixels around say
        (NeighbourhoodStem), of a network that is told."""
        ...

    def complete(self, x: Tensor, row: int, column: int) -> None:
        """Keep the intensities [N, 1, 3] of the pixel that was asked for last."""
        ...


class WholePixelDecoder:
    """Draws a canvas of mixtures: see Decoder."""

    def __init__(
        self,
        network: Callable[[int], ByWholePixel],
        head: Dense,
        canvas: Canvas,
        size: int,
        *,
        stem: NeighbourhoodStem | None,
        predictors: Predictors | None,
    ) -> None:
        """network: makes what computes so many images of size x size. stem: what it is told of. predictors: whose
        guesses the head's parameters are relative to."""
        self._network, self._head, self._canvas, self._size = network, head, canvas, size
        self._stem, self._predictors = stem, predictors
        self.parameters = torch.empty(0)

    def steps(self) -> Iterator[Tensor]:
        canvas = self._canvas
        values = canvas.values
        count, padding = images_computed(canvas)
        network, head = self._network(count + padding), DenseByPixel(self._head, in_fp32=True)
        known = torch.zeros(count + padding, values.shape[1], 3, dtype=torch.float32, device=values.device)
        """Intensities of pixels that are complete, on [-1, 1], as the forward pass reads them whatever its dtype."""
        last = int((~canvas.known).nonzero()[-1]) if not canvas.known.all() else -1
        for pixel in range(last + 1):
            row, column = divmod(pixel, self._size)
            if column == 0:
                network.begin_row(row)
            position = torch.tensor([pixel])
            place = position.to(values.device)
            stem = None if self._stem is None else self._stem(self._stem.features(known, place))
            features = network.features(stem, row, column)
            if not canvas.known[pixel]:
                parameters = head.at(F.elu(features))  # whatever stands before the layers of blocks
                if self._predictors is not None:
                    parameters = around_guesses(parameters, self._predictors(known, place))
                self.parameters = parameters[:count]
                values[:, place] = canvas.draw(self.parameters, canvas.noise(place))
                yield position
            drawn = (values[:, pixel].float() - 127.5) / 127.5
            known[:, pixel] = F.pad(drawn.repeat(canvas.copies, 1), (0, 0, 0, padding))
            network.complete(known[:, pixel : pixel + 1], row, column)


def images_computed(canvas: Canvas) -> tuple[int, int]:
    """How many images are computed for a canvas, and how many more beside them: on a CPU in full rows of a product, so
    that an image is the same in any batch."""
    count = canvas.copies * len(canvas.values)
    return count, -count % ROWS_OF_A_PRODUCT if canvas.values.device.type == "cpu" else 0


class ConvolutionByPixel:
    """A masked convolution of inputs that are given, and kept, pixel by pixel."""

    def __init__(
        self, convolution: MaskedConvolution, images: int = 0, size: int = 0, *, in_fp32: bool = False
    ) -> None:
        """images, size: of a kernel that sees more than the pixel itself."""
        weight = convolution.weight * convolution.visible
        left, right, self._above, _ = convolution.padding
        self._left, self._columns = left, left + 1 + right
        self._in_fp32 = in_fp32
        dtype = torch.promote_types(weight.dtype, torch.float32) if in_fp32 else product_dtype(weight)
        self._bias = convolution.bias.to(dtype)
        self._inputs = None
        if weight.ndim == 4:
            # A kernel of one row has no columns to its right, and none to be kept there.
            shape = (images, self._above + size, left + size + right, weight.shape[1])
            self._inputs = weight.new_zeros(shape)
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        self._matrix = weight.to(dtype)

    def keep(self, x: Tensor, row: int, column: int) -> None:
        """The input x [N, features_in] of a pixel, for those after it."""
        assert self._inputs is not None
        self._inputs[:, self._above + row, self._left + column] = x

    def at(self, x: Tensor, row: int = 0, column: int = 0) -> Tensor:
        """The result [N, F] at a pixel whose input is x [N, features_in]."""
        if self._inputs is not None:
            self.keep(x, row, column)
            x = self._inputs[:, row : row + self._above + 1, column : column + self._columns].flatten(1)
        out = F.linear(x.to(self._matrix.dtype), self._matrix, self._bias)
        return out if self._in_fp32 else out.to(x.dtype)
