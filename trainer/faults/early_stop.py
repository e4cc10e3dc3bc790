"""How does a job end that is asked to stop before it trains? With a sentence, as there is nothing to save yet.

Training has its own way to stop (trainer/faults/preemption.py), which takes the place of this one. SIGUSR1 is left to
it: Slurm's warning is passed on only once a job handles that signal. This file is loaded before all libraries.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from trainer.errors import INTERRUPTED, STOPPED, StoppedEarly

CODES = {signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
SAME_REQUEST_SECONDS = 3.0
"""Signals within this time are one request: Ctrl-C comes from the terminal and from the launcher's processes."""


def end_when_asked() -> None:
    """From now on a signal ends the process at once.

    For the time in which libraries are loaded: they may catch an exception, and go on without a part of themselves.
    """
    _handle(_end)


def raise_when_asked() -> None:
    """From now on the first signal raises StoppedEarly in the main thread; a second one, seconds later, ends it."""
    _handle(_raise)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs ignore Ctrl-C
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one sentence per machine
        os.write(2, f"{_sentence(number)}\n".encode())
    os._exit(CODES[signal.Signals(number)])


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    asked = time.monotonic()

    def end_if_asked_again(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - asked > SAME_REQUEST_SECONDS:
            _end(number, frame)

    _handle(end_if_asked_again)
    raise StoppedEarly(_sentence(number), CODES[signal.Signals(number)])


def _sentence(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped on request ({name}) before training began; the same command starts it again"
