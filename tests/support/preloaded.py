"""How do tests start ranks without paying for the imports each time? A process that has them forks each rank.

A start of the trainer is seconds of imports before its first line of work, and the tests start it dozens of times. Here
one process a test session imports everything, then forks a child for each request: a process of its own, with its own
arguments, environment and output files, that can be killed like any other.

Protocol: one JSON request a line on stdin, the child's pid as the answer; when a child ends, its exit code (negative:
the signal that killed it) appears in the file that the request names.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn, TextIO

from tests.support.s3_server import die_with_parent

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Rank:
    """A rank as its tests see it: what `subprocess.Popen` offers of it."""

    pid: int
    stdout: Path
    stderr: Path
    exit_code: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.exit_code.exists():
            self.returncode = int(self.exit_code.read_text())
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        texts = [path.read_text() if path.exists() else "" for path in (self.stdout, self.stderr)]  # killed at once
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_rank(
    arguments: list[str], environment: dict[str, str], folder: Path, sabotage: Callable[[], None] | None = None
) -> Rank:
    """Start `trainer/run.py` with these arguments; its output goes to files in `folder`.

    `sabotage`, a function of tests/support/sabotage.py, is called in the rank's process before it begins.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    stdout, stderr, exit_code = folder / "stdout", folder / "stderr", folder / "exit_code"
    files = {"stdout": str(stdout), "stderr": str(stderr), "exit_code": str(exit_code)}
    request = {"arguments": arguments, "environment": environment, **files}
    request["sabotage"] = sabotage.__name__ if sabotage else None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return Rank(int(server.stdout.readline()), stdout, stderr, exit_code)


@lru_cache(maxsize=1)
def _server() -> "subprocess.Popen[str]":
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # read when torch is loaded
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.preloaded"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _serve() -> None:
    """Fork on request until stdin is closed."""
    from trainer import run  # here: `start_rank` is imported by tests that do not pay for it

    answers = os.fdopen(os.dup(1), "w")
    children: dict[int, str] = {}
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        if readable:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become(request, run.main, answers)
                children[pid] = request["exit_code"]
                print(pid, file=answers, flush=True)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                path = Path(children.pop(pid))
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(str(os.waitstatus_to_exitcode(status)))
                unfinished.rename(path)


def _become(request: dict[str, object], main: object, answers: TextIO) -> NoReturn:
    code = 70
    try:
        os.setsid()
        die_with_parent()
        answers.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(str(request[name]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        environment, arguments = request["environment"], request["arguments"]
        assert isinstance(environment, dict) and isinstance(arguments, list) and callable(main)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [str(ROOT / "trainer/run.py"), *arguments]
        if request["sabotage"]:
            getattr(importlib.import_module("tests.support.sabotage"), str(request["sabotage"]))()
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
