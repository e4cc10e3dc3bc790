"""What becomes of a training run whose object store dies: for a while, and for longer than it may?"""

import json
import re
import time
from pathlib import Path

from tests.conftest import pack_photographs
from tests.support import launch
from tests.support.s3_server import S3Server

STEPS = 150  # more than two epochs of 3000 images
BATCHES = {"train__global_batch_images": 48, "train__micro_batch_images": 48, "train__log_every_steps": 10}


def test_a_run_outlives_a_store_that_is_killed_and_started_again(
    tmp_path: Path, splits: Path, s3_bucket: str, s3_server: S3Server
) -> None:
    changes = {**BATCHES, "train__steps": STEPS, "data__read_deadline_seconds": 120}
    launch.train(launch.settings(tmp_path / "undisturbed", splits, **changes))
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    run = tmp_path / "run"
    arguments = launch.settings(run, splits, data__train_url=f"s3://{s3_bucket}/train", **changes)
    ranks = launch.start(arguments, ranks=1, environment=s3_server.environment)
    try:
        launch.wait_for_step(run, 20, ranks)
        s3_server.pause()  # a moment before the end, so that requests are under way when it comes
        time.sleep(0.5)
        s3_server.kill()
        time.sleep(2)
    finally:
        s3_server.start()
    code, text = launch.finish(ranks)
    assert code == 0 and re.search(r"cannot read s3://.*train-000000.tar \(bytes .*trying again", text), text
    assert launch.curve(run) == launch.curve(tmp_path / "undisturbed"), "every byte is right"


def test_a_store_that_stays_away_ends_the_run_with_its_url_and_how_long_it_was_tried(
    tmp_path: Path, splits: Path, s3_bucket: str, s3_server: S3Server
) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    run, url = tmp_path / "run", f"s3://{s3_bucket}/train"
    changes = {**BATCHES, "train__steps": 100_000, "data__read_deadline_seconds": 3, "data__train_url": url}
    ranks = launch.start(launch.settings(run, splits, **changes), ranks=1, environment=s3_server.environment)
    try:
        launch.wait_for_step(run, 20, ranks)
        s3_server.kill()
        code, text = launch.finish(ranks)
    finally:
        s3_server.start()
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    sentence = (
        rf"error: cannot read {url}/train-000000.tar \(bytes \d+-\d+\): gave up after \d+ s and \d+ tr(?:y|ies); last: "
    )
    assert code == 69 and re.match(sentence, error), text
    assert "Traceback" not in text
    state = json.loads((run / "run_state.json").read_text())
    assert (state["state"], state["code"]) == ("failed", 69) and state["reason"] in error
