"""Does anything secret get into what a run writes: its folder, MLflow, what it prints, what it says when it fails?"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import pack_photographs
from tests.support.launch import ROOT, SMALL_JOB, finish, settings, start
from tests.trainer.record.test_tracker import DATASETS, config_in
from trainer.record.tracker import Tracker

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIDSECRETSECRET0001",
    "AWS_SECRET_ACCESS_KEY": "wJalr/SECRET+0002",
    "AWS_SESSION_TOKEN": "session-SECRET-0003",
    "MLFLOW_TRACKING_PASSWORD": "SECRET-0004",
    "MLFLOW_TRACKING_TOKEN": "SECRET-0005",
    "HF_TOKEN": "hf_SECRET0006",
    "NCCL_PASSWORD": "SECRET-0007",  # with the beginning of a variable that is recorded
}
MARK = b"SECRET"


def files_with_secrets(folder: Path) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and MARK in path.read_bytes()
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of this code with a change that holds a password."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("trainer", "models", "data_pipeline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notes.txt").write_text("nothing yet\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "code"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    (folder / "notes.txt").write_text(
        f"url = https://me:SECRET-0008@host\npassword = 'SECRET-0009'\n{SECRETS['HF_TOKEN']}\n"
    )
    return folder


def test_a_real_job_writes_and_prints_no_secret(checkout: Path, tmp_path: Path) -> None:
    for split, images in (("train", 520), ("validation", 16)):
        pack_photographs(str(tmp_path / split), images=images, split=split)
    arguments = settings(tmp_path / "run", tmp_path, train__steps=2, checkpoint__every_steps=2)
    command = [sys.executable, str(checkout / "trainer/run.py"), "--config", str(SMALL_JOB)]
    environment = os.environ | SECRETS | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert MARK.decode() not in done.stdout + done.stderr
    assert files_with_secrets(tmp_path) == []
    (diff,) = tmp_path.rglob("run/repro/git.diff")
    assert "+password = '***'" in diff.read_text()
    assert "NCCL_PASSWORD=***" in (diff.parent / "environment.txt").read_text()


class _EchoingStore(BaseHTTPRequestHandler):
    """An object store that has everything, refuses to read it, and repeats the request's headers in the error."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.send_header("ETag", '"x"')
        self.end_headers()

    def do_GET(self) -> None:
        told = f"key {self.headers['Authorization']} token {self.headers['x-amz-security-token']}"
        body = f"<Error><Code>AccessDenied</Code><Message>refused: {told}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def echoing_store() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _EchoingStore)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_error_text_of_the_object_store_loses_its_secrets(tmp_path: Path, echoing_store: str) -> None:
    arguments = settings(tmp_path / "run", tmp_path, data__train_url="s3://bucket/train")
    environment = SECRETS | {"AWS_ENDPOINT_URL": echoing_store, "AWS_DEFAULT_REGION": "us-east-1"}
    code, text = finish(start(arguments, ranks=1, environment=environment))
    assert code in (2, 69), text
    assert "s3://bucket/train" in text
    assert "refused: key" in text
    assert MARK.decode() not in text
    assert files_with_secrets(tmp_path) == []


def test_texts_given_to_the_tracker_lose_their_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = config_in(tmp_path, "run.name=wJalr/SECRET+0002", "data.train_url=https://host/x?X-Amz-Signature=SECRET")
    texts = {"deepspeed.json": '{"password": "SECRET"}'}
    tracker = Tracker(config, world_size=1, step=0, datasets=DATASETS, artifacts=texts)
    tracker.event(1, "loss_spike", "401 for session-SECRET-0003", url="s3://me:SECRET@bucket")
    reason = f"cannot read https://host/?X-Amz-Credential=SECRET with {SECRETS['AWS_SECRET_ACCESS_KEY']}"
    tracker.close("failed", code=69, reason=reason, step=1)
    assert files_with_secrets(tmp_path) == []
    assert "cannot read https://host/" in (tmp_path / "run/run_state.json").read_text()
