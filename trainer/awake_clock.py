"""For how long did this process run? Time for which it was suspended does not count."""

import threading
import time
from collections.abc import Callable

LONGEST_PAUSE_SECONDS = 1.0
"""A pause between two looks at the clock counts for so much at most. Who uses the clock looks more often than that."""
SUSPENDED_SECONDS = 5.0
"""After a longer pause between two looks, the process was suspended: no load keeps a thread waiting for so long."""


class AwakeClock:
    """Seconds, as of `time.monotonic`, but standing still while nobody looks at the clock.

    A job may be suspended as a whole: by a scheduler, by Ctrl-Z, or with its virtual machine. None of its threads runs
    then. So one thread has to look often, and a pause between two looks says that it could not. The system's clock may
    stand still in such a pause, or run on; neither matters here.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen = monotonic()
        self._awake = self._resumed = 0.0

    def now(self) -> float:
        """Seconds for which this process ran, from the clock's beginning on. Every thread may ask."""
        return self._look()[0]

    def since(self, moment: float) -> float:
        """Seconds from a moment on. A suspension after that moment begins the count anew.

        Other processes of the job may have been suspended a little earlier than this one, or wake up later.
        """
        now, resumed = self._look()
        return now - max(moment, resumed)

    def _look(self) -> tuple[float, float]:
        with self._lock:
            seen = self._monotonic()
            pause, self._seen = seen - self._seen, seen
            self._awake += min(pause, LONGEST_PAUSE_SECONDS)
            if pause > SUSPENDED_SECONDS:
                self._resumed = self._awake
            return self._awake, self._resumed
