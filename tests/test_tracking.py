"""Does a run keep its record, with one point a step, over restarts and without MLflow?"""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from tests.launch import QUICKSTART, free_port, mlflow_store
from trainer.config import RunConfig, load_config
from trainer.tracking import RunFiles, Tracker, record_results

SHARDS = SimpleNamespace(
    url="/data/train", digest="ab" * 32, manifest=SimpleNamespace(name="photographs-32-chrabaszcz")
)
DATASETS = {"training": SHARDS}


def config_in(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run").mkdir(exist_ok=True)
    return load_config(QUICKSTART, [f"run.dir={folder}/run", f"tracking.uri={mlflow_store(folder)}", *overrides])


def runs_in(folder: Path) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def history(folder: Path, name: str) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = runs_in(folder)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_a_restart_continues_the_run_with_one_point_a_step(tmp_path: Path) -> None:
    first = Tracker(config_in(tmp_path), rank=0, world_size=2, datasets=DATASETS)
    for step in (1, 2, 3):
        first.log(step, {"train/bits_per_dim": 8.0 - step})
    # Killed here, without close, in the middle of writing a line; the checkpoint was of step 1.
    with RunFiles(tmp_path / "run").metrics.open("a") as file:
        file.write('{"step": 4, "metr')
    second = Tracker(config_in(tmp_path, "train.steps=900"), rank=0, world_size=1, datasets=DATASETS)
    for step in (2, 3, 4):
        second.log(step, {"train/bits_per_dim": 8.0 - step, "val/bits_per_dim": 7.0})
    second.close("finished", code=0, reason="all steps done", step=4)

    assert history(tmp_path, "train/bits_per_dim") == [(1, 7.0), (2, 6.0), (3, 5.0), (4, 4.0)]
    assert [step for step, _ in history(tmp_path, "val/bits_per_dim")] == [2, 3, 4]
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.tags["changed.train.steps"] == "900"
    assert run.data.tags["world_size"] == "1"
    lines = RunFiles(tmp_path / "run").metrics.read_text().splitlines()
    assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_the_end_of_a_run_is_told_truthfully(tmp_path: Path, state: str, status: str) -> None:
    tracker = Tracker(config_in(tmp_path), rank=0, world_size=1, datasets=DATASETS)
    tracker.close(state, code=3, reason="because", step=5)  # type: ignore[arg-type]
    (run,) = runs_in(tmp_path)
    assert run.info.status == status
    written = RunFiles(tmp_path / "run").read_state()
    assert (written["state"], written["code"], written["reason"], written["step"]) == (state, 3, "because", 5)


def test_the_data_set_is_recorded_with_its_digest(tmp_path: Path) -> None:
    Tracker(config_in(tmp_path), rank=0, world_size=1, datasets=DATASETS)
    (run,) = runs_in(tmp_path)
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("photographs-32-chrabaszcz", "ab" * 16)
    assert dataset.tags[0].value == "training"


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    tracker = Tracker(config_in(tmp_path), rank=1, world_size=2, datasets=DATASETS)
    tracker.log(1, {"train/bits_per_dim": 8.0})
    tracker.close("finished", code=0, reason="", step=1)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_server_that_is_away_costs_a_warning_and_no_point(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = config_in(tmp_path, f"tracking.uri=http://127.0.0.1:{free_port()}")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(config, rank=0, world_size=1, datasets=DATASETS)
        tracker.log(1, {"train/bits_per_dim": 8.0})
        tracker.log(2, {"train/bits_per_dim": 7.0})
        tracker.close("finished", code=0, reason="", step=2)
    assert [record.message for record in caplog.records if "MLflow does not answer" in record.message]
    assert RunFiles(tmp_path / "run").last_steps() == {"train/bits_per_dim": 2}


def test_what_a_tool_finds_is_added_to_the_run(tmp_path: Path) -> None:
    tracker = Tracker(config_in(tmp_path), rank=0, world_size=1, datasets=DATASETS)
    tracker.close("finished", code=0, reason="", step=9)
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"x")
    files = RunFiles(tmp_path / "run")
    for _ in range(2):  # the second time adds nothing
        record_results(files, 9, {"final/raw_bits_per_dim": 4.5}, [picture])
    assert history(tmp_path, "final/raw_bits_per_dim") == [(9, 4.5)]
    (run,) = runs_in(tmp_path)
    artifacts = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").list_artifacts(run.info.run_id, "samples")
    assert [artifact.path for artifact in artifacts] == ["samples/samples.png"]
    assert run.info.status == "FINISHED"
