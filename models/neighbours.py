"""Which pixels around a pixel are known when it is drawn, and what do they say about it?

Whatever the order of generation: a neighbour counts only where it is generated before the pixel.

Shapes: B batch, L pixels of an image in raster order, T of them, N = 12 neighbours, C = 3 channels, P predictors.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.linear import Linear

Predictor = Literal[
    "median",
    "average",
    "left",
    "above",
    "gradient",
    "learned",
    "plane",
    "left_and_slope",
    "above_and_slope",
    "above_right",
]
"""How a pixel is guessed from its neighbours, W(est), N(orth), NW and so on; WW is left of W, NN above N:
- median: of W, N and W + N - NW (LOCO-I, Weinberger et al. 2000, where it is called MED);
- average: (W + N) / 2; left: W; above: N; above_right: NE; plane: W + N - NW;
- gradient: W + (NE - NW) / 4 + (N - NW) / 4; left_and_slope: W + NE - N; above_and_slope: N + (NE - NNE + N - NN) / 2;
- learned: a linear combination of all channels of all neighbours, which starts at (W + N) / 2 + (NE - NW) / 4."""
PREDICTORS: tuple[Predictor, ...] = get_args(Predictor)
Stem = Literal["previous", "neighbourhood"]
"""What a model makes its first features of: what the paper of its family says, or also what NeighbourhoodStem sees."""

OFFSETS = tuple((0, -distance) for distance in (1, 2)) + tuple((-up, side) for up in (1, 2) for side in range(-2, 3))
"""Rows and columns from a pixel to its neighbours; W is the first."""
WEST, NORTH = (0, -1), (-1, 0)
NEARER = {
    (0, -2): WEST,
    (-1, -2): (-1, -1),
    (-1, -1): NORTH,
    (-1, 1): NORTH,
    (-1, 2): (-1, 1),
    (-2, -2): (-2, -1),
    (-2, -1): (-2, 0),
    (-2, 0): NORTH,
    (-2, 1): (-1, 1),
    (-2, 2): (-2, 1),
}
"""The neighbour that stands in for one which is not there. In the end these are N and W, also for each other."""
HALF_LEVEL = 1 / 255


def known_neighbours(size: int, generation_order: Tensor) -> Tensor:
    """int64 [L, N]: raster position of each neighbour, -1 where it is outside or not generated before the pixel."""
    rank = torch.empty_like(generation_order)
    rank[generation_order] = torch.arange(len(generation_order))
    rows, columns = torch.arange(size * size) // size, torch.arange(size * size) % size
    found = []
    for up, side in OFFSETS:
        row, column = rows + up, columns + side
        inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
        position = torch.where(inside, row * size + column, 0)
        found.append(torch.where(inside & (rank[position] < rank), position, -1))
    return torch.stack(found, dim=1)


def stand_ins(neighbours: Tensor) -> Tensor:
    """int64 [L, N]: as `known_neighbours`, with another neighbour in the place of one that is not there; -1 only where
    there is neither N nor W."""
    columns = dict(zip(OFFSETS, neighbours.unbind(1), strict=True))

    def found(offset: tuple[int, int]) -> Tensor:
        position = columns[offset]
        if offset in NEARER:
            return torch.where(position < 0, found(NEARER[offset]), position)
        return torch.where(position < 0, columns[WEST if offset == NORTH else NORTH], position)

    return torch.stack([found(offset) for offset in OFFSETS], dim=1)


def gather(values: Tensor, positions: Tensor) -> Tensor:
    """values [B, L, C] at positions [T, N]: [B, T, N, C]; zero where a position is -1."""
    found = values.index_select(1, positions.clamp(min=0).flatten()).unflatten(1, positions.shape)
    return found * (positions >= 0)[..., None]


def median(values: Tensor) -> Tensor:
    """The predictor of this name from values of neighbours [..., N, C]: [..., C]."""
    west, north, northwest = (values[..., OFFSETS.index(offset), :] for offset in (WEST, NORTH, (-1, -1)))
    low, high = torch.minimum(west, north), torch.maximum(west, north)
    return torch.maximum(low, torch.minimum(high, west + north - northwest))


def _all_positions(values: Tensor) -> Tensor:
    """Raster positions of values [B, L, C]."""
    return torch.arange(values.shape[1], device=values.device)


class Predictors(nn.Module):
    """Guesses of every pixel from its neighbours."""

    stand_ins: Tensor

    def __init__(self, names: tuple[Predictor, ...], size: int, generation_order: Tensor) -> None:
        super().__init__()
        self.names = names
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            self.register_buffer("stand_ins", stand_ins(known_neighbours(size, generation_order)), persistent=False)
        if "learned" in names:
            self.combine = LearnedPredictor()

    def forward(self, values: Tensor, positions: Tensor) -> Tensor:
        """Intensities [B, L, C] on [-1, 1] and positions [T] -> [B, T, P, C], on [-1, 1]."""
        around = gather(values, self.stand_ins[positions])
        west, north, northwest, northeast, above_north, above_northeast = (
            around[..., OFFSETS.index(offset), :] for offset in (WEST, NORTH, (-1, -1), (-1, 1), (-2, 0), (-2, 1))
        )
        guesses = []
        for name in self.names:
            match name:
                case "median":
                    guess = median(around)
                case "average":
                    guess = (west + north) / 2
                case "left":
                    guess = west
                case "above":
                    guess = north
                case "gradient":
                    guess = west + (northeast - northwest) / 4 + (north - northwest) / 4
                case "learned":
                    guess = self.combine(around)
                case "plane":
                    guess = west + north - northwest
                case "left_and_slope":
                    guess = west + northeast - north
                case "above_and_slope":
                    guess = north + (northeast - above_northeast) / 2 + (north - above_north) / 2
                case "above_right":
                    guess = northeast
            guesses.append(guess)
        return torch.stack(guesses, dim=-2).clamp(-1, 1)

    def of_images(self, images: Tensor) -> Tensor:
        """Intensities [B, H, W, C] -> guesses of every pixel [B, H, W, P, C]."""
        values = images.flatten(1, 2)
        return self(values, _all_positions(values)).unflatten(1, images.shape[1:3])


class LearnedPredictor(nn.Linear):
    """A linear combination of all channels of all neighbours, [..., N, C] -> [..., C], in fp32."""

    GAIN = 0.1
    """Of the weights: an optimizer whose steps have one size for all should move these in smaller ones."""

    def __init__(self) -> None:
        super().__init__(3 * len(OFFSETS), 3)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, around: Tensor) -> Tensor:
        west, north, northwest, northeast = (
            around[..., OFFSETS.index(offset), :] for offset in (WEST, NORTH, (-1, -1), (-1, 1))
        )
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = nn.functional.linear(around.flatten(-2).to(wide), self.weight.to(wide), self.bias.to(wide))
        return (west + north) / 2 + (northeast - northwest) / 4 + self.GAIN * change


class NeighbourhoodStem(nn.Module):
    """What a pixel's neighbours say, as a token.

    Of each neighbour its intensities and whether it is there, by how much it differs from W, and by how much it
    differed from its own guess (`median`). Differences also squashed at two scales, and their size as a logarithm: most
    are of a few levels, and say how smooth the image is.
    """

    FEATURES = 4 * len(OFFSETS) + 3 * 3 * (2 * len(OFFSETS) - 1)
    neighbours: Tensor
    stand_ins: Tensor

    def __init__(self, size: int, generation_order: Tensor, width: int) -> None:
        super().__init__()
        with torch.device("cpu"):
            neighbours = known_neighbours(size, generation_order)
            self.register_buffer("neighbours", neighbours, persistent=False)
            self.register_buffer("stand_ins", stand_ins(neighbours), persistent=False)
        self.combine = Linear(self.FEATURES, width, std=(3 * len(OFFSETS)) ** -0.5, bias=True)

    def features(self, values: Tensor, positions: Tensor) -> Tensor:
        """Intensities [B, L, C] on [-1, 1] and positions [T] -> at least fp32 [B, T, FEATURES]."""
        values = values.to(torch.promote_types(values.dtype, self.combine.weight.dtype))
        neighbours = self.neighbours[positions]
        present = (neighbours >= 0).float()[..., None]
        around = gather(values, neighbours)
        differences = (around[..., 1:, :] - around[..., :1, :]) * present[:, 1:] * present[:, :1]
        if len(positions) < values.shape[1]:  # as in drawing: only where they are asked for
            of_neighbours = self._errors(values, neighbours.clamp(min=0).flatten())
            errors = of_neighbours.unflatten(1, neighbours.shape) * present
        else:
            errors = gather(self._errors(values, torch.arange(values.shape[1], device=values.device)), neighbours)
        details = torch.cat([differences, errors], dim=-2)
        parts = [around, torch.tanh(8 * details), torch.tanh(40 * details), (details.abs() + HALF_LEVEL).log() / 3 + 1]
        flat = [part.flatten(-2) for part in parts]
        return torch.cat([*flat, present.squeeze(-1).expand(len(values), -1, -1)], dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, FEATURES] -> [B, T, D]."""
        return self.combine(features.to(self.combine.weight.dtype))

    def of_images(self, images: Tensor) -> Tensor:
        """Intensities [B, H, W, C] -> the token of every pixel [B, H, W, D]."""
        values = images.flatten(1, 2)
        return self(self.features(values, _all_positions(values))).unflatten(1, images.shape[1:3])

    def _errors(self, values: Tensor, positions: Tensor) -> Tensor:
        """By how much pixels differ from their guesses: [B, T, C]."""
        return values.index_select(1, positions) - median(gather(values, self.stand_ins[positions]))


OWN_FEATURES = 3 + 4 * 3
"""Numbers that `of_own_pixel` gives."""


def of_own_pixel(pixels: Tensor, missed: Tensor, channels: Tensor) -> Tensor:
    """What is known of the pixel of a sub-pixel before it: intensities of pixels [B, T, 3] on [-1, 1], by how much they
    differ from their guesses, and the channels int64 [T] -> [B, T, OWN_FEATURES]."""
    known = torch.arange(3, device=channels.device) < channels[:, None]
    missed = missed * known
    parts = [
        pixels * known,
        torch.tanh(8 * missed),
        torch.tanh(40 * missed),
        ((missed.abs() + HALF_LEVEL).log() / 3 + 1) * known,
    ]
    channel = nn.functional.one_hot(channels, 3).expand(len(pixels), -1, -1)
    return torch.cat([channel, *parts], dim=-1)


class SubpixelStem(NeighbourhoodStem):
    """What the neighbours of a sub-pixel's pixel say, and the channels of the pixel itself that are known, as a token.

    Of each known channel its intensity, and by how much it differs from its guess (`median`), as of neighbours.
    """

    def __init__(self, size: int, generation_order: Tensor, width: int) -> None:
        """generation_order: of pixels."""
        super().__init__(size, generation_order, width)
        self.combine_own = Linear(OWN_FEATURES, width, std=3**-0.5)

    def tokens(self, values: Tensor, positions: Tensor) -> Tensor:
        """Intensities of pixels [B, L, C] on [-1, 1] and positions of sub-pixels [T] -> [B, T, D]."""
        values = values.to(torch.promote_types(values.dtype, self.combine.weight.dtype))
        pixels, channels = positions // 3, positions % 3
        if len(positions) > values.shape[1]:  # those of all sub-pixels: once for each pixel
            around = self(self.features(values, _all_positions(values))).index_select(1, pixels)
        else:
            around = self(self.features(values, pixels))
        own = of_own_pixel(values.index_select(1, pixels), self._errors(values, pixels), channels)
        return around + self.combine_own(own.to(self.combine_own.weight.dtype))


def flops_at_a_pixel(model: nn.Module) -> int:
    """Of the products by which stem and predictors of a model combine what they see."""
    parts = (module for module in model.modules() if isinstance(module, NeighbourhoodStem | LearnedPredictor))
    return sum(2 * parameter.numel() for part in parts for parameter in part.parameters() if parameter.ndim == 2)
