"""Is a run of skipped updates answered by going back once, then by giving up, and is a spike of the loss noticed?"""

import random

from trainer.faults.divergence import SkipCounter, SpikeAlarm


def test_a_single_skip_changes_nothing() -> None:
    skips = SkipCounter(limit=3)
    for _ in range(10):
        assert [skips.skipped(can_roll_back=True), skips.skipped(can_roll_back=True)] == ["go on", "go on"]
        skips.applied()
    assert skips.total == 20


def test_several_in_a_row_roll_back_once_and_then_give_up() -> None:
    skips = SkipCounter(limit=2)
    assert [skips.skipped(can_roll_back=True) for _ in range(4)] == ["go on", "roll back", "go on", "give up"]


def test_a_checkpoint_after_the_trouble_allows_another_roll_back() -> None:
    skips = SkipCounter(limit=1)
    assert skips.skipped(can_roll_back=True) == "roll back"
    skips.applied()
    skips.checkpointed()
    assert skips.skipped(can_roll_back=True) == "roll back"
    assert skips.skipped(can_roll_back=True) == "give up"


def test_a_checkpoint_after_a_single_update_does_not() -> None:
    skips = SkipCounter(limit=2)
    assert [skips.skipped(can_roll_back=True) for _ in range(2)] == ["go on", "roll back"]
    skips.applied()
    skips.checkpointed()
    assert [skips.skipped(can_roll_back=True) for _ in range(2)] == ["go on", "give up"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to() -> None:
    assert SkipCounter(limit=1).skipped(can_roll_back=False) == "give up"


def test_a_jump_is_a_spike_and_the_slope_of_the_start_and_noise_are_none() -> None:
    random.seed(0)
    alarm = SpikeAlarm(6.0)
    curve = [3 + 5 / (1 + step / 5) + random.gauss(0, 0.05) for step in range(300)]
    assert not any(alarm.rises(loss) for loss in curve)
    assert alarm.rises(6.0)
    assert alarm.rises(6.0)  # it did not count into the mean
    assert not alarm.rises(3.1)


def test_zero_deviations_never_alarm() -> None:
    alarm = SpikeAlarm(0.0)
    assert not any(alarm.rises(loss) for loss in [1.0] * 100 + [1e9])
