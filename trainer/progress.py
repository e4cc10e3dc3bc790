"""What does a person watching the terminal see? One live line, of training on rank 0 only."""

import sys
import time


class Progress:
    """On a terminal: one line, rewritten in place. Elsewhere (a log file): a new line every ten seconds."""

    def __init__(self, *, enabled: bool, total_steps: int) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._live = sys.stderr.isatty()
        self._last_print = 0.0
        self._seconds_per_step = 0.0
        self._last = (0.0, 0)

    def start(self, step: int) -> None:
        """Begin to measure the rate, at `step` updates done."""
        self._last = (time.monotonic(), step)

    def update(self, step: int, bits_per_dim: float, images_per_s: float) -> None:
        """Show the state after `step` updates. The time left includes evaluations and checkpoints."""
        now = time.monotonic()
        rate = (now - self._last[0]) / max(1, step - self._last[1])
        # A running mean: responsive, yet calm.
        self._seconds_per_step = 0.8 * self._seconds_per_step + 0.2 * rate if self._seconds_per_step else rate
        self._last = (now, step)
        left = _duration(self._seconds_per_step * (self._total - step))
        line = f"step {step}/{self._total} | {bits_per_dim:.3f} bits/dim | {images_per_s:,.0f} images/s | {left} left"
        if not self._enabled:
            return
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif now - self._last_print > 10 or step == self._total:
            print(line, file=sys.stderr, flush=True)
            self._last_print = now

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._enabled:
            print(f"\r\x1b[K{text}" if self._live else text, file=sys.stderr, flush=True)


class ProgressBar:
    """A bar on a terminal, nothing elsewhere: the share that is done, the rate, the time left."""

    WIDTH = 32

    def __init__(self, total: int, unit: str) -> None:
        self.total, self._unit = total, unit
        self.started = time.monotonic()
        self.last_shown = 0.0

    def show(self, done: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.last_shown < 0.1 and done < self.total):
            return
        self.last_shown = now
        filled = self.WIDTH * done // self.total
        rate = done / max(now - self.started, 1e-6)
        left = (self.total - done) / max(rate, 1e-6)
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        line = f"{bar} {100 * done // self.total:3d} % | {rate:,.0f} {self._unit}/s | {left:.0f} s left"
        print(f"\r\x1b[K{line}", end="\n" if done == self.total else "", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
