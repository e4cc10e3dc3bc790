"""Does `deepspeed --hostfile` over two machines train as one machine does, and end soon when one of them is lost?"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab.jobs import STEPS, arguments, last_step, same_curves, state_of
from tests.lab.lab import BIN, Lab, Node, wait_for
from tests.support.launch import curve, free_port

LOST_SECONDS = 60.0
"""So soon the other ranks end when one is lost ..."""
BUSY_SECONDS = 60.0
"""... on a machine that has nothing else to do; this is for one that has."""
RANK = r"^\S+ -u trainer/run.py"

pytestmark = pytest.mark.timeout(900)


def hostfile(lab: Lab, folder: Path) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{node.name} slots=1\n" for node in lab.nodes[:2]))
    return path


def launch(lab: Lab, run_dir: Path, data: str, **changes: object) -> list[str]:
    """The README's command over the first two machines of the lab."""
    deepspeed = [str(BIN / "deepspeed"), "--hostfile", str(hostfile(lab, run_dir.parent))]
    config = ["--config", "tests/support/small_job.yaml", *arguments(run_dir, data, run__world_size=2, **changes)]
    return [*deepspeed, "trainer/run.py", *config]


def supervised(lab: Lab, run_dir: Path, data: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cluster.supervise", "--run-dir", str(run_dir), "--", *launch(lab, run_dir, data)]
    return lab.nodes[0].start(*command, log=f"{run_dir.parent.name}.log")


def wait_for_step(run_dir: Path, step: int, process: "subprocess.Popen[str]", lab: Lab) -> None:
    def reached() -> bool:
        assert process.poll() is None, lab.logs()
        return last_step(run_dir) >= step

    wait_for(reached, f"step {step}", 240)


def wait_for_no_rank(node: Node, seconds: float) -> None:
    wait_for(lambda: not node.processes(RANK), f"the ranks of {node.name} to end", seconds)


def test_a_checked_hostfile_trains_over_two_machines_to_the_curve_of_one(
    lab: Lab, data: str, reference: Path, tmp_path: Path
) -> None:
    first = lab.nodes[0]
    check = [sys.executable, "-m", "cluster.hosts", "check", str(hostfile(lab, tmp_path)), "--world-size", "2"]
    assert "2 hosts, 2 slots" in first.on(*check).stdout
    command = launch(lab, tmp_path / "run", data)
    process = first.start(command[0], "--master_port", str(free_port()), *command[1:], log="hostfile.log")
    assert process.wait(600) == 0, lab.logs()
    text = (lab.folder / "hostfile.log").read_text()
    assert "pdsh" in text
    assert "testing" not in text  # the secret key
    same_curves(curve(tmp_path / "run"), curve(reference))
    assert (state_of(tmp_path / "run")["state"], state_of(tmp_path / "run")["step"]) == ("finished", STEPS)


def test_a_rank_that_is_killed_ends_the_others_and_the_supervised_job_goes_on_by_itself(
    lab: Lab, data: str, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = supervised(lab, run_dir, data)
    wait_for_step(run_dir, 20, process, lab)
    first, second = lab.nodes[:2]
    (survivor,) = first.processes(RANK)
    killed = second.processes(RANK)
    second.on("kill", "-9", *map(str, killed))
    wait_for(lambda: survivor not in first.processes(RANK), "the survivor to end", LOST_SECONDS + BUSY_SECONDS)
    assert process.wait(600) == 0, lab.logs()
    same_curves(curve(run_dir), curve(reference))
    lines = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [line["next"] for line in lines if "next" in line] == ["again", "done"]
    assert lines[2]["step"] >= 20


def test_a_cut_cable_ends_the_job_with_the_name_of_the_machine_and_the_same_command_goes_on(
    lab: Lab, data: str, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = supervised(lab, run_dir, data)
    wait_for_step(run_dir, 20, process, lab)
    first, second = lab.nodes[:2]
    second.cut_cable()
    cut = time.monotonic()
    try:
        for node in (first, second):
            wait_for_no_rank(node, LOST_SECONDS + BUSY_SECONDS - (time.monotonic() - cut))
        assert process.wait(120) == 69, lab.logs()
        text = (lab.folder / f"{tmp_path.name}.log").read_text()
        assert "supervise: attempt 1: n2 does not answer ssh" in text
        assert "rank 1" in text  # the trainer's own word
    finally:
        second.mend_cable()
    again = supervised(lab, run_dir, data)
    assert again.wait(600) == 0, lab.logs()
    same_curves(curve(run_dir), curve(reference))
