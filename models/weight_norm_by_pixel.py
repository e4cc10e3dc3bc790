"""How are layers with weight normalisation (models/weight_norm.py) computed a few pixels at a time, each pixel once?

Weights are normalised once. What later pixels see of a convolution's input is kept: kernels have at most two rows, so
that two rows of it are enough. All products are of matrices, with pixels of images as rows.

Shapes: N images, C pixels side by side in a row of W columns, F features, which come last here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear import product_dtype
from models.weight_norm import (
    Convolution,
    Dense,
    GatedResnet,
    TransposedConvolution,
    WeightNormed,
    activated,
)


class DenseByPixel:
    """[N, C, F] -> [N, C, F']."""

    def __init__(self, layer: Dense, *, in_fp32: bool = False) -> None:
        """in_fp32: products and result are at least fp32."""
        dtype = torch.promote_types(layer.v.dtype, torch.float32) if in_fp32 else product_dtype(layer.v)
        self._matrix, self._bias, self._in_fp32 = layer.weight().to(dtype), layer.b.to(dtype), in_fp32

    def at(self, x: Tensor, row: int = 0, column: int = 0) -> Tensor:
        """The result at pixels whose inputs are x; where they are does not matter."""
        out = F.linear(x.to(self._matrix.dtype), self._matrix, self._bias)
        return out if self._in_fp32 else out.to(x.dtype)


class ConvolutionByPixel:
    """A convolution whose inputs are given in raster order."""

    def __init__(self, layer: Convolution, images: int, columns: int) -> None:
        """images: N; columns: W of the input."""
        dtype, weight = product_dtype(layer.v), layer.weight()
        left, right, self._above, _ = layer.margins
        self._left, self._stride, self._kernel_columns = left, layer.stride, weight.shape[3]
        self._matrix, self._bias = weight.transpose(1, 2).flatten(1).to(dtype), layer.b.to(dtype)
        shape = (images, left + columns + right, weight.shape[1])
        self._rows = [layer.v.new_zeros(shape), layer.v.new_zeros(shape)]
        """Inputs of the last even and of the last odd row, with what lies beside the image."""

    def keep(self, x: Tensor, row: int, column: int) -> None:
        """The inputs x [N, C, F] of pixels of a row, the first of which is in this column."""
        begin = self._left + column
        self._rows[row % 2][:, begin : begin + x.shape[1]] = x

    def result(self, row: int, column: int, count: int) -> Tensor:
        """[N, count, F'], the first of which stands at this pixel of the input, and the next ones at steps of the
        stride to the right."""
        end = column + self._stride * (count - 1) + self._kernel_columns
        rows = [self._rows[(row - above) % 2][:, column:end] for above in reversed(range(self._above + 1))]
        windows = torch.stack([each.unfold(1, self._kernel_columns, self._stride) for each in rows], dim=2)
        out = F.linear(windows.flatten(2).to(self._matrix.dtype), self._matrix, self._bias)
        return out.to(windows.dtype)

    def at(self, x: Tensor, row: int, column: int) -> Tensor:
        """The result [N, C, F'] at pixels whose inputs are x; a kernel that sees what is to its right asks for whole
        rows."""
        self.keep(x, row, column)
        return self.result(row, column, x.shape[1])


class TransposedConvolutionByPixel:
    """[N, C, F] -> [N, 2, 2 C, F']: two rows and twice the columns. A kernel of three columns asks for whole rows."""

    def __init__(self, layer: TransposedConvolution) -> None:
        dtype, weight = product_dtype(layer.v), layer.weight()
        self._kernel = weight.shape[2:]
        self._matrix, self._bias = weight.permute(2, 3, 1, 0).flatten(0, 2).to(dtype), layer.b.to(dtype)

    def at(self, x: Tensor) -> Tensor:
        products = F.linear(x.to(self._matrix.dtype), self._matrix).unflatten(2, (*self._kernel, -1)).transpose(1, 2)
        if self._kernel[1] == 3:
            left, middle, right = products.unbind(3)
            # Between two pixels of the input stands what both add to, the right column of one and the left of the next.
            products = torch.stack([middle, right + F.pad(left[:, :, 1:], (0, 0, 0, 1))], dim=3)
        return (products.flatten(2, 3) + self._bias).to(x.dtype)


class GatedResnetByPixel:
    """x [N, C, F] -> [N, C, F], in raster order."""

    def __init__(self, block: GatedResnet, images: int, columns: int, labels: Tensor | None = None) -> None:
        """images: N; columns: W; labels: int64 [N] of a block that is told classes."""
        self._nonlinearity = block.nonlinearity
        self._first, self._second = (by_pixel(layer, images, columns) for layer in (block.first, block.second))
        self._beside = DenseByPixel(block.beside) if hasattr(block, "beside") else None
        self._of_class = None if labels is None else block.of_class(labels).flatten(1)[:, None]

    def at(self, x: Tensor, row: int, column: int, beside: Tensor | None = None) -> Tensor:
        """The result at pixels, the first of which is the given one; see ConvolutionByPixel.at."""
        hidden = self._first.at(self._activated(x), row, column)
        if beside is not None:
            assert self._beside is not None
            hidden = hidden + self._beside.at(self._activated(beside))
        both = self._second.at(self._activated(hidden), row, column)
        if self._of_class is not None:
            both = both + self._of_class
        value, gate = both.chunk(2, dim=2)
        return x + value * gate.sigmoid()

    def _activated(self, x: Tensor) -> Tensor:
        return activated(x, self._nonlinearity, dim=2)


def by_pixel(layer: WeightNormed, images: int, columns: int) -> DenseByPixel | ConvolutionByPixel:
    """The layer of a block."""
    if isinstance(layer, Convolution):
        return ConvolutionByPixel(layer, images, columns)
    assert isinstance(layer, Dense)
    return DenseByPixel(layer)
