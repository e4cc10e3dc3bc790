"""Does a supervised command run again until it is done or hopeless, and do signals reach its processes?"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import supervise

ROOT = Path(__file__).resolve().parents[2]
# Stands in for the launcher and the trainer: dies twice, finishes the third time.
JOB = """
import json, os, sys, time
from pathlib import Path
run, script = Path(sys.argv[1]), sys.argv[2].split(",")
run.mkdir(exist_ok=True)
number = len(list(run.glob("try-*")))
(run / f"try-{number}").touch()
what = script[min(number, len(script) - 1)]
state = {"state": "running", "started": time.time()}
(run / "run_state.json").write_text(json.dumps(state))
if what != "stuck":
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number + 1, "metrics": {}}) + "\\n")
if what == "finish":
    end = {"state": "finished", "code": 0, "reason": "done", "ended": time.time(), "step": number}
    (run / "run_state.json").write_text(json.dumps(state | end))
if what == "hang":
    time.sleep(600)
os._exit(1)
"""


def command(folder: Path, script: str) -> list[str]:
    return [sys.executable, "-c", JOB, str(folder / "run"), script]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "PAUSE_SECONDS", 0.0)


def test_it_runs_again_until_the_run_is_finished(tmp_path: Path) -> None:
    assert supervise.supervise(command(tmp_path, "die,die,finish"), tmp_path / "run", 3) == 0
    assert len(list((tmp_path / "run").glob("try-*"))) == 3


def test_without_progress_it_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise.supervise(command(tmp_path, "die,stuck"), tmp_path / "run", 2) == 70
    assert len(list((tmp_path / "run").glob("try-*"))) == 3
    assert "2 attempts in a row brought the run no step further" in capsys.readouterr().err


def test_a_machine_that_does_not_answer_ends_it_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "answers", lambda host: host != "node2")
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    job = [*command(tmp_path, "die"), "--hostfile", str(tmp_path / "hosts")]
    assert supervise.supervise(job, tmp_path / "run", 3) == 69
    assert "node2 does not answer ssh" in capsys.readouterr().err
    entries = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert entries[-1]["code"] == 69


def test_a_command_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise.supervise(["deepsped"], tmp_path / "run", 3) == 2
    assert "cannot start deepsped (No such file or directory)" in capsys.readouterr().err


def test_each_attempt_of_the_launcher_gets_a_port_of_its_own() -> None:
    launcher = ["/venv/bin/deepspeed", "--hostfile", "hosts", "trainer/run.py"]
    assert supervise.with_port(launcher, 29501)[:4] == ["/venv/bin/deepspeed", "--master_port", "29501", "--hostfile"]
    for chosen in (["deepspeed", "--master_port", "1", "x"], ["deepspeed", "--master_port=1", "x"], ["python", "x"]):
        assert supervise.with_port(chosen, 29501) == chosen


def test_sigterm_reaches_every_process_of_the_command(tmp_path: Path) -> None:
    """The launcher alone would end and leave its ranks running; a shell stands in for it."""
    job = ["sh", "-c", '"$@" & wait', "sh", *command(tmp_path, "hang")]
    ours = [sys.executable, "-m", "cluster.supervise", "--run-dir", str(tmp_path / "run"), "--"]
    with subprocess.Popen([*ours, *job], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pattern = f"{tmp_path}/run hang$"
        assert subprocess.run(["pgrep", "-f", pattern], capture_output=True).returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        assert process.stderr is not None
        assert "stopped by a signal" in process.stderr.read()
    while subprocess.run(["pgrep", "-f", pattern], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(list((tmp_path / "run").glob("try-*"))) == 1
