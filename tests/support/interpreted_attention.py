"""Do the attention kernels compute what the dense mask computes, run one operation at a time on the CPU?

test_local_attention_triton.py runs this file with TRITON_INTERPRET=1, which must be set before the kernels are
imported. An interpreted step of a tile takes 15 to 100 ms, so patterns are small.
"""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.attention import local_attention_triton
from models.attention.local_attention import local_attention
from models.attention.pattern import Pattern, dilated_1d, fixed_1d, full, local_1d, local_2d, sliding_1d, strided_1d
from models.model import Recompute
from tests.models.attention.test_local_attention import REFERENCE, pattern_of
from tests.models.attention.test_local_attention import TOLERANCE as REFERENCE_TOLERANCE
from tests.support.tiny_model import random_images, tiny_config

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
    "sliding": sliding_1d(90, 24),
    "sliding over a block and more": sliding_1d(100, 40),
    "strided": strided_1d(96, 2),
    "strided, ragged": strided_1d(47, 3),
    "fixed": fixed_1d(96, 32, 8),
    "fixed, second group": fixed_1d(80, 32, 8, group=1),
}
# The pattern, whether the gradient of q has a pass of its own, and whether tiles are copied through descriptors.
CASES = [
    *((name, False, False) for name in PATTERNS),
    *((name, True, True) for name in PATTERNS),
    *(
        (name, False, True)
        for name in ("1d ragged", "2d partial flange", "1d both sides", "sliding", "strided, ragged")
    ),
]
# Relative error of the norm, of sums in fp32.
TOLERANCE = 1e-6


@pytest.fixture
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels copy tiles through descriptors, as on compute capability 9.0."""
    tiles = local_attention_triton._INTERPRETED_TILES
    monkeypatch.setattr(local_attention_triton, "_INTERPRETED_TILES", tiles._replace(descriptors=request.param))
    return request.param


def random_pattern(seed: int) -> Pattern:
    """One dimension with blocks that do not divide the length, or two with flanges that do not divide the blocks."""
    rng = random.Random(seed)
    if seed % 2:
        rows, columns = rng.randint(2, 5), rng.randint(3, 9)
        height, width = rows * rng.randint(1, 3), columns * rng.randint(1, 3)
        flange = rng.randint(0, height - rows), rng.randint(0, width - columns)
        return local_2d(height, width, (rows, columns), flange, causal=rng.random() < 0.8)
    block = rng.randint(5, 50)
    return local_1d(rng.randint(block, 110), block, rng.randint(0, 60), causal=rng.random() < 0.8)


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


@pytest.mark.parametrize(("name", "deterministic", "descriptors"), CASES, indirect=["descriptors"])
def test_values_and_gradients_are_those_of_the_dense_mask(name: str, deterministic: bool, descriptors: bool) -> None:
    pattern = PATTERNS[name]
    tensors = inputs(pattern)
    actual = results(
        tensors,
        lambda q, k, v: local_attention(q, k, v, pattern, backend="triton", deterministic=deterministic),
    )
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE)


@pytest.mark.parametrize("descriptors", [False, True], indirect=True, ids=["pointers", "descriptors"])
@pytest.mark.parametrize("seed", range(4))
def test_random_patterns_too(seed: int, descriptors: bool) -> None:
    pattern = random_pattern(seed + 4 * descriptors)
    tensors = inputs(pattern)
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE)


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*masked*.npz")), ids=lambda path: path.stem)
def test_outputs_and_gradients_are_those_of_the_original_code(path: Path) -> None:
    """One image and head of each file; zeros widen its heads to the least that the kernels take."""
    data = dict(np.load(path))
    pattern, width = pattern_of(path.stem, data), data["q"].shape[-1]
    stored = {
        name: torch.from_numpy(data[name])[:1, :1].flatten(2, -2)[:, :, pattern.storage_order]
        for name in ("q", "k", "v", "dout", "out", "dq", "dk", "dv")
    }
    tensors = [F.pad(stored[name], (0, 16 - width)) for name in ("q", "k", "v", "dout")]
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, scale=1.0, backend="triton"))
    for tensor, name in zip(actual, ("out", "dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(
            tensor[..., :width], stored[name], rtol=REFERENCE_TOLERANCE, atol=REFERENCE_TOLERANCE
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("width", local_attention_triton.HEAD_WIDTHS)
def test_half_precision_errs_at_most_one_and_a_half_times_as_much_as_the_dense_mask(
    width: int, dtype: torch.dtype
) -> None:
    pattern = local_1d(40, 20, 12)
    tensors = inputs(pattern, width, dtype=dtype)
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    dense = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="reference"))
    assert all(tensor.dtype == dtype for tensor in actual)
    for one, other, exact in zip(actual, dense, expected_results(tensors, pattern), strict=True):
        assert (one.double() - exact).norm() <= 1.5 * (other.double() - exact).norm()


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_images_and_heads_are_kept_apart_and_heads_share_keys_in_groups(key_heads: int, deterministic: bool) -> None:
    pattern = local_1d(24, 12, 12)
    q, k, v, dout = inputs(pattern, batch=2, heads=4)
    tensors = [q, k[:, :key_heads], v[:, :key_heads], dout]
    actual = results(
        tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton", deterministic=deterministic)
    )
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE)


@pytest.mark.parametrize("descriptors", [True], indirect=True)
def test_rows_that_descriptors_cannot_address_are_copied_first(descriptors: bool) -> None:
    pattern = local_1d(24, 12, 12)
    wide = [torch.randn(1, 24, 1, 19)[..., 1:17].transpose(1, 2) for _ in range(3)]
    tensors = [*wide, torch.randn(1, 1, 1, 16).expand(1, 1, 24, 16)]
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    assert_close(actual, expected_results(tensors, pattern), TOLERANCE)


def test_large_scores_do_not_overflow() -> None:
    pattern = local_1d(48, 24, 24)
    q, k, v, dout = inputs(pattern)
    tensors = [60 * q, k, v, dout]
    assert (tensors[0] @ k.mT).max() / 4 > 100, "the exponential of such a score exceeds fp32"
    actual = results(tensors, lambda q, k, v: local_attention(q, k, v, pattern, backend="triton"))
    # The scores' rounding errors, relative to 1, are errors of the weights relative to their size.
    assert_close(actual, expected_results(tensors, pattern), 1e-4)


@pytest.mark.parametrize("descriptors", [False, True], indirect=True, ids=["pointers", "descriptors"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize(
    "pattern",
    [local_1d(50, 20, 12), local_2d(6, 9, (3, 3), (2, 1)), sliding_1d(50, 14), strided_1d(50, 3)],
    ids=["1d", "2d partial flange", "sliding", "strided"],
)
def test_nothing_is_read_or_written_outside_the_tensors(
    pattern: Pattern, deterministic: bool, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are windows of larger ones, with NaN beside what is given and infinity beside what the kernels write,
    which is NaN until then: NaN that is read there and written there shows as well."""
    margin = 40
    given, written = [], []

    def window(memories: list[Tensor], shape: torch.Size, dtype: torch.dtype, margin_value: float) -> Tensor:
        memory = torch.full((*shape[:2], shape[2] + 2 * margin, *shape[3:]), margin_value, dtype=dtype)
        memories.append(memory)
        return memory[:, :, margin:-margin].fill_(math.nan)

    def new_window(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return window(written, shape, dtype, math.inf)

    new_empty = Tensor.new_empty

    def new_empty_window(like: Tensor, shape: torch.Size, **options) -> Tensor:
        # The interpreter makes empty tensors too, with other options.
        return new_window(shape, **options) if options.keys() == {"dtype"} else new_empty(like, shape, **options)

    tensors = inputs(pattern)
    q, k, v, dout = (window(given, tensor.shape, tensor.dtype, math.nan).copy_(tensor) for tensor in tensors)
    number = local_attention_triton._number_of(pattern)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like, **options: new_window(like.shape, like.dtype))
        patch.setattr(Tensor, "new_empty", new_empty_window)
        forward = local_attention_triton._forward._init_fn
        out, lse = forward(q, k, v, number, 0.25, deterministic)
        backward = local_attention_triton._backward._init_fn
        gradients = backward(dout, q, k, v, out, lse, number, 0.25, deterministic)
    assert (len(given), len(written)) == (4, 6)  # written: the output, lse, delta, gradients of q, k and v
    assert_close([out, *gradients], expected_results(tensors, pattern), TOLERANCE)
    for memory in written:
        assert memory[:, :, :margin].isposinf().all() and memory[:, :, -margin:].isposinf().all()
    for memory in given:
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


def test_layers_with_the_operators_in_them_compile_into_one_graph_each_also_when_recomputed() -> None:
    torch.manual_seed(0)
    model = tiny_config(heads=1).build(Recompute(every=1))
    images = random_images(1, 4)
    pattern = model.patterns[0][0]
    model.attends = [lambda q, k, v: local_attention(q, k, v, pattern, backend="triton")] * 2

    def gradients() -> list[Tensor]:
        model.zero_grad()
        (model(images) ** 2).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(), expected, strict=True):
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
