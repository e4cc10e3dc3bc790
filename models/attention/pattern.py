"""Which keys does each query see?

A pattern cuts the sequence into query blocks. Every query of a block sees the whole *memory* of that block. Of its own
block it sees everything or, if the pattern is causal, what has been generated so far, itself included. Of all this it
sees, if the pattern has a *window*, only what was generated last. That is the whole definition. Dense masks, blocked
attention, the window of decoding and the count of FLOPs are derived from it.

Heads may see different keys: then they have a pattern each, in turn (`fixed_1d` with groups).

Two orders of the positions matter besides the raster order in which an image comes:
- the *generation order* decides what "so far" means: blocks one after the other, raster order inside a block;
- the *storage order* decides where a token lies in memory. It keeps each block together, and inside a block
  each *cell*, so that every memory is a few runs of neighbouring tokens. In one dimension all three orders
  are the same.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryBlock:
    """Queries that share one memory. All numbers are storage slots; ranges exclude their end."""

    start: int
    """First slot of the block; also the generation rank of the position generated first."""
    stop: int
    """One past the last slot of the block, or more where a step would lead there."""
    memory: tuple[tuple[int, int], ...]
    """Slots outside the block that every one of its queries sees, as ascending ranges."""
    step: int = 1
    """From each slot of the block to its next one."""

    @property
    def slots(self) -> range:
        return range(self.start, self.stop, self.step)

    @property
    def num_queries(self) -> int:
        return len(self.slots)

    @property
    def num_memory_keys(self) -> int:
        return sum(stop - start for start, stop in self.memory)


@dataclass(frozen=True, eq=False)
class Pattern:
    """One attention pattern over `length` positions.

    Patterns of the same content are equal, so that what is made of one (plans, masks) is made once.
    """

    storage_order: Tensor
    """int64 [length]: storage slot -> raster position."""
    rank: Tensor
    """int64 [length]: storage slot -> place in the generation order. A block's slots and ranks are the same
    range."""
    blocks: tuple[QueryBlock, ...]
    """In the order of their first slots, covering 0..length without gaps. Blocks of a step other than 1, which lie
    between each other, have no memory, and all have the same step."""
    causal: bool
    """Whether a query sees only the part of its own block that is generated up to and including itself."""
    window: int = 0
    """Only this many positions generated last are seen, the query included, and 0: all. Where it is not 0, the pattern
    is causal, stored in the order of generation, and each memory lies just before its block."""
    digest: str = field(init=False, repr=False)
    """A checksum of everything above."""

    def __post_init__(self) -> None:
        content = hashlib.sha256(repr((self.blocks, self.causal, self.window)).encode())
        for order in (self.storage_order, self.rank):
            content.update(order.numpy().tobytes())
        object.__setattr__(self, "digest", content.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def length(self) -> int:
        return len(self.storage_order)

    @cached_property
    def slot_of_rank(self) -> Tensor:
        """int64 [length]: place in the generation order -> storage slot."""
        return torch.argsort(self.rank)

    @cached_property
    def generation_order(self) -> Tensor:
        """int64 [length]: place in the generation order -> raster position."""
        return self.storage_order[self.slot_of_rank]

    @cached_property
    def slot_of_position(self) -> Tensor:
        """int64 [length]: raster position -> storage slot."""
        return torch.argsort(self.storage_order)

    @cached_property
    def stored_in_raster_order(self) -> bool:
        return bool((self.storage_order == torch.arange(self.length)).all())

    @property
    def step(self) -> int:
        """From each slot of a block to its next one; where it is not 1, blocks are generated in between each other."""
        return self.blocks[0].step

    @property
    def num_pairs(self) -> int:
        """How many (query, visible key) pairs there are."""
        pairs = 0
        for block in self.blocks:
            queries, memory = block.num_queries, block.num_memory_keys
            if self.window:
                pairs += sum(min(self.window, memory + index + 1) for index in range(queries))
            else:
                pairs += queries * memory + (queries * (queries + 1) // 2 if self.causal else queries**2)
        return pairs

    def block_mask(self, block: QueryBlock) -> Tensor:
        """bool [queries, memory keys + queries], each in storage order: which keys of its memory, and then of its own
        block, each query sees."""
        rank = self.rank[block.start : block.stop : block.step]
        memory = torch.cat([rank[:0], *(self.rank[start:stop] for start, stop in block.memory)])
        if not self.causal:
            return torch.ones(len(rank), len(memory) + len(rank), dtype=torch.bool)
        age = rank[:, None] - torch.cat([memory, rank])[None, :]
        return (age >= 0) & (age < (self.window or self.length))

    def mask_in_storage_order(self) -> Tensor:
        """bool [length, length], storage order on both axes: mask[i, j] = query i sees key j."""
        mask = torch.zeros(self.length, self.length, dtype=torch.bool)
        for block in self.blocks:
            queries = torch.tensor(block.slots)
            keys = torch.cat([*(torch.arange(*range_) for range_ in block.memory), queries])
            mask[queries[:, None], keys[None, :]] = self.block_mask(block)
        return mask

    def mask(self) -> Tensor:
        """bool [length, length], raster order on both axes: mask[i, j] = query i sees key j."""
        slots = self.slot_of_position
        return self.mask_in_storage_order()[slots[:, None], slots[None, :]]


def local_1d(length: int, query_block: int, memory: int, causal: bool = True) -> Pattern:
    """1D local attention (section 3.3): own block and `memory` earlier positions; on both sides when not
    causal.

    The last block is shorter where `query_block` does not divide `length`. `memory == query_block` is the
    original code.
    """
    _require_positive(length=length, query_block=query_block)
    _require_not_negative(memory=memory)

    def memory_of(start: int, stop: int) -> tuple[tuple[int, int], ...]:
        before = (max(0, start - memory), start)
        after = (stop, stop if causal else min(length, stop + memory))
        return tuple(range_ for range_ in (before, after) if range_[0] < range_[1])

    return _in_raster_order(length, query_block, memory_of, causal)


def dilated_1d(length: int, query_block: int, memory_block: int, gap: int, num_memory_blocks: int) -> Pattern:
    """Causal 1D attention with gaps: own block and `num_memory_blocks` earlier chunks of `memory_block`
    positions, each preceding the next, or the own block, by `gap` positions that are not seen."""
    _require_positive(
        length=length, query_block=query_block, memory_block=memory_block, num_memory_blocks=num_memory_blocks
    )
    _require_not_negative(gap=gap)

    def memory_of(start: int, stop: int) -> tuple[tuple[int, int], ...]:
        starts = [start - (gap + memory_block) * chunk for chunk in range(num_memory_blocks, 0, -1)]
        return tuple((max(0, first), first + memory_block) for first in starts if first + memory_block > 0)

    return _in_raster_order(length, query_block, memory_of, causal=True)


def full(length: int, causal: bool = True) -> Pattern:
    """Every earlier position and itself; every position when not causal."""
    _require_positive(length=length)
    return _in_raster_order(length, length, lambda start, stop: (), causal)


def sliding_1d(length: int, window: int) -> Pattern:
    """The last `window` positions, the query included: "local" attention in the code of the Sparse Transformer (Child
    et al. 2019), whose paper lets each query see one more."""
    _require_positive(length=length, window=window)

    # The mask is the same for blocks of any size; these make as many pairs in vain as are seen.
    def memory_of(start: int, stop: int) -> tuple[tuple[int, int], ...]:
        return ((max(0, start - window + 1), start),) if start and window > 1 else ()

    return _in_raster_order(length, window, memory_of, causal=True, window=window)


def strided_1d(length: int, stride: int) -> Pattern:
    """Every stride-th position back from the query, which is included (Child et al. 2019, section 4.3)."""
    _require_positive(length=length, stride=stride)
    blocks = tuple(QueryBlock(start, length, (), stride) for start in range(min(stride, length)))
    return Pattern(torch.arange(length), torch.arange(length), blocks, causal=True)


def fixed_1d(length: int, query_block: int, summary: int, group: int = 0) -> Pattern:
    """Own block, and of every earlier one the `summary` positions at its end (Child et al. 2019, section 4.3).

    Heads of group 1 see the `summary` positions before those instead, of group 2 the ones before them, and so on.
    """
    _require_positive(length=length, query_block=query_block, summary=summary)
    _require_not_negative(group=group)
    if (group + 1) * summary > query_block:
        raise ValueError(f"group: {group} of {summary} positions lies outside of a block of {query_block}")

    def memory_of(start: int, stop: int) -> tuple[tuple[int, int], ...]:
        ends = [end - group * summary for end in range(query_block, start + 1, query_block)]
        return _merged([(end - summary, end) for end in ends])

    return _in_raster_order(length, query_block, memory_of, causal=True)


def local_2d(
    height: int,
    width: int,
    query_shape: tuple[int, int],
    memory_flange: tuple[int, int],
    causal: bool = True,
    cell: tuple[int, int] | None = None,
) -> Pattern:
    """2D local attention (section 3.3): own rectangle, and a flange of `memory_flange` (rows, columns) around
    it.

    Causal: the flange lies above (reaching out to both sides) and to the left. Otherwise it lies on all
    sides. Rectangles are generated in raster order, positions inside a rectangle in raster order too.

    The positions of a `cell` (rows, columns) are stored together. None: the largest of which every memory is made;
    a smaller one that divides it lets several patterns have one storage order.
    """
    (query_height, query_width), (flange_height, flange_width) = query_shape, memory_flange
    _require_positive(height=height, width=width, query_height=query_height, query_width=query_width)
    _require_not_negative(flange_height=flange_height, flange_width=flange_width)
    if height % query_height or width % query_width:
        raise ValueError(f"query_shape: {query_height} x {query_width} does not tile a grid of {height} x {width}")

    cell_height, cell_width = cell or (math.gcd(query_height, flange_height), math.gcd(query_width, flange_width))
    raster = torch.arange(height * width)
    generation_order = _tile_order(raster.view(height, width), (query_height, query_width))
    block_rasters = generation_order.view(-1, query_height, query_width)
    storage_order = torch.cat([_tile_order(block, (cell_height, cell_width)) for block in block_rasters])
    rank = torch.argsort(generation_order)[storage_order]

    blocks = []
    area = query_height * query_width
    for index in range(height * width // area):
        top = index // (width // query_width) * query_height
        left = index % (width // query_width) * query_width
        above, before = max(0, top - flange_height), max(0, left - flange_width)
        below, after = top + query_height, left + query_width
        seen = torch.zeros(height, width, dtype=torch.bool)
        if causal:
            seen[above:top, before : after + flange_width] = True
            seen[top:below, before:left] = True
        else:
            seen[above : below + flange_height, before : after + flange_width] = True
            seen[top:below, left:after] = False
        slots = seen.flatten()[storage_order].nonzero().flatten()
        blocks.append(QueryBlock(index * area, (index + 1) * area, _runs(slots.tolist())))
    return Pattern(storage_order, rank, tuple(blocks), causal)


def _in_raster_order(
    length: int,
    query_block: int,
    memory_of: Callable[[int, int], tuple[tuple[int, int], ...]],
    causal: bool,
    window: int = 0,
) -> Pattern:
    bounds = [(start, min(start + query_block, length)) for start in range(0, length, query_block)]
    blocks = tuple(QueryBlock(start, stop, memory_of(start, stop)) for start, stop in bounds)
    return Pattern(torch.arange(length), torch.arange(length), blocks, causal, window)


def _tile_order(grid: Tensor, tile: tuple[int, int]) -> Tensor:
    """The entries of a grid tile by tile; raster order among the tiles and inside each."""
    height, width = grid.shape
    tiled = grid.reshape(height // tile[0], tile[0], width // tile[1], tile[1])
    return tiled.transpose(1, 2).flatten()


def _runs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as (start, stop) ranges."""
    return _merged([(number, number + 1) for number in numbers])


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending ranges, of which those that meet become one."""
    runs: list[tuple[int, int]] = []
    for start, stop in ranges:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: {value} is not positive")


def _require_not_negative(**values: int) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name}: {value} is negative")
