"""Which sample comes at which position of an endless run, and which positions belong to which rank?

Pure functions of (block sizes, seed, lanes, position): no generator state exists, so any position can be
computed at once and one integer, the number of samples consumed, resumes a run on any number of ranks.

An epoch is a line: the blocks of the data set in a random order, one after the other. The line is cut into
equal intervals, the *lanes*. A block, or the piece of it that falls into one lane, is a *window*, and the
samples inside a window are permuted. Position ``i`` of the epoch reads lane ``i mod L`` at place ``i div L``,
so that every batch mixes all lanes while each lane reads only one window at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

U = np.uint64
Indices = np.ndarray  # int64

KEY_SHIFT = 32  # a window's key is epoch << 32 | index, one integer that is cheap to look up


class Window(NamedTuple):
    """A run of samples inside one block that are used together, seen by one rank."""

    key: int
    """Unique over the run."""
    block: int
    begin: int
    """First row of the block that belongs to the window."""
    end: int
    """One past its last row."""
    place: int
    """Where in the window's permutation this rank begins ..."""
    step: int
    """... and how far it moves on each time; other ranks use what lies between."""
    first: int
    """Position at which this rank first needs it."""
    last: int
    """Position after which this rank needs it no more."""
    gap: int
    """From one position at which this rank uses a row of it to the next."""

    @property
    def positions(self) -> Indices:
        """Where the rows come, one after the other."""
        return np.arange(self.first, self.last + 1, self.gap)


@dataclass(frozen=True)
class EpochLayout:
    """The line of one epoch: windows are numbered along it."""

    edges: Indices
    """Where window w starts on the line; one more entry than windows."""
    block: Indices
    """Block of window w."""
    begin: Indices
    """Row of that block at which window w begins."""
    lane: Indices
    """Lane of window w."""


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers one to one (the finaliser of splitmix64; arithmetic modulo 2**64)."""
    x = x + U(0x9E3779B97F4A7C15)
    x = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U(27))) * U(0x94D049BB133111EB)
    return x ^ (x >> U(31))


def hash_of(*key: int) -> np.ndarray:
    """One 64-bit hash of a few integers, as an array of one element (scalars would warn of the wrap-around)."""
    h = np.zeros(1, U)
    for k in key:
        h = mix(h ^ U(k))
    return h


def permutation(n: int, *key: int) -> Indices:
    """A permutation of range(n) that depends on the key alone.

    Own arithmetic instead of ``numpy.random``, whose streams may change from version to version.
    """
    return np.argsort(mix(hash_of(*key) + np.arange(n, dtype=U) * U(0xD1342543DE82EF95)), kind="stable")


def usable_lanes(lanes: int, count: int, block_samples: int) -> int:
    """The number of lanes really used: the largest divisor of ``lanes`` that leaves each lane a whole block.

    A lane shorter than a block would read whole blocks for the sake of a few rows; a divisor keeps the number
    of lanes a multiple of the usual numbers of ranks, so that ranks share no lane.
    """
    fitting = max(1, count // max(1, block_samples))
    return max(d for d in range(1, lanes + 1) if lanes % d == 0 and d <= fitting)


class TrainingOrder:
    """The endless order of samples over epochs, for blocks of the given sizes."""

    def __init__(self, block_counts: Sequence[int], *, seed: int, lanes: int) -> None:
        self.counts: Indices = np.asarray(block_counts, dtype=np.int64)
        assert len(self.counts) > 0 and int(self.counts.min()) > 0, "blocks must not be empty"
        assert seed >= 0 and lanes >= 1, (seed, lanes)
        self.seed = seed
        self.count = int(self.counts.sum())
        self.lanes = usable_lanes(lanes, self.count, int(self.counts.max()))
        lengths = self.count // self.lanes + (np.arange(self.lanes) < self.count % self.lanes)
        self.lane_start: Indices = np.concatenate([[0], np.cumsum(lengths)])
        self.layout = lru_cache(maxsize=3)(self._layout)

    def _layout(self, epoch: int) -> EpochLayout:
        blocks = permutation(len(self.counts), self.seed, epoch, 1)
        starts = np.concatenate([[0], np.cumsum(self.counts[blocks])])
        edges = np.union1d(starts, self.lane_start)
        place = np.searchsorted(starts, edges[:-1], "right") - 1
        lane = np.searchsorted(self.lane_start, edges[:-1], "right") - 1
        return EpochLayout(edges, blocks[place], edges[:-1] - starts[place], lane)

    def rows(self, window: Window) -> Indices:
        """Rows of the window's block that the rank uses, in the order in which it uses them."""
        epoch, index = window.key >> KEY_SHIFT, window.key & ((1 << KEY_SHIFT) - 1)
        order = permutation(window.end - window.begin, self.seed, epoch, 2, index)
        return window.begin + order[window.place :: window.step]

    def windows(self, start: int, stride: int) -> Iterator[Window]:
        """The windows that positions ``start, start + stride, ...`` touch, in order of first need, for ever."""
        epoch = start // self.count
        while True:
            yield from self._epoch_windows(epoch, start, stride)
            epoch += 1

    def _epoch_windows(self, epoch: int, start: int, stride: int) -> list[Window]:
        layout, lanes, origin = self.layout(epoch), self.lanes, epoch * self.count
        # This rank's places p in lane l solve p * lanes + l = start - origin (modulo stride).
        common = math.gcd(lanes, stride)
        period = stride // common
        behind = (start - origin - layout.lane) % stride
        solvable = behind % common == 0
        inverse = pow(lanes // common, -1, period) if period > 1 else 0
        residue = (behind // common) * inverse % period
        whole = layout.edges[:-1] - self.lane_start[layout.lane]
        high = layout.edges[1:] - self.lane_start[layout.lane]
        # When resuming inside an epoch, places before the start are behind us.
        resumed = -(-(start - origin - layout.lane) // lanes)
        low = np.maximum(whole, resumed)
        first = low + (residue - low) % period
        last = high - 1 - (high - 1 - residue) % period
        needed = solvable & (first < high) & (last >= low)
        first_position = origin + first * lanes + layout.lane
        last_position = origin + last * lanes + layout.lane
        index = np.flatnonzero(needed)
        index = index[np.argsort(first_position[index], kind="stable")]
        ends = layout.begin + np.diff(layout.edges)
        columns = (
            ((epoch << KEY_SHIFT) | index).tolist(),
            layout.block[index].tolist(),
            layout.begin[index].tolist(),
            ends[index].tolist(),
            (first - whole)[index].tolist(),
            [period] * len(index),
            first_position[index].tolist(),
            last_position[index].tolist(),
            [period * lanes] * len(index),
        )
        return [Window(*fields) for fields in zip(*columns, strict=True)]


class StoredOrder:
    """The samples as they lie in the shards, once: the order of evaluation."""

    lanes = 1

    def __init__(self, block_counts: Sequence[int]) -> None:
        counts: Indices = np.asarray(block_counts, dtype=np.int64)
        self.starts: Indices = np.concatenate([[0], np.cumsum(counts)])

    def rows(self, window: Window) -> Indices:
        """Rows of the window's block that the rank uses, in the order in which it uses them."""
        return np.arange(window.begin, window.end)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The blocks that positions ``[start, stop)`` touch."""
        first, last = (np.searchsorted(self.starts, [start, stop - 1], "right") - 1).tolist()
        for block in range(first, last + 1):
            low, high = int(self.starts[block]), int(self.starts[block + 1])
            begin, end = max(low, start), min(high, stop)
            yield Window(block, block, begin - low, end - low, 0, 1, begin, end - 1, 1)


def rank_share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous share ``[start, stop)`` of a rank; shares differ by at most one and cover everything."""
    return rank * count // world_size, (rank + 1) * count // world_size
