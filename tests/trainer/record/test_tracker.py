"""Does a run keep its record, with one point a step, over restarts and without MLflow, and does no step wait for it?"""

import errno
import inspect
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from PIL import Image

from tests.support.launch import ROOT, SMALL_JOB, free_port, mlflow_store
from tests.support.mlflow_server import MlflowServer
from trainer import tracking
from trainer.comparison.mlflow_history import history_of_run
from trainer.comparison.run_history import history_of_folder
from trainer.config import RunConfig, load_config
from trainer.errors import MlflowUnreachable
from trainer.ranks import Ranks
from trainer.record.run_folder import Journal, RunFiles, metric_name
from trainer.record.tool_results import record_results
from trainer.record.tracker import CLOSE_SECONDS, NoTracker, Tracker, open_tracker

SHARDS = SimpleNamespace(
    url="/data/train",
    digest="ab" * 32,
    manifest=SimpleNamespace(
        name="imagenet-64-oord",
        count=1281149,
        image_size=64,
        source={"form": "imagenet"},
        protocol={"name": "oord", "imagenet_version": "A"},
    ),
)
DATASETS = {"training": SHARDS}
BITS = "train/bits_per_dim"


def config_in(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run").mkdir(exist_ok=True)
    return load_config(SMALL_JOB, [f"run.dir={folder}/run", f"tracking.uri={mlflow_store(folder)}", *overrides])


def tracker_in(folder: Path, *overrides: str, world_size: int = 1, step: int = 0) -> Tracker:
    tracker = open_tracker(
        config_in(folder, *overrides), Ranks(0, world_size, 0, world_size), step=step, datasets=DATASETS
    )
    assert isinstance(tracker, Tracker)
    return tracker


def killed_attempt(folder: Path, statements: str, *overrides: str) -> None:
    """An attempt in a process of its own, which SIGKILL ends after the given statements about `tracker`."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.trainer.record.test_tracker import tracker_in\n"
        "tracker = tracker_in(Path(sys.argv[1]), *sys.argv[2:], world_size=2)\n"
        f"{statements}\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(folder), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def runs_in(uri: Path | str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(uri if isinstance(uri, str) else f"sqlite:///{uri}/mlflow.db")
    experiment = client.get_experiment_by_name("small_job")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def history(uri: Path | str, name: str = BITS) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(uri if isinstance(uri, str) else f"sqlite:///{uri}/mlflow.db")
    (run,) = runs_in(uri)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def sync(folder: Path, *options: str) -> int:
    """`python -m trainer.tracking sync`, without starting another interpreter; its exit code."""
    streams, factory = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["trainer.tracking", "sync", str(folder / "run"), *options])
            return tracking.main()
    finally:  # main() puts a guard around them
        sys.stdout, sys.stderr = streams
        logging.setLogRecordFactory(factory)


def curve_in(uri: str, name: str = BITS) -> dict[float, float]:
    """A curve as a comparison reads it from MLflow."""
    (run,) = runs_in(uri)
    curve = history_of_run(mlflow.MlflowClient(uri), run.info.run_id).curves[name]
    return dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


def test_a_killed_run_is_continued_with_one_point_a_step(tmp_path: Path) -> None:
    statements = "for step in (1, 2, 3): tracker.log(step, {'train/bits_per_dim': 18.0 - step})"
    killed_attempt(tmp_path, statements, "tracking.required=true")
    with RunFiles(tmp_path / "run").metrics.open("a") as file:
        file.write('{"step": 4, "metr')  # the kill came in the middle of a line; the checkpoint was of step 1
    assert RunFiles(tmp_path / "run").read_state()["state"] == "running"
    second = tracker_in(tmp_path, "train.steps=900", step=1)
    for step in (2, 3, 4):
        second.log(step, {BITS: 8.0 - step, "val/bits_per_dim": 7.0})
    second.log(4, {BITS: 1.0})  # an attempt has one value
    second.close("finished", code=0, reason="all steps done", step=4)

    expected = {1: 17.0, 2: 6.0, 3: 5.0, 4: 4.0}
    assert curve_in(mlflow_store(tmp_path)) == expected
    assert {step: value for step, (_, value) in RunFiles(tmp_path / "run").standing_points()[BITS].items()} == expected
    assert [step for step, _ in history(tmp_path, "val/bits_per_dim")] == [2, 3, 4]
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.tags["changed.train.steps"] == "900"
    assert run.data.tags["world_size"] == "1"
    assert (run.data.tags["attempts"], run.data.tags["attempt.1.world_size"]) == ("2", "2")
    assert run.data.metrics["final/val_bits_per_dim"] == 7.0
    lines = RunFiles(tmp_path / "run").metrics.read_text().splitlines()
    assert all(json.loads(line) for line in lines)


def test_points_of_weights_that_were_thrown_away_are_superseded_wherever_they_arrived(tmp_path: Path) -> None:
    first = tracker_in(tmp_path, "tracking.required=true", "tracking.system_metrics=true")
    for step in range(1, 10):
        first.log(step, {BITS: 20.0 + step, "val/bits_per_dim": 20.0, "perf/images_per_s": 1.0 * step})
        first.log_image(step, "samples", Image.new("RGB", (8, 8), (255, 0, 0)))
    first.close("failed", code=76, reason="diverged", step=9)
    store, files = mlflow_store(tmp_path), RunFiles(tmp_path / "run")
    assert list(curve_in(store)) == list(range(1, 10))

    with pytest.MonkeyPatch.context() as patch:  # goes on on a machine whose clock is behind
        right = time.time
        patch.setattr(time, "time", lambda: right() - 7200)
        files.write_state(attempt=2)
        second = tracker_in(tmp_path, "tracking.system_metrics=true", step=4)
        for step in (5, 6):
            second.log(step, {BITS: 5.0 + step, "val/bits_per_dim": 6.0, "perf/images_per_s": 30.0})
        second.log_image(6, "samples", Image.new("RGB", (8, 8), (0, 255, 0)))
        second.close("finished", code=0, reason="", step=6)
        record_results(files, 4, {"final/raw_bits_per_dim": 5.5}, [])  # of a checkpoint that is still there
        files.write_state(attempt=3)
        third = tracker_in(tmp_path, step=6)
        third.close("stopped", code=75, reason="", step=6)

    expected = {1: 21.0, 2: 22.0, 3: 23.0, 4: 24.0, 5: 10.0, 6: 11.0}
    with files.metrics.open("a") as file:  # the first attempt lives on somewhere
        file.write(json.dumps({"step": 7, "time": 1.0, "metrics": {BITS: 1.0}, "attempt": 1}) + "\n")
    folder = history_of_folder(files.folder)
    other = mlflow_store(tmp_path / "other")
    assert sync(tmp_path, "--to", other) == 0
    assert curve_in(store) == curve_in(other) == expected
    assert dict(zip(folder.curves[BITS].steps, folder.curves[BITS].values, strict=True)) == expected
    (run,) = runs_in(store)
    assert run.data.metrics["final/val_bits_per_dim"] == 6.0
    assert run.data.metrics["final/raw_bits_per_dim"] == 5.5
    assert run.data.metrics["final/images_per_s"] == 3.5  # the median of 1, 2, 3, 4, 30, 30
    assert len(files.standing_points()["system/cpu_utilization_percentage"]) == 2, "the machine's points stay"
    histories = [
        folder,
        *(history_of_run(mlflow.MlflowClient(uri), runs_in(uri)[0].info.run_id) for uri in (store, other)),
    ]
    for history_read in histories:
        pictures = history_read.pictures["samples"]
        assert sorted(pictures) == [1, 2, 3, 4, 6]
        with Image.open(io.BytesIO(pictures[6]())) as picture:
            assert picture.getpixel((0, 0)) == (0, 255, 0)
    # What did not stand any more is not sent to a store that never had it.
    assert [step for step, _ in history(other)] == list(range(1, 7))


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_the_end_of_a_run_is_told_truthfully(tmp_path: Path, state: str, status: str) -> None:
    tracker = tracker_in(tmp_path)
    tracker.close(state, code=3, reason="because", step=5)  # type: ignore[arg-type]
    (run,) = runs_in(tmp_path)
    assert run.info.status == status
    written = RunFiles(tmp_path / "run").read_state()
    assert (written["state"], written["code"], written["reason"], written["step"]) == (state, 3, "because", 5)


def test_the_end_is_tried_for_a_while_and_a_finished_run_whose_end_is_nowhere_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = RunFiles.write_state
    monkeypatch.setattr("trainer.record.tracker.RECORD_SECONDS", {"finished": 1.0, "stopped": 0.1})

    def broken(failures: int) -> Tracker:
        monkeypatch.setattr(RunFiles, "write_state", write)
        tracker = tracker_in(tmp_path)

        def write_state(files: RunFiles, **changes: object) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            write(files, **changes)

        monkeypatch.setattr(RunFiles, "write_state", write_state)
        return tracker

    state = tmp_path / "run/run_state.json"
    says = f"{state}: cannot be written (Input/output error), and does not say that the run"
    assert broken(failures=2).close("finished", code=0, reason="all steps done", step=4) is None
    assert RunFiles(tmp_path / "run").read_state()["code"] == 0
    assert broken(failures=1000).close("finished", code=0, reason="all steps done", step=4) == f"{says} finished"
    assert broken(failures=1000).close("stopped", code=75, reason="asked to", step=2) is None
    assert f"{says} stopped" in caplog.text


def test_a_new_attempt_says_where_it_began_and_nothing_of_how_the_one_before_ended(tmp_path: Path) -> None:
    first = tracker_in(tmp_path)
    first.log(9, {"train/bits_per_dim": 7.0})
    first.close("failed", code=78, reason="rank 1 is lost", step=9)
    second = tracker_in(tmp_path, step=4)
    files = RunFiles(tmp_path / "run")
    assert files.read_state()["state"] == "running"
    assert not {"code", "reason", "ended"} & files.read_state().keys()
    second.close("stopped", code=75, reason="received a signal", step=5)
    starts = [event for event in Journal(files.events).records() if event["event"] == "start"]
    assert [(event["step"], event["text"]) for event in starts] == [
        (0, "at step 0, on 1 rank"),
        (4, "at step 4, on 1 rank"),
    ]


def test_a_killed_run_that_nobody_continues_is_failed_once_it_is_synchronised(tmp_path: Path) -> None:
    killed_attempt(tmp_path, "tracker.log(1, {'train/bits_per_dim': 7.0})")
    for _ in range(2):  # the second time changes nothing
        assert sync(tmp_path) == 0
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FAILED"
    assert history(tmp_path) == [(1, 7.0)]


def test_code_packages_data_and_texts_are_recorded(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    tracker = Tracker(config, world_size=1, step=0, datasets=DATASETS, artifacts={"deepspeed.json": '{"zero": 2}'})
    tracker.close("finished", code=0, reason="", step=1)
    (run,) = runs_in(tmp_path)
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("imagenet-64-oord", "ab" * 16)
    tags = {tag.key: tag.value for tag in dataset.tags}
    described = {"version": "A", "form": "imagenet", "images": "1281149", "image_size": "64"}
    assert tags == {"mlflow.data.context": "training"} | described
    assert (run.data.tags["data.version"], run.data.tags["data.digest"]) == ("A", "ab" * 32)
    assert run.data.params["model.width"] == "96"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    folder = Path(client.download_artifacts(run.info.run_id, "repro"))
    # Beside the store, wherever the job was started.
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path / "mlruns")
    assert (folder / "deepspeed.json").read_text() == '{"zero": 2}'
    assert f"torch=={run.data.tags['versions.torch']}\n" in (folder / "packages.txt").read_text()
    assert {"git.diff", "environment.txt"} <= {path.name for path in folder.iterdir()}


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(config_in(tmp_path), Ranks(1, 2, 1, 2), step=0, datasets=DATASETS)
    assert isinstance(tracker, NoTracker)
    tracker.log(1, {BITS: 8.0})
    tracker.event(1, "loss_spike", "x")
    tracker.log_image(1, "samples", Image.new("RGB", (4, 4)))
    tracker.log_file(tmp_path / "nothing", "profile")
    tracker.close("finished", code=0, reason="", step=1)
    assert list((tmp_path / "run").iterdir()) == []


def test_what_other_ranks_have_takes_the_same_calls() -> None:
    names = [name for name in vars(NoTracker) if not name.startswith("_")]
    recording = {name for name in vars(Tracker) if not name.startswith("_")} - {"wait_until_open"}
    assert set(names) == recording
    for name in names:
        assert inspect.signature(getattr(NoTracker, name)) == inspect.signature(getattr(Tracker, name))


def test_events_pictures_and_files_reach_mlflow_once(tmp_path: Path) -> None:
    statements = (
        "from PIL import Image\n"
        "for step in (10, 20): tracker.log_image(step, 'samples', Image.new('RGB', (8, 8), (step, 0, 0)))\n"
        "tracker.event(12, 'skipped_update', 'gradient is not finite', rank=1)\n"
    )
    killed_attempt(tmp_path, statements)
    (tmp_path / "other.png").write_bytes((tmp_path / "run/samples/samples-step-000000010.png").read_bytes())
    (tmp_path / "run/trace.json").write_text("{}")
    second = tracker_in(tmp_path, step=20)
    second.log_image(30, "samples", tmp_path / "other.png")
    second.log_file(tmp_path / "run/trace.json", "profile")
    second.close("finished", code=0, reason="", step=30)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = runs_in(tmp_path)
    names = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    steps = [name.split("+")[2] for name in names if name.endswith(".png")]
    assert sorted(steps) == ["10", "20", "30"]
    assert len({name.split("+")[0] for name in names}) == 1  # one series
    assert [file.path for file in client.list_artifacts(run.info.run_id, "profile")] == ["profile/trace.json"]
    assert run.data.tags["event.skipped_update"] == "step 12: gradient is not finite"
    lines = [json.loads(line) for line in RunFiles(tmp_path / "run").events.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "image", "image", "skipped_update", "start", "image", "file"]
    assert (lines[3]["step"], lines[3]["rank"]) == (12, 1)
    with Image.open(tmp_path / "run/samples/samples-step-000000020.png") as kept:
        assert kept.getpixel((0, 0)) == (20, 0, 0)


def test_awkward_names_and_values_raise_nothing_and_stop_nothing(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path, f"run.name={'x' * 7000}", f"data.train_url=/{'y' * 7000}")
    values = {"loss(train)": 1.0, "lr@0": 2.0, "../a//b=c": 3.0, "nan": float("nan"), "inf": float("inf")}
    tracker.log(1, values | {"z" * 300: 4.0})
    tracker.log(2, {"loss(train)": 5.0})
    tracker.close("finished", code=0, reason="", step=2)
    assert history(tmp_path, "loss_train_") == [(1, 1.0), (2, 5.0)]
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED"
    assert {"lr_0", "a/b_c", "nan", "inf", "z" * 250} <= run.data.metrics.keys()
    assert len(run.data.params["data.train_url"]) == 6000
    assert (metric_name("perf/mfu"), metric_name("//")) == ("perf/mfu", "unnamed")


def test_a_run_that_was_deleted_is_made_anew_with_all_its_points(tmp_path: Path) -> None:
    first = tracker_in(tmp_path)
    first.log(1, {BITS: 7.0})
    first.close("stopped", code=75, reason="", step=1)
    (old,) = runs_in(tmp_path)
    mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").delete_run(old.info.run_id)
    second = tracker_in(tmp_path, step=1)
    second.log(2, {BITS: 6.0})
    second.close("finished", code=0, reason="", step=2)
    assert history(tmp_path) == [(1, 7.0), (2, 6.0)]
    (new,) = runs_in(tmp_path)
    assert new.data.tags["resumed_from"] == old.info.run_id != new.info.run_id
    assert RunFiles(tmp_path / "run").read_state()["mlflow_run_id"] == new.info.run_id


def test_a_run_that_goes_on_at_another_server_is_made_anew_there_with_all_its_points(tmp_path: Path) -> None:
    first = tracker_in(tmp_path)
    first.log(1, {BITS: 7.0})
    first.close("stopped", code=75, reason="", step=1)
    (old,) = runs_in(tmp_path)
    other = mlflow_store(tmp_path / "other")
    second = tracker_in(tmp_path, f"tracking.uri={other}", step=1)
    second.log(2, {BITS: 6.0})
    second.close("finished", code=0, reason="", step=2)
    assert history(other) == [(1, 7.0), (2, 6.0)]
    (new,) = runs_in(other)
    assert (new.info.status, new.data.tags["resumed_from"]) == ("FINISHED", old.info.run_id)


def test_a_folder_that_lost_its_run_id_finds_its_run_again(tmp_path: Path) -> None:
    first = tracker_in(tmp_path)
    first.log(1, {BITS: 7.0})
    first.close("stopped", code=75, reason="", step=1)
    for path in (RunFiles(tmp_path / "run").state, RunFiles(tmp_path / "run").sent):
        path.unlink()
    second = tracker_in(tmp_path, step=1)
    second.log(2, {BITS: 6.0})
    second.close("finished", code=0, reason="", step=2)
    assert history(tmp_path) == [(1, 7.0), (2, 6.0)]  # the first was sent a second time, and is there once


def test_a_server_that_was_never_there_costs_a_warning_and_gets_everything_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.record.tracker.SEND_EVERY_SECONDS", 0.01)
    config = config_in(tmp_path, f"tracking.uri=http://127.0.0.1:{free_port()}")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(config, world_size=1, step=0, datasets=DATASETS)
        for step in (1, 2, 3):
            tracker.log(step, {BITS: 8.0 - step})
        deadline = time.monotonic() + 60
        while tracker._uploader._failures < 3:  # several tries, and one warning
            assert time.monotonic() < deadline
            time.sleep(0.01)
        tracker.log_image(3, "samples", Image.new("RGB", (4, 4)))
        tracker.close("stopped", code=75, reason="", step=3)
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if "MLflow does not answer" in text]) == 1
    assert "3 points and the end of the run not sent to MLflow" in messages[-1]
    assert f"python -m trainer.tracking sync {tmp_path}/run" in messages[-1]
    assert sync(tmp_path) == 69

    for _ in range(2):
        assert sync(tmp_path, "--to", mlflow_store(tmp_path)) == 0
    assert history(tmp_path) == [(1, 7.0), (2, 6.0), (3, 5.0)]
    (run,) = runs_in(tmp_path)
    assert (run.info.status, run.data.params["model.layers"]) == ("KILLED", "3")
    client = mlflow.MlflowClient(mlflow_store(tmp_path))
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # a picture and its small copy


def test_a_required_server_that_is_away_ends_the_start_with_69(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.record.tracker.REQUIRED_SECONDS", 2.0)
    with pytest.raises(MlflowUnreachable, match="tracking.required: MLflow at http://127.*does not answer") as caught:
        tracker_in(tmp_path, "tracking.required=true", f"tracking.uri=http://127.0.0.1:{free_port()}")
    assert caught.value.exit_code == 69


def test_a_required_store_that_answers_is_open_when_training_begins(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path, "tracking.required=true")
    (run,) = runs_in(tmp_path)
    assert run.info.status == "RUNNING"
    tracker.close("finished", code=0, reason="", step=0)


def test_new_sqlite_stores_survive_being_opened_by_several_processes_at_once(tmp_path: Path) -> None:
    program = "import sys; from trainer.record.mlflow_mirror import open_client; open_client(sys.argv[1])"
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path}/new/mlflow.db"]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/new/mlflow.db").search_experiments()


def test_what_a_tool_finds_is_added_to_the_run(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path)
    tracker.close("finished", code=0, reason="", step=9)
    files = RunFiles(tmp_path / "run")
    picture = files.samples / "samples.png"
    picture.parent.mkdir()
    picture.write_bytes(b"x")
    for _ in range(2):  # the second time adds nothing
        record_results(files, 9, {"final/raw_bits_per_dim": 4.5}, [picture])
    assert history(tmp_path, "final/raw_bits_per_dim") == [(9, 4.5)]
    (run,) = runs_in(tmp_path)
    artifacts = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").list_artifacts(run.info.run_id, "samples")
    assert [artifact.path for artifact in artifacts] == ["samples/samples.png"]
    assert run.info.status == "FINISHED"


def test_what_a_tool_finds_while_the_job_runs_is_sent_by_the_job(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path, "tracking.required=true")
    record_results(RunFiles(tmp_path / "run"), 5, {"final/raw_bits_per_dim": 4.5}, [])
    tracker.log(6, {BITS: 5.0})
    tracker.close("finished", code=0, reason="", step=6)
    assert history(tmp_path, "final/raw_bits_per_dim") == [(5, 4.5)]
    assert history(tmp_path) == [(6, 5.0)]


def test_system_metrics_are_recorded_under_mlflows_names(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = tracker_in(tmp_path, "tracking.system_metrics=true")
        tracker.close("stopped", code=75, reason="", step=0)
    steps = [step for step, _ in history(tmp_path, "system/cpu_utilization_percentage")]
    assert steps == [0, 1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_no_step_waits_for_a_frozen_or_killed_server_and_nothing_is_lost(
    tmp_path: Path, server: MlflowServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.record.tracker.SEND_EVERY_SECONDS", 0.05)
    monkeypatch.setattr("trainer.record.tracker.LONGEST_PAUSE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    seconds = []

    def log_steps(begin: int, end: int) -> None:
        for step in range(begin, end):
            before = time.perf_counter()
            tracker.log(step, {BITS: float(step), "optim/lr": 0.1})
            seconds.append(time.perf_counter() - before)

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 120
        while not any(text in record.getMessage() for record in caplog.records):
            assert time.monotonic() < deadline, text
            time.sleep(0.05)

    with caplog.at_level(logging.WARNING):
        tracker = tracker_in(tmp_path, f"tracking.uri={server.uri}", "tracking.required=true")
        log_steps(1, 100)
        server.freeze()
        log_steps(100, 200)
        wait_for("MLflow does not answer")
        log_steps(200, 300)
        server.thaw()
        wait_for("MLflow answers again")
        caplog.clear()
        log_steps(300, 400)
        server.kill()
        log_steps(400, 500)
        wait_for("MLflow does not answer")
        server.start()
        log_steps(500, 600)
        wait_for("MLflow answers again")
        tracker.close("finished", code=0, reason="", step=599)
    assert history(server.uri) == [(step, float(step)) for step in range(1, 600)]
    (run,) = runs_in(server.uri)
    assert run.info.status == "FINISHED"
    # A call that waited for the server would have taken the two seconds of its time-out.
    assert max(seconds) < 1


@pytest.mark.slow
def test_a_start_does_not_wait_for_a_frozen_server_and_the_end_only_so_long(
    tmp_path: Path, server: MlflowServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setitem(CLOSE_SECONDS, "stopped", 0.5)
    server.freeze()
    try:
        before = time.monotonic()
        tracker = tracker_in(tmp_path, f"tracking.uri={server.uri}")
        tracker.log(1, {BITS: 7.0})
        tracker.close("stopped", code=75, reason="", step=1)
        assert time.monotonic() - before < 50
    finally:
        server.thaw()
    assert "1 point and the end of the run not sent to MLflow (no answer in 0 seconds)" in caplog.text


def test_changes_of_the_code_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    tracker_in(tmp_path, "tracking.code_changes=false").close("finished", code=0, reason="", step=0)
    assert not (tmp_path / "run/repro/git.diff").exists()
    assert (tmp_path / "run/repro/environment.txt").exists()
