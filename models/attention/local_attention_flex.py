"""How does PyTorch's FlexAttention compute local attention?

Its BlockMask, which says which tiles to compute and which of them to mask, is made from the pattern's plan;
create_block_mask would evaluate the mask for all pairs of positions, at a cost quadratic in the length.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from models.attention.pattern import Pattern
from models.attention.tile_plan import plan_on_grid

SMALLEST_HEAD_WIDTH = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 128


def flexible_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the visible keys; q and the result [B, N, L, D], k and v [B, N / any, L, D].

    Compiled on a GPU, at the first call of each shape; on a CPU without gradients only, and with all scores in memory.
    """
    mask = _masks[_number_of(pattern, q.device)]
    if q.device.type == "cpu":
        # FlexAttention refuses leaves that ask for gradients on a CPU, also where none are computed.
        return _attend(q.detach(), k.detach(), v.detach(), mask, scale)
    return _compiled()(q, k, v, mask, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(_attend, dynamic=False)


# Masks by the number of their first use: a compiler can look up a mask, but not follow how one is made.
_numbers: dict[tuple[Pattern, torch.device], int] = {}
_masks: list[BlockMask] = []


def _number_of(pattern: Pattern, device: torch.device) -> int:
    if (pattern, device) not in _numbers:
        _numbers[pattern, device] = len(_masks)
        _masks.append(block_mask(pattern, device))
    return _numbers[pattern, device]


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes two seconds.
_number_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def block_mask(pattern: Pattern, device: torch.device) -> BlockMask:
    """The tiles of TILE queries and keys that the pattern needs, and the mask inside those that are not full."""
    plan = plan_on_grid(pattern, TILE)
    partial, full = _padded(plan.partial, device), _padded(plan.full, device)
    # Every bound of a memory is a multiple of `chunk`, so a small table says which block sees which chunk.
    bounds = [bound for block in pattern.blocks for range_ in block.memory for bound in range_]
    chunk = math.gcd(pattern.length, *bounds)
    in_memory = torch.zeros(len(pattern.blocks), pattern.length // chunk, dtype=torch.bool)
    block_of_slot = torch.empty(pattern.length, dtype=torch.int64)
    for index, block in enumerate(pattern.blocks):
        block_of_slot[block.start : block.stop : block.step] = index
        for start, stop in block.memory:
            in_memory[index, start // chunk : stop // chunk] = True
    rank = pattern.rank if pattern.causal else torch.zeros_like(pattern.rank)
    window = pattern.window or pattern.length
    in_memory, block_of_slot, rank = (x.to(device) for x in (in_memory, block_of_slot, rank))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (block_of_slot[query] == block_of_slot[key]) & (rank[key] <= rank[query])
        return (own | in_memory[block_of_slot[query], key // chunk]) & (rank[query] - rank[key] < window)

    lengths = (pattern.length, pattern.length)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=lengths)


def _padded(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Counts [1, 1, rows] and indices [1, 1, rows, rows], both int32."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)
    indices = torch.tensor([[*row, *[0] * (len(rows) - len(row))] for row in rows], dtype=torch.int32, device=device)
    return counts[None, None], indices[None, None]
