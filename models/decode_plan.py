"""Which blocks can be decoded together, and where do the keys that they need lie in memory?

Decoding keeps, for each block in progress, a *window*: slots for all keys that its queries see. Blocks that see nothing
of each other form a *wave* and are decoded side by side, one token of each a step.

- Where a block's memory is what was generated just before it (local_1d, full), the window is a ring: the key of rank r
  lies in slot r modulo its size, and stays there. For local_1d that is query_block + memory keys.
- Elsewhere (local_2d, dilated_1d) the window is the memory, then the block. A block's keys that later blocks see are
  *kept* outside of the windows when the block is finished, in slots that are free again after the last block that sees
  them has copied them. For local_2d these are about as many as the flange's rows have columns: they grow with the
  width of the image, not with its height (in waves: with the number of rows of blocks in progress, too).

Shapes: G blocks of a wave, Q tokens of a block, W slots of a window.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.pattern import Pattern, QueryBlock
from models.pixel_order import Shift, source_positions

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
    own_window_slots: Tensor
    """int64 [Q]: slot of the window where the block's own j-th key goes."""
    loads: tuple[Copy, ...]
    """Before the wave, by block: kept keys to its window."""
    stores: tuple[Copy, ...]
    """After the wave, by block: keys of its window to be kept."""

    @property
    def num_steps(self) -> int:
        return self.slots.shape[1]


@dataclass(frozen=True)
class DecodePlan:
    """The course of decoding one image, and how much memory it takes."""

    waves: tuple[Wave, ...]
    window_slots: int
    """W."""
    kept_slots: int
    """Keys kept outside of the windows, at most; 0 for a ring."""

    @property
    def num_windows(self) -> int:
        """The largest G."""
        return max(len(wave.blocks) for wave in self.waves)

    @property
    def num_steps(self) -> int:
        """Serial steps for an image."""
        return sum(wave.num_steps for wave in self.waves)

    @property
    def num_keys(self) -> int:
        """Keys (and as many values) of one layer and head that are in memory for one image."""
        return self.num_windows * self.window_slots + self.kept_slots


@lru_cache(maxsize=16)
def decode_plan(pattern: Pattern, shift: Shift, in_waves: bool = True) -> DecodePlan:
    """Blocks one after the other, or in_waves as many together as the pattern allows.

    Only the inside of blocks is serial where inputs are shifted inside each block; a shift along the generation order
    hands each block's last value to the next, so that every wave is one block.
    """
    waves = _waves(pattern, shift) if in_waves else [[block] for block in pattern.blocks]
    return _ring(pattern, waves) if _fits_a_ring(pattern, waves) else _windows_and_kept(pattern, waves)


def _waves(pattern: Pattern, shift: Shift) -> list[list[QueryBlock]]:
    """A block's wave is the first after those of all blocks that it needs anything of."""
    block_of = torch.zeros(pattern.length, dtype=torch.int64)  # by storage slot
    for index, block in enumerate(pattern.blocks):
        block_of[block.start : block.stop] = index
    sources = source_positions(pattern, shift)
    wave_of: list[int] = []
    waves: list[list[QueryBlock]] = []
    for index, block in enumerate(pattern.blocks):
        inputs = sources[block.start : block.stop]
        slots = [pattern.slot_of_position[inputs[inputs >= 0]], *(torch.arange(*run) for run in block.memory)]
        needed = set(block_of[torch.cat(slots)].tolist()) - {index}
        wave_of.append(1 + max((wave_of[other] for other in needed), default=-1))
        if wave_of[-1] == len(waves):
            waves.append([])
        waves[wave_of[-1]].append(block)
    # Blocks of a wave keep step, so all have equally many tokens.
    return [same for wave in waves for same in _by_num_queries(wave)]


def _by_num_queries(blocks: list[QueryBlock]) -> Iterable[list[QueryBlock]]:
    groups: dict[int, list[QueryBlock]] = {}
    for block in blocks:
        groups.setdefault(block.num_queries, []).append(block)
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
        slots = pattern.slot_of_rank[block.start : block.stop][None]
        plan.append(Wave((block,), slots, order, own_window_slots, (), ()))
    return DecodePlan(tuple(plan), size, 0)


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
                memory_slots + torch.arange(blocks[0].num_queries),
                tuple(loads),
                tuple(stores),
            )
        )
    return DecodePlan(tuple(plan), size, num_kept)


def _memory(block: QueryBlock) -> list[int]:
    return [slot for start, stop in block.memory for slot in range(start, stop)]
