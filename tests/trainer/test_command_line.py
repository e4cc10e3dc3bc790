"""Does a command end with the right exit code, and with a sentence or a traceback as it deserves?"""

import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from data_pipeline.storage import DataError
from trainer.command_line import run_tool
from trainer.errors import CheckpointError, ConfigError, UsageError

DISK = "error: run/x: the disk cannot be used ({}); the same command goes on when it can\n"


@pytest.fixture(autouse=True)
def no_guard() -> Iterator[None]:
    """Undoes what run_tool puts around the streams."""
    streams, factory = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    yield
    sys.stdout, sys.stderr = streams
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("--n: 0 is too few"), 2, "error: --n: 0 is too few\n"),
        (ConfigError("one\ntwo"), 2, "error: one\nerror: two\n"),
        (DataError("away", 69), 69, "error: away\n"),
        (CheckpointError("damaged"), 74, "error: damaged\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(5, "Input/output error", "run/x"), 73, DISK.format("Input/output error")),
        (PermissionError(13, "Permission denied", "run/x"), 73, DISK.format("Permission denied")),
    ],
)
def test_an_error_that_was_foreseen_is_its_sentence(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool() -> None:
        raise error

    assert run_tool(tool) == code
    assert capsys.readouterr().err == words


def too_large_for_any_machine() -> None:
    torch.empty(2**50)


def in_the_wake_of_another() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    except RuntimeError:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904


def raising(error: Exception) -> Callable[[], None]:
    def tool() -> None:
        raise error

    return tool


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (too_large_for_any_machine, "DefaultCPUAllocator: can't allocate memory"),
        (in_the_wake_of_another, "previous error during capture"),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf")), "allocate 2.00 GiB.)"),
        (raising(RuntimeError("CUDA error: out of memory")), "CUDA error: out of memory)"),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), "CUBLAS"),
        (raising(MemoryError()), "(MemoryError)"),
        (raising(OSError(12, "Cannot allocate memory")), "Cannot allocate memory)"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(
    tool: Callable[[], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(tool, "a smaller --n") == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the device's memory ran out (") and words in line
    assert line.endswith("); a smaller --n needs less")


def test_a_bug_is_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: print({}["missing"])) == 70
    assert "Traceback" in (text := capsys.readouterr().err) and "KeyError: 'missing'" in text


def test_a_tool_that_did_its_work_ends_with_0() -> None:
    assert run_tool(lambda: None) == 0
