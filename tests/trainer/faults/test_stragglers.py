"""Is a rank that holds the others up named, once, and left to go on?"""

import json
import os
from pathlib import Path

from tests.support import sabotage
from tests.support.launch import finish, settings, start
from trainer.faults.stragglers import SLOW_POINTS, StragglerWatch


def stragglers(run_dir: Path) -> list[dict[str, object]]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "straggler"]


def test_a_rank_that_is_several_times_slower_is_named_once_and_not_ended(tmp_path: Path, splits: Path) -> None:
    run_dir = tmp_path / "run"
    changes = {"train__micro_batch_images": 64, "train__global_batch_images": 128}  # passes of more than a moment
    arguments = settings(run_dir, splits, train__steps=48, train__log_every_steps=6, **changes)
    code, text = finish(start(arguments, ranks=2, sabotage={1: sabotage.forward_passes_are_slow}))
    assert code == 0, text
    (event,) = [event for event in stragglers(run_dir) if event["rank"] == 1]
    assert event["host"] == os.uname().nodename and float(str(event["ratio"])) > 1.5
    assert f"rank 1 on {os.uname().nodename} holds the others up" in text


def test_only_three_slow_points_in_a_row_count_and_a_recovery_allows_another_alarm() -> None:
    watch = StragglerWatch()
    slow, even = [1.0, 1.1, 0.9, 1.6], [1.0, 1.4, 0.9, 1.0]
    found = [watch.newly_slow(point) for point in (slow, slow, even, slow, slow, slow, slow, even, slow, slow, slow)]
    assert [index for index, ranks in enumerate(found) if ranks] == [5, 10]
    assert found[5] == {3: 1.6}


def test_of_two_ranks_the_slower_one_is_named_and_one_rank_alone_never() -> None:
    watch = StragglerWatch()
    assert [watch.newly_slow([2.0, 1.0]) for _ in range(SLOW_POINTS)][-1] == {0: 2.0}
    alone = StragglerWatch()
    assert not any(alone.newly_slow([5.0]) for _ in range(2 * SLOW_POINTS))
