"""Is only that store contacted which the user named, whatever a run's folder says?"""

import json
import shutil
import sqlite3
import uuid
from pathlib import Path

import mlflow
import pytest

from tests.support.launch import mlflow_store
from tests.support.recorded_runs import make_run
from tests.trainer.record.test_tracker import BITS, history, runs_in, sync, tracker_in
from trainer.errors import FilesUnsent, RefusedStore
from trainer.record import mlflow_mirror, tracker
from trainer.record.mlflow_mirror import Mirror, open_client
from trainer.record.own_runs import is_own_url, own_store, remember_store, remember_urls, store_of_environment
from trainer.record.run_folder import Journal, RunFiles, write_json
from trainer.record.tool_results import record_results

KEY = "0123456789abcdef" * 2


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFiles:
    """A run folder that came from elsewhere: its files name a store that this user does not know."""
    (tmp_path / "theirs").mkdir()
    folder = make_run(tmp_path / "theirs", "run", 4.0)
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
    files = RunFiles(tmp_path / "run")
    files.sent.unlink()
    write_json(files.description, files.read_description() | {"key": uuid.uuid4().hex})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return files


def stored(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_is_remembered_outside_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    remember_store(tmp_path / "run", KEY, "http://mlflow:5000")
    assert own_store(KEY) == own_store(KEY, tmp_path / "run") == "http://mlflow:5000"
    assert own_store(KEY, tmp_path / "a copy of it") is None
    assert own_store("f" * 32) is None
    (record,) = (path for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert record.stat().st_mode & 0o777 == 0o600
    monkeypatch.chdir(tmp_path)
    remember_store(tmp_path / "run", KEY, "sqlite:///mlflow.db")
    assert own_store(KEY) == f"sqlite:///{tmp_path}/mlflow.db"
    record.write_text('{"uri": ["odd"]}')
    assert own_store(KEY) is None


@pytest.mark.parametrize("key", ["", "../../x", "None", KEY + "/"])
def test_an_odd_key_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember_store(tmp_path, key, "http://mlflow:5000")
    assert own_store(key) is None
    assert not list(tmp_path.iterdir())


def test_without_a_home_runs_are_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    remember_store(tmp_path, KEY, "http://mlflow:5000")
    assert own_store(KEY) is None
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    remember_store(tmp_path, KEY, "http://mlflow:5000")
    assert own_store(KEY) is None


def test_urls_are_remembered_outside_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    remember_urls(["data/train", "s3://bucket/train/", "pipe:odd"])
    for url in (f"{tmp_path}/data/train", "data/train", f"file://{tmp_path}/link/train", "s3://bucket/train"):
        assert is_own_url(url), url
    for url in ("data", "data/train/more", "s3://bucket/other", "http://bucket/train", "pipe:odd", ""):
        assert not is_own_url(url), url
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").rglob("*.json")} == {0o600}


def test_the_environment_names_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store_of_environment() == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    assert store_of_environment() is None


def test_what_a_tool_finds_out_about_a_strangers_run_stays_in_the_folder(
    stranger: RunFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(tmp_path / "theirs")

    def contact(*arguments: object, **options: object) -> None:
        raise AssertionError("a store is contacted")

    monkeypatch.setattr(tracker, "Mirror", contact)
    record_results(stranger, 40, {"final/raw_bits_per_dim": 4.5}, [])
    assert [record["metrics"] for record in Journal(stranger.metrics).records()][-1] == {"final/raw_bits_per_dim": 4.5}
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"python -m trainer.tracking sync {stranger.folder}" in told
    assert stored(tmp_path / "theirs") == before


def test_a_strangers_run_is_sent_where_the_user_says(
    stranger: RunFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stored(tmp_path / "theirs")
    assert sync(tmp_path) == 2
    assert "name yours with --to" in capsys.readouterr().err
    assert sync(tmp_path, "--to", f"sqlite:///{stranger.folder}/mlflow.db") == 2
    assert sync(tmp_path, "--to", "ftp://somewhere") == 2
    assert sync(tmp_path, "--to", mlflow_store(tmp_path)) == 0
    assert capsys.readouterr().out.startswith(f"sending {stranger.folder} to {mlflow_store(tmp_path)}\n")
    assert len(runs_in(tmp_path)) == 1
    assert stored(tmp_path / "theirs") == before


def test_a_folder_cannot_choose_another_run_of_the_store(stranger: RunFiles, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    make_run(tmp_path / "mine", "run", 3.0)
    (mine,) = runs_in(tmp_path / "mine")
    stranger.write_state(mlflow_run_id=mine.info.run_id)
    assert sync(tmp_path, "--to", mlflow_store(tmp_path / "mine")) == 0
    assert len(runs_in(tmp_path / "mine")) == 2


def test_only_files_of_the_folder_are_sent(stranger: RunFiles, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    for name in ("id_rsa", "picture.png"):
        (tmp_path / "private" / name).write_text("PRIVATE")
    shutil.rmtree(stranger.repro)
    stranger.repro.mkdir()
    (stranger.repro / "code.txt").write_text("theirs")
    (stranger.repro / "key").symlink_to(tmp_path / "private/id_rsa")
    (stranger.folder / "key").symlink_to(tmp_path / "private/id_rsa")
    (stranger.folder / "linked").symlink_to(tmp_path / "private")
    events = Journal(stranger.events)
    for name in (str(tmp_path / "private/id_rsa"), "../private/id_rsa", "key", "linked/id_rsa", "gone", "."):
        events.append({"step": 1, "time": 1.0, "event": "file", "text": "", "file": name, "folder": "samples"})
        events.append({"step": 1, "time": 1.0, "event": "image", "text": "", "file": name, "key": "x"})
    events.close()
    assert sync(tmp_path, "--to", mlflow_store(tmp_path)) == 0
    sent = {path.name for path in (tmp_path / "mlruns").rglob("*") if path.is_file()}
    assert "code.txt" in sent
    assert not sent & {"id_rsa", "key", "picture.png"}
    assert not [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]


@pytest.mark.parametrize(
    "place",
    ["{}/elsewhere", "file://{}/elsewhere", "elsewhere", "{}/mlruns/../elsewhere", "{}/mlruns/link", "runs:/x/y"],
)
def test_a_store_does_not_choose_where_files_are_written(tmp_path: Path, place: str) -> None:
    run = tracker_in(tmp_path, "tracking.required=true")
    run.close("finished", code=0, reason="", step=0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mlruns" / "link").symlink_to(tmp_path / "elsewhere")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("update runs set artifact_uri = ?", (place.format(tmp_path),))
    files = RunFiles(tmp_path / "run")
    Journal(files.metrics).append({"step": 1, "time": 1.0, "attempt": 1, "metrics": {BITS: 7.0}})
    Journal(files.events).append(
        {"step": 1, "time": 1.0, "event": "file", "text": "", "file": "config.yaml", "folder": ""}
    )
    mirror = Mirror(files, mlflow_store(tmp_path))
    with pytest.raises(FilesUnsent, match="nothing is written there; the numbers of the run have arrived") as caught:
        mirror.catch_up(end=True)
    mirror.close()
    assert caught.value.exit_code == 77
    assert history(tmp_path) == [(1, 7.0)]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "place", ["/home/me/.ssh", "file:///home/me/.ssh", "FILE:/home/me/.ssh", "mlruns", "runs:/a/b"]
)
def test_a_server_cannot_name_a_place_on_this_machine(place: str) -> None:
    info = mlflow.entities.RunInfo("a" * 32, "0", "me", "RUNNING", 0, None, "active", artifact_uri=place)
    run = mlflow.entities.Run(info, mlflow.entities.RunData())
    with pytest.raises(RefusedStore, match="a place on this machine"):
        mlflow_mirror._pin_artifacts(run, "http://mlflow:5000")


def test_a_database_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("create table bookmarks (url text)")
    database.close()
    (tmp_path / "notes.txt").write_text("no database at all, but some text of a length " * 100)
    for name in ("places.sqlite", "notes.txt"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(RefusedStore, match="is no MLflow store"):
            open_client(f"sqlite:///{tmp_path}/{name}")
        assert (tmp_path / name).read_bytes() == before


def test_evaluation_of_an_own_run_reaches_its_store_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, "run", 4.0)
    capsys.readouterr()
    record_results(RunFiles(folder), 41, {"final/raw_bits_per_dim": 4.5}, [])
    (run,) = runs_in(tmp_path)
    assert run.data.metrics["final/raw_bits_per_dim"] == 4.5
    assert capsys.readouterr().err == ""
    assert json.loads((folder / "mlflow_run.json").read_text())["key"]
