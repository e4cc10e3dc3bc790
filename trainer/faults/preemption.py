"""Has this job been asked to stop, and do all ranks agree on that?

There are four ways to ask: a signal to any rank (from Slurm, from the launcher, Ctrl-C), a file `stop` in the run's
folder, the budget `limits.run_minutes`, and the launcher's death, since nothing else would watch over the ranks. The
same agreement carries two more facts that concern all ranks (`Agreed`).
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed

from trainer.faults.early_stop import SAME_REQUEST_SECONDS
from trainer.ranks import COLLECTIVE_TIMEOUT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "stop"
REASONS = ("", "the launcher died", "reached limits.run_minutes", "found the file `stop`", "received a signal")
"""The ranks exchange the index of a reason. Where their reasons differ, the largest index wins."""
LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of the whole job, the same on each."""

    stop: bool
    """Somebody asked one of the ranks to stop."""
    superseded: bool
    """A newer attempt has taken over the run's folder."""
    checkpoint_written: bool
    """All ranks have written their files of the checkpoint that is being saved, if there is one."""


class StopRequest:
    """Remembers a signal until the loop reaches a step boundary. A second one, seconds later, ends the process."""

    def __init__(self, run_dir: str, budget_seconds: float | None = None) -> None:
        """Install the signal handlers. Collective where torch.distributed is initialised."""
        self.reason = ""
        """Why the job stops, the same on all ranks. Empty until they have agreed."""
        self._seen_at: float | None = None
        self._stop_file = Path(run_dir) / STOP_FILE
        self._looked = 0.0
        self._local_reason = ""
        self._deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
        self._launcher = os.getppid() if _is_launcher(os.getppid()) else None
        # The ranks agree over gloo, in host memory. On a GPU every step would wait until the GPU has caught up.
        self._group = None
        if torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._seen_at is None:
            self._seen_at = now
        elif now - self._seen_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self, *, superseded: bool = False, checkpoint_written: bool = True) -> Agreed:
        """What the ranks agree on; collective.

        A stop or a newer attempt that one rank knows of holds for all: launchers often signal only one. A checkpoint
        is written when all ranks have written it.
        """
        facts = torch.tensor([REASONS.index(self._asked()), superseded, not checkpoint_written])
        if self._group is not None:
            torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX, group=self._group)
        reason, newer_attempt, writing = facts.tolist()
        self.reason = REASONS[reason]
        return Agreed(reason > 0, newer_attempt > 0, not writing)

    def forget_stop_file(self) -> None:
        """Delete the file `stop` once the job has followed it, so that the next start does not stop at once."""
        with contextlib.suppress(OSError):
            self._stop_file.unlink(missing_ok=True)

    def _asked(self) -> str:
        """Why this rank wants to stop: one of REASONS."""
        if self._seen_at is not None:
            return "received a signal"
        now = time.monotonic()
        if not self._local_reason and now - self._looked >= LOOK_AGAIN_SECONDS:
            self._looked = now
            if self._stop_file.exists():
                self._local_reason = "found the file `stop`"
            elif self._deadline is not None and now >= self._deadline:
                self._local_reason = "reached limits.run_minutes"
            elif self._launcher is not None and os.getppid() != self._launcher:
                self._local_reason = "the launcher died"
        return self._local_reason


def _is_launcher(pid: int) -> bool:
    """Whether a process is DeepSpeed's launcher on this node. If it is killed, its ranks live on as orphans."""
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
