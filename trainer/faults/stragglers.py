"""Which rank holds the others up?

All ranks make each update together, so a step takes as long on every rank as on the slowest one. What tells them apart
is the time that a rank spends on its own: it waits for its data and computes forward passes. At ZeRO stage 3 forward
passes gather weights and so wait for each other. There only a slow data stream is recognised.
"""

import statistics

SLOW_RATIO = 1.5
"""A rank is slow if it takes more than so many times the median of all ranks."""
SLOW_POINTS = 3
"""A rank is named after so many slow points of the curves in a row: anything may hold a rank up once."""


class StragglerWatch:
    """Names each slow rank once, and again only if it was fast in between."""

    def __init__(self) -> None:
        self._slow_points: dict[int, int] = {}

    def newly_slow(self, seconds_of_rank: list[float]) -> dict[int, float]:
        """The ranks that become stragglers at this point, each with its time as a multiple of the median.

        `seconds_of_rank`: what each rank spent on its own since the last point. The median of two ranks is the faster
        one.
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
