"""What happens when a loss or a gradient is not a finite number, or when the loss jumps?

An update with such a gradient is skipped on all ranks, so the weights stay good. After several in a row the run goes
back to its last checkpoint, once, and leaves the images since then out; if that does not help, it ends.
"""

import math
from typing import Literal

Action = Literal["go on", "roll back", "give up"]

SPIKE_MEMORY = 50
"""Points of the training curve over which the loss's mean and variance are taken (a running mean)."""
SPIKE_QUIET = 20
"""Points before the first alarm: at the start of training the loss falls steeply."""


class SkipCounter:
    """Counts skipped updates in a row and says when to go back to a checkpoint and when to give up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.total = 0
        self._applied_in_a_row = 0
        self._rolled_back = False

    def applied(self) -> None:
        """The update was made."""
        self.in_a_row = 0
        self._applied_in_a_row += 1

    def skipped(self, *, can_roll_back: bool) -> Action:
        """The update was skipped; `can_roll_back` says whether there is a checkpoint to go back to."""
        self.in_a_row += 1
        self.total += 1
        self._applied_in_a_row = 0
        if self.in_a_row < self.limit:
            return "go on"
        if self._rolled_back or not can_roll_back:
            return "give up"
        self.in_a_row, self._rolled_back = 0, True
        return "roll back"

    def checkpointed(self) -> None:
        """A new checkpoint is complete. After as many updates in a row as may be skipped, the training got past the
        trouble and may go back once more; one between two series of skips would prove nothing."""
        if self._applied_in_a_row >= self.limit:
            self._rolled_back = False


class SpikeAlarm:
    """Says when a loss lies far above its running mean."""

    def __init__(self, deviations: float) -> None:
        """Alarm above the mean by so many standard deviations; 0 never does."""
        self._deviations = deviations
        self._mean = self._variance = 0.0
        self._points = 0

    def rises(self, loss: float) -> bool:
        """Whether `loss`, the next point of the curve, is a spike; a spike does not count into the mean."""
        self._points += 1
        if self._points == 1:
            self._mean = loss
            return False
        excess = loss - self._mean
        if (
            self._deviations
            and self._points > SPIKE_QUIET
            and excess > self._deviations * math.sqrt(self._variance)
            and excess > 0.01 * abs(self._mean)  # a curve without noise has no deviations to speak of
        ):
            return True
        weight = 1 / min(self._points, SPIKE_MEMORY)
        self._mean += weight * excess
        self._variance = (1 - weight) * (self._variance + weight * excess**2)
        return False
