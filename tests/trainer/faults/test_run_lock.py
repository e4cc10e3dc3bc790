"""Is a job told from its successor where the file system has locks, and where it has none?"""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from trainer.errors import RunInUse
from trainer.faults import run_lock
from trainer.faults.run_lock import RunLock
from trainer.record.run_folder import RunFiles, write_json


def test_a_second_job_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    first = RunLock(RunFiles(tmp_path))
    with pytest.raises(RunInUse, match=f"is in use by process {os.getpid()} on "):
        RunLock(RunFiles(tmp_path))
    assert first.attempt == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_attempt_number_fences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def no_lock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(run_lock, "LOOK_AGAIN_SECONDS", 0.0)
    first = RunLock(RunFiles(tmp_path))
    assert caplog.messages == [
        f"{tmp_path} is on a file system without locks ({os.strerror(number)}): a second job there is not refused, but "
        "ends this one, when it is noticed after some seconds"
    ]
    assert not first.superseded()
    second = RunLock(RunFiles(tmp_path))
    assert (first.attempt, second.attempt) == (1, 2)
    assert (first.superseded(), second.superseded()) == (True, False)


def test_another_error_of_the_lock_is_none_of_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: object, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(RunFiles(tmp_path))


def test_the_number_of_an_attempt_does_not_come_again_where_the_state_was_lost(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    attempts = [{"started": 1.0, "world_size": 1}]
    whole = {"uri": "x", "experiment": "e", "name": "n", "key": "a" * 32, "attempt": 4, "attempts": attempts}
    write_json(files.description, whole | {"params": {}, "tags": {}, "data": []})
    assert RunLock(files).attempt == 5
