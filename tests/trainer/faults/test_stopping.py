"""Is a request to stop followed whenever it comes, is a second one followed at once, and is nothing lost by either?"""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.support import sabotage
from tests.support.launch import finish, settings, start, train, wait_for_step
from tests.support.s3_server import S3Server
from trainer.checkpoint import read_weights
from trainer.faults.early_stop import SAME_REQUEST_SECONDS

LONG = 100_000
BUSY_WITH = {
    "checkpoints": {"checkpoint__every_steps": 1, "checkpoint__background": False},
    "checkpoints in the background": {"checkpoint__every_steps": 1},
    "drawing": {"tracking__sample_every_steps": 1, "tracking__sample_images": 64, "checkpoint__every_steps": LONG},
    "evaluation": {"evaluate__every_steps": 1, "evaluate__images": None, "checkpoint__every_steps": LONG},
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


@pytest.mark.parametrize(("work", "number"), list(zip(BUSY_WITH, SIGNALS, strict=True)))
def test_a_signal_to_all_ranks_in_the_middle_of_anything_ends_with_one_checkpoint(
    tmp_path: Path, splits: Path, work: str, number: int
) -> None:
    run_dir = tmp_path / "run"
    ranks = start(settings(run_dir, splits, train__steps=LONG, **BUSY_WITH[work]), ranks=2)
    wait_for_step(run_dir, 2, ranks)
    for rank in ranks:
        rank.send_signal(number)
    code, text = finish(ranks)
    assert [code, ranks[1].returncode] == [75, 75], text
    assert "Traceback" not in text
    state = json.loads((run_dir / "run_state.json").read_text())
    assert (state["state"], state["code"], state["reason"]) == ("stopped", 75, "received a signal")
    assert f"stopped at step {state['step']} on request; the same command goes on from there" in text
    assert read_weights(str(run_dir / "checkpoints"), "raw").checkpoints[0].step == state["step"]


def test_a_stop_that_cannot_save_ends_with_75_and_says_from_where_the_run_goes_on(tmp_path: Path, splits: Path) -> None:
    arguments = settings(tmp_path / "run", splits, train__steps=LONG, limits__checkpoint_seconds=5)
    ranks = start(arguments, ranks=1, sabotage={0: sabotage.checkpoints_after_the_fifth_update_cannot_be_written})
    wait_for_step(tmp_path / "run", 6, ranks)
    ranks[0].send_signal(signal.SIGTERM)
    code, text = finish(ranks)
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    problem = f"the checkpoint of step {state['step']} cannot be written: the disk is full"
    assert (code, state["state"], state["code"]) == (75, "stopped", 75), text
    assert f"on request; {problem}; the same command goes on from step 4, which is safe" in text
    assert "the same command goes on from step 4" in state["reason"] and "Traceback" not in text
    assert read_weights(str(tmp_path / "run/checkpoints"), "raw").checkpoints[0].step == 4


def test_a_second_signal_ends_a_save_that_takes_too_long_and_the_last_checkpoint_is_good(
    tmp_path: Path, splits: Path, s3_server: S3Server
) -> None:
    """As when Slurm's last warning leaves less time than the store needs."""
    bucket = s3_server.make_bucket()
    arguments = settings(tmp_path / "run", splits, train__steps=LONG, checkpoint__url=f"s3://{bucket}/checkpoints")
    ranks = start(arguments, ranks=1, environment=s3_server.environment)
    wait_for_step(tmp_path / "run", 9, ranks)  # checkpoints of step 4 and 8 are begun; that of step 4 is complete
    s3_server.pause()
    try:
        ranks[0].send_signal(signal.SIGUSR1)
        time.sleep(SAME_REQUEST_SECONDS + 0.5)
        assert ranks[0].poll() is None
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(30) == -signal.SIGTERM  # while the store is still frozen
    finally:
        s3_server.resume()
    finish(ranks)
    assert json.loads((tmp_path / "run/run_state.json").read_text())["state"] == "running"
    text = train([*arguments, "--set", "train.steps=40"], environment=s3_server.environment)
    assert "going on from step-" in text
