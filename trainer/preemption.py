"""Has anybody asked this job to stop, and do all ranks agree?"""

import signal
import time
from types import FrameType

import torch
import torch.distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 3.0
"""Ctrl-C reaches a rank two or three times: from the terminal, and passed on by each process of the launcher."""


class StopRequest:
    """Remembers a signal until the loop reaches a step boundary; one that comes seconds later ends the process."""

    def __init__(self) -> None:
        """Install the handlers; collective, after torch.distributed is initialised (or without it)."""
        self._seen_at: float | None = None
        # Agreement over gloo on host memory: asking the GPU would make every step wait for its queue to drain.
        self._group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._seen_at is None:
            self._seen_at = now
        elif now - self._seen_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self) -> bool:
        """True on all ranks if one of them was signalled (launchers often signal only one); collective."""
        seen = torch.tensor([self._seen_at is not None])
        if self._group is not None:
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(seen)
