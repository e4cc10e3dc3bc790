"""Which exit code does each way of ending have, and what does the user read?

0 finished · 2 usage or config · 65 bad data · 69 a service is missing · 70 our bug, or starts without progress ·
73 the run's folder is in use or full · 74 checkpoint I/O · 75 stopped on request, run the same command to go on ·
76 diverged · 77 a newer attempt has taken over · 78 a rank hangs or is lost · 79 the ranks' weights differ ·
130 Ctrl-C outside of training.
The launcher loses exit codes and signals, so `run_state.json` in the run's folder says the same.
"""

import os
import sys
import traceback
from collections.abc import Callable

from data_pipeline.storage import DataError
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.redaction import guard_output
from trainer.replicas import DifferentWeights

FINISHED, USAGE, BUG, IN_USE, CHECKPOINT, STOPPED, DIVERGED = 0, 2, 70, 73, 74, 75, 76
SUPERSEDED, HANG, DIFFERENT, INTERRUPTED = 77, 78, 79, 130


class UsageError(ValueError):
    """The user asked for something that cannot be done here; the text is one sentence."""


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class RunInUse(RuntimeError):
    """Another job writes to the run's folder."""


class RunFolderFull(RuntimeError):
    """There is no space left for the run's folder."""


class Superseded(RuntimeError):
    """A newer attempt at the run has taken over."""


class LostRank(RuntimeError):
    """Another rank of the job is gone or failed; the job ends with that one's exit code."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class NoProgress(RuntimeError):
    """The run was started again and again and got no further."""


def code_of(error: BaseException) -> int:
    """The exit code of an error; BUG for one that nobody foresaw."""
    match error:
        case ConfigError() | UsageError():
            return USAGE
        case DataError() | LostRank():
            return error.exit_code
        case CheckpointError():
            return CHECKPOINT
        case Diverged():
            return DIVERGED
        case RunInUse() | RunFolderFull():
            return IN_USE
        case Superseded():
            return SUPERSEDED
        case DifferentWeights():
            return DIFFERENT
    return BUG


def report(error: BaseException, code: int) -> None:
    """Print an error on stderr: its sentence, or the traceback of a bug."""
    if code == BUG and not isinstance(error, NoProgress | LostRank):
        traceback.print_exception(error)
    else:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)


def run_tool(tool: Callable[[], None]) -> int:
    """Run a command-line tool of one process and return its exit code; nothing secret is printed from here on."""
    guard_output()
    try:
        tool()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads what is printed has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return FINISHED
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        code = code_of(error)
        # A tool that cannot find its run was called with the wrong folder.
        code = USAGE if code == CHECKPOINT else code
        report(error, code)
        return code
    return FINISHED
