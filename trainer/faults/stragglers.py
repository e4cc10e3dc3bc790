"""Which rank holds the others up?

All ranks make each update together, so the time of a step is that of the slowest one, and the same on all. What tells
them apart is the time that a rank spends on its own: waiting for its data and computing forward passes. At ZeRO stage 3
forward passes gather weights and wait for each other, so that only a slow data stream is recognised there.
"""

import statistics

SLOW_RATIO = 1.5
"""A rank is slow that takes so many times the median of all ranks."""
SLOW_POINTS = 3
"""Points of the curves in a row for which it must be slow: a rank may be held up once by anything."""


class StragglerWatch:
    """Says once of each rank that it is slow, and again only after it was not."""

    def __init__(self) -> None:
        self._slow_points: dict[int, int] = {}

    def newly_slow(self, seconds_of_rank: list[float]) -> dict[int, float]:
        """The ranks that became stragglers with this point, and how many times the median they take.

        `seconds_of_rank`: what each rank spent on its own since the last point. Of two ranks the faster one is the
        median.
        """
        median = statistics.median_low(seconds_of_rank)
        found = {}
        for rank, seconds in enumerate(seconds_of_rank):
            if seconds <= SLOW_RATIO * median:
                self._slow_points.pop(rank, None)
                continue
            self._slow_points[rank] = self._slow_points.get(rank, 0) + 1
            if self._slow_points[rank] == SLOW_POINTS:
                found[rank] = seconds / median if median else float("inf")
        return found
