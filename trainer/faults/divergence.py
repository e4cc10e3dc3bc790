"""What happens when a loss or a gradient is not a finite number, or when the loss jumps?

All ranks skip an update with such a gradient, so the weights stay good. After several skips in a row the run goes back
to its last checkpoint once, and does not use the images since then again. If that does not help, the run ends.
"""

import math
from typing import Literal

Action = Literal["go on", "roll back", "give up"]

SPIKE_MEMORY = 50
"""The loss's running mean and variance look back over about so many points of the training curve."""
SPIKE_QUIET = 20
"""No alarm before so many points: at the start of training the loss falls steeply."""


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
        """The update was skipped; `can_roll_back`: there is a checkpoint to go back to. Returns what to do."""
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
        """A new checkpoint is complete.

        If at least `limit` updates in a row were applied before it, training is past the trouble and may go back once
        more. A single applied update between two series of skips would prove nothing.
        """
        if self._applied_in_a_row >= self.limit:
            self._rolled_back = False


class SpikeAlarm:
    """Says when a loss lies far above its running mean."""

    def __init__(self, deviations: float) -> None:
        """`deviations`: a loss so many standard deviations above the mean is a spike; 0: none is."""
        self._deviations = deviations
        self._mean = self._variance = 0.0
        self._points = 0

    def rises(self, loss: float) -> bool:
        """Whether `loss`, the next point of the curve, is a spike. Spikes do not enter the mean."""
        self._points += 1
        if self._points == 1:
            self._mean = loss
            return False
        excess = loss - self._mean
        if (
            self._deviations
            and self._points > SPIKE_QUIET
            and excess > self._deviations * math.sqrt(self._variance)
            and excess > 0.01 * abs(self._mean)  # without noise, the deviation is next to nothing
        ):
            return True
        weight = 1 / min(self._points, SPIKE_MEMORY)
        self._mean += weight * excess
        self._variance = (1 - weight) * (self._variance + weight * excess**2)
        return False
