"""Does the batch script's program start its steps right, and know when rank 0 listens? (tests/lab has the rest.)"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import slurm_job
from cluster.slurm_job import rank_0_listens, split

LISTENER = """
import signal, sys
print("up", flush=True); sys.stdin.readline()
signal.signal(signal.SIGUSR1, lambda number, frame: None)
print("listening", flush=True); sys.stdin.readline()
"""


def test_three_commands_are_cut_at_the_first_three_dashes() -> None:
    arguments = ["--run-dir", "x", "--", "srun", "-N1", "--", "--", "run.py", "--", "more"]
    assert split(arguments) == [["--run-dir", "x"], ["srun", "-N1"], [], ["run.py", "--", "more"]]


def test_outside_of_slurm_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for arguments, words in (
        (["--run-dir", "x", "--", "srun"], "three commands"),
        (["--run-dir", "x", "--", "a", "--", "--", "b"], "submit cluster/train.sbatch"),
    ):
        with pytest.raises(SystemExit):
            slurm_job.main(arguments)
        assert words in capsys.readouterr().err


def test_rank_0_listens_once_its_handler_is_installed() -> None:
    job = f"4711{os.getpid()}"
    place = {"SLURM_JOB_ID": job, "SLURM_PROCID": "0", "SLURM_STEP_ID": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER],
        env=os.environ | place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert not rank_0_listens(job)
        process.stdin.write("\n")
        assert process.stdout.readline() == "listening\n"
        assert rank_0_listens(job)
        assert not rank_0_listens(job + "0")
        process.stdin.write("\n")


SCONTROL = """#!/bin/sh
case "$*" in
"show hostnames "*) printf 'n1\\nn2\\nn3\\n' ;;
"show node "*) echo "NodeName=$3 NodeAddr=10.0.0.7 Port=1" ;;
"show job "*) echo "JobId=$3 PreemptEligibleTime=now PreemptTime=${PREEMPTED:-None}" ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> slurm_job.Job:
    """A job of three nodes whose scontrol is a stand-in."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(SCONTROL)
    (tmp_path / "bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "42", "JOB_NODELIST": "n[1-3]", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    kept = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    options = argparse.Namespace(
        run_dir=tmp_path / "run", warn_seconds=300.0, tasks_per_node=2, min_nodes=2, without_progress=3
    )
    result = slurm_job.Job(options)
    for number, handler in kept.items():
        signal.signal(number, handler)
    return result


def preflight_that_says(folder: Path, code: int, *bad: str) -> list[str]:
    """A preflight that writes names to the file behind --bad-nodes-to."""
    script = f'for last; do :; done; printf "%s\\n" {" ".join(bad)} > "$last"; exit {code}'
    return ["-c", script, "preflight"]


def test_the_ranks_meet_at_the_first_good_node_at_a_port_of_this_attempt(job: slurm_job.Job) -> None:
    assert job.meeting_point() == {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": str(20000 + 42 * 7 + 1)}
    assert job.ranks() == 6
    assert job.command(["srun", "-x"], ["p"]) == ["srun", "--nodes=3", "--nodelist=n1,n2,n3", "--ntasks=6", "-x", "p"]


def test_preemption_is_seen(job: slurm_job.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not job.is_preempted()
    monkeypatch.setenv("PREEMPTED", "2026-01-01T00:00:00")
    assert job.is_preempted()


@pytest.mark.parametrize(
    ("code", "bad", "expected", "words"),
    [
        (0, [], [], ""),
        (69, ["n3"], ["n3"], "bad nodes: n3. Going on with n1 n2"),
        (69, ["n2", "n3"], None, "bad nodes: n2 n3. Submit again with --exclude n2,n3"),
        (69, ["n1"], None, "Submit again with --exclude n1"),  # this script runs there
        (1, [], None, "preflight ended with 1 and named no node"),
    ],
)
def test_bad_nodes_are_left_out_or_named(
    code: int,
    bad: list[str],
    expected: list[str] | None,
    words: str,
    job: slurm_job.Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(job, "command", lambda srun, program: ["sh", *program])
    assert job.check_nodes([], preflight_that_says(tmp_path, code, *bad)) == expected
    assert words in capsys.readouterr().out


def test_the_first_rank_that_ends_gives_the_code_and_not_those_that_were_ended_for_it(
    job: slurm_job.Job, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "srun: error: n2: task 1: Exited with exit code 2\nsrun: error: n[1,3]: tasks 0,2-3: Terminated"
    assert job.start(["sh", "-c", f'echo "{lines}" >&2; exit 143'], saves=True) == 2
    assert "n2: task 1: Exited" in capsys.readouterr().out
    assert job.start(["sh", "-c", "exit 143"], saves=True) == 143
    assert job.start(["true"], saves=True) == 0
