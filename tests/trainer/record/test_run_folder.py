"""Are a run's lines whole and complete, whatever happens to the process, the disk and the reader?"""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT
from trainer.record.run_folder import Journal, RunFiles, working_seconds


def numbers(path: Path) -> list[int]:
    return [record["n"] for record in Journal(path).records()]


def test_lines_come_back_in_order_and_in_pieces(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.jsonl")
    for n in range(2500):
        journal.append({"n": n})
    assert numbers(journal.path) == list(range(2500))
    records, position = journal.read(0, 10)
    assert [record["n"] for record in records] == list(range(10))
    records, position = journal.read(position, 5000)
    assert [record["n"] for record in records] == list(range(10, 2500))
    assert journal.read(position, 10) == ([], position)
    journal.append({"n": 2500})
    assert journal.read(position, 10)[0] == [{"n": 2500}]


def test_the_beginning_of_a_line_is_not_read_and_is_cut_off_by_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\nnot JSON\n{"n": 2}\n{"n"')
    journal = Journal(path)
    assert numbers(path) == [1, 2]
    journal.repair()
    journal.append({"n": 3})
    assert numbers(path) == [1, 2, 3]


def test_a_file_that_somebody_replaced_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n')
    assert Journal(path).read(10_000, 10)[0] == [{"n": 1}]


def test_lines_of_two_processes_do_not_mix(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.record.run_folder import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in range(500): journal.append({'n': n, 'who': sys.argv[2], 'text': 'x' * 3000})\n"
    )
    path = tmp_path / "x.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), who], cwd=ROOT) for who in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for who in "ab":
        assert [record["n"] for record in records if record["who"] == who] == list(range(500))


def test_a_disk_that_is_full_for_a_while_loses_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE makes the kernel write a part of a line and then refuse, as a full disk does."""
    program = (
        "import json, resource, signal, sys; from pathlib import Path; from trainer.record.run_folder import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "for n in range(30):\n"
        "    if n == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (107, hard))\n"
        "    if n == 20: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "    journal.append({'n': n})\n"
        "    if n == 15: print(Path(sys.argv[1]).read_bytes()[-1:] == b'\\n')\n"
    )
    path = tmp_path / "x.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert numbers(path) == list(range(30))
    assert done.stdout == "True\n"  # what fitted of a line was taken back
    assert done.stderr.count("cannot be written") == 1


def test_appending_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "no folder" / "x.jsonl")
    with caplog.at_level(logging.WARNING):
        journal.append({"n": 1})
        journal.append({"n": 2})
    assert len(caplog.records) == 1
    assert os.strerror(errno.ENOENT) in caplog.text
    journal.path.parent.mkdir()
    journal.append({"n": 3})
    assert numbers(journal.path) == [1, 2, 3]


class StaleFile:
    """What an open file becomes when its server forgets it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def fileno(self) -> int:
        return int(self._file.fileno())

    def write(self, data: bytes) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def close(self) -> None:
        self._file.close()


def test_a_stale_handle_costs_neither_a_line_nor_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "x.jsonl")
    journal.append({"n": 1})
    journal._file = StaleFile(journal._file)  # type: ignore[assignment]
    journal.append({"n": 2})
    assert numbers(journal.path) == [1, 2]
    assert not caplog.records


def test_a_folder_that_was_replaced_gets_the_lines_that_follow(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "x.jsonl")
    journal.path.parent.mkdir()
    journal.append({"n": 1})
    journal.path.parent.rename(tmp_path / "old")
    journal.append({"n": 2})
    journal.path.parent.mkdir()
    assert journal.finish(0.0) is None
    assert (numbers(tmp_path / "old/x.jsonl"), numbers(journal.path)) == ([1], [2])


def test_the_last_lines_wait_for_a_disk_that_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "x.jsonl")
    journal.append({"n": 1})
    thread = threading.Timer(0.3, journal.path.parent.mkdir)
    thread.start()
    assert journal.finish(30.0) is None
    assert numbers(journal.path) == [1]
    thread.join()


def test_lines_that_cannot_be_written_until_the_end_are_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    journal = Journal(tmp_path / "a run" / "x.jsonl")
    for n in range(3):
        journal.append({"n": n})
    text = journal.finish(0.3)
    (spare,) = tmp_path.glob("a run-x-*.jsonl")
    assert text is not None
    sentence, command = text.split(": cat ")
    assert (
        sentence == f"{journal.path}: 3 lines could not be written (No such file or directory) and are kept in {spare}"
    )
    journal.path.parent.mkdir()
    subprocess.run(f"cat {command}", shell=True, check=True)
    assert numbers(journal.path) == [0, 1, 2]

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    lost = Journal(tmp_path / "nowhere" / "x.jsonl")
    lost.append({"n": 1})
    assert "1 line could not be written (No such file or directory), nor kept elsewhere" in str(lost.finish(0.0))


def test_a_disk_that_does_not_confirm_the_lines_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal = Journal(tmp_path / "x.jsonl")
    journal.append({"n": 1})
    monkeypatch.setattr(os, "fsync", fail)
    assert (
        journal.finish(0.0)
        == f"{journal.path}: it is not known whether the disk has all of its lines (Input/output error)"
    )


def test_a_kill_in_the_middle_leaves_whole_lines(tmp_path: Path) -> None:
    program = (
        "import itertools, sys; from pathlib import Path; from trainer.record.run_folder import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in itertools.count():\n"
        "    journal.append({'n': n, 'text': 'x' * 2000})\n"
        "    if n == 20: print('go', flush=True)\n"
    )
    path = tmp_path / "x.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    found = numbers(path)
    assert found == list(range(len(found)))
    assert len(found) > 20


def test_the_state_changes_entry_by_entry_and_survives_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = RunFiles(tmp_path)
    assert files.read_state() == {}
    files.write_state(state="running", step=1)
    files.write_state(step=2)
    assert files.read_state() == {"state": "running", "step": 2}
    files.state.write_text('{"state": "runn')
    assert files.read_state() == {}
    assert "is damaged" in caplog.text


def test_an_attempt_ends_with_its_last_sign_of_life() -> None:
    attempts = [{"started": 10.0}, {"started": 100.0}, {"started": 200.0}]
    spent = working_seconds(attempts, [12.0, 30.0, 150.0])
    assert [seconds for _, seconds in spent] == [20.0, 50.0, 0.0]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 80.0, "time": 1.0, "metrics": {}}',
        '{"step": -1, "time": 1.0, "metrics": {}}',
        '{"step": 1e400, "time": 1.0, "metrics": {}}',
        '{"step": 2, "time": NaN, "metrics": {}}',
        '{"step": 2, "time": 1e300, "metrics": {}}',
        '{"step": 2, "time": 1.0}',
        '{"step": 2, "time": 1.0, "metrics": {"x": "1"}}',
        '{"step": 2, "time": 1.0, "metrics": [1]}',
        '{"step": true, "time": 1.0, "metrics": {}}',
        '{"step": 2, "time": 1.0, "metrics": {}, "x": ' + "[" * 100_000,
        "[]",
        "3" * 10_000,
    ],
    ids=lambda line: line[:40],
)
def test_an_odd_point_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str) -> None:
    files = RunFiles(tmp_path)
    good = '{"step": 1, "time": 1, "metrics": {"a": NaN, "b": 2}, "more": 3}'
    files.metrics.write_text(f"{line}\n{good}\n{line}\n{good}\n")
    assert [record["step"] for record in files.points().records()] == [1, 1]
    assert files.last_steps() == {"a": 1, "b": 1}
    assert len([text for text in caplog.messages if "a line is passed over" in text]) <= 2  # one for each reading


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\n' + b"\0" * (5 << 20) + b'\n{"n": 2}\n')
    assert numbers(path) == [1, 2]
    with path.open("ab") as file:
        file.truncate(1 << 28)  # a hole, and no end of a line
    assert numbers(path) == [1, 2]
    Journal(path).repair()
    assert path.stat().st_size < 6 << 20


def test_an_odd_entry_of_the_state_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = RunFiles(tmp_path)
    state = {"attempt": "three", "identity": {"model": 3}, "state": "asleep", "step": 4, "code": 0, "mine": [1]}
    files.state.write_text(json.dumps(state))
    assert files.read_state() == {"step": 4, "code": 0, "mine": [1]}
    assert "attempt and identity and state is damaged" in caplog.text
    files.write_state(attempt=1)
    assert files.read_state() == {"step": 4, "code": 0, "mine": [1], "attempt": 1}


@pytest.mark.parametrize("text", ["", "[]", "null", '{"x": ' + "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"])
def test_what_is_no_record_at_all_is_none(tmp_path: Path, text: str) -> None:
    files = RunFiles(tmp_path)
    for path in (files.state, files.description, files.sent):
        path.write_text(text, encoding="latin-1")
    assert (files.read_state(), files.read_description(), files.read_sent()) == ({}, {}, {})


@pytest.mark.parametrize(
    "odd",
    [
        {"key": "' or 1"},
        {"attempts": [{}]},
        {"params": {"a": 1}},
        {"data": [{"url": 1}]},
        {"attempt": 1.5},
        {"uri": None},
    ],
    ids=str,
)
def test_an_odd_description_is_none(tmp_path: Path, odd: dict[str, object]) -> None:
    files = RunFiles(tmp_path)
    attempts = [{"started": 1.0, "world_size": 1, "host": "vm"}]
    whole = {"uri": "x", "experiment": "e", "name": "n", "key": "a" * 32, "attempt": 1, "attempts": attempts}
    whole |= {"params": {}, "tags": {}, "data": []}
    files.description.write_text(json.dumps(whole))
    assert files.read_description() == whole
    files.description.write_text(json.dumps(whole | odd))
    assert files.read_description() == {}
    files.sent.write_text('{"metrics": -5, "events": 0}')
    assert files.read_sent() == {}
