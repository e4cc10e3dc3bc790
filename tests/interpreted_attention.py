"""Do the attention kernels compute what the dense mask computes, run one operation at a time on the CPU?

tests/test_local_attention_triton.py runs this file with TRITON_INTERPRET=1, which must be set before the kernels are
imported. An interpreted step of a tile takes 15 to 100 ms, so patterns are small.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models import local_attention_triton
from models.local_attention import local_attention
from models.pattern import Pattern, dilated_1d, full, local_1d, local_2d

# With tiles of 32 x 16 and 16 x 32: memory and blocks of whole tiles, of parts of tiles, and of less than one.
PATTERNS = {
    "1d": local_1d(96, 32, 32),
    "1d short memory": local_1d(128, 64, 24),
    "1d long memory": local_1d(96, 32, 56),
    "1d blocks smaller than a tile": local_1d(48, 12, 12),
    "1d ragged": local_1d(107, 32, 24),
    "1d one block": local_1d(40, 40, 0),
    "1d both sides": local_1d(96, 32, 24, causal=False),
    "2d cells": local_2d(8, 16, (4, 16), (4, 8)),
    "2d partial flange": local_2d(8, 12, (4, 6), (3, 2)),
    "2d all sides": local_2d(8, 16, (4, 8), (4, 4), causal=False),
    "dilated": dilated_1d(96, 32, 8, 4, 3),
    "full": full(72),
}
# Relative error of the norm: of sums in fp32, and of inputs, weights and results rounded to half precision.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def inputs(
    pattern: Pattern, width: int = 16, batch: int = 1, heads: int = 1, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v and the gradient of the output, [B, N, L, D], as the projections give them: not contiguous."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, pattern.length, 3, heads, width, generator=generator).to(dtype)
    dout = torch.randn(batch, pattern.length, heads, width, generator=generator).to(dtype)
    return [*(qkv[:, :, i].transpose(1, 2) for i in range(3)), dout.transpose(1, 2)]


def results(tensors: list[Tensor], attend) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def expected_results(tensors: list[Tensor], pattern: Pattern) -> list[Tensor]:
    exact = [tensor.double() for tensor in tensors]
    return results(exact, lambda q, k, v: local_attention(q, k, v, pattern, backend="reference"))


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("name", PATTERNS)
def test_values_and_gradients_are_those_of_the_dense_mask(name: str, deterministic: bool) -> None:
    pattern = PATTERNS[name]
    tensors = inputs(pattern)
    actual = results(
        tensors,
        lambda q, k, v: local_attention(q, k, v, pattern, backend="triton", deterministic=deterministic),
    )
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("width", local_attention_triton.HEAD_WIDTHS)
def test_half_precision_of_every_width_differs_by_rounding(width: int, dtype: torch.dtype) -> None:
    pattern = local_1d(40, 20, 12)
    tensors = inputs(pattern, width, dtype=dtype)
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE[dtype])


def test_images_and_heads_are_kept_apart() -> None:
    pattern = local_1d(24, 12, 12)
    tensors = inputs(pattern, batch=2, heads=3)
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE[torch.float32])


def test_large_scores_do_not_overflow() -> None:
    pattern = local_1d(48, 24, 24)
    q, k, v, dout = inputs(pattern)
    tensors = [60 * q, k, v, dout]
    assert (tensors[0] @ k.mT).max() / 4 > 100, "the exponential of such a score exceeds fp32"
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    # The scores' rounding errors, relative to 1, are errors of the weights relative to their size.
    assert_close(actual, expected_results(tensors, pattern), 1e-4)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_nothing_is_read_or_written_outside_the_tensors(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are windows of larger ones full of NaN; what the kernels allocate is NaN until they write it."""
    pattern, margin = local_1d(50, 20, 12), 40
    tensors = inputs(pattern)
    surrounded, around = [], []

    def window(like: Tensor, **options) -> Tensor:
        memory = torch.full((*like.shape[:2], like.shape[2] + 2 * margin, *like.shape[3:]), math.nan, **options)
        around.append(memory)
        return memory[:, :, margin:-margin]

    for tensor in tensors:
        surrounded.append(window(tensor, dtype=tensor.dtype).copy_(tensor))
    number = local_attention_triton._number_of(pattern)
    empty_like = torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like, **options: window(like, dtype=like.dtype))
        q, k, v, dout = surrounded
        forward = local_attention_triton._forward._init_fn
        out, lse = forward(q, k, v, number, 0.25, deterministic)
        backward = local_attention_triton._backward._init_fn
        gradients = backward(dout, q, k, v, out, lse, number, 0.25, deterministic)
    assert torch.empty_like is empty_like and len(around) == 9  # inputs, results, delta
    assert_close([out, *gradients], expected_results(tensors, pattern), TOLERANCE[torch.float32])
    for memory in around:
        assert memory[:, :, :margin].isnan().all() and memory[:, :, -margin:].isnan().all()


def test_the_operators_keep_the_rules_of_torch() -> None:
    """Schema, gradients, shapes without data, and tracing."""
    pattern = local_1d(24, 12, 12)
    q, k, v, dout = inputs(pattern)
    arguments = (local_attention_triton._number_of(pattern), 0.25, False)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(local_attention_triton._forward, (*leaves, *arguments))
    out, lse = local_attention_triton._forward(q, k, v, *arguments)
    torch.library.opcheck(local_attention_triton._backward, (dout, q, k, v, out, lse, *arguments))


def test_compilation_as_one_graph_and_checkpointing_change_nothing() -> None:
    pattern = local_1d(24, 12, 12)
    tensors = inputs(pattern)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q * 2, k, v, pattern, backend="triton", deterministic=True) + q

    expected = results(tensors, attend)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for variant in (compiled, lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)):
        for one, other in zip(results(tensors, variant), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_inputs_that_the_kernels_cannot_take_are_refused() -> None:
    pattern = local_1d(24, 12, 12)
    x = torch.zeros(1, 1, 24, 24)
    with pytest.raises(ValueError, match="heads are 24 wide"):
        local_attention(x, x, x, pattern, backend="triton")
    x = torch.zeros(1, 1, 24, 16)
    with pytest.raises(ValueError, match="one of bf16, fp16 and fp32 for all"):
        local_attention(x, x.half(), x, pattern, backend="triton")
    with pytest.raises(ValueError, match="must be positive"):
        local_attention(x, x, x, pattern, scale=0.0, backend="triton")
