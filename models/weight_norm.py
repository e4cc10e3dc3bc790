"""What are PixelCNN++ and PixelSNAIL made of: layers with weight normalisation, and the gated residual block?

A weight is g V / |V|, one norm for each feature of the result (Salimans and Kingma 2016). The first g and b follow from
the first images: each layer's results have mean 0 and variance 1 over them (`set_scales_from_images`). Convolutions
look up and left only; shifting the result by a row or a column makes them strict.

Checked against the authors' code by tests/support/rivals_reference.py. Features come second: B batch, F features, H
rows, W columns.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.likelihood import Mixtures, PredictorMixtureOutput, initial_parameters
from models.linear import product_dtype

Nonlinearity = Literal["concat_elu", "elu", "relu"]
"""concat_elu(x) = elu([x, -x]) (Shang et al. 2016) has twice the features of x."""
Sees = Literal["above", "above and left"]
"""Of the kernel's pixels, the last row's middle one or the last row's last one stands at the result's pixel."""
SPREAD_OF_V = 0.05
GAIN_OF_GATES = 0.1
"""The variance that a block adds at first is small: its last convolution starts with a tenth of the usual scale."""
OPINION_AT_FIRST = 0.1
"""How far parameters of a mixture around guesses begin from those that are typical."""
VARIANCE_FLOOR = 1e-10


class WeightNormed(nn.Module):
    """A layer with v, whose length does not matter, and a scale g and a bias b for each feature of its result."""

    out_axis = 0
    """Axis of v along which the result's features lie."""

    def __init__(self, v_shape: tuple[int, ...], initial_scale: float, initial_mean: Tensor | float = 0.0) -> None:
        super().__init__()
        self.initial_scale, self.initial_mean = initial_scale, initial_mean
        """Standard deviation and mean (of all features, or of each) of the results over the first images."""
        features = v_shape[self.out_axis]
        # In the constructor of the leaf: ZeRO-3 splits a module's weights among ranks as soon as it is constructed.
        self.v = nn.Parameter(torch.empty(v_shape))
        self.g = nn.Parameter(torch.full((features,), initial_scale))
        self.b = nn.Parameter(torch.zeros(features) + initial_mean)
        nn.init.normal_(self.v, std=SPREAD_OF_V)

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        return self.products(x.to(dtype), self.weight().to(dtype), self.b.to(dtype)).to(x.dtype)

    def weight(self) -> Tensor:
        """g V / |V|, at least in fp32: a norm over thousands of squares."""
        v, g = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (self.v, self.g))
        shape = [-1 if axis == self.out_axis else 1 for axis in range(v.ndim)]
        axes = [axis for axis in range(v.ndim) if axis != self.out_axis]
        return v * (g.view(shape) / v.square().sum(axes, keepdim=True).sqrt())

    def products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What the layer computes, with its weights in the dtype of x."""
        raise NotImplementedError

    def uncropped(self, x: Tensor) -> Tensor:
        """The results whose moments count, those included that the layer cuts off."""
        return self.forward(x)

    def flops(self, x: Tensor, result: Tensor) -> int:
        """Of the products for one image."""
        return 2 * self.v.numel() * result.shape[2] * result.shape[3]


class Convolution(WeightNormed):
    """[B, F, H, W] -> [B, F', H, W], or half the rows and columns with stride 2; a pixel sees what the kernel, of so
    many rows and columns, holds above and to the left of it, and itself."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        kernel: tuple[int, int],
        *,
        sees: Sees,
        stride: int = 1,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__((features_out, features_in, *kernel), initial_scale)
        rows, columns = kernel
        beside = ((columns - 1) // 2, (columns - 1) // 2) if sees == "above" else (columns - 1, 0)
        self.margins = (*beside, rows - 1, 0)
        self.stride = stride

    def products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.margins), weight, bias, stride=self.stride)


class TransposedConvolution(WeightNormed):
    """[B, F, H, W] -> [B, F', 2 H, 2 W]: kernels of 2x3 pixels that see what is above, or of 2x2, also to the left."""

    out_axis = 1

    def __init__(self, features_in: int, features_out: int, *, sees: Sees) -> None:
        columns = 3 if sees == "above" else 2
        super().__init__((features_in, features_out, 2, columns), 1.0)
        self.cut = (columns - 1) // 2
        """Columns on each side of the whole result that are not part of it."""

    def products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=(0, self.cut), output_padding=(0, self.cut))

    def uncropped(self, x: Tensor) -> Tensor:
        """With the last row and the outer columns, some of which no kernel reaches: the authors measured these, too."""
        return F.conv_transpose2d(x, self.weight(), self.b, stride=2, output_padding=1)

    def flops(self, x: Tensor, result: Tensor) -> int:
        return 2 * self.v.numel() * x.shape[2] * x.shape[3]


class Dense(WeightNormed):
    """[B, F, H, W] -> [B, F', H, W], pixel by pixel."""

    def __init__(
        self, features_in: int, features_out: int, *, initial_scale: float = 1.0, initial_mean: Tensor | float = 0.0
    ) -> None:
        super().__init__((features_out, features_in), initial_scale, initial_mean)

    def products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight[:, :, None, None], bias)


def mixture_head(features: int, output: Mixtures) -> Dense:
    """[B, F, H, W] -> [B, 10 K, H, W]. Around guesses it begins near them; else the first images decide, as always."""
    if isinstance(output, PredictorMixtureOutput):
        mean = initial_parameters(output)
        return Dense(features, len(mean), initial_scale=OPINION_AT_FIRST, initial_mean=mean)
    return Dense(features, 10 * output.components)


class ClassWeights(nn.Embedding):
    """int64 [B] -> [B, F, 1, 1]: what is added everywhere for a class."""

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__(num_classes, features)
        nn.init.normal_(self.weight, std=SPREAD_OF_V)

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(labels)[:, :, None, None]


MakeLayer = Callable[..., WeightNormed]
"""(features_in, features_out, initial_scale=...) -> a layer that keeps rows and columns."""


class GatedResnet(nn.Module):
    """x -> x + p sigmoid(q), where p and q are what two layers make of x, of `beside`, and of the class."""

    def __init__(
        self,
        features: int,
        make: MakeLayer,
        nonlinearity: Nonlinearity,
        dropout: float,
        *,
        features_beside: int = 0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.nonlinearity = nonlinearity
        widened = 2 if nonlinearity == "concat_elu" else 1
        self.first = make(widened * features, features)
        if features_beside:
            self.beside = Dense(widened * features_beside, features)
        self.dropout = nn.Dropout(dropout)
        self.second = make(widened * features, 2 * features, initial_scale=GAIN_OF_GATES)
        if num_classes:
            self.of_class = ClassWeights(num_classes, 2 * features)

    def forward(self, x: Tensor, beside: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        hidden = self.first(activated(x, self.nonlinearity))
        if beside is not None:
            hidden = hidden + self.beside(activated(beside, self.nonlinearity))
        both = self.second(self.dropout(activated(hidden, self.nonlinearity)))
        if labels is not None:
            both = both + self.of_class(labels)
        value, gate = both.chunk(2, dim=1)
        return x + value * gate.sigmoid()


class Entry(nn.Module):
    """Intensities on [-1, 1], [B, H, W, 3] -> [B, 4, H, W]: with ones, by which layers know the image's border, since
    beyond it everything is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1).permute(0, 3, 1, 2)


def activated(x: Tensor, nonlinearity: Nonlinearity, dim: int = 1) -> Tensor:
    """dim: the axis of features."""
    match nonlinearity:
        case "concat_elu":
            return F.elu(torch.cat([x, -x], dim=dim))
        case "elu":
            return F.elu(x)
        case "relu":
            return F.relu(x)


def down_shift(x: Tensor) -> Tensor:
    """Each row takes the place of the next one; the first is 0."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def right_shift(x: Tensor) -> Tensor:
    """Each column takes the place of the next one; the first is 0."""
    return F.pad(x, (1, 0))[:, :, :, :-1]


@torch.no_grad()
def set_scales_from_images(
    model: nn.Module, run: Callable[[], Any], variance_floor: Callable[[WeightNormed], float]
) -> None:
    """Run the model once, layer after layer, with g and b such that results have the layer's mean and standard
    deviation over images and pixels. variance_floor is added to variances, which are not corrected for their number."""

    def set_scale(layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        assert isinstance(layer, WeightNormed)
        layer.g.fill_(1.0)
        layer.b.zero_()
        variance, mean = torch.var_mean(layer.uncropped(inputs[0]), (0, 2, 3), correction=0)
        layer.g.copy_(layer.initial_scale / (variance + variance_floor(layer)).sqrt())
        layer.b.copy_(torch.as_tensor(layer.initial_mean, device=mean.device) - mean * layer.g)
        return layer.forward(inputs[0])  # instead of the result

    hooks = [layer.register_forward_hook(set_scale) for layer in layers(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


def layers(model: nn.Module) -> Iterator[WeightNormed]:
    return (module for module in model.modules() if isinstance(module, WeightNormed))


def layer_flops(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Products for one image of each layer that `run` comes by, by its name in the model."""
    found: dict[str, int] = {}
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, WeightNormed)}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(layer, WeightNormed)
        found[names[layer]] = layer.flops(inputs[0], result)

    hooks = [layer.register_forward_hook(count) for layer in names]
    run()
    for hook in hooks:
        hook.remove()
    return found
