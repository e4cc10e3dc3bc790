"""What does the batch script of a training job do on the first node: check, start the ranks, and requeue or end?

    python -m cluster.slurm_job OPTIONS -- srun ... -- PREFLIGHT -- TRAINING

stands at the end of cluster/train.sbatch and runs `srun ... PREFLIGHT`, then `srun ... TRAINING`. Slurm's warning
(SIGUSR1, some minutes before the time limit or on preemption) is passed on to the ranks, which write a checkpoint; then
the job goes back into the queue. Only the standard library: with a container, this runs outside of it.

exit codes: 0 finished · 69 preflight found a bad node · 70 no progress · 75 stopped on request · others: the trainer's
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from cluster.attempts import BUG, STOPPED, UNAVAILABLE, Attempts, decide, read_state

FIRST_PORT, PORTS = 20000, 10000
"""Ports for the ranks' first meeting: one for each job and attempt, below those that the kernel gives out."""
EXITED = re.compile(r"^srun: error: \S+: tasks? [\d,-]+: Exited with exit code (\d+)$")
POLL_SECONDS = 0.5
REQUEUE_SECONDS = 600.0
"""After `scontrol requeue`, this process waits so long for Slurm to end it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.slurm_job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run.dir of the config")
    parser.add_argument("--warn-seconds", type=float, default=300.0, help="N of sbatch --signal=B:USR1@N (300)")
    parser.add_argument("--tasks-per-node", type=int, default=1, help="ranks on each node (1)")
    parser.add_argument("--min-nodes", type=int, default=0, help="go on with so many nodes if others are bad (all)")
    parser.add_argument("--without-progress", type=int, default=3, help="attempts in a row that may bring no step (3)")
    ours, *commands = split(list(sys.argv[1:] if arguments is None else arguments))
    options = parser.parse_args(ours)
    if len(commands) != 3 or not commands[0] or not commands[2]:
        parser.error("needs three commands, each behind `--`: srun, the preflight (may be empty) and the training")
    if "SLURM_JOB_ID" not in os.environ:
        parser.error("runs inside a Slurm job: submit cluster/train.sbatch")
    return Job(options).run(*commands)


def split(arguments: list[str]) -> list[list[str]]:
    """Cut at the first three `--`; what the training is given behind its own `--` stays together."""
    parts: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--" and len(parts) < 4:
            parts.append([])
        else:
            parts[-1].append(argument)
    return parts


class Job:
    """One attempt of a run inside one Slurm allocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.number = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.name = f"{self.number}-{self.restart}"
        self.nodes = lines_of("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
        self.warned_at: float | None = None
        signal.signal(signal.SIGUSR1, self._warned)
        # On scancel Slurm signals the ranks itself; this process stays to write down how they ended.
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def run(self, srun: list[str], preflight: list[str], training: list[str]) -> int:
        """Check the nodes, train on the good ones, decide what is next; returns the exit code."""
        attempts = Attempts(self.options.run_dir)
        limit = self.options.without_progress
        if (stalled := attempts.without_progress()) >= limit:
            tries = f"{stalled} attempt{'s' * (stalled != 1)} in a row"
            say(f"{tries} brought the run no step further; see {attempts.path}. Remove it to go on")
            return BUG
        nodes = len(self.nodes)
        say(f"attempt {self.name} on {nodes} node{'s' * (nodes != 1)}: {' '.join(self.nodes)}")
        if preflight:
            bad = self.check_nodes(srun, preflight)
            if bad is None and self.warned_at is None:
                return UNAVAILABLE
            self.nodes = [node for node in self.nodes if node not in (bad or [])]
        before = read_state(self.options.run_dir)
        attempts.began(self.name)
        logs = self.options.run_dir / "logs" / self.name
        logs.mkdir(parents=True, exist_ok=True)
        say(f"what the ranks print: {logs}/rank-0.log to rank-{self.ranks() - 1}.log")
        to_files = [f"--output={logs}/rank-%t.log", "--open-mode=append"]
        command = self.command([srun[0], *to_files, *srun[1:]], training)
        code = STOPPED if self.warned_at else self.start(command, saves=True)
        leaving = self.warned_at is not None or self.is_preempted()
        decision = decide(before, read_state(self.options.run_dir), code, leaving=leaving)
        attempts.ended(self.name, decision, leaving=leaving)
        say(f"attempt {self.name}: {decision.reason}")
        if decision.next == "again":
            return self.requeue(decision.code)
        return decision.code

    def check_nodes(self, srun: list[str], preflight: list[str]) -> list[str] | None:
        """Names of bad nodes that training can do without; None if it cannot, or if the check itself fails."""
        found = self.options.run_dir / f"bad-nodes-{self.name}.txt"
        found.parent.mkdir(parents=True, exist_ok=True)
        code = self.start(
            self.command(srun, [*preflight, "--nodes", *self.nodes, "--bad-nodes-to", str(found)]), saves=False
        )
        if code == 0:
            return []
        bad = found.read_text().split() if found.exists() else []
        good = [node for node in self.nodes if node not in bad]
        if not bad:
            say(f"preflight ended with {code} and named no node; its log says why")
        elif self.nodes[0] in bad or not 0 < self.options.min_nodes <= len(good):
            say(f"bad nodes: {' '.join(bad)}. Submit again with --exclude {','.join(bad)}")
        else:
            say(f"bad nodes: {' '.join(bad)}. Going on with {' '.join(good)}")
            return bad
        return None

    def command(self, srun: list[str], program: list[str]) -> list[str]:
        """The step that runs a program on this job's good nodes."""
        place = [f"--nodes={len(self.nodes)}", f"--nodelist={','.join(self.nodes)}", f"--ntasks={self.ranks()}"]
        return [srun[0], *place, *srun[1:], *program]

    def ranks(self) -> int:
        return len(self.nodes) * int(self.options.tasks_per_node)

    def start(self, command: list[str], *, saves: bool) -> int:
        """Run a step to its end and pass the warning on to one that saves its work.

        Returns the exit code of the rank that ended first with one. srun's own exit code does not tell it: that is the
        highest one, and ranks that were ended because of the first have 143.
        """
        environment = os.environ | self.meeting_point()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        codes: list[int] = []

        def pass_errors_on() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                print(line, end="", flush=True)
                if match := EXITED.search(line):
                    codes.append(int(match[1]))

        reader = threading.Thread(target=pass_errors_on, daemon=True)
        reader.start()
        passed_on = False
        while True:
            try:
                code = process.wait(POLL_SECONDS)
                reader.join()
                return codes[0] if codes else code
            except subprocess.TimeoutExpired:
                if self.warned_at is None:
                    continue
            if saves and not passed_on and rank_0_listens(self.number):
                process.send_signal(signal.SIGUSR1)
                passed_on = True
            # A quarter of the time is kept for Slurm: a job that runs into its limit is not requeued.
            if not saves or time.monotonic() - self.warned_at > 0.75 * self.options.warn_seconds:
                say("the ranks did not stop in time; the next attempt goes on from the last checkpoint")
                process.kill()
                process.wait()
                return STOPPED

    def meeting_point(self) -> Mapping[str, str]:
        """Address of the first good node, and this attempt's port."""
        (fields,) = lines_of("scontrol", "show", "node", self.nodes[0], "-o")
        address = dict(field.partition("=")[::2] for field in fields.split() if "=" in field)["NodeAddr"]
        port = FIRST_PORT + (int(self.number) * 7 + self.restart) % PORTS
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}

    def is_preempted(self) -> bool:
        """Whether Slurm wants the nodes back for another job. It may have told only the ranks."""
        fields = " ".join(lines_of("scontrol", "show", "job", self.number, "-o")).split()
        return any(f.startswith("PreemptTime=") and f != "PreemptTime=None" for f in fields)

    def requeue(self, code: int) -> int:
        """Go back into the queue, for the same number of nodes, under the same job id."""
        result = subprocess.run(["scontrol", "requeue", self.number], capture_output=True, text=True)
        if result.returncode:
            say(f"cannot requeue ({result.stderr.strip()}); submit again to go on")
            return code
        time.sleep(REQUEUE_SECONDS)
        return code

    def _warned(self, number: int, frame: FrameType | None) -> None:
        if self.warned_at is None:
            self.warned_at = time.monotonic()
            say("Slurm wants the nodes back; asking the ranks for a checkpoint")


def rank_0_listens(job: str) -> bool:
    """Whether rank 0, which runs on this node, handles SIGUSR1 by now; before, it ignores the signal."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), b"SLURM_PROCID=0"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_bytes().split(b"\0"))
            # The batch script has SLURM_PROCID too, but belongs to no step.
            if not wanted <= environment or not any(one.startswith(b"SLURM_STEP_ID=") for one in environment):
                continue
            status = (process / "status").read_text()
        except OSError:
            continue  # ended meanwhile, or another user's
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        if int(caught, 16) >> (signal.SIGUSR1 - 1) & 1:
            return True
    return False


def lines_of(*command: str) -> list[str]:
    """What a command of Slurm prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
