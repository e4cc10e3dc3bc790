"""Has anybody asked this job to stop, and do all ranks agree?"""

import signal
from types import FrameType

import torch
import torch.distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal until the loop reaches a step boundary; a second signal ends the process at once."""

    def __init__(self) -> None:
        """Install the handlers; collective, after torch.distributed is initialised (or without it)."""
        self._seen = False
        # Agreement over gloo on host memory: asking the GPU would make every step wait for its queue to drain.
        self._group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    def agreed(self) -> bool:
        """True on all ranks if one of them was signalled (launchers often signal only one); collective."""
        seen = torch.tensor([self._seen])
        if self._group is not None:
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(seen)
