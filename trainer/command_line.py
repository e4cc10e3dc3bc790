"""How does a command end: what does the user read, and which exit code does the shell get?"""

import os
import sys
import traceback
from collections.abc import Callable

from trainer.errors import FINISHED, INTERRUPTED, code_of, is_foreseen
from trainer.record.redaction import guard_output
from trainer.safe_files import worded


def report(error: BaseException) -> None:
    """Print an error on stderr: its sentence, or the traceback of a bug."""
    if is_foreseen(error):
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    else:
        traceback.print_exception(error)


def run_tool(tool: Callable[[], None]) -> int:
    """Run a command-line tool of one process and return its exit code; nothing secret is printed from here on."""
    guard_output()
    try:
        tool()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return FINISHED
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        error = worded(error)
        report(error)
        return code_of(error)
    return FINISHED
