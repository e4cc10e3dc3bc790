"""Which tiles of keys does each tile of queries need?

A GPU computes attention tile by tile. A plan lists the pairs of tiles in which at least one query sees at least one key
and tells those where every query sees every key, so that only the others are masked. It is built from the blocks of a
pattern and their memory, in time that grows with the number of pairs, never from a dense mask.

Tiles are cut from the first slot of each block and of each range of its memory, so that none lies in two blocks. They
have the step of the pattern's blocks: a tile of 64 slots in a block of step 3 is as long as 192 others.
Neighbouring tiles without a mask make one run: a kernel walks along it without looking anything up.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from models.attention.pattern import Pattern

Range = tuple[int, int]
Partner = tuple[int, int, int, int]


@dataclass(frozen=True)
class TilePlan:
    """For each tile, what it meets of the other side: first runs of whole tiles without a mask, then masked tiles."""

    tiles: Tensor
    """int32 [tiles, 5]: first slot, one past the last slot, and in `partners` the first one, the first masked one, and
    one past the last one."""
    partners: Tensor
    """int32 [runs and masked tiles, 4]: first and one past the last slot; first and one past the last visible key."""

    def to(self, device: torch.device) -> "TilePlan":
        return TilePlan(self.tiles.to(device), self.partners.to(device))


@dataclass(frozen=True)
class GridPlan:
    """The same for tiles that are cut from slot 0 on, whatever blocks lie in them, as FlexAttention wants it."""

    full: tuple[tuple[int, ...], ...]
    """For each tile of queries, the tiles of keys of which each query sees each key, ascending."""
    partial: tuple[tuple[int, ...], ...]
    """For each tile of queries, the other tiles of keys of which some query sees some key, ascending."""


def plan_by_queries(pattern: Pattern, query_tile: int, key_tile: int) -> TilePlan:
    """For each tile of queries the tiles of keys, as the forward pass and the gradient of q need them."""
    sees, rows = _comparison(pattern), []
    for block in pattern.blocks:
        seen = [range(*range_) for range_ in block.memory] + [block.slots]
        tiles = [keys for slots in seen for keys in _cut(slots, key_tile)]
        for queries in _cut(block.slots, query_tile):
            full: list[Partner] = []
            masked: list[Partner] = []
            for keys in tiles:
                some, every = sees(queries, keys)
                if some:
                    (full if every and len(keys) == key_tile else masked).append((*_ends(keys), *_ends(keys)))
            rows.append((_ends(queries), full, masked))
    return _packed(rows)


def plan_by_keys(pattern: Pattern, query_tile: int, key_tile: int) -> TilePlan:
    """For each tile of keys the tiles of queries, as the gradients of k and v need them."""
    sees = _comparison(pattern)
    tiles_of_blocks = [list(_cut(block.slots, key_tile)) for block in pattern.blocks]
    tiles = [tile for of_block in tiles_of_blocks for tile in of_block]
    starts = [tile.start for tile in tiles]
    full: list[list[Partner]] = [[] for _ in tiles]
    masked: list[list[Partner]] = [[] for _ in tiles]
    own = 0
    for block, own_tiles in zip(pattern.blocks, tiles_of_blocks, strict=True):
        queries = list(_cut(block.slots, query_tile))
        seen = [pair for range_ in block.memory for pair in _overlaps(tiles, starts, *range_)]
        for index, keys in seen + list(enumerate(own_tiles, start=own)):
            for tile in queries:
                some, every = sees(tile, keys)
                whole = len(tile) == query_tile and len(keys) == key_tile
                if some:
                    (full if every and whole else masked)[index].append((*_ends(tile), *_ends(keys)))
        own += len(own_tiles)
    return _packed(zip(map(_ends, tiles), full, masked, strict=True))


def plan_on_grid(pattern: Pattern, tile: int) -> GridPlan:
    """For each `tile` slots of queries the `tile` slots of keys; a tile that reaches past the end is never full."""
    sees, count = _comparison(pattern), -(-pattern.length // tile)
    # Pairs of tiles are full where the visible pairs in them are all there are; blocks may meet in a tile.
    visible: list[dict[int, int]] = [{} for _ in range(count)]
    for block in pattern.blocks:
        seen = [range(*range_) for range_ in block.memory] + [block.slots]
        pieces = [piece for slots in seen for piece in _cut_on_grid(slots, tile)]
        for queries in _cut_on_grid(block.slots, tile):
            row = visible[queries[0] // tile]
            for keys in pieces:
                some, every = sees(queries, keys)
                if some:
                    pairs = len(queries) * len(keys) if every else 0
                    row[keys[0] // tile] = row.get(keys[0] // tile, 0) + pairs
    full = tuple(tuple(sorted(key for key, pairs in row.items() if pairs == tile**2)) for row in visible)
    partial = tuple(tuple(sorted(key for key, pairs in row.items() if pairs < tile**2)) for row in visible)
    return GridPlan(full, partial)


def _cut(slots: range, size: int) -> Iterator[range]:
    """Tiles of `size` slots, of which the last may have fewer."""
    return (slots[first : first + size] for first in range(0, len(slots), size))


def _cut_on_grid(slots: range, size: int) -> Iterator[range]:
    """The slots in each `size` neighbouring ones, counted from slot 0 on."""
    for first in range(slots.start // size * size, slots.stop, size):
        before, after = (len(range(slots.start, bound, slots.step)) for bound in (first, first + size))
        if piece := slots[before:after]:
            yield piece


def _ends(slots: range) -> Range:
    return slots.start, slots.stop


def _comparison(pattern: Pattern) -> Callable[[range, range], tuple[bool, bool]]:
    """Of tiles of queries and keys of a block, or of it and its memory: does some query see some key, and each each?"""
    rank, window = pattern.rank.tolist(), pattern.window or pattern.length

    @cache
    def extremes(slots: range) -> Range:
        # Inside a run of slots ranks may go to and fro.
        ranks = [rank[slot] for slot in slots]
        return min(ranks), max(ranks)

    def sees(queries: range, keys: range) -> tuple[bool, bool]:
        if not pattern.causal:
            return True, True
        (first, last), (oldest, youngest) = extremes(queries), extremes(keys)
        return oldest <= last and first - youngest < window, youngest <= first and last - oldest < window

    return sees


def _overlaps(tiles: list[range], starts: list[int], start: int, stop: int) -> Iterator[tuple[int, range]]:
    """(index of a tile of keys, the keys of it that lie in a range of memory)."""
    index = bisect_right(starts, start) - 1
    while index < len(tiles) and starts[index] < stop:
        yield index, range(max(start, tiles[index].start), min(stop, tiles[index].stop))
        index += 1


def _packed(rows: Iterable[tuple[Range, Sequence[Partner], Sequence[Partner]]]) -> TilePlan:
    """(tile, partners without a mask in ascending order, masked partners) of each tile."""
    tiles: list[tuple[int, ...]] = []
    partners: list[Partner] = []
    for (start, stop), full, masked in rows:
        first, runs = len(partners), _runs(full)
        tiles.append((start, stop, first, first + len(runs), first + len(runs) + len(masked)))
        partners += [*runs, *masked]
    return TilePlan(torch.tensor(tiles, dtype=torch.int32), torch.tensor(partners, dtype=torch.int32))


def _runs(full: Sequence[Partner]) -> list[Partner]:
    """Tiles that follow each other as one; the visible keys are those of all of them."""
    runs: list[Partner] = []
    for start, stop, first_key, last_key in full:
        if runs and runs[-1][1] == start:
            begin, _, begin_key, _ = runs[-1]
            runs[-1] = (begin, stop, begin_key, last_key)
        else:
            runs.append((start, stop, first_key, last_key))
    return runs
