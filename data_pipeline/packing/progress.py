"""What does someone who waits for the packing see: how far it is, how fast, and how long it will take?"""

import contextlib
import multiprocessing
import sys
import threading
import time
from types import TracebackType

from data_pipeline.terminal import LIVE_LINE


class PackingProgress:
    """One live line on a terminal, a plain line every ten seconds elsewhere; on stderr."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = what, total
        self.counter = multiprocessing.get_context("forkserver").Value("q", 0)
        self.live = sys.stderr.isatty()
        self.done = threading.Event()
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PackingProgress":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        if self.counter.value:
            self._show(end="\n")

    def _run(self) -> None:
        while not self.done.wait(0.2 if self.live else 10.0):
            self._show(end="" if self.live else "\n")

    def _show(self, end: str) -> None:
        text = progress_line(self.what, self.counter.value, self.total, time.monotonic() - self.started)
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more: no reason to stop working
            sys.stderr.write(f"{LIVE_LINE if self.live else ''}{text}{end}")
            sys.stderr.flush()


def progress_line(what: str, images: int, total: int | None, seconds: float) -> str:
    """For example ``writing shards: 512 of 2,048 images, 256/s, 6 s left``."""
    rate = images / max(seconds, 1e-3)
    text = f"{what}: {images:,}" + (f" of {total:,}" if total else "") + f" images, {rate:,.0f}/s"
    if total and 0 < images < total:
        text += f", {(total - images) / rate:,.0f} s left"
    return text
