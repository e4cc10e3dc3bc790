"""Does the benchmark of checkpoints run the real job both ways and report what it lost?"""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint, report
from tests.support.launch import TINY_MODEL, mlflow_store, train


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
    (loop,), (without,) = (numbers["details"]["loops"][kind] for kind in ("with checkpoints", "without"))
    assert loop["steps"] == without["steps"] == 13
    assert loop["seconds"] > 0 and without["seconds"] > 0 and without["stall_seconds"] == 0
    assert numbers["checkpoint_stall_share"] == pytest.approx(loop["stall_seconds"] / loop["seconds"])
    assert numbers["checkpoint_time_share"] == pytest.approx(1 - without["seconds"] / loop["seconds"])
    assert (numbers["details"]["every_steps"], numbers["details"]["mebibytes"] > 0) == (4, True)
    assert "a checkpoint of " in (tmp_path / "RESULTS.md").read_text()


def test_the_stall_is_what_intervals_with_a_checkpoint_take_outside_of_steps_beyond_the_others(tmp_path: Path) -> None:
    times = {5: 10.0, 10: 15.5, 15: 28.5, 20: 34.0, 25: 42.0}  # 5 s of steps, 0.5 s between them; after 10: 7.5 s more
    lines = [{"step": step, "time": time, "metrics": {"perf/step_ms": 1000}} for step, time in times.items()]
    lines.insert(0, {"step": 0, "time": 0.0, "metrics": {"val/bits_per_dim": 8.0}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loop = checkpoint.loop_of(tmp_path, every_steps=10)
    assert (loop.seconds, loop.steps) == (32.0, 20)
    assert loop.stall_seconds == pytest.approx(7.5 + 2.5)  # after steps 10 and 20
    assert checkpoint.loop_of(tmp_path, every_steps=1000).stall_seconds == 0
