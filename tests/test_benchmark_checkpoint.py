"""Does the benchmark of checkpoints run the real job both ways and report what it lost?"""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint, report
from tests.launch import TINY_MODEL, mlflow_store, train


def run_in_a_forked_process(settings: dict[str, object], ranks: int) -> None:
    train([part for name, value in settings.items() for part in ("--set", f"{name}={value}")], ranks=ranks)


def test_the_command_writes_its_numbers_and_its_section(
    tmp_path: Path, splits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(checkpoint, "run_job", run_in_a_forked_process)
    values = TINY_MODEL | {"checkpoint.every_steps": 4, "train.log_every_steps": 1, "train.precision": "fp32"}
    values |= {f"data.{split}_url": splits / split for split in ("train", "validation")}
    values["tracking.uri"] = mlflow_store(tmp_path / "store")
    arguments = ["--json", str(tmp_path / "numbers.json"), "--ranks", "1", "--steps", "14", "--repeats", "1"]
    assert checkpoint.main([*arguments, *(f"--set={name}={value}" for name, value in values.items())]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["checkpoint_stall_share"] < 1
    assert 0 < numbers["checkpoint_between_steps_share"] < 1
    (loop,) = numbers["details"]["loops"]["with checkpoints"]
    assert loop["steps"] == 13 and 0 < loop["seconds_between_steps"] < loop["seconds"]
    assert (numbers["details"]["every_steps"], numbers["details"]["mebibytes"] > 0) == (4, True)
    assert "a checkpoint of " in (tmp_path / "RESULTS.md").read_text()
