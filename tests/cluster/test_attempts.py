"""Is the right thing decided after each way that an attempt can end?"""

import json
from pathlib import Path

import pytest

from cluster.attempts import Attempts, Decision, decide, furthest_step, read_state

RUNNING = {"state": "running", "started": 2.0}
BEFORE = {"state": "stopped", "code": 75, "started": 1.0, "ended": 1.5, "step": 10}


def ended(state: str, code: int) -> dict[str, object]:
    return BEFORE | {"state": state, "code": code, "reason": "because", "step": 20, "started": 2.0, "ended": 3.0}


@pytest.mark.parametrize(
    ("after", "code", "leaving", "expected"),
    [
        (ended("finished", 0), 0, False, ("done", 0)),
        (ended("finished", 0), 1, True, ("done", 0)),  # the launcher's own code is no news
        (ended("stopped", 75), 1, False, ("end", 75)),  # a user's wish
        (ended("stopped", 75), 75, True, ("again", 75)),  # Slurm's
        (ended("failed", 76), 76, False, ("end", 76)),
        (ended("failed", 2), 0, False, ("end", 2)),
        (ended("failed", 70), 70, False, ("again", 70)),  # a rank lost its peer
        (ended("failed", 69), 69, False, ("again", 69)),
        (BEFORE | RUNNING, 247, False, ("again", 247)),  # killed
        (BEFORE | RUNNING, 0, False, ("again", 70)),  # killed, and the launcher says 0
        (BEFORE | RUNNING, 2, False, ("again", 2)),  # it had begun: the code is the launcher's
        (BEFORE, 2, False, ("end", 2)),  # a mistake in the config, before anything was written
        (BEFORE, 1, False, ("again", 1)),
        (BEFORE, 0, False, ("again", 70)),
        (BEFORE | RUNNING, 137, True, ("again", 75)),
        ({}, 2, False, ("end", 2)),
        ({}, 1, False, ("again", 1)),
    ],
)
def test_run_state_decides_and_the_exit_code_only_where_it_is_silent(
    after: dict[str, object], code: int, leaving: bool, expected: tuple[str, int]
) -> None:
    decision = decide(BEFORE if after else {}, after, code, leaving=leaving)
    assert (decision.next, decision.code) == expected


def step(folder: Path, number: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number, "metrics": {}}) + "\n")


def test_attempts_in_a_row_that_bring_no_step_are_counted(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "run")
    assert attempts.without_progress() == 0
    for count in (1, 2):
        attempts.began(f"a{count}")
        assert attempts.without_progress() == count
    step(tmp_path / "run", 5)
    assert attempts.without_progress() == 0
    attempts.began("b")
    assert attempts.without_progress() == 1
    attempts.ended("b", Decision("again", 75, ""), leaving=True)  # it had no time
    assert attempts.without_progress() == 0
    with attempts.path.open("a") as file:
        file.write('{"attempt": "torn", "beg')
    assert attempts.without_progress() == 0


def test_torn_and_missing_files_are_no_error(tmp_path: Path) -> None:
    assert read_state(tmp_path) == {}
    assert furthest_step(tmp_path) == 0
    (tmp_path / "run_state.json").write_text('{"step": 7}')
    assert furthest_step(tmp_path) == 7
    step(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')
    assert furthest_step(tmp_path) == 3
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 40, "metrics": {"system/cpu": 1}}\n{"step": 2, "metrics": {"train/loss": 1}}\n[1]\n')
    assert furthest_step(tmp_path) == 3  # neither minutes nor what an attempt repeats that went back
    (tmp_path / "run_state.json").write_text("torn")
    assert read_state(tmp_path) == {}
