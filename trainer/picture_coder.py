"""How do the pixels of a picture of any size become bytes, and come back to the last bit?

A picture is cut into tiles of the model's image size, and each value is entropy-coded (constriction's range coder)
with the probabilities that the model gives it. What lies outside of the picture in the tiles at its edges is not coded:
it repeats the nearest pixel, which encoder and decoder know alike.

Both must compute the same integers from the same values. So both walk the same decoder, on the CPU and in fp64, where
batch, threads and the kind of processor change a result by 1e-14 or so; what the model says is rounded more coarsely
before anything is derived from it. Which tiles share a stream depends on nothing but their number and size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import constriction
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.by_channel import ByChannel
from models.given import Given
from models.model import Model
from models.teacher_forcing import parameters_in_turn
from trainer.errors import CheckpointError, Irreproducible

PIXELS_OF_A_STREAM = 1 << 15
"""Tiles of about so many pixels are coded one after the other into one stream, whose end costs some bytes."""
PARAMETER_STEP = 2.0**-14
"""What the model says is rounded to multiples of it: the step of a mean is 1/128 of a level."""
PROBABILITY_STEP = 2.0**-20
"""Probabilities are rounded to multiples of it; the coder gives each intensity another 2^-24 and never less."""
_CATEGORICAL = constriction.stream.model.Categorical(perfect=False)

Progress = Callable[[int], None]
"""Values that are done, of height x width x 3 (or 1, of gray ones)."""


@dataclass(frozen=True)
class Picture:
    """What the picture's size and the model's make of it."""

    height: int
    width: int
    is_gray: bool
    """Of each pixel red alone is coded; the others are equal to it."""
    tile_size: int

    @property
    def num_colours(self) -> int:
        return 1 if self.is_gray else 3

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_size)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_size)

    @property
    def num_tiles(self) -> int:
        return self.rows * self.columns

    @property
    def tiles_of_a_stream(self) -> int:
        return max(1, PIXELS_OF_A_STREAM // self.tile_size**2)

    @property
    def num_streams(self) -> int:
        return -(-self.num_tiles // self.tiles_of_a_stream)

    def nearest(self, tiles: slice) -> Tensor:
        """int64 [N, S S]: for each pixel of these tiles the nearest one of the same tile that is in the picture."""
        numbers, along = torch.arange(self.num_tiles)[tiles], torch.arange(self.tile_size)
        last_row, last_column = (
            (extent - 1 - start * self.tile_size)[:, None].clamp(max=self.tile_size - 1)
            for extent, start in ((self.height, numbers // self.columns), (self.width, numbers % self.columns))
        )
        rows, columns = along.minimum(last_row), along.minimum(last_column)
        return (rows[:, :, None] * self.tile_size + columns[:, None, :]).flatten(1)

    def cut(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> [tiles, S, S, 3]; zero outside of the picture."""
        size = self.tile_size
        below, right = self.rows * size - self.height, self.columns * size - self.width
        padded = F.pad(pixels, (0, 0, 0, right, 0, below))
        return padded.view(self.rows, size, self.columns, size, 3).transpose(1, 2).reshape(-1, size, size, 3)

    def joined(self, tiles: Tensor) -> Tensor:
        """The inverse of `cut`."""
        size = self.tile_size
        rows = tiles.view(self.rows, self.columns, size, size, 3).transpose(1, 2)
        return rows.reshape(self.rows * size, self.columns * size, 3)[: self.height, : self.width]


def encode(
    model: Model, pixels: Tensor, *, is_gray: bool, label: int | None, batch_tiles: int, progress: Progress
) -> list[bytes]:
    """The streams of a picture, uint8 [H, W, 3] on the CPU; the same whatever `batch_tiles`, how many tiles of it are
    computed at once. The model is in fp64 (`in_fp64`)."""
    picture = Picture(pixels.shape[0], pixels.shape[1], is_gray, model.config.image_size)
    encoders = [constriction.stream.queue.RangeEncoder() for _ in range(picture.num_streams)]
    tiles = picture.cut(pixels)

    def code(stream: int, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        encoders[stream].encode(values, _CATEGORICAL, weights)
        return values

    _walk(model, picture, tiles, code, label=label, batch_tiles=batch_tiles, progress=progress)
    return [encoder.get_compressed().astype("<u4").tobytes() for encoder in encoders]


def decode(
    model: Model,
    streams: Sequence[bytes],
    *,
    height: int,
    width: int,
    is_gray: bool,
    label: int | None,
    batch_tiles: int,
    progress: Progress,
) -> Tensor:
    """The picture uint8 [H, W, 3] of the streams that `encode` gave.

    Raises Irreproducible where they hold no values of these probabilities, ValueError for another number of streams.
    """
    picture = Picture(height, width, is_gray, model.config.image_size)
    decoders = [constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4")) for stream in streams]
    if len(decoders) != picture.num_streams:
        raise ValueError(f"{len(decoders)} streams, but the tiles of such a picture take {picture.num_streams}")
    tiles = torch.zeros(picture.num_tiles, picture.tile_size, picture.tile_size, 3, dtype=torch.uint8)

    def code(stream: int, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        try:
            return decoders[stream].decode(_CATEGORICAL, weights)
        except AssertionError:  # what it raises for words that no encoder writes
            raise Irreproducible("the file holds no values of the probabilities that were computed here") from None

    _walk(model, picture, tiles, code, label=label, batch_tiles=batch_tiles, progress=progress)
    return picture.joined(tiles)


@contextlib.contextmanager
def in_fp64(model: Model) -> Iterator[None]:
    """The model on the CPU and in fp64, and everything that it computes meanwhile."""
    before, device, dtype = torch.get_default_dtype(), model.device, next(model.parameters()).dtype
    torch.set_default_dtype(torch.float64)
    try:
        model.cpu().double()
        yield
    finally:
        torch.set_default_dtype(before)
        model.to(device, dtype)


Code = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Number of a stream, values int32 [n] in the tiles, weights [n, 256] of all intensities -> the true values."""


def _walk(
    model: Model,
    picture: Picture,
    tiles: Tensor,
    code: Code,
    *,
    label: int | None,
    batch_tiles: int,
    progress: Progress,
) -> None:
    """Take all tiles, uint8 [tiles, S, S, 3], through the model, and put into them what `code` makes of their
    values."""
    streams_at_once = max(1, batch_tiles // picture.tiles_of_a_stream)
    done = 0
    for first in range(0, picture.num_streams, streams_at_once):
        batch = slice(first * picture.tiles_of_a_stream, (first + streams_at_once) * picture.tiles_of_a_stream)
        labels = None if label is None else torch.full((len(tiles[batch]),), label)
        for coded in _walk_batch(model, picture, tiles, batch, first, code, Given(labels=labels)):
            done += coded
            progress(done)


def _walk_batch(
    model: Model, picture: Picture, tiles: Tensor, batch: slice, first_stream: int, code: Code, given: Given
) -> Iterator[int]:
    """The same for one batch of tiles; how many values were done in each step of the model."""
    length, output = len(model.generation_order), model.config.output
    truth = tiles[batch].reshape(len(tiles[batch]), length, -1)
    channels = truth.shape[2]
    subpixels = 3 // channels  # positions of a pixel
    num_colours = picture.num_colours
    # Where the value of a position comes from if it is not coded.
    nearest = picture.nearest(batch)
    is_inside = nearest == torch.arange(nearest.shape[1])
    remaining = int(is_inside.sum()) * num_colours
    values = torch.zeros_like(truth)
    for positions, parameters in parameters_in_turn(model, values, given):
        pixels, colours = positions // subpixels, positions % subpixels
        coded = is_inside[:, pixels] & (colours < num_colours)
        sources = nearest[:, pixels] * subpixels + (0 if picture.is_gray else colours)
        filled = values.gather(1, sources[..., None].expand(-1, -1, channels))
        found = truth[:, positions][coded]
        streams = _streams(coded, first_stream, picture.tiles_of_a_stream)
        distributions = ByChannel(output, (parameters[coded].double() / PARAMETER_STEP).round() * PARAMETER_STEP)
        coded_channels = min(channels, num_colours)
        for channel in range(coded_channels):
            if channel:
                distributions.take(found[:, channel - 1])
            weights = _weights(distributions.cumulative())
            for stream, part in streams:
                coded_values = code(stream, found[part, channel].numpy().astype(np.int32), weights[part])
                found[part, channel] = torch.from_numpy(coded_values.astype(np.uint8))
        if picture.is_gray:
            found = found[:, :1].expand(-1, channels)
        filled[coded] = found
        values[:, positions] = filled
        yield len(found) * coded_channels
        remaining -= len(found) * coded_channels
        if not remaining:
            break
    complete = values.view(tiles[batch].shape)
    tiles[batch] = complete[..., :1] if picture.is_gray else complete  # green and blue may have come after the last red


def _streams(coded: Tensor, first_stream: int, tiles_of_a_stream: int) -> list[tuple[int, slice]]:
    """Numbers of the streams that values of these tiles go to, and which of them: `coded` is bool [tiles, positions],
    and they come in this order."""
    ends = [0]
    for tiles in coded.split(tiles_of_a_stream):
        ends.append(ends[-1] + int(tiles.sum()))
    parts = (slice(begin, end) for begin, end in pairwise(ends))
    return [(number, part) for number, part in enumerate(parts, start=first_stream) if part.stop > part.start]


def _weights(cumulative: Tensor) -> np.ndarray:
    """Integers [n, 256] in proportion to the probabilities of intensities. Each sum of the first ones is rounded by
    itself, so that a value depends on the rounding at its own two edges alone. Raises CheckpointError where a model
    gives no probabilities."""
    if not cumulative.isfinite().all():
        raise CheckpointError("the model gives no probabilities: there are weights in it that are not finite")
    return (cumulative / PROBABILITY_STEP).round().diff(dim=-1).clamp(min=0).numpy()
