"""How does a command end: what does the user read, and which exit code does the shell get?"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

from trainer.errors import FINISHED, INTERRUPTED, OutOfMemory, code_of, is_foreseen
from trainer.record.redaction import guard_output, one_line
from trainer.safe_files import worded


def report(error: BaseException) -> None:
    """Print an error on stderr: its sentence, or the traceback of a bug."""
    if is_foreseen(error):
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    else:
        traceback.print_exception(error)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the memory of a device, or of the host, ran out, and the error has no exit code of its own.

    For the most part torch says so by a RuntimeError, while steps are captured by another one in its wake.
    """
    if error is None or is_foreseen(error):
        return False
    if isinstance(error, RuntimeError):
        # What CUDA, torch on a CPU, and cuBLAS and cuDNN say.
        said = re.search("out of memory|can't allocate memory|_STATUS_ALLOC_FAILED", str(error))
        return said is not None or is_out_of_memory(error.__context__)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def without_memory(error: Exception, needs_less: str) -> OutOfMemory:
    """The sentence that tells of memory that ran out, and of what needs less of it."""
    return OutOfMemory(f"the device's memory ran out ({one_line(error)}); {needs_less} needs less")


def run_tool(tool: Callable[[], None], needs_less: str = "a smaller model") -> int:
    """Run a command-line tool of one process and return its exit code; nothing secret is printed from here on.

    `needs_less`: what is to be changed where the memory runs out.
    """
    guard_output()
    try:
        tool()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return FINISHED
    except Exception as error:  # noqa: BLE001 (the end of the program: everything is reported here)
        error = without_memory(error, needs_less) if is_out_of_memory(error) else worded(error)
        report(error)
        return code_of(error)
    return FINISHED
