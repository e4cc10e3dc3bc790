"""Does the clock count the time for which the process ran, and no other?"""

import pytest

from trainer.awake_clock import AwakeClock


class Told:
    """A clock that says what it is told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, clock: AwakeClock, seconds: float) -> None:
        """Let time pass in which somebody looks at the clock twice a second."""
        for _ in range(round(2 * seconds)):
            self.seconds += 0.5
            clock.now()


def test_a_clock_that_is_looked_at_counts_all_of_the_time() -> None:
    told = Told()
    clock = AwakeClock(told)
    begun = clock.now()
    told.run(clock, 40)
    assert clock.since(begun) == pytest.approx(40)


@pytest.mark.parametrize("suspended", [6, 25, 86_400])
def test_after_a_suspension_everything_is_counted_anew(suspended: float) -> None:
    told = Told()
    clock = AwakeClock(told)
    begun = clock.now()
    told.run(clock, 9)
    told.seconds += suspended
    assert clock.since(begun) == 0
    told.run(clock, 9)
    assert clock.since(begun) == pytest.approx(9)


def test_a_thread_that_waited_for_a_processor_makes_the_clock_slow_and_no_more() -> None:
    told = Told()
    clock = AwakeClock(told)
    begun = clock.now()
    told.run(clock, 9)
    told.seconds += 4
    assert clock.since(begun) == pytest.approx(10)
