"""Does the benchmark of attention time only what is right, and does its command still run?"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import attention, report
from models.attention.pattern import Pattern

SMALL = {"batch": 2, "heads": 2, "width": 8, "dtype": torch.float32}
CASE_1D = attention.case_1d("1d", 96, 16, 16, **SMALL)
CASE_2D = attention.case_2d("2d", (12, 24), (4, 8), (2, 4), **SMALL)


def test_the_command_writes_its_numbers_and_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(attention, "cases", lambda device: [CASE_1D, CASE_2D])
    monkeypatch.setattr(attention, "MEMORY_LENGTHS", (512, 4096))
    assert attention.main(["--device", "cpu", "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for name in ("two_part_1d", "dense_mask_1d", "full_causal_1d", "dense_mask_2d", "full_causal_2d"):
        assert numbers[f"cpu_speedup_vs_{name}"] > 0
    assert numbers["cpu_memory_exponent"] > 0
    assert numbers["details"]["2d"]["missing"] == {
        "two_part": "NotImplementedError: is made for 1D with a memory of one block"
    }
    assert "attention on a CPU" in (tmp_path / "RESULTS.md").read_text()


def test_the_command_measures_the_promised_numbers_on_a_cpu() -> None:
    (case,) = attention.cases("cpu")
    names = {f"cpu_speedup_vs_{name}_{case.name}" for name in attention.builders(case, "cpu")}
    assert {"cpu_speedup_vs_dense_mask_3072", "cpu_speedup_vs_full_causal_3072"} <= names
    assert (case.pattern.length, case.heads, case.width, case.dtype) == (3072, 8, 64, torch.float32)


def test_a_wrong_or_failing_candidate_is_not_timed() -> None:
    build = attention.builders(CASE_1D, "cpu")
    right = build["ours"]()

    def of(attend: attention.Attend) -> attention.Candidate:
        return attention.Candidate("other", attend, right.mask, right.pairs)

    def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right.attend(q.detach() + 0 * q, k, v)

    def failing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    others = {
        "wrong value": lambda: of(lambda q, k, v: right.attend(q, k, v) * 1.001),
        "wrong gradient": lambda: of(wrong_gradient),
        "not a number": lambda: of(lambda q, k, v: right.attend(q, k, v) / 0),
        "failing": lambda: of(failing),
    }
    measured, missing, matmuls = attention.measure(CASE_1D, {**build, **others}, "cpu", 2)
    assert set(missing) == set(others)
    assert missing["failing"] == "RuntimeError: no such kernel"
    assert set(measured) == set(build)
    assert all(len(run.forward) == len(run.backward) == len(matmuls) == 2 for run in measured.values())


@pytest.mark.parametrize("case", [CASE_1D, CASE_2D], ids=["1d", "2d"])
def test_every_candidate_on_a_cpu_is_right(case: attention.Case) -> None:
    tensors = attention.inputs(case, "cpu")
    for name, build in attention.builders(case, "cpu").items():
        if case is CASE_1D or name != "two_part":
            assert attention.error_of(build(), tensors) < 1e-5


def test_the_users_mask_on_raster_tokens_is_the_patterns() -> None:
    position = torch.arange(CASE_2D.pattern.length)
    visible = attention.raster_mask(CASE_2D)(position, position, position[:, None], position[None, :])
    assert torch.equal(visible, CASE_2D.pattern.mask())


@pytest.mark.parametrize("pattern", [CASE_1D.pattern, CASE_2D.pattern], ids=["1d", "2d"])
def test_a_sliding_window_makes_as_many_pairs_as_the_pattern_or_few_more(pattern: Pattern) -> None:
    size, pairs = attention.window_size(pattern)
    ones = torch.ones(pattern.length, pattern.length, dtype=torch.bool)
    assert int((ones.tril() & ~ones.tril(-size)).sum()) == pairs >= pattern.num_pairs
    assert int((ones.tril() & ~ones.tril(1 - size)).sum()) < pattern.num_pairs
