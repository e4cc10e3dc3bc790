"""Is a bit that flips in the memory of one rank found before it gets into a checkpoint, and is the rank named?"""

import json
import os
from pathlib import Path

import pytest

from tests.support import sabotage
from tests.support.launch import curve, finish, settings, start, train
from trainer.checkpoint import read_weights
from trainer.faults.replicas import _describe

HOST = os.uname().nodename


def test_one_flipped_bit_of_one_rank_ends_the_run_with_its_name_before_the_next_checkpoint(
    tmp_path: Path, splits: Path
) -> None:
    """At stage 0 no update mends it. The same command goes on from the checkpoint before it."""
    batch = {"train__global_batch_images": 6, "train__micro_batch_images": 2}
    arguments = settings(tmp_path / "run", splits, train__steps=12, train__zero_stage=0, **batch)
    code, text = finish(start(arguments, ranks=3, sabotage={1: sabotage.one_bit_flips}))
    assert code == 79, text
    assert f"error: rank 1 on {HOST} holds other values of {sabotage.TENSOR} than the other ranks" in text
    assert "Traceback" not in text
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    assert (state["state"], state["code"], state["step"]) == ("failed", 79, 8)
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-000000004"]
    assert read_weights(str(tmp_path / "run/checkpoints"), "raw").checkpoints[0].step == 4
    assert "going on from step-000000004" in train(arguments)
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stuck_bit_is_found_although_every_update_writes_over_it(tmp_path: Path, splits: Path, stage: int) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=12, train__precision="bf16", train__zero_stage=stage)
    code, text = finish(start(arguments, ranks=2, sabotage={1: sabotage.one_bit_is_stuck}))
    assert code == 79, text
    assert f"error: rank 0 on {HOST} and rank 1 on {HOST} hold different values of {sabotage.TENSOR}" in text
    assert "no majority says which are right" in text
    assert read_weights(str(tmp_path / "run/checkpoints"), "raw").checkpoints[0].step == 4


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        ([[1, 2], [1, 2], [1, 3]], "rank 2 on c holds other values of second than the other ranks"),
        ([[1, 2], [5, 2], [1, 3]], "rank 1 on b and rank 2 on c hold other values of first and 1 other tensor than"),
        ([[1, 2], [0, 2]], "rank 0 on a and rank 1 on b hold different values of first, and no majority"),
        ([[1, 2], [1, 3], [1, 4]], "rank 0 on a and rank 1 on b and rank 2 on c hold different values of second"),
    ],
)
def test_those_that_differ_from_the_majority_are_named_and_all_where_there_is_none(
    sums: list[list[int]], words: str
) -> None:
    assert _describe(["first", "second"], list(zip("abc", sums, strict=False))).startswith(words)
