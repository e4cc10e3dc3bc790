"""How do tests run hundreds of commands with each call on a file watched, or one of them failing?

By forks of one process, which is started with tests/support/file_calls.c before libc, and has everything imported. So
each is a real process, and costs a fraction of a second.

Protocol: one JSON request a line on stdin, with a function of tests/; one line of JSON as the answer when its child has
ended, with the exit code (negative: the signal that killed it).
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.s3_server import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("file_calls.c")
HUNG = -signal.SIGALRM
"""In place of an exit code: the child took too long."""


@dataclass(frozen=True)
class Ended:
    """What became of a child."""

    code: int
    text: str
    """What it printed."""


class Forks:
    """A process that forks children which have the modules imported already."""

    def __init__(self, folder: Path, modules: list[str], environment: dict[str, str]) -> None:
        library = folder / "file_calls.so"
        compiler = ["g++", "-x", "c", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
        if subprocess.run(compiler, capture_output=True, check=False).returncode:
            pytest.skip("calls on files cannot be watched here: g++ does not make the library for it")
        self._output = folder / "output"
        alone = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TZ": "UTC"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", *modules],
            cwd=ROOT,
            env=os.environ | alone | environment | {"LD_PRELOAD": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, function: str, seconds: float = 60.0, **arguments: Any) -> Ended:
        """Call `module:name` of tests/ with JSON values in a child; what it returns is its exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"function": function, "arguments": arguments, "output": str(self._output), "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        return Ended(code, self._output.read_text(errors="replace"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@lru_cache(maxsize=1)
def file_calls() -> ctypes.CDLL:
    """The library of tests/support/file_calls.c, in a process that was started with it."""
    library = ctypes.CDLL(None)
    library.file_calls_struck.restype = ctypes.c_char_p
    library.file_calls_trace.argtypes = [ctypes.c_char_p]
    library.file_calls_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    return library


def _serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
        deadline, code = time.monotonic() + request["seconds"], None
        while code is None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                # With what it has started, which otherwise ends when the child does.
                (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                code = HUNG
            else:
                time.sleep(0.002)
        print(json.dumps(code), flush=True)


def _become(request: dict[str, Any]) -> NoReturn:
    code: object = 70
    try:
        os.setsid()
        die_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        module, _, name = request["function"].partition(":")
        code = getattr(importlib.import_module(module), name)(**request["arguments"])
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 (the end of the child: it is printed)
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve(sys.argv[1:])
