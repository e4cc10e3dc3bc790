"""How does a GPU compute local attention without storing the scores?

Tiles of queries and keys meet as models/attention/tile_plan.py lists them; scores live in registers, in units of log2,
and only their log-sum-exp is stored for the backward pass (Dao et al., FlashAttention-2). Products of bf16 or fp16
tiles are accumulated in fp32.

The backward pass runs over tiles of keys and adds the gradient of q with atomic fp32 additions (5 products a pair of
tiles); as the order of these additions is not fixed, `deterministic` computes that gradient in a pass of its own (7).

From compute capability 9.0 on, the tiles of the inner loops are copied, and the gradient of q is added, by the tensor
memory unit through descriptors. Elsewhere, in fp32, and where the slots of a block are apart (strided attention), it is
done through pointers.

Importing this file needs Triton, which the CUDA wheels of torch bring. With TRITON_INTERPRET=1 in the environment the
kernels run on CPU tensors, slowly, for tests.

Shapes: B batch, N heads, L positions in storage order, D head width; keys and values may have fewer heads, each of
which serves as many neighbouring heads of queries.
"""

# Arguments of kernels have no Python types: pointers, numbers of any width, tiles.
# mypy: disable-error-code="no-untyped-def"

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from models.attention.pattern import Pattern
from models.attention.tile_plan import TilePlan, plan_by_keys, plan_by_queries

HEAD_WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What the tensor memory unit wants of the first byte of a tensor and of the distance of its rows.
_DESCRIPTOR_ALIGNMENT_BYTES = 16

_LOG2_E = tl.constexpr(1.4426950408889634)
_LAST_RANK = tl.constexpr(2**31 - 1)
# The interpreter of Triton 3.6 to 3.9 keeps bf16 as integers and multiplies their bits; it cannot add through
# descriptors.
_INTERPRETED = tl.constexpr(INTERPRETED)


class Tile(NamedTuple):
    """How one kernel is cut and compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The kernels of one head width on one generation of GPUs."""

    forward: Tile
    backward: Tile
    """Gradients of k and v, and of q by atomic additions or not."""
    gradient_of_q: Tile
    descriptors: bool
    """Whether the tensor memory unit copies tiles, else threads do."""


# (compute capability, largest head width) -> tiles. Of the configurations that compile without spilling registers;
# tests/models/attention/test_local_attention_triton.py compiles each. Which is fastest has not been measured yet.
TILES = {
    (8, 64): Tiles(Tile(128, 64, 8, 3), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), descriptors=False),
    (8, 128): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), descriptors=False),
    (9, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2), descriptors=True),
    (9, 128): Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), descriptors=True),
}
# fp32 operands are twice as large and split in two for tensor cores: at width 128 the backward pass spills a little.
FP32_TILES = Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), descriptors=False)
# Small and of unequal sides, so that tests meet every kind of tile in few steps.
_INTERPRETED_TILES = Tiles(Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), descriptors=False)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, deterministic: bool) -> Tensor:
    """softmax(scale q k^T) v over the visible keys; q and the result [B, N, L, D], k and v [B, N / any, L, D].

    `scale` must be positive; dtypes and widths are DTYPES and HEAD_WIDTHS. Memory grows with L only.
    """
    return torch.ops.image_transformer.local_attention(q, k, v, _number_of(pattern), scale, deterministic)[0]


# A custom operator takes tensors and numbers only, so patterns are numbered in the order of their first use.
_patterns: list[Pattern] = []
_numbers: dict[Pattern, int] = {}


def _number_of(pattern: Pattern) -> int:
    if pattern not in _numbers:
        _numbers[pattern] = len(_patterns)
        _patterns.append(pattern)
    return _numbers[pattern]


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes two seconds.
_number_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Plans(NamedTuple):
    forward: TilePlan
    backward: TilePlan
    gradient_of_q: TilePlan
    rank: Tensor


@lru_cache(maxsize=64)
def _plans(number: int, tiles: Tiles, device: torch.device) -> _Plans:
    pattern = _patterns[number]
    return _Plans(
        plan_by_queries(pattern, tiles.forward.queries, tiles.forward.keys).to(device),
        plan_by_keys(pattern, tiles.backward.queries, tiles.backward.keys).to(device),
        plan_by_queries(pattern, tiles.gradient_of_q.queries, tiles.gradient_of_q.keys).to(device),
        pattern.rank.to(device, torch.int32),
    )


def tiles_for(dtype: torch.dtype, width: int, device: torch.device, step: int = 1) -> Tiles:
    """The committed configuration for these inputs, and slots of a block that are `step` apart."""
    are_neighbours = step == 1  # all that descriptors can copy; other tiles are made for pointers
    if INTERPRETED:
        return _INTERPRETED_TILES._replace(descriptors=_INTERPRETED_TILES.descriptors and are_neighbours)
    if dtype == torch.float32:
        return FP32_TILES
    generation = 9 if torch.cuda.get_device_capability(device)[0] >= 9 and are_neighbours else 8
    return TILES[generation, 64 if width <= 64 else 128]


@torch.library.custom_op("image_transformer::local_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, pattern_number: int, scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the log2-sum-exp2 of each query's scores, fp32 [B, N, L]."""
    pattern = _patterns[pattern_number]
    tiles = tiles_for(q.dtype, q.shape[-1], q.device, pattern.step)
    plans, tma = _plans(pattern_number, tiles, q.device), tiles.descriptors
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (_readable(x, tma) for x in (q, k, v))
    _launch(
        forward_kernel, plans.forward, tiles.forward, q,
        q, *(_tiled(x, tiles.forward.keys, tma) for x in (k, v)), out, lse, plans.rank,
        *_strides(q, k, v, out), scale,
        GROUP=q.shape[1] // k.shape[1], TMA=tma, **_seen(pattern),
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pattern_number: int, scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("image_transformer::local_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern_number: int, scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    pattern, group = _patterns[pattern_number], q.shape[1] // k.shape[1]
    tiles = tiles_for(q.dtype, q.shape[-1], q.device, pattern.step)
    tma = tiles.descriptors
    plans = _plans(pattern_number, tiles, q.device)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    q, k, v, out, dout = (_readable(x, tma) for x in (q, k, v, out, dout))
    delta = torch.empty_like(lse)
    _launch(delta_kernel, plans.forward, tiles.forward, q, dout, out, delta, *_strides(dout, out), STEP=pattern.step)

    added = dq if deterministic else torch.zeros_like(dq, dtype=torch.float32)
    rows = tiles.backward.queries
    _launch(
        backward_kernel, plans.backward, tiles.backward, k,
        _tiled(q, rows, tma), k, v, _tiled(dout, rows, tma),
        added if deterministic or INTERPRETED else _tiled(added, rows, tma), dk, dv, lse, delta, plans.rank,
        *_strides(q, k, v, dout, added, dk, dv), scale,
        GROUP=group, ADD_DQ=not deterministic, TMA=tma, **_seen(pattern),
    )  # fmt: skip
    if not deterministic:
        return dq.copy_(added), dk, dv
    rows = tiles.gradient_of_q.keys
    _launch(
        gradient_of_q_kernel, plans.gradient_of_q, tiles.gradient_of_q, q,
        q, _tiled(k, rows, tma), _tiled(v, rows, tma), dout, dq, lse, delta, plans.rank,
        *_strides(q, k, v, dout, dq), scale,
        GROUP=group, TMA=tma, **_seen(pattern),
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern_number: int, scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def _seen(pattern: Pattern) -> dict[str, Any]:
    """What kernels are compiled for besides tiles: how keys inside a tile are masked, how far slots are apart."""
    return {"CAUSAL": pattern.causal, "WINDOW": pattern.window, "STEP": pattern.step}


def _readable(x: Tensor, for_descriptors: bool) -> Tensor:
    """The tensor or a copy with neighbouring numbers of a token, and for descriptors with every row aligned."""
    if x.stride(-1) != 1:
        return x.contiguous()
    aligned = x.data_ptr() % _DESCRIPTOR_ALIGNMENT_BYTES == 0 and all(
        stride > 0 and stride * x.element_size() % _DESCRIPTOR_ALIGNMENT_BYTES == 0 for stride in x.stride()[:-1]
    )
    return x.clone(memory_format=torch.contiguous_format) if for_descriptors and not aligned else x


def _tiled(x: Tensor, rows: int, as_descriptor: bool) -> Tensor | TensorDescriptor:
    """What a kernel gets to copy tiles of `rows` tokens of one head from or to."""
    if not as_descriptor:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]])


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _launch(kernel: Any, plan: TilePlan, tile: Tile, tiled: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program for each tile of each head of `tiled`."""
    batch, heads, length, width = tiled.shape
    # Neighbouring programs are neighbouring tiles of one head: they share keys in the cache. One axis, since the
    # others end at 65535.
    grid = (len(plan.tiles) * batch * heads,)
    with torch.cuda.device_of(tiled):
        kernel[grid](
            *arguments, plan.tiles, plan.partners, len(plan.tiles), heads, length,
            D=width, BM=tile.queries, BN=tile.keys, PRECISION=_precision_of(tiled.dtype), **constants,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32 operands: as three products of tf32, exact to a few 1e-7; of no effect on others."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def _load(X, base, stride, slots, valid, D: tl.constexpr, MASKED: tl.constexpr):
    """[slots, D]; zeros where not valid."""
    pointers = X + base + slots.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    x = tl.load(pointers, mask=valid[:, None], other=0.0) if MASKED else tl.load(pointers)
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _load_tile(
    X, base, stride, b, n, start, slots, valid,
    ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] of slots from `start` on. Where not valid, zeros (pointers), or other tokens (descriptors)."""
    if TMA:
        x = tl.reshape(X.load([b, n, start, 0]), [ROWS, D])
        if _INTERPRETED:
            x = x.to(tl.float32)
        return x
    else:  # noqa: RET505  one return ends the compiled function, the branch is chosen at compile time
        return _load(X, base, stride, slots, valid, D, MASKED)


@triton.jit
def _store(X, base, stride, slots, valid, x, D: tl.constexpr):
    pointers = X + base + slots.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(X.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _rank_of_keys(RANK, slots, valid, CAUSAL: tl.constexpr):
    """Ranks to compare with those of queries; keys out of bounds come after every query."""
    return tl.load(RANK + slots, mask=valid, other=_LAST_RANK) if CAUSAL else tl.where(valid, 0, _LAST_RANK)


@triton.jit
def _rank_of_queries(RANK, slots, valid, CAUSAL: tl.constexpr):
    """Queries out of bounds see every key, so that their unused sums stay finite."""
    return tl.load(RANK + slots, mask=valid, other=_LAST_RANK - 1) if CAUSAL else tl.full(slots.shape, 0, tl.int32)


@triton.jit
def _visible(rank_of_queries, rank_of_keys, WINDOW: tl.constexpr):
    """Whether each query sees each key, as far as it depends on when they are generated."""
    visible = rank_of_keys <= rank_of_queries
    if WINDOW:
        in_window = rank_of_queries - rank_of_keys < WINDOW
        visible = visible & (in_window | (rank_of_queries == _LAST_RANK - 1))
    return visible


@triton.jit
def _forward_step(
    q, acc, top, total, K, V, RANK, k_base, v_base, k_stride, v_stride, b, n, start, stop, rank_of_queries, log2_scale,
    D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    slots = start + tl.arange(0, BN) * STEP
    valid = slots < stop
    k = _load_tile(K, k_base, k_stride, b, n, start, slots, valid, BN, D, MASKED, TMA)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        visible = _visible(rank_of_queries[:, None], _rank_of_keys(RANK, slots, valid, CAUSAL)[None, :], WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
    # A query that has met no visible key yet: keep -inf - -inf out.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.math.exp2(scores * log2_scale - shift[:, None])
    shrink = tl.math.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    v = _load_tile(V, v_base, v_stride, b, n, start, slots, valid, BN, D, MASKED, TMA)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, RANK,
    q_b, q_n, q_l, k_b, k_n, k_l, v_b, v_n, v_l, o_b, o_n, o_l,
    scale, TILES, PARTNERS, num_tiles, heads, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries of one head."""
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, n = head // heads, head % heads
    slots = tl.load(TILES + tile * 5) + tl.arange(0, BM) * STEP
    valid = slots < tl.load(TILES + tile * 5 + 1)
    first, masked, last = tl.load(TILES + tile * 5 + 2), tl.load(TILES + tile * 5 + 3), tl.load(TILES + tile * 5 + 4)

    q = _load(Q, b.to(tl.int64) * q_b + n.to(tl.int64) * q_n, q_l, slots, valid, D, True)
    rank = _rank_of_queries(RANK, slots, valid, CAUSAL)
    acc = tl.zeros([BM, D], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    m = n // GROUP
    k_base = b.to(tl.int64) * k_b + m.to(tl.int64) * k_n
    v_base = b.to(tl.int64) * v_b + m.to(tl.int64) * v_n
    log2_scale = scale * _LOG2_E
    for index in range(first, masked):
        stop = tl.load(PARTNERS + index * 4 + 1)
        for start in range(tl.load(PARTNERS + index * 4), stop, BN * STEP):
            acc, top, total = _forward_step(
                q, acc, top, total, K, V, RANK, k_base, v_base, k_l, v_l, b, m, start, stop, rank, log2_scale,
                D, BN, CAUSAL, WINDOW, STEP, False, PRECISION, TMA,
            )  # fmt: skip
    for index in range(masked, last):
        acc, top, total = _forward_step(
            q, acc, top, total, K, V, RANK, k_base, v_base, k_l, v_l, b, m,
            tl.load(PARTNERS + index * 4), tl.load(PARTNERS + index * 4 + 1), rank, log2_scale,
            D, BN, CAUSAL, WINDOW, STEP, True, PRECISION, TMA,
        )  # fmt: skip
    _store(OUT, b.to(tl.int64) * o_b + n.to(tl.int64) * o_n, o_l, slots, valid, acc / total[:, None], D)
    tl.store(LSE + head.to(tl.int64) * length + slots, top + tl.math.log2(total), mask=valid)


@triton.jit
def delta_kernel(
    DOUT, OUT, DELTA, do_b, do_n, do_l, o_b, o_n, o_l, TILES, PARTNERS, num_tiles, heads, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each query's sum of dout * out over D: the mean that the softmax's gradient subtracts."""
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, n = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    slots = tl.load(TILES + tile * 5) + tl.arange(0, BM) * STEP
    valid = slots < tl.load(TILES + tile * 5 + 1)
    dout = _load(DOUT, b * do_b + n * do_n, do_l, slots, valid, D, True).to(tl.float32)
    out = _load(OUT, b * o_b + n * o_n, o_l, slots, valid, D, True).to(tl.float32)
    tl.store(DELTA + head.to(tl.int64) * length + slots, tl.sum(dout * out, 1), mask=valid)


@triton.jit
def _backward_step(
    k, v, dk, dv, Q, DOUT, DQ, LSE, DELTA, RANK, q_base, do_base, dq_base, q_stride, do_stride, dq_stride, row_base,
    b, n, start, stop, keys, first_key, last_key, log2_scale, scale,
    D: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ADD_DQ: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    slots = start + tl.arange(0, BM) * STEP
    valid = slots < stop
    q = _load_tile(Q, q_base, q_stride, b, n, start, slots, valid, BM, D, MASKED, TMA)
    dout = _load_tile(DOUT, do_base, do_stride, b, n, start, slots, valid, BM, D, MASKED, TMA)
    if MASKED:
        lse = tl.load(LSE + row_base + slots, mask=valid, other=0.0)
        delta = tl.load(DELTA + row_base + slots, mask=valid, other=0.0)
    else:
        lse = tl.load(LSE + row_base + slots)
        delta = tl.load(DELTA + row_base + slots)
    # Keys by queries, so that only the gradient of q needs a transpose.
    weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale - lse[None, :])
    if MASKED:
        seen = (keys >= first_key) & (keys < last_key)
        rank_of_keys = _rank_of_keys(RANK, keys, seen, CAUSAL)
        visible = _visible(_rank_of_queries(RANK, slots, valid, CAUSAL)[None, :], rank_of_keys[:, None], WINDOW)
        weights = tl.where(visible & valid[None, :], weights, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
    if ADD_DQ:
        dq = tl.dot(tl.trans(dscores), k, input_precision=PRECISION) * scale
        if TMA and not _INTERPRETED:
            # Adds zeros to queries out of bounds.
            DQ.atomic_add([b, n, start, 0], tl.reshape(dq, [1, 1, BM, D]))
        else:
            pointers = DQ + dq_base + slots.to(tl.int64)[:, None] * dq_stride + tl.arange(0, D)[None, :]
            if MASKED:
                tl.atomic_add(pointers, dq, mask=valid[:, None], sem="relaxed")
            else:
                tl.atomic_add(pointers, dq, sem="relaxed")
    return dk, dv


@triton.jit
def backward_kernel(
    Q, K, V, DOUT, DQ, DK, DV, LSE, DELTA, RANK,
    q_b, q_n, q_l, k_b, k_n, k_l, v_b, v_n, v_l, do_b, do_n, do_l, dq_b, dq_n, dq_l, dk_b, dk_n, dk_l, dv_b, dv_n, dv_l,
    scale, TILES, PARTNERS, num_tiles, heads, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, ADD_DQ: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program for each tile of keys of one head of keys."""
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, m = head // heads, head % heads
    keys = tl.load(TILES + tile * 5) + tl.arange(0, BN) * STEP
    valid = keys < tl.load(TILES + tile * 5 + 1)
    first, masked, last = tl.load(TILES + tile * 5 + 2), tl.load(TILES + tile * 5 + 3), tl.load(TILES + tile * 5 + 4)

    b64, m64 = b.to(tl.int64), m.to(tl.int64)
    k = _load(K, b64 * k_b + m64 * k_n, k_l, keys, valid, D, True)
    v = _load(V, b64 * v_b + m64 * v_n, v_l, keys, valid, D, True)
    dk, dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    log2_scale = scale * _LOG2_E
    for member in range(GROUP):
        n = m * GROUP + member
        n64 = n.to(tl.int64)
        q_base, do_base, dq_base = b64 * q_b + n64 * q_n, b64 * do_b + n64 * do_n, b64 * dq_b + n64 * dq_n
        row_base = (b64 * heads * GROUP + n64) * length
        for index in range(first, masked):
            stop = tl.load(PARTNERS + index * 4 + 1)
            for start in range(tl.load(PARTNERS + index * 4), stop, BM * STEP):
                dk, dv = _backward_step(
                    k, v, dk, dv, Q, DOUT, DQ, LSE, DELTA, RANK, q_base, do_base, dq_base, q_l, do_l, dq_l, row_base,
                    b, n, start, stop, keys, 0, 0, log2_scale, scale,
                    D, BM, CAUSAL, WINDOW, STEP, False, PRECISION, ADD_DQ, TMA,
                )  # fmt: skip
        for index in range(masked, last):
            dk, dv = _backward_step(
                k, v, dk, dv, Q, DOUT, DQ, LSE, DELTA, RANK, q_base, do_base, dq_base, q_l, do_l, dq_l, row_base,
                b, n, tl.load(PARTNERS + index * 4), tl.load(PARTNERS + index * 4 + 1), keys,
                tl.load(PARTNERS + index * 4 + 2), tl.load(PARTNERS + index * 4 + 3), log2_scale, scale,
                D, BM, CAUSAL, WINDOW, STEP, True, PRECISION, ADD_DQ, TMA,
            )  # fmt: skip
    _store(DK, b64 * dk_b + m64 * dk_n, dk_l, keys, valid, dk * scale, D)
    _store(DV, b64 * dv_b + m64 * dv_n, dv_l, keys, valid, dv, D)


@triton.jit
def _gradient_of_q_step(
    q, dout, lse, delta, dq, K, V, RANK, k_base, v_base, k_stride, v_stride, b, n, start, stop, rank_of_queries,
    log2_scale,
    D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    slots = start + tl.arange(0, BN) * STEP
    valid = slots < stop
    k = _load_tile(K, k_base, k_stride, b, n, start, slots, valid, BN, D, MASKED, TMA)
    v = _load_tile(V, v_base, v_stride, b, n, start, slots, valid, BN, D, MASKED, TMA)
    weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale - lse[:, None])
    if MASKED:
        visible = _visible(rank_of_queries[:, None], _rank_of_keys(RANK, slots, valid, CAUSAL)[None, :], WINDOW)
        weights = tl.where(visible, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dscores = (weights * (dweights - delta[:, None])).to(k.dtype)
    return tl.dot(dscores, k, dq, input_precision=PRECISION)


@triton.jit
def gradient_of_q_kernel(
    Q, K, V, DOUT, DQ, LSE, DELTA, RANK,
    q_b, q_n, q_l, k_b, k_n, k_l, v_b, v_n, v_l, do_b, do_n, do_l, dq_b, dq_n, dq_l,
    scale, TILES, PARTNERS, num_tiles, heads, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries of one head: the second pass of the deterministic mode."""
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, n = head // heads, head % heads
    slots = tl.load(TILES + tile * 5) + tl.arange(0, BM) * STEP
    valid = slots < tl.load(TILES + tile * 5 + 1)
    first, masked, last = tl.load(TILES + tile * 5 + 2), tl.load(TILES + tile * 5 + 3), tl.load(TILES + tile * 5 + 4)

    b64, n64 = b.to(tl.int64), n.to(tl.int64)
    q = _load(Q, b64 * q_b + n64 * q_n, q_l, slots, valid, D, True)
    dout = _load(DOUT, b64 * do_b + n64 * do_n, do_l, slots, valid, D, True)
    lse = tl.load(LSE + head.to(tl.int64) * length + slots, mask=valid, other=0.0)
    delta = tl.load(DELTA + head.to(tl.int64) * length + slots, mask=valid, other=0.0)
    rank = _rank_of_queries(RANK, slots, valid, CAUSAL)
    dq = tl.zeros([BM, D], tl.float32)
    m = n // GROUP
    k_base = b64 * k_b + m.to(tl.int64) * k_n
    v_base = b64 * v_b + m.to(tl.int64) * v_n
    log2_scale = scale * _LOG2_E
    for index in range(first, masked):
        stop = tl.load(PARTNERS + index * 4 + 1)
        for start in range(tl.load(PARTNERS + index * 4), stop, BN * STEP):
            dq = _gradient_of_q_step(
                q, dout, lse, delta, dq, K, V, RANK, k_base, v_base, k_l, v_l, b, m, start, stop, rank, log2_scale,
                D, BN, CAUSAL, WINDOW, STEP, False, PRECISION, TMA,
            )  # fmt: skip
    for index in range(masked, last):
        dq = _gradient_of_q_step(
            q, dout, lse, delta, dq, K, V, RANK, k_base, v_base, k_l, v_l, b, m,
            tl.load(PARTNERS + index * 4), tl.load(PARTNERS + index * 4 + 1), rank, log2_scale,
            D, BN, CAUSAL, WINDOW, STEP, True, PRECISION, TMA,
        )  # fmt: skip
    _store(DQ, b64 * dq_b + n64 * dq_n, dq_l, slots, valid, dq * scale, D)
