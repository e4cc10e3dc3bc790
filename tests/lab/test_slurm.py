"""Do the scripts for Slurm train, warn, requeue, resume, give up and pack on a real slurmctld with real slurmd?"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.loader import open_shards
from tests.lab.jobs import STEPS, arguments, last_step, same_curves, state_of
from tests.lab.lab import Lab, wait_for
from tests.support.launch import curve

pytestmark = pytest.mark.timeout(1200)
RANK = "trainer/run.py --config"


@pytest.fixture(scope="module")
def slurm(lab: Lab, data: str) -> Lab:
    """The lab with Slurm on all its nodes."""
    lab.start_slurm()
    return lab


@pytest.fixture(autouse=True)
def idle(slurm: Lab) -> Iterator[None]:
    """Each test begins and ends with idle nodes."""
    slurm.wait_for_idle_nodes()
    yield
    slurm.slurm("scancel", "--user", "root", check=False)
    slurm.wait_for_idle_nodes()


def submit(slurm: Lab, *options: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cluster.submit", "--gpus-per-node", "0", *options]
    return slurm.slurm(*command, check=check)


def train(slurm: Lab, run_dir: Path, data: str, *options: str, **changes: object) -> str:
    """Submit the run of these tests; the job's number."""
    config = ["--config", "tests/support/small_job.yaml", *arguments(run_dir, data, **changes)]
    result = submit(slurm, *config, "--no-check", *options)
    first = result.stdout.splitlines()[0]
    assert first.startswith("job: "), result.stdout
    return first.removeprefix("job: ")


def log_of(run_dir: Path, job: str) -> str:
    path = run_dir / "logs" / f"slurm-{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def story(slurm: Lab, run_dir: Path, job: str) -> str:
    """Everything about a job, for the message of a test that failed."""
    ranks = sorted((run_dir / "logs").glob("*/rank-*.log"))
    texts = [f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in ranks]
    return "\n".join([str(slurm.job(job)), log_of(run_dir, job), *texts])


def wait_for_end(slurm: Lab, run_dir: Path, job: str, state: str = "COMPLETED", seconds: float = 420) -> None:
    ends = "COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL"
    found = slurm.wait_for_job(job, ends, seconds)
    assert found["JobState"] == state, story(slurm, run_dir, job)


def wait_for_step(slurm: Lab, run_dir: Path, job: str, step: int) -> None:
    def reached() -> bool:
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), story(slurm, run_dir, job)
        return last_step(run_dir) >= step

    wait_for(reached, f"step {step}", 300)


@contextmanager
def slowed(run_dir: Path) -> Iterator[None]:
    """Let the ranks of a run work a fiftieth of the time, so that it lasts until whatever the test waits for, on a fast
    machine too; no pause is long enough for a rank to be taken for lost."""
    done = threading.Event()

    def ranks() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if (
                b"trainer/run.py\0" in command
                and f"run.dir={run_dir}\0".encode() in command
                and b"srun\0" not in command
            ):
                found.append(int(process.name))
        return found

    def send(number: int) -> None:
        for pid in ranks():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def pace() -> None:
        while not done.is_set():
            send(signal.SIGSTOP)
            done.wait(4.9)
            send(signal.SIGCONT)
            done.wait(0.1)

    thread = threading.Thread(target=pace)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        send(signal.SIGCONT)


def test_the_time_limit_warns_saves_requeues_and_resumes_to_the_curve_of_an_undisturbed_run(
    slurm: Lab, data: str, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = train(slurm, run_dir, data, "--nodes", "2", "--time", "4", "--warn-seconds", "110")
    wait_for_step(slurm, run_dir, job, 10)
    with slowed(run_dir):
        wait_for(lambda: "Slurm wants the nodes back" in log_of(run_dir, job), "Slurm's warning", 240)
    wait_for(lambda: slurm.job(job)["Restarts"] == "1", "the job to be back in the queue", 180)
    slurm.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # one warning is enough for the test
    wait_for_end(slurm, run_dir, job)
    assert slurm.job(job)["Restarts"] == "1"
    same_curves(curve(run_dir), curve(reference))
    text = log_of(run_dir, job)
    assert text.index("slowest pair: n1 and n2") < text.index("Slurm wants the nodes back")  # preflight was first
    assert (
        text.index(f" attempt {job}-0: ")
        < text.index(f" attempt {job}-1 on 2 nodes")
        < text.index(f" attempt {job}-1: ")
    )
    assert state_of(run_dir)["state"] == "finished"
    ended = json.loads((run_dir / "attempts.jsonl").read_text().splitlines()[1])
    assert (ended["next"], ended["code"], ended["leaving"]) == ("again", 75, True)
    logs = sorted(path.relative_to(run_dir / "logs").as_posix() for path in (run_dir / "logs").glob("*/*"))
    assert logs == [f"{job}-{attempt}/rank-{rank}.log" for attempt in (0, 1) for rank in (0, 1)]


def test_preemption_saves_requeues_and_resumes(slurm: Lab, data: str, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    site = ["--partition", "preemptible", "--preflight", "no", "--warn-seconds", "60"]
    job = train(slurm, run_dir, data, "--nodes", "3", "--time", "10", *site, train__global_batch_images=48)
    wait_for_step(slurm, run_dir, job, 10)
    with slowed(run_dir):
        urgent = slurm.slurm("sbatch", "--parsable", "-p", "main", "-N3", "-c4", "-o", "/dev/null", "--wrap", "true")
        wait_for(lambda: "Slurm wants the nodes back" in log_of(run_dir, job), "the preemption", 60)
    slurm.wait_for_job(urgent.stdout.strip(), "COMPLETED")
    wait_for_end(slurm, run_dir, job)
    assert slurm.job(job)["Restarts"] == "1"
    assert [step for step, _ in curve(run_dir)] == list(range(1, STEPS + 1))


def test_scancel_ends_the_ranks_and_nothing_is_requeued(slurm: Lab, data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = train(slurm, run_dir, data, "--nodes", "2", "--time", "10", "--preflight", "no", train__steps=100_000)
    wait_for_step(slurm, run_dir, job, 5)
    slurm.slurm("scancel", job)
    wait_for_end(slurm, run_dir, job, "CANCELLED")
    for node in slurm.nodes:
        wait_for(lambda node=node: not node.processes(RANK), "the ranks to end", 60)  # type: ignore[misc]
    assert slurm.job(job)["Restarts"] == "0"


def test_a_job_goes_on_with_fewer_nodes_after_one_was_killed(
    slurm: Lab, data: str, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = train(slurm, run_dir, data, "--nodes", "1-2", "--time", "10", "--preflight", "no")
    wait_for_step(slurm, run_dir, job, 20)
    allocated = slurm.slurm("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).stdout.split()
    assert len(allocated) == 2  # as many as there are
    lost = next(node for node in slurm.nodes if node.name == allocated[-1])
    spare = next(node for node in slurm.nodes if node.name not in allocated)
    slurm.slurm("scontrol", "update", f"NodeName={spare.name}", "State=DRAIN", "Reason=test")
    lost.kill()
    try:
        wait_for_end(slurm, run_dir, job)
    finally:
        lost.boot()
        slurm.start_slurmd(lost)
        slurm.slurm("scontrol", "update", f"NodeName={spare.name}", "State=RESUME")
    assert int(slurm.job(job)["Restarts"]) >= 1
    assert slurm.job(job)["NumNodes"] == "1"
    same_curves(curve(run_dir), curve(reference))


def test_a_node_that_preflight_finds_bad_is_left_out(slurm: Lab, data: str, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    disk = tmp_path / "scratch"
    disk.mkdir()
    node = slurm.nodes[2]
    node.on("bash", "-c", f"mount -t tmpfs -o size=16m tmpfs {disk} && ! cat /dev/zero > {disk}/full 2>/dev/null")
    try:
        options = ["--preflight", f"--disk {disk} --min-disk-gib 0.01"]
        job = train(slurm, run_dir, data, "--nodes", "2-3", "--time", "10", *options)
        wait_for_end(slurm, run_dir, job)
    finally:
        node.on("umount", str(disk))
    text = log_of(run_dir, job)
    assert "bad nodes: n3. Going on with n1 n2" in text
    same_curves(curve(run_dir), curve(reference))

    node.on("bash", "-c", f"mount -t tmpfs -o size=16m tmpfs {disk} && ! cat /dev/zero > {disk}/full 2>/dev/null")
    try:
        job = train(slurm, run_dir, data, "--nodes", "3", "--time", "10", *options)
        wait_for_end(slurm, run_dir, job, "FAILED")
    finally:
        node.on("umount", str(disk))
    assert "Submit again with --exclude n3" in log_of(run_dir, job)
    assert slurm.job(job)["ExitCode"] == "69:0"


def test_a_run_that_always_dies_is_given_up(slurm: Lab, data: str, tmp_path: Path) -> None:
    """The interpreter of the ranks is killed a moment after each start."""
    run_dir = tmp_path / "run"
    dying = ["--preflight", "no", "--container", "timeout --signal=KILL 2"]
    job = train(slurm, run_dir, data, "--nodes", "1", "--time", "10", *dying)
    wait_for_end(slurm, run_dir, job, "FAILED")
    assert slurm.job(job)["Restarts"] == "3"
    assert slurm.job(job)["ExitCode"] == "70:0"
    assert "3 attempts in a row brought the run no step further" in log_of(run_dir, job)


def test_a_mistake_in_the_config_fails_at_once_before_and_in_the_job(slurm: Lab, data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    wrong = arguments(run_dir, data, train__global_batch_images=30)
    options = ["--config", "tests/support/small_job.yaml", *wrong, "--nodes", "2", "--time", "10", "--preflight", "no"]
    result = submit(slurm, *options, check=False)
    assert result.returncode == 2
    assert "train.global_batch_images: 30" in result.stderr
    job = submit(slurm, *options, "--no-check").stdout.splitlines()[0].removeprefix("job: ")
    wait_for_end(slurm, run_dir, job, "FAILED")
    assert slurm.job(job)["ExitCode"] == "2:0"
    assert slurm.job(job)["Restarts"] == "0"


def test_slurm_accepts_every_script_that_a_dry_run_prints(slurm: Lab, data: str, tmp_path: Path) -> None:
    train_options = ["--config", "tests/support/small_job.yaml", *arguments(tmp_path / "run", data), "--nodes", "1-2"]
    site = ["--time", "1-12", "--partition", "main", "--cpus-per-task", "2", "--exclude", "n3", "--dry-run"]
    others = {
        "evaluate": ["--job", "evaluate", "--", "--run", "runs/x y", "--weights", "ema"],
        "pack": ["--job", "pack", "--tasks", "32", "--", "--source", "folder", "--input", "it's here"],
    }
    for options in ([*train_options, *site], *([*site, *rest] for rest in others.values())):
        script = tmp_path / "script"
        script.write_text(submit(slurm, *options).stdout)
        assert "to start at" in slurm.slurm("sbatch", "--test-only", str(script)).stderr
        subprocess.run(["shellcheck", str(script)], check=True)
    script.write_text(script.read_text().replace("--cpus-per-task", "--cpus-for-task"))
    assert slurm.slurm("sbatch", "--test-only", str(script), check=False).returncode != 0
    assert not (tmp_path / "run").exists()


def test_evaluation_waits_for_the_training_that_it_is_chained_to(
    slurm: Lab, data: str, reference: Path, tmp_path: Path
) -> None:
    before = slurm.slurm("sbatch", "--parsable", "-o", "/dev/null", "--hold", "--wrap", "true").stdout.strip()
    program = ["--", "--run", str(reference), "--weights", "ema"]
    result = submit(slurm, "--job", "evaluate", "--time", "10", "--after", before, *program)
    job, log = (line.partition(": ")[2] for line in result.stdout.splitlines()[:2])
    assert slurm.job(job)["Dependency"].startswith(f"afterok:{before}")
    slurm.slurm("scontrol", "release", before)
    assert slurm.wait_for_job(job, "COMPLETED|FAILED")["JobState"] == "COMPLETED", Path(log).read_text()
    assert "bits/dim over all 200 validation images" in Path(log).read_text()


def test_a_job_array_packs_one_data_set_and_submits_again_what_failed(slurm: Lab, data: str, tmp_path: Path) -> None:
    """Task 1 of the first round loses its process; the result is the one of a single process."""
    program = [
        "--source",
        "photographs",
        "--images",
        "1200",
        "--size",
        "8",
        "--split",
        "train",
        "--shard-images",
        "512",
    ]
    program += ["--workers", "1", "--scratch", str(tmp_path / "scratch"), "--dest", f"{data}/array"]
    killer = tmp_path / "first-time"
    killer.write_text(
        "#!/bin/bash\n"
        f'if [ "$SLURM_ARRAY_TASK_ID" = 1 ] && mkdir {tmp_path}/killed 2>/dev/null; then kill -9 $$; fi\nexec "$@"\n'
    )
    killer.chmod(0o755)
    result = submit(slurm, "--job", "pack", "--tasks", "3", "--time", "10", "--container", str(killer), "--", *program)
    rounds = Path(result.stdout.split("rounds: ")[1].strip())
    wait_for(lambda: rounds.exists() and "complete" in rounds.read_text(), "the data set", 400)
    text = rounds.read_text()
    assert "round 1: tasks that did their share: 2, failed: 1, hopeless: none" in text
    assert (rounds.parent / "round-2").read_text() == "1\n"
    subprocess.run(
        [sys.executable, "-m", "data_pipeline.pack", *program[:-1], f"{data}/alone"], check=True, capture_output=True
    )
    assert open_shards(f"{data}/array").digest == open_shards(f"{data}/alone").digest


def test_a_packing_that_cannot_succeed_is_given_up(slurm: Lab, data: str, tmp_path: Path) -> None:
    program = ["--source", "folder", "--size", "8", "--split", "train", "--dest", str(tmp_path / "dest")]
    result = submit(slurm, "--job", "pack", "--tasks", "2", "--time", "10", "--", *program)
    rounds = Path(result.stdout.split("rounds: ")[1].strip())
    wait_for(lambda: rounds.exists() and "giving up" in rounds.read_text(), "the end", 200)
    assert "hopeless: 0 1" in rounds.read_text()
