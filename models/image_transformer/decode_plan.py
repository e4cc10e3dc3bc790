"""Which blocks can be decoded together, and where do the keys that they need lie in memory?

Decoding keeps, for each block in progress, a *window*: slots for all keys that its queries see. Blocks that see nothing
of each other form a *wave* and are decoded side by side, one token of each a step.

- Where a block's memory is what was generated just before it (local_1d, sliding_1d, full), the window is a ring: the
  key of rank r lies in slot r modulo its size, and stays there. For local_1d that is query_block + memory keys.
- Where blocks are generated in between each other (strided_1d), each has a window of its own, and the steps look into
  one after the other.
- Elsewhere (local_2d, dilated_1d, fixed_1d) the window is the memory, then the block. A block's keys that later blocks
  see are *kept* outside of the windows when the block is finished, in slots that are free again after the last block
  that sees them has copied them. For local_2d these are about as many as the flange's rows have columns: they grow with
  the width of the image, not with its height (in waves: with the number of rows of blocks in progress, too).

Layers may have different patterns, each with windows and kept keys of its own. They share the order of generation, so
that they take their steps together; the blocks of one may end where those of another do not.

Shapes: G blocks of a wave, Q tokens of a block, W slots of a window.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention.pattern import Pattern, QueryBlock
from models.image_transformer.pixel_order import Shift, source_positions

MEMORY = -1
"""In Wave.order: a key of the memory, seen by the whole block."""
UNSEEN = 2**31 - 1
"""In Wave.order: not a key that the block sees."""


class Copy(NamedTuple):
    """Keys that move between the window of a block and the slots of what is kept."""

    window_slots: Tensor
    """int64 [any number]."""
    kept_slots: Tensor
    """int64, as many."""


@dataclass(frozen=True)
class Wave:
    """Blocks that are decoded together; all have Q tokens."""

    blocks: tuple[QueryBlock, ...]
    slots: Tensor
    """int64 [G, Q]: storage slot of the token that each block generates j-th."""
    order: Tensor
    """int32 [G, W]: which key each slot of a window holds during the wave: MEMORY, the block's own j-th (seen from step
    j on), or UNSEEN."""
    until: Tensor
    """int32 [G, W]: the step from which on that key is not seen any more; UNSEEN for never."""
    own_window_slots: Tensor
    """int64 [Q]: slot of the window where the block's own j-th key goes."""
    own_windows: Tensor | None
    """int64 [Q]: where one block stands for several that are generated in between each other, the window (of all G) to
    which the j-th key goes and into which its query looks. None: each block has one window."""
    loads: tuple[Copy, ...]
    """Before the wave, by block: kept keys to its window."""
    stores: tuple[Copy, ...]
    """After the wave, by block: keys of its window to be kept."""

    @property
    def num_steps(self) -> int:
        return self.slots.shape[1]


@dataclass(frozen=True)
class DecodePlan:
    """In which order the blocks of one pattern are decoded, and how much memory that takes."""

    waves: tuple[Wave, ...]
    window_slots: int
    """W."""
    kept_slots: int
    """Keys kept outside of the windows, at most; 0 for a ring."""

    @property
    def num_windows(self) -> int:
        """The largest G."""
        return max(len(wave.order) for wave in self.waves)

    @property
    def num_steps(self) -> int:
        """Serial steps for an image."""
        return sum(wave.num_steps for wave in self.waves)

    @property
    def num_keys(self) -> int:
        """Keys (and as many values) of one layer and head that are in memory for one image."""
        return self.num_windows * self.window_slots + self.kept_slots


@dataclass(frozen=True)
class Stretch:
    """Steps during which each pattern stays in one of its waves."""

    slots: Tensor
    """int64 [G, steps]: storage slot of the token that each block generates in each step."""
    waves: tuple[int, ...]
    """By pattern: the number of its wave."""
    first_steps: tuple[int, ...]
    """By pattern: the number, in that wave, of the stretch's first step."""

    @property
    def num_steps(self) -> int:
        return self.slots.shape[1]


def decode_plan(pattern: Pattern, shift: Shift, in_waves: bool = True) -> DecodePlan:
    """The plan of a model whose layers all have one pattern."""
    return decode_plans((pattern,), shift, in_waves)[0][0]


@lru_cache(maxsize=16)
def decode_plans(
    patterns: tuple[Pattern, ...], shift: Shift, in_waves: bool = True
) -> tuple[tuple[DecodePlan, ...], tuple[Stretch, ...]]:
    """Blocks one after the other, or in_waves as many together as all patterns allow: a plan for each pattern, and the
    course of all of them together. The patterns have one order of generation and of storage.

    Only the inside of blocks is serial where inputs are shifted inside each block; a shift along the generation order
    hands each block's last value to the next, so that every wave is one block. Patterns of different blocks have no
    waves, either.
    """
    bounds = [[(block.start, block.stop) for block in _decoded_blocks(pattern)] for pattern in patterns]
    if in_waves and shift == "block" and all(of_pattern == bounds[0] for of_pattern in bounds):
        waves = _waves(patterns, shift)
        plans = [_plan(pattern, [[pattern.blocks[index] for index in wave] for wave in waves]) for pattern in patterns]
        numbers = range(len(waves))
        stretches = [
            Stretch(plans[0].waves[number].slots, (number,) * len(patterns), (0,) * len(patterns)) for number in numbers
        ]
    else:
        plans = [_plan(pattern, [[block] for block in _decoded_blocks(pattern)]) for pattern in patterns]
        stretches = list(_stretches(patterns, bounds))
    return tuple(plans), tuple(stretches)


def _decoded_blocks(pattern: Pattern) -> tuple[QueryBlock, ...]:
    """The blocks one after the other; those that are generated in between each other as one."""
    return pattern.blocks if pattern.step == 1 else (QueryBlock(0, pattern.length, ()),)


def _plan(pattern: Pattern, waves: list[list[QueryBlock]]) -> DecodePlan:
    if pattern.step != 1:
        return _several_windows(pattern)
    return _ring(pattern, waves) if _fits_a_ring(pattern, waves) else _windows_and_kept(pattern, waves)


def _stretches(patterns: tuple[Pattern, ...], bounds: list[list[tuple[int, int]]]) -> Iterator[Stretch]:
    """The steps from each bound of some pattern's block to the next."""
    starts = sorted({start for of_pattern in bounds for start, _ in of_pattern})
    for start, stop in zip(starts, [*starts[1:], patterns[0].length], strict=True):
        waves = tuple(bisect_right(of_pattern, start, key=lambda bound: bound[0]) - 1 for of_pattern in bounds)
        firsts = tuple(start - of_pattern[wave][0] for of_pattern, wave in zip(bounds, waves, strict=True))
        yield Stretch(patterns[0].slot_of_rank[start:stop][None], waves, firsts)


def _waves(patterns: tuple[Pattern, ...], shift: Shift) -> list[list[int]]:
    """Numbers of blocks. A block's wave is the first after those of all blocks that it needs anything of."""
    first = patterns[0]
    block_of = torch.zeros(first.length, dtype=torch.int64)  # by storage slot
    for index, block in enumerate(first.blocks):
        block_of[block.start : block.stop] = index
    sources = source_positions(first, shift)
    wave_of: list[int] = []
    waves: list[list[int]] = []
    for index, blocks in enumerate(zip(*(pattern.blocks for pattern in patterns), strict=True)):
        inputs = sources[blocks[0].start : blocks[0].stop]
        seen = [torch.arange(*run) for block in blocks for run in block.memory]
        slots = [first.slot_of_position[inputs[inputs >= 0]], *seen]
        needed = set(block_of[torch.cat(slots)].tolist()) - {index}
        wave_of.append(1 + max((wave_of[other] for other in needed), default=-1))
        if wave_of[-1] == len(waves):
            waves.append([])
        waves[wave_of[-1]].append(index)
    # Blocks of a wave keep step, so all have equally many tokens.
    return [same for wave in waves for same in _by_num_queries(first, wave)]


def _by_num_queries(pattern: Pattern, blocks: list[int]) -> Iterable[list[int]]:
    groups: dict[int, list[int]] = {}
    for index in blocks:
        groups.setdefault(pattern.blocks[index].num_queries, []).append(index)
    return groups.values()


def _fits_a_ring(pattern: Pattern, waves: list[list[QueryBlock]]) -> bool:
    """Whether each block's memory is what was generated just before it, in this order."""
    in_order = bool((pattern.rank == torch.arange(pattern.length)).all()) and all(len(wave) == 1 for wave in waves)
    runs = [(block.memory, block.start) for block in pattern.blocks if block.memory]
    return in_order and all(len(memory) == 1 and memory[0][1] == start for memory, start in runs)


def _ring(pattern: Pattern, waves: list[list[QueryBlock]]) -> DecodePlan:
    size = max(block.num_memory_keys + block.num_queries for block in pattern.blocks)
    plan = []
    for blocks in waves:
        (block,) = blocks
        order = torch.full((1, size), UNSEEN, dtype=torch.int32)
        order[0, torch.arange(block.start - block.num_memory_keys, block.start) % size] = MEMORY
        own_window_slots = torch.arange(block.start, block.stop) % size
        order[0, own_window_slots] = torch.arange(block.num_queries, dtype=torch.int32)
        until = torch.full_like(order, UNSEEN)
        if pattern.window:
            ranks = torch.arange(block.start - block.num_memory_keys, block.stop)
            until[0, ranks % size] = (ranks + pattern.window - block.start).int()
        slots = pattern.slot_of_rank[block.start : block.stop][None]
        plan.append(Wave((block,), slots, order, until, own_window_slots, None, (), ()))
    return DecodePlan(tuple(plan), size, 0)


def _several_windows(pattern: Pattern) -> DecodePlan:
    steps = torch.arange(pattern.length)
    own_windows, own_window_slots = steps % pattern.step, steps // pattern.step
    size = int(own_window_slots[-1]) + 1
    order = torch.full((len(pattern.blocks), size), UNSEEN, dtype=torch.int32)
    order[own_windows, own_window_slots] = steps.int()
    until = torch.full_like(order, UNSEEN)
    slots = pattern.slot_of_rank[None]
    wave = Wave(_decoded_blocks(pattern), slots, order, until, own_window_slots, own_windows, (), ())
    return DecodePlan((wave,), size, 0)


def _windows_and_kept(pattern: Pattern, waves: list[list[QueryBlock]]) -> DecodePlan:
    memory_slots = max(block.num_memory_keys for block in pattern.blocks)
    size = memory_slots + max(block.num_queries for block in pattern.blocks)
    last_wave = [-1] * pattern.length  # that sees a key, by storage slot
    for index, blocks in enumerate(waves):
        for block in blocks:
            for slot in _memory(block):
                last_wave[slot] = index

    plan = []
    kept_slot_of: dict[int, int] = {}  # by storage slot
    free: list[int] = []
    num_kept = 0
    for index, blocks in enumerate(waves):
        loads = []
        order = torch.full((len(blocks), size), UNSEEN, dtype=torch.int32)
        for row, block in enumerate(blocks):
            sources = torch.tensor([kept_slot_of[slot] for slot in _memory(block)], dtype=torch.int64)
            loads.append(Copy(torch.arange(len(sources)), sources))
            order[row, : len(sources)] = MEMORY
            order[row, memory_slots : memory_slots + block.num_queries] = torch.arange(block.num_queries)
        for slot in [slot for slot in kept_slot_of if last_wave[slot] == index]:
            heapq.heappush(free, kept_slot_of.pop(slot))

        stores = []
        for block in blocks:
            ranks = range(block.start, block.stop)
            slots = zip(ranks, pattern.slot_of_rank[block.start : block.stop].tolist(), strict=True)
            seen_later = [(rank - block.start, slot) for rank, slot in slots if last_wave[slot] > index]
            for _, slot in seen_later:
                if not free:
                    free.append(num_kept)
                    num_kept += 1
                kept_slot_of[slot] = heapq.heappop(free)
            stores.append(
                Copy(
                    memory_slots + torch.tensor([step for step, _ in seen_later], dtype=torch.int64),
                    torch.tensor([kept_slot_of[slot] for _, slot in seen_later], dtype=torch.int64),
                )
            )
        plan.append(
            Wave(
                tuple(blocks),
                torch.stack([pattern.slot_of_rank[block.start : block.stop] for block in blocks]),
                order,
                torch.full_like(order, UNSEEN),
                memory_slots + torch.arange(blocks[0].num_queries),
                None,
                tuple(loads),
                tuple(stores),
            )
        )
    return DecodePlan(tuple(plan), size, num_kept)


def _memory(block: QueryBlock) -> list[int]:
    return [slot for start, stop in block.memory for slot in range(start, stop)]
