"""Is nothing contacted but what the user named? Every command, behind a proxy that refuses and remembers."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.launch import ROOT, SMALL_JOB, settings


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that hangs up, and what it was asked for."""
    listener = socket.create_server(("127.0.0.1", 0))
    lines: list[str] = []

    def refuse() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                lines.append(connection.recv(4096).decode(errors="replace").partition("\r\n")[0])

    threading.Thread(target=refuse, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", lines
    listener.close()


def test_no_command_asks_anybody_for_anything(tmp_path: Path, splits: Path, asked: tuple[str, list[str]]) -> None:
    proxy, lines = asked
    # Libraries keep quiet where they see a test or a CI run.
    quiet = ("CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "GITLAB_CI", "NO_PROXY", "no_proxy", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment |= {name: proxy for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run, config = tmp_path / "run", SMALL_JOB
    picture = tmp_path / "picture.png"
    Image.new("RGB", (9, 8), "teal").save(picture)
    small = settings(run, splits, train__steps=2, evaluate__images=4)
    for command in (
        [str(ROOT / "trainer/run.py"), "--config", str(config), *small],
        ["-m", "trainer.evaluate", "--run", str(run)],
        ["-m", "trainer.sample", "--run", str(run), "--n", "1"],
        ["-m", "trainer.export", "--run", str(run), "--to", str(tmp_path / "exported")],
        ["-m", "trainer.compress", "--run", str(run), str(picture), "--out", str(tmp_path / "picture.bin")],
        ["-m", "trainer.compare", str(run), "--html", str(tmp_path / "page.html")],
        ["-m", "trainer.plan", "--config", str(config), "--gpus", "2"],
        ["-m", "trainer.tracking", "sync", str(run)],
        ["-m", "data_pipeline.verify", str(splits / "train")],
    ):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert lines == [], command
