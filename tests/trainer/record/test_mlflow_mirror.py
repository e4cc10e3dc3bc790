"""Does MLflow get everything exactly once, from stores and servers that behave badly?"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from filelock import FileLock
from mlflow.exceptions import MlflowException
from PIL import Image

from tests.support.launch import ROOT, mlflow_store
from tests.trainer.record.test_tracker import BITS, history, runs_in, sync, tracker_in
from trainer.record import mlflow_mirror
from trainer.record.mlflow_mirror import Mirror, MirrorInUse, on_network_disk, open_client
from trainer.record.run_folder import RunFiles, write_json

MOUNTS = """\
/dev/root / ext4 rw 0 0
filer:/home /home nfs4 rw 0 0
/dev/nvme /home/fast\\040disk xfs rw 0 0
lustre@tcp:/x /scratch lustre rw 0 0
me@host:/ /mnt/remote fuse.sshfs rw 0 0
overlay /data overlay rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/mlflow.db", None),
        ("/home/me/mlflow.db", "nfs4"),
        ("/home/fast disk/mlflow.db", None),
        ("/homely/mlflow.db", None),
        ("/scratch/mlflow.db", "lustre"),
        ("/mnt/remote/mlflow.db", "fuse.sshfs"),
        ("/data/mlflow.db", None),
    ],
)
def test_a_store_on_a_network_disk_is_recognised(path: str, kind: str | None) -> None:
    assert on_network_disk(path, MOUNTS) == kind


def test_a_store_on_a_network_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_mirror, "on_network_disk", lambda path, mounts: "nfs4")
    with pytest.raises(OSError, match=r"lies on a network disk \(nfs4\), where sqlite loses data; set tracking.uri"):
        open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()


def test_what_was_sent_twice_is_there_once(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path)
    for step in range(1, 201):
        tracker.log(step, {BITS: 1.0 / step, "nan": float("nan")})
    tracker.close("finished", code=0, reason="", step=200)
    RunFiles(tmp_path / "run").sent.unlink()  # as when the process dies between sending and remembering it
    mirror = Mirror(RunFiles(tmp_path / "run"), mlflow_store(tmp_path))
    state = RunFiles(tmp_path / "run").state
    before = state.stat().st_ino
    mirror.catch_up(end=True)
    mirror.close()
    assert state.stat().st_ino == before  # not written without need: the job may write it at the same time
    assert history(tmp_path) == [(step, 1.0 / step) for step in range(1, 201)]
    assert [step for step, _ in history(tmp_path, "nan")] == list(range(1, 201))
    assert len(runs_in(tmp_path)) == 1


def test_one_process_sends_at_a_time(tmp_path: Path) -> None:
    tracker_in(tmp_path).close("finished", code=0, reason="", step=0)
    first, second = (
        Mirror(RunFiles(tmp_path / "run"), mlflow_store(tmp_path)),
        Mirror(RunFiles(tmp_path / "run"), mlflow_store(tmp_path)),
    )
    first.catch_up(end=True)
    with pytest.raises(MirrorInUse, match="another process sends .*/run to MLflow"):
        second.catch_up(end=True)
    first.close()
    second.catch_up(end=True)
    second.close()


def test_a_store_that_another_process_never_finishes_opening_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "STORE_CREATION_SECONDS", 0.2)
    with FileLock(tmp_path / "mlflow.db.lock"), pytest.raises(OSError, match="another process has been opening it"):
        open_client(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_point_that_mlflow_refuses_does_not_hold_up_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mlflow.MlflowClient.log_batch

    def refusing(self: mlflow.MlflowClient, run_id: str, metrics: object = (), **others: object) -> None:
        if any(metric.key == "bad" for metric in metrics):  # type: ignore[attr-defined]
            raise MlflowException.invalid_parameter_value("no metric may be bad")
        real(self, run_id, metrics=metrics, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refusing)
    tracker = tracker_in(tmp_path)
    for step in range(1, 30):
        tracker.log(step, {BITS: float(step)} | ({"bad": 1.0} if step == 17 else {}))
    tracker.close("finished", code=0, reason="", step=29)
    assert history(tmp_path) == [(step, float(step)) for step in range(1, 30)]
    assert "MLflow refuses bad at step 17" in caplog.text


def test_a_run_that_is_deleted_while_it_is_sent_is_made_anew(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path, "tracking.required=true")
    tracker.log(1, {BITS: 1.0})
    (run,) = runs_in(tmp_path)
    mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").delete_run(run.info.run_id)
    tracker.log(2, {BITS: 2.0})
    tracker.close("finished", code=0, reason="", step=2)
    assert history(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert runs_in(tmp_path)[0].info.status == "FINISHED"


def test_files_that_cannot_be_stored_hold_nothing_else_up_and_are_sent_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlruns").write_text("in the way of the folder for artifacts")
    with caplog.at_level(logging.WARNING):
        tracker = tracker_in(tmp_path, "tracking.required=true")
        tracker.log_image(1, "samples", Image.new("RGB", (4, 4)))
        tracker.log(1, {BITS: 7.0})
        tracker.event(1, "spike", "the loss jumped")
        tracker.close("finished", code=0, reason="", step=1)
    (run,) = runs_in(tmp_path)
    assert (run.info.status, run.data.params["model.layers"]) == ("FINISHED", "3")
    assert run.data.tags["event.spike"] == "step 1: the loss jumped"
    assert run.inputs.dataset_inputs and history(tmp_path) == [(1, 7.0)]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("trainer")]
    command = f"python -m trainer.tracking sync {tmp_path}/run"
    first, last = ours
    assert "does not get files of the run" in first and f"once that is mended, {command} sends the files" in first
    assert last.startswith("files of the run not sent to MLflow (") and last.endswith(f"run: {command}")
    capsys.readouterr()
    assert sync(tmp_path) == 69
    assert capsys.readouterr().err.count("\n") == 1

    (tmp_path / "mlruns").unlink()
    assert sync(tmp_path) == 0
    client = mlflow.MlflowClient(mlflow_store(tmp_path))
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # the picture and its small copy
    sent = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "events.jsonl", "repro", "images"} <= sent


def test_what_an_older_version_has_sent_is_not_sent_again(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path)
    tracker.log_image(1, "samples", Image.new("RGB", (4, 4)))
    tracker.close("finished", code=0, reason="", step=1)
    files = RunFiles(tmp_path / "run")
    new = ("files", "files_attempt")
    write_json(files.sent, {name: value for name, value in files.read_sent().items() if name not in new})
    arrived = {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*") if path.is_file()}
    assert sync(tmp_path) == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*") if path.is_file()}
    assert again == arrived and any(path.suffix == ".png" for path in arrived)


def test_a_user_without_a_home_has_mlflow_all_the_same() -> None:
    program = (
        "import os, pwd\n"
        "def unknown(user): raise KeyError(user)\n"
        "pwd.getpwuid = unknown\n"
        "import trainer.deepspeed_engine, trainer.record.tracker\n"  # both load MLflow
        "assert 'HOME' not in os.environ\n"
    )
    nobody = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=nobody, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class _Refusing(BaseHTTPRequestHandler):
    """A server in front of MLflow that answers everything with one status."""

    status = 500

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"nope")

    do_GET = do_POST  # noqa: N815 (the names that http.server calls)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[401, 403, 500, 503, "no TLS"])
def refusing_server(request: pytest.FixtureRequest) -> Iterator[str]:
    scheme, status = ("https", 500) if request.param == "no TLS" else ("http", request.param)
    handler = type("Handler", (_Refusing,), {"status": status})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"{scheme}://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_refuses_everything_costs_one_warning_and_no_point(
    tmp_path: Path, refusing_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = tracker_in(tmp_path, f"tracking.uri={refusing_server}")
        for step in (1, 2):
            tracker.log(step, {BITS: 7.0})
        tracker.close("stopped", code=75, reason="", step=2)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("trainer")]
    assert len([text for text in ours if "MLflow does not answer" in text]) == 1
    assert "2 points and the end of the run not sent to MLflow" in ours[-1]
    assert RunFiles(tmp_path / "run").last_steps() == {BITS: 2}
