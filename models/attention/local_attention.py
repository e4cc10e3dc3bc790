"""How is attention computed so that its cost follows the pattern and not the square of the length?

Shapes: B batch, N heads, K heads of keys and values (N, or a divisor of it), L positions in storage order, D head
width, G blocks of one kind, Q queries and M memory keys of a block.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from models.attention import local_attention_flex
from models.attention.attention_on_meta import attention_on_meta
from models.attention.pattern import Pattern, QueryBlock
from models.linear import product_dtype

try:
    from models.attention import local_attention_triton
except ModuleNotFoundError as error:
    # The CUDA wheels of torch bring Triton, the CPU wheels do not.
    if error.name != "triton":
        raise
    local_attention_triton = None  # type: ignore[assignment]

Backend = Literal["auto", "reference", "blocked", "triton", "flex"]

logger = logging.getLogger(__name__)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    backend: Backend = "auto",
    deterministic: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v over the keys that `pattern` lets each query see (equation 1 of the paper).

    q and the result are [B, N, L, D], k and v [B, K, L, D], with tokens in pattern.storage_order; each head of keys
    serves N / K neighbouring heads of queries (grouped-query attention); scale defaults to 1 / sqrt(D).
    - "triton": fused kernels, forward and backward; CUDA, heads 16, 32, 64 or 128 wide;
    - "flex": PyTorch's FlexAttention on our own list of tiles; CUDA, or a CPU without gradients;
    - "blocked": each block's keys only, anywhere; in fp32 it differs from "reference" by rounding, less than 2e-5 for
      inputs of unit variance;
    - "reference": the dense mask, slow and obvious, for tests;
    - "auto": "triton" for bf16 and fp16 on CUDA, else "flex" on CUDA, else "blocked"; logs which and why, once.
      On the meta device, the shapes that a fused kernel allocates.

    `deterministic` makes the gradients of "triton" the same bits every time, at 1.4 times the backward products; the
    others ignore it. ValueError: shapes that do not fit, or a backend that cannot compute these inputs.
    """
    (batch, heads, *rest), (key_batch, key_heads, *key_rest) = q.shape, k.shape
    if k.shape != v.shape or (batch, rest) != (key_batch, key_rest) or heads % key_heads:
        raise ValueError(
            f"q, k and v differ in shape: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; k and v may have fewer "
            "heads, a divisor of q's, and nothing else may differ"
        )
    if q.shape[2] != pattern.length:
        raise ValueError(f"q has {q.shape[2]} tokens, but the pattern is made for {pattern.length}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "auto" and q.device.type == "meta":
        return attention_on_meta(q, k, v)
    if backend == "auto":
        backend = _fastest(q, k, v, scale)
    if backend == "triton":
        _require(backend, _why_not_triton(q, k, v, scale))
        return local_attention_triton.fused_attention(q, k, v, pattern, scale, deterministic)
    if backend == "flex":
        _require(backend, _why_not_flex(q, k, v))
        return local_attention_flex.flexible_attention(q, k, v, pattern, scale)
    if backend == "blocked":
        return _blocked(q, k, v, pattern, scale)
    if backend == "reference":
        return _reference(q, k, v, pattern, scale)
    raise ValueError(f"backend: {backend!r} is not one of 'auto', 'triton', 'flex', 'blocked', 'reference'")


def _fastest(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Backend:
    """The first of triton, flex and blocked that can compute these inputs and is fast."""
    if q.device.type != "cuda":
        _log_choice("blocked", f"the others are for CUDA, and the tensors are on {q.device.type}")
        return "blocked"
    why_not_triton = _why_not_triton(q, k, v, scale)
    if why_not_triton is None and q.dtype == torch.float32:
        why_not_triton = "its tiles for fp32 are small and slow"
    if why_not_triton is None:
        _log_choice("triton", "the fastest for these inputs")
        return "triton"
    why_not_flex = _why_not_flex(q, k, v)
    if why_not_flex is None:
        _log_choice("flex", f"not triton: {why_not_triton}")
        return "flex"
    _log_choice("blocked", f"not triton: {why_not_triton}; not flex: {why_not_flex}")
    return "blocked"


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """A reason why the fused kernels cannot compute these inputs, or None."""
    if local_attention_triton is None:
        return "Triton is not installed (the CUDA wheels of torch bring it)"
    if q.device.type != "cuda" and not local_attention_triton.INTERPRETED:
        return f"the tensors are on {q.device.type}, it needs CUDA"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in local_attention_triton.DTYPES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; it takes one of bf16, fp16 and fp32 for all"
    if q.shape[-1] not in local_attention_triton.HEAD_WIDTHS:
        return f"heads are {q.shape[-1]} wide, it takes {local_attention_triton.HEAD_WIDTHS}"
    if not scale > 0:
        return f"scale is {scale}, it must be positive"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the GPU is older than compute capability 8.0"
    return None


def _why_not_flex(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """A reason why FlexAttention cannot compute these inputs, or None."""
    if q.device.type not in ("cuda", "cpu"):
        return f"the tensors are on {q.device.type}, it needs CUDA"
    wants_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and wants_gradients:
        return "FlexAttention has no gradients on a CPU; take 'blocked' there"
    if q.device.type == "cuda" and q.dtype not in local_attention_flex.DTYPES:
        return f"q is {q.dtype}; it takes bf16, fp16 and fp32"
    if q.device.type == "cuda" and q.shape[-1] < local_attention_flex.SMALLEST_HEAD_WIDTH:
        return f"heads are {q.shape[-1]} wide, it takes {local_attention_flex.SMALLEST_HEAD_WIDTH} and more"
    return None


def _require(backend: str, why_not: str | None) -> None:
    if why_not is not None:
        raise ValueError(f"backend: {backend!r} cannot compute this: {why_not}")


def _log_choice(backend: str, why: str) -> None:
    _log_once(backend, why)


@cache
def _log_once(backend: str, why: str) -> None:
    logger.info("attention runs on %s: %s", backend, why)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask: q [B, N, any, D], k and v [B, K, any other, D]."""
    if q.device.type == "meta":
        return attention_on_meta(q, k, v)
    dtype, key_heads = product_dtype(q), k.shape[1]
    # Queries that share a head of keys are like further tokens of it: nothing is repeated.
    queries = q.to(dtype).unflatten(1, (key_heads, -1)).flatten(2, 3)
    output = F.scaled_dot_product_attention(queries, k.to(dtype), v.to(dtype))
    return output.reshape(q.shape).to(q.dtype)  # a view but on CUDA, whose kernels may store heads inside


def _reference(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    k, v = _for_every_head(q, k, v)
    mask = pattern.mask_in_storage_order().to(q.device)
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v repeated for the heads of q that they serve."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _blocked(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """Blocks with equally many queries and memory keys are computed together, so nothing is padded."""
    given, dtype = q.dtype, product_dtype(q)
    k, v = _for_every_head(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale <= 0:
        # torch's kernel for CPUs masks by -inf before it scales: that would be NaN, or +inf.
        q, scale = scale * q, 1.0
    plan = _plan_of(pattern, q.device)
    outputs = []
    for group in plan.groups:
        queries = _gather(q, group.query_chunks, group)
        keys, values = _gather(k, group.key_chunks, group), _gather(v, group.key_chunks, group)
        output = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, is_causal=group.is_causal, scale=scale
        )
        outputs.append(output.view(*q.shape[:2], output.shape[1] * output.shape[2], q.shape[-1]))
    output = torch.cat(outputs, dim=2)
    if plan.restore is not None:
        output = _chunked(output, plan.chunk).index_select(2, plan.restore).flatten(2, 3)
    return output.to(given)


@dataclass(frozen=True)
class _Group:
    """Blocks with the same numbers of queries and memory keys. Index tensors count chunks of `chunk`
    slots."""

    num_blocks: int
    chunk: int
    query_chunks: Tensor
    """int64 [G * Q / chunk]."""
    key_chunks: Tensor
    """int64 [G * (M + Q) / chunk], for each block its memory and then itself."""
    mask: Tensor | None
    """bool [Q, M + Q], or None where is_causal says it all or everything is visible."""
    is_causal: bool


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_Group, ...]
    chunk: int
    restore: Tensor | None
    """int64: chunks of the concatenated groups in storage order; None if they are in order already."""


def _plan_of(pattern: Pattern, device: torch.device) -> _Plan:
    return _plan(pattern, device)


@lru_cache(maxsize=64)
def _plan(pattern: Pattern, device: torch.device) -> _Plan:
    with _disable_current_modes():  # of values, also where the caller's tensors have none
        return _new_plan(pattern, device)


def _new_plan(pattern: Pattern, device: torch.device) -> _Plan:
    kinds: dict[tuple[int, int], list[QueryBlock]] = {}
    for block in pattern.blocks:
        kinds.setdefault((block.num_queries, block.num_memory_keys), []).append(block)
    groups = tuple(_group(pattern, blocks, device) for blocks in kinds.values())

    computed = [block.slots for blocks in kinds.values() for block in blocks]
    chunk = _largest_chunk(computed)
    order = _chunk_indices(computed, chunk, torch.device("cpu"))
    in_order = bool((order == torch.arange(len(order))).all())
    return _Plan(groups, chunk, None if in_order else torch.argsort(order).to(device))


def _group(pattern: Pattern, blocks: list[QueryBlock], device: torch.device) -> _Group:
    own = [block.slots for block in blocks]
    seen = [slots for block in blocks for slots in (*(range(*range_) for range_ in block.memory), block.slots)]
    chunk = _largest_chunk(seen)

    # Blocks of one size have one order of generation inside, so one mask serves the group.
    mask = pattern.block_mask(blocks[0])
    is_causal = blocks[0].num_memory_keys == 0 and bool((mask == torch.ones_like(mask).tril()).all())
    needs_mask = not is_causal and not bool(mask.all())
    return _Group(
        num_blocks=len(blocks),
        chunk=chunk,
        query_chunks=_chunk_indices(own, chunk, device),
        key_chunks=_chunk_indices(seen, chunk, device),
        mask=mask.to(device) if needs_mask else None,
        is_causal=is_causal,
    )


def _largest_chunk(parts: list[range]) -> int:
    """Slots of the largest chunk of which all parts are made."""
    if any(slots.step != 1 for slots in parts):
        return 1
    return math.gcd(*(bound for slots in parts for bound in (slots.start, slots.stop)))


def _chunk_indices(parts: list[range], chunk: int, device: torch.device) -> Tensor:
    return torch.cat([torch.tensor(slots[::chunk]) // chunk for slots in parts]).to(device)


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """[B, N, L, D] -> [B, N, L / chunk, chunk, D], without the slots after the last whole chunk."""
    whole = x.shape[2] // chunk * chunk
    return x[:, :, :whole].unflatten(2, (-1, chunk))


def _gather(x: Tensor, chunks: Tensor, group: _Group) -> Tensor:
    """[B, N, L, D] -> [B * N, G, rows of a block, D]."""
    batch, heads, _, depth = x.shape
    # index_select and not unfold: compiled for the CPU, unfold gives wrong gradients of k (torch 2.13).
    rows = len(chunks) * group.chunk // group.num_blocks
    return _chunked(x, group.chunk).index_select(2, chunks).view(batch * heads, group.num_blocks, rows, depth)


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes two seconds: called
# while tracing, and not part of the graph, where a call of a logger or arithmetic on lists of blocks would end it.
_log_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
_plan_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
