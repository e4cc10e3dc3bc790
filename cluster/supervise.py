"""How does a job of a hostfile go on by itself after a rank or a machine was lost?

    python -m cluster.supervise --run-dir runs/big -- deepspeed --hostfile cluster/hosts trainer/run.py --config ...

runs the command again until `run_state.json` says that the run is finished, that somebody stopped it, or that another
attempt would end the same way. Each attempt has its own port, so that it does not meet what is left of the one before.
A machine that no longer answers ends it, with its name: take it out of the hostfile, and the same command goes on.

exit codes: 0 finished · 69 a machine does not answer · 70 no progress · 75 stopped on request · others: the trainer's
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cluster.attempts import BUG, STOPPED, UNAVAILABLE, USAGE, Attempts, Decision, decide, read_state
from cluster.hosts import read_hosts

FIRST_PORT = 29500
PORTS = 100
PAUSE_SECONDS = 5.0
"""Before the next attempt: time for the ranks on other machines to notice and end."""
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run.dir of the config")
    parser.add_argument(
        "--without-progress", type=int, default=3, metavar="N", help="attempts in a row that may bring no step (3)"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="behind --: deepspeed ... trainer/run.py ...")
    options = parser.parse_args(arguments)
    if options.without_progress < 1:
        parser.error("--without-progress: must be at least 1")
    return supervise(options.command, options.run_dir, options.without_progress)


def supervise(command: list[str], run_dir: Path, limit: int) -> int:
    """Run attempts until the run is done, or another one would not help; returns the exit code."""
    hosts = hosts_of(command)
    attempts = Attempts(run_dir)
    number = 0
    while (stalled := attempts.without_progress()) < limit:
        number += 1
        name = f"{os.getpid()}-{number}"
        before = read_state(run_dir)
        attempts.began(name)
        code, interrupted = run_attempt(with_port(command, FIRST_PORT + number % PORTS))
        decision = decide(before, read_state(run_dir), code, leaving=False)
        if decision.next == "again" and interrupted:
            decision = Decision("end", STOPPED, f"stopped by a signal ({decision.reason})")
        if decision.next == "again" and (dead := [host for host in hosts if not answers(host)]):
            text = f"{', '.join(dead)} does not answer ssh; take it out of the hostfile to go on without it"
            decision = Decision("end", UNAVAILABLE, f"{text} ({decision.reason})")
        attempts.ended(name, decision, leaving=False)
        say(f"attempt {number}: {decision.reason}")
        if decision.next != "again":
            return decision.code
        time.sleep(PAUSE_SECONDS)
    tries = f"{stalled} attempt{'s' * (stalled != 1)} in a row"
    say(f"{tries} brought the run no step further (--without-progress {limit}); see {attempts.path}")
    return BUG


def run_attempt(command: list[str]) -> tuple[int, bool]:
    """Run the launcher to its end. Returns its exit code, and whether this process was told to stop.

    SIGTERM and Ctrl-C are passed on to all of its processes on this machine.
    """
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        say(f"cannot start {command[0]} ({error.strerror})")
        return USAGE, False
    interrupted = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        # The launcher alone would end and leave its ranks running.
        os.killpg(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait(), bool(interrupted)
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def with_port(command: list[str], port: int) -> list[str]:
    """The command with a port of its own, if it is DeepSpeed's launcher and the user chose none."""
    chosen = any(argument.partition("=")[0] == "--master_port" for argument in command)
    if Path(command[0]).name != "deepspeed" or chosen:
        return command
    return [command[0], "--master_port", str(port), *command[1:]]


def hosts_of(command: list[str]) -> list[str]:
    """The machines of the hostfile that a command names; none for a job of this machine alone."""
    for index, argument in enumerate(command[:-1]):
        if argument in ("--hostfile", "-H"):
            hosts, problems = read_hosts(Path(command[index + 1]))
            return [] if problems or len(hosts) == 1 else list(hosts)
    return []


def answers(host: str) -> bool:
    """Whether a machine can be logged in to."""
    return subprocess.run([*SSH, "--", host, "true"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
