"""Which tiles of keys does each tile of queries need?

A GPU computes attention tile by tile. A plan lists the pairs of tiles in which at least one query sees at least one key
and tells those where every query sees every key, so that only the others are masked. It is built from the blocks of a
pattern and their memory, in time that grows with the number of pairs, never from a dense mask.

Tiles are cut from the first slot of each block and of each range of its memory, so that none lies in two blocks.
Neighbouring tiles without a mask make one run: a kernel walks along it without looking anything up.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.pattern import Pattern, QueryBlock

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
    rank, rows = pattern.rank.tolist(), []
    for block in pattern.blocks:
        memory = [keys for range_ in block.memory for keys in _cut(*range_, key_tile)]
        own = list(_cut(block.start, block.stop, key_tile))
        for start, stop in _cut(block.start, block.stop, query_tile):
            full = [keys for keys in memory if keys[1] - keys[0] == key_tile]
            masked = [keys for keys in memory if keys[1] - keys[0] < key_tile]
            for keys in own:
                some, every = _sees(pattern, rank, (start, stop), keys)
                if some:
                    (full if every and keys[1] - keys[0] == key_tile else masked).append(keys)
            rows.append(((start, stop), [(*keys, *keys) for keys in full], [(*keys, *keys) for keys in masked]))
    return _packed(rows)


def plan_by_keys(pattern: Pattern, query_tile: int, key_tile: int) -> TilePlan:
    """For each tile of keys the tiles of queries, as the gradients of k and v need them."""
    rank = pattern.rank.tolist()
    tiles = [tile for block in pattern.blocks for tile in _cut(block.start, block.stop, key_tile)]
    starts = [start for start, _ in tiles]
    full: list[list[Partner]] = [[] for _ in tiles]
    masked: list[list[Partner]] = [[] for _ in tiles]
    for block in pattern.blocks:
        queries = list(_cut(block.start, block.stop, query_tile))
        for index, *seen in _overlaps(tiles, starts, block):
            keys = (seen[0], seen[1])
            for start, stop in queries:
                some, every = True, True
                if block.start <= keys[0] < block.stop:
                    some, every = _sees(pattern, rank, (start, stop), keys)
                whole = stop - start == query_tile and keys[1] - keys[0] == key_tile
                if some:
                    (full if every and whole else masked)[index].append((start, stop, *keys))
    return _packed(zip(tiles, full, masked, strict=True))


def plan_on_grid(pattern: Pattern, tile: int) -> GridPlan:
    """For each `tile` slots of queries the `tile` slots of keys; a tile that reaches past the end is never full."""
    rank, count = pattern.rank.tolist(), -(-pattern.length // tile)
    # Pairs of tiles are full where the visible pairs in them are all there are; blocks may meet in a tile.
    visible: list[dict[int, int]] = [{} for _ in range(count)]
    for block in pattern.blocks:
        for queries in _cut_on_grid(block.start, block.stop, tile):
            row, num_queries = visible[queries[0] // tile], queries[1] - queries[0]
            for range_ in (*block.memory, (block.start, block.stop)):
                for keys in _cut_on_grid(*range_, tile):
                    some, every = True, True
                    if range_[0] == block.start:
                        some, every = _sees(pattern, rank, queries, keys)
                    if some:
                        pairs = num_queries * (keys[1] - keys[0]) if every else 0
                        row[keys[0] // tile] = row.get(keys[0] // tile, 0) + pairs
    full = tuple(tuple(sorted(key for key, pairs in row.items() if pairs == tile**2)) for row in visible)
    partial = tuple(tuple(sorted(key for key, pairs in row.items() if pairs < tile**2)) for row in visible)
    return GridPlan(full, partial)


def _cut(start: int, stop: int, size: int) -> Iterator[Range]:
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _cut_on_grid(start: int, stop: int, size: int) -> Iterator[Range]:
    return ((max(first, start), min(first + size, stop)) for first in range(start // size * size, stop, size))


def _sees(pattern: Pattern, rank: list[int], queries: Range, keys: Range) -> tuple[bool, bool]:
    """Whether some query sees some key, and each query each key, of two ranges of slots of one block."""
    if not pattern.causal:
        return True, True
    ranks_of_queries, ranks_of_keys = rank[slice(*queries)], rank[slice(*keys)]
    return min(ranks_of_keys) <= max(ranks_of_queries), max(ranks_of_keys) <= min(ranks_of_queries)


def _overlaps(tiles: list[Range], starts: list[int], block: QueryBlock) -> Iterator[tuple[int, int, int]]:
    """(index of a tile of keys, first and one past the last of its keys that the block sees)."""
    for start, stop in (*block.memory, (block.start, block.stop)):
        index = bisect_right(starts, start) - 1
        while index < len(tiles) and starts[index] < stop:
            yield index, max(start, tiles[index][0]), min(stop, tiles[index][1])
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
