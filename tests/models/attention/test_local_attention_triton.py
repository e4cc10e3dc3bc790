"""Are the fused attention kernels right, do they fit the GPUs they are for, and are they chosen where they pay?

The kernels run here in Triton's interpreter and are compiled ahead of time, each in a process of its own since one
excludes the other; tests marked `gpu` run them as they will be used.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.attention import local_attention as dispatch
from models.attention.local_attention import local_attention
from models.attention.pattern import Pattern, dilated_1d, fixed_1d, full, local_1d, local_2d, sliding_1d, strided_1d
from models.attention.tile_plan import TilePlan, plan_by_keys, plan_by_queries, plan_on_grid

ROOT = Path(__file__).resolve().parents[3]
# Bytes of shared memory that a program may use, by compute capability.
SHARED_MEMORY = {80: 166_912, 90: 232_448}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}

PATTERNS = {
    "1d": local_1d(256, 64, 64),
    "1d short memory": local_1d(200, 50, 20),
    "1d long memory": local_1d(256, 64, 160),
    "1d small blocks": local_1d(96, 12, 12),
    "1d ragged": local_1d(301, 64, 40),
    "1d both sides": local_1d(200, 40, 24, causal=False),
    "2d cells": local_2d(16, 32, (8, 16), (8, 8)),
    "2d partial flange": local_2d(12, 20, (4, 10), (2, 3)),
    "2d all sides": local_2d(16, 16, (8, 8), (4, 4), causal=False),
    "dilated": dilated_1d(256, 32, 16, 8, 3),
    "full": full(200),
    "global": full(200, causal=False),
    "sliding": sliding_1d(256, 64),
    "sliding, ragged": sliding_1d(301, 37),
    "strided": strided_1d(256, 4),
    "strided, ragged": strided_1d(301, 7),
    "strided by more than a tile": strided_1d(300, 150),
    "fixed": fixed_1d(256, 64, 16),
    "fixed, second group": fixed_1d(256, 32, 4, group=1),
}
EVERY_PATTERN = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def run(arguments: list[str], **environment: str) -> str:
    """The output of a Python process, which must succeed."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def pairs_of(pattern: Pattern, plan: TilePlan, by_queries: bool) -> tuple[Tensor, Tensor]:
    """int [L, L]: how often each (query, key) is computed without a mask, and how often with one."""
    without, masked = torch.zeros(2, pattern.length, pattern.length, dtype=torch.int64)
    step = pattern.step
    for start, stop, first, first_masked, last in plan.tiles.tolist():
        for index in range(first, last):
            other_start, other_stop, key_start, key_stop = plan.partners[index].tolist()
            queries = slice(start, stop, step) if by_queries else slice(other_start, other_stop, step)
            (without if index < first_masked else masked)[queries, key_start:key_stop:step] += 1
    return without, masked


@EVERY_PATTERN
@pytest.mark.parametrize("plan_of", [plan_by_queries, plan_by_keys])
def test_a_plan_computes_each_visible_pair_once_and_masks_all_others(plan_of, pattern: Pattern) -> None:
    plan = plan_of(pattern, 32, 16)
    without, masked = pairs_of(pattern, plan, plan_of is plan_by_queries)
    visible = pattern.mask_in_storage_order()
    assert torch.equal((without + masked)[visible], torch.ones_like(without)[visible])
    assert not without[~visible].any()
    # The kernels mask by rank; only keys that come later, or before a window, may be in a tile in vain.
    age = pattern.rank[:, None] - pattern.rank[None, :]
    invisible = ((age < 0) | (age >= (pattern.window or pattern.length))) & pattern.causal
    assert invisible[(masked > 0) & ~visible].all()


@EVERY_PATTERN
def test_no_tile_is_computed_in_vain(pattern: Pattern) -> None:
    visible = pattern.mask_in_storage_order()
    plan = plan_by_queries(pattern, 32, 16)
    for start, stop, first, _, last in plan.tiles.tolist():
        for key_start, key_stop, _, _ in plan.partners[first:last].tolist():
            assert visible[start : stop : pattern.step, key_start : key_stop : pattern.step].any()


@EVERY_PATTERN
@pytest.mark.parametrize("tile", [16, 128])
def test_the_plan_on_a_grid_is_what_the_dense_mask_says(pattern: Pattern, tile: int) -> None:
    plan, count = plan_on_grid(pattern, tile), -(-pattern.length // tile)
    visible = torch.zeros(count * tile, count * tile, dtype=torch.bool)
    visible[: pattern.length, : pattern.length] = pattern.mask_in_storage_order()
    tiles = visible.view(count, tile, count, tile).transpose(1, 2).flatten(2)
    some, every = tiles.any(-1), tiles.all(-1)
    for row in range(count):
        assert list(plan.full[row]) == every[row].nonzero().flatten().tolist()
        assert list(plan.partial[row]) == (some & ~every)[row].nonzero().flatten().tolist()


@EVERY_PATTERN
def test_flex_attention_without_gradients_is_that_of_the_dense_mask(pattern: Pattern) -> None:
    q, k, v = (torch.randn(1, 2, pattern.length, 16) for _ in range(3))
    expected = local_attention(q, k, v, pattern, backend="reference")
    torch.testing.assert_close(local_attention(q, k, v, pattern, backend="flex"), expected, rtol=2e-5, atol=2e-5)


def test_flex_attention_on_a_cpu_refuses_gradients_in_a_sentence() -> None:
    x = torch.zeros(1, 1, 200, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients on a CPU; take 'blocked'"):
        local_attention(x, x, x, PATTERNS["full"], backend="flex")
    with torch.no_grad():
        local_attention(x, x, x, PATTERNS["full"], backend="flex")


def test_the_fused_kernels_refuse_a_cpu_in_a_sentence() -> None:
    x = torch.zeros(1, 1, 200, 16)
    with pytest.raises(ValueError, match="on cpu, it needs CUDA"):
        local_attention(x, x, x, PATTERNS["full"], backend="triton")


def test_the_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    x = torch.zeros(1, 1, 200, 16)
    with caplog.at_level(logging.INFO, logger="models.attention.local_attention"):
        for _ in range(2):
            local_attention(x, x, x, PATTERNS["full"])
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs on blocked: the others are for CUDA, and the tensors are on cpu"
    ]


def test_the_choice_and_its_log_line_do_not_break_a_compiled_graph(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    choose = torch.compile(lambda x: (x, dispatch._fastest(x, x, x, 1.0)), fullgraph=True, backend="eager")
    with caplog.at_level(logging.INFO, logger="models.attention.local_attention"):
        assert choose(torch.zeros(1, 1, 200, 16))[1] == "blocked"
    assert "attention runs on blocked" in caplog.text


def test_without_triton_the_other_backends_work() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from models.attention.local_attention import local_attention
from models.attention.pattern import full
x = torch.ones(1, 1, 4, 2)
assert torch.equal(local_attention(x, x, x, full(4)), x)
try:
    local_attention(x, x, x, full(4), backend="triton")
except ValueError as error:
    print(error)
"""
    assert "Triton is not installed" in run(["-c", code])


def test_interpreted_kernels_pass_their_tests() -> None:
    pytest.importorskip("triton")
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "tests/support/interpreted_attention.py"]
    assert " passed" in run(arguments, TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "sees", "group"),
    [
        (90, 64, "bf16", "causal", 1),
        pytest.param(90, 32, "bf16", "causal", 1, marks=pytest.mark.slow),
        pytest.param(90, 128, "bf16", "causal", 1, marks=pytest.mark.slow),
        pytest.param(80, 64, "bf16", "causal", 1, marks=pytest.mark.slow),
        pytest.param(80, 128, "bf16", "causal", 1, marks=pytest.mark.slow),
        pytest.param(90, 64, "fp16", "both sides", 4, marks=pytest.mark.slow),
        pytest.param(90, 128, "fp32", "causal", 1, marks=pytest.mark.slow),
        pytest.param(90, 64, "bf16", "window", 1, marks=pytest.mark.slow),
        pytest.param(90, 128, "bf16", "stride", 1, marks=pytest.mark.slow),
        pytest.param(80, 64, "bf16", "window", 1, marks=pytest.mark.slow),
    ],
)
def test_compiled_kernels_fit_the_gpu(
    capability: int, width: int, dtype: str, sees: str, group: int, tmp_path: Path
) -> None:
    """Tensor cores are used, and on Hopper the tensor memory unit; no register is spilled to memory, shared memory
    suffices."""
    pytest.importorskip("triton")
    arguments = [
        "-m",
        "tests.support.compile_attention_kernels",
        str(capability),
        str(width),
        dtype,
        sees,
        str(group),
    ]
    rows = [json.loads(line) for line in run(arguments, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    assert len(rows) == 5
    for row in rows:
        name = row["kernel"]
        assert row["shared"] <= SHARED_MEMORY[capability], row
        # delta multiplies no matrices. fp32 is there for its precision: older instructions, and some spills.
        assert (row["HMMA" if dtype == "fp32" else TENSOR_CORES[capability]] > 0) == (name != "delta"), row
        assert dtype == "fp32" or row["stack"] == row["LDL"] == row["STL"] == 0, row
        by_descriptors = capability == 90 and dtype != "fp32" and sees != "stride"
        assert (row["UTMALDG"] > 0) == (by_descriptors and name != "delta"), row
        assert (row["UTMAREDG"] > 0) == (by_descriptors and name == "backward"), row


def on_gpu(pattern: Pattern, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, not contiguous."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkvd = torch.randn(2, pattern.length, 4, 3, width, generator=generator, device="cuda").to(dtype)
    return [qkvd[:, :, i].transpose(1, 2) for i in range(4)]


def results(tensors: list[Tensor], pattern: Pattern, **options) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = local_attention(*leaves, pattern, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(actual, exact, strict=True)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_PATTERN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "triton"},
        {"backend": "triton", "deterministic": True},
        pytest.param({"backend": "flex"}, marks=pytest.mark.slow),
    ],
    ids=["atomic", "deterministic", "flex"],
)
def test_on_a_gpu_the_error_is_at_most_one_and_a_half_that_of_the_dense_mask(
    pattern: Pattern, dtype: torch.dtype, width: int, options: dict
) -> None:
    tensors = on_gpu(pattern, width, dtype)
    exact = results([tensor.double() for tensor in tensors], pattern, backend="reference")
    rounded = errors(results(tensors, pattern, backend="reference"), exact)
    for error, of_dense in zip(errors(results(tensors, pattern, **options), exact), rounded, strict=True):
        assert error <= 1.5 * of_dense


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_PATTERN
def test_on_a_gpu_fp32_is_exact_to_rounding(pattern: Pattern) -> None:
    tensors = on_gpu(pattern, 64, torch.float32)
    exact = results([tensor.double() for tensor in tensors], pattern, backend="reference")
    assert max(errors(results(tensors, pattern, backend="triton"), exact)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_deterministic_mode_gives_the_same_bits_every_time() -> None:
    pattern = local_1d(4096, 512, 512)
    tensors = on_gpu(pattern, 64, torch.bfloat16)
    first = results(tensors, pattern, backend="triton", deterministic=True)
    for _ in range(10):
        again = results(tensors, pattern, backend="triton", deterministic=True)
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_fused_kernels_are_chosen_and_compile_into_one_graph(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    pattern = PATTERNS["2d cells"]
    q, k, v, _ = on_gpu(pattern, 64, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: local_attention(q, k, v, pattern), fullgraph=True)
    with caplog.at_level(logging.INFO, logger="models.attention.local_attention"):
        actual = compiled(q, k, v)
    assert "attention runs on triton" in caplog.text
    assert torch.equal(actual, local_attention(q, k, v, pattern, backend="triton"))
