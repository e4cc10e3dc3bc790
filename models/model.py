"""What does a family of models offer to those who train, evaluate and draw?

A family is a frozen config (`ModelConfig`), whose fields decide the shape of the model, and the model that it builds
(`Model`). Nobody outside of `models/` asks which family it is; the union of all configs stands in trainer/config.py.

Shapes: B batch, H rows, W columns, C values per position (1 sub-pixel or the 3 of a pixel), L = 3 H W / C positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.drawing.canvas import Canvas, Decoder
from models.given import NOTHING, Given
from models.likelihood import Output


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which units the backward pass computes a second time, instead of keeping their activations."""

    every: int = 0
    """Every n-th unit; 0: none."""
    keeps_attention: bool = False
    """Do not recompute attention in these units: its results are small, and take long to compute."""

    def includes(self, unit: int) -> bool:
        """Whether the unit of this number (0 is the first) is recomputed."""
        return self.every > 0 and (unit + 1) % self.every == 0


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products for one image; a product of m x k and k x n counts 2 m k n."""

    forward: int
    backward: int
    """Gradients of weights and of activations: twice the forward products, but for those of the first layer, whose
    input needs no gradient."""
    recomputed: int
    """Forward products done a second time in the backward pass, because their activations were not kept."""

    @property
    def training(self) -> int:
        """What training a model of this shape takes, however it is done: the numerator of model FLOPs utilisation."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


@dataclass(frozen=True, kw_only=True)
class Account:
    """How large a model is, and what it computes for one image."""

    parameters: int
    """Trainable numbers."""
    positions: int
    """L: positions of the sequence that an image is."""
    parts: Mapping[str, Flops]
    """By part of the model, in the order of the forward pass. Exact: products that are computed count, those of pairs
    that attention leaves out do not. What fused kernels compute again inside is not counted."""
    attention: str | None = None
    """The part of products among queries, keys and values; None for a model without attention."""

    @property
    def flops(self) -> Flops:
        return sum(self.parts.values(), Flops(0, 0, 0))


class ModelShape(Protocol):
    """What goes into a model, and what comes out."""

    @property
    def family(self) -> str:
        """The tag of the union of configs."""
        ...

    @property
    def image_size(self) -> int:
        """Rows and columns of the square images."""
        ...

    @property
    def output(self) -> Output:
        """The distribution of a value."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes that the model can be asked for; 0 for none."""
        ...

    @property
    def label_dropout(self) -> float:
        """Rate at which training hides the class; where it is 0, the model knows no images without a class."""
        ...

    @property
    def small_size(self) -> int:
        """Rows and columns of the small image that is super-resolved; 0 for none."""
        ...


class ModelConfig(ModelShape, Protocol):
    """A frozen dataclass of a family. Its constructor raises ValueError with one problem a line."""

    @property
    def num_units(self) -> int:
        """Units that can be recomputed (`Recompute`); those of the model's main stack."""
        ...

    @property
    def unit_period(self) -> int:
        """The kinds of units in the main stack repeat after this many."""
        ...

    def with_units(self, count: int) -> Self:
        """The same model with this many units in its main stack."""
        ...

    def narrow(self) -> Self:
        """The same model with as few features as show which values each position sees; without dropout."""
        ...

    def build(self, recompute: Recompute = ...) -> "Model":
        """The model with its first weights, drawn with torch's generator."""
        ...

    def account(self, recompute: Recompute = ...) -> Account: ...


class Entrance(NamedTuple):
    """Where values enter a model."""

    module: nn.Module
    """Its first input is rows of values [B, ..., any]."""
    positions: Tensor
    """int64: the raster position whose value each row holds, and -1 for none."""
    looks_up: bool = False
    """Values are looked up, so that the rows are the module's output."""


class Intensities(nn.Module):
    """uint8 -> fp32 on [-1, 1]."""

    def forward(self, values: Tensor) -> Tensor:
        return values.float() / 127.5 - 1


class ToldNothing:
    """A config of models that read pixels and are told nothing else."""

    @property
    def num_classes(self) -> int:
        return 0

    @property
    def label_dropout(self) -> float:
        return 0.0

    @property
    def small_size(self) -> int:
        return 0


class Model(nn.Module, ABC):
    """Images and what is given of them -> parameters of the distribution of every value, given all before it."""

    config: ModelShape
    recompute: Recompute
    generation_order: Tensor
    """int64 [L] on the CPU: place in the order of generation -> position. Positions are numbered in raster order:
    row, column, and where a position is a sub-pixel, channel."""

    @abstractmethod
    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        """Parameters of the output distribution (models/likelihood.py), fp32: [B, H, W, 3, 256] (categorical) or
        [B, H, W, 10 components] (mixture).

        images uint8 [B, H, W, 3]. What is returned for a position depends on the values generated before it only.
        Raises ValueError where images or what is given does not fit the config.
        """

    @abstractmethod
    def entrances(self) -> tuple[Entrance, ...]:
        """Where its values begin to count: what gradients end at. Together these hold every way in."""

    @abstractmethod
    def units(self) -> Iterator[nn.Module]:
        """The repeated parts, of which each can be compiled alone, and whose matrices Muon updates."""

    def through(self, index: int, unit: nn.Module, *inputs: Any, draws_random: bool = False, **options: Any) -> Any:
        """What the unit of this number makes of its inputs: in training, where `recompute` says so, with activations
        that the backward pass computes again, from the same random numbers if it draws any."""
        if not (self.training and self.recompute.includes(index)):
            return unit(*inputs)
        return checkpoint(unit, *inputs, use_reentrant=False, preserve_rng_state=draws_random, **options)

    @abstractmethod
    def decoder(self, canvas: Canvas) -> Decoder:
        """What draws the values of a canvas that are not known yet."""

    @property
    def initial_images(self) -> int:
        """How many images `initialise` looks at; 0 for a family whose first weights depend on none."""
        return 0

    def initialise(self, images: Tensor, given: Given = NOTHING) -> None:
        """Set the weights that depend on images (data-dependent initialisation), the others being new.

        Called once in a run, before its first update, with its first training images, in training mode: dropout draws
        from torch's generator. Only where `initial_images` is not 0.
        """
        raise NotImplementedError(f"{type(self).__name__}: the first weights depend on no images")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def check_inputs(shape: ModelShape, images: Tensor, given: Given) -> None:
    """Raise ValueError where inputs do not fit the config."""
    for name, tensor, size in (
        ("images", images, shape.image_size),
        ("small_images", given.small_images, shape.small_size),
    ):
        if (tensor is None) != (size == 0):
            raise ValueError(
                f"{name}: {'missing' if tensor is None else 'given'}, but their size in the config is {size}"
            )
        if tensor is not None and tensor.shape[1:] != (size, size, 3):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but the model reads [B, {size}, {size}, 3]")
    if (given.labels is None) != (shape.num_classes == 0):
        raise ValueError(
            f"labels: {'missing' if given.labels is None else 'given'}, but num_classes is {shape.num_classes}"
        )


LARGEST_SIZES = {"image_size": 1024, "features": 1 << 16, "layers": 4096, "head_features": 1 << 18}
LARGEST_KERNEL = 255
"""Far beyond what anybody trains. A config may come from a stranger, and its sizes decide what a computer does."""


def check_sizes(config: object, *, odd: Collection[str], for_each_colour: Collection[str]) -> None:
    """Raise ValueError, one problem a line, where a size of a config is out of bounds: of kernels, which are odd, and
    of LARGEST_SIZES, among them those that have at least one feature for each colour."""
    problems = []
    for name in (*LARGEST_SIZES, *odd):
        size = getattr(config, name)
        least, most = 3 if name in for_each_colour else 1, LARGEST_SIZES.get(name, LARGEST_KERNEL)
        if size < least:
            problems.append(f"{name}: {size} is less than {least}" + (", one for each colour" if least == 3 else ""))
        elif size > most:
            problems.append(f"{name}: {size} is more than {most}")
        elif name in odd and size % 2 == 0:
            problems.append(f"{name}: {size} is even; a kernel has a pixel in its middle")
    if problems:
        raise ValueError("\n".join(problems))


def num_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in model.parameters())
