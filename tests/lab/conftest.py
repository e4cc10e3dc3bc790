"""What do tests of whole clusters share: the lab, shards on its S3 server, and one undisturbed run to compare with."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.conftest import pack_photographs
from tests.lab.jobs import IMAGES, STEPS, arguments, last_step
from tests.lab.lab import HEAD_ADDRESS, ROOT, Lab
from tests.support.launch import train
from tests.support.s3_server import S3Server


def pytest_configure() -> None:
    if "IN_LAB" not in os.environ:
        pytest.exit("the tests of tests/lab are run by `make test-cluster`", returncode=2)
    # Process 1 of the lab ignores SIGTERM unless it says otherwise.
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code that tests may change, as a git checkout on a disk that all nodes share."""
    folder = tmp_path_factory.mktemp("checkout") / "code"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "The code under test"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), checkout, nodes=3)
    for folder in (lab.folder, *lab.folder.parents):  # pytest makes them for the user alone; munged wants to look in
        if folder.is_relative_to(tmp_path_factory.getbasetemp().parent):
            folder.chmod(0o755)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()


@pytest.fixture(scope="session")
def s3(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on the head node. The environment of this process points at it, and the file that the launcher
    forwards; the keys lie in a file of their own, as `cluster.hosts check` wants it."""
    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(folder, HEAD_ADDRESS)
    server.start()
    keys = {name.lower(): server.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    (folder / "credentials").write_text("[default]\n" + "".join(f"{name}={key}\n" for name, key in keys.items()))
    variables = {
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(variables)
    quick = {name: os.environ[name] for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    lines = [f"{name}={value}\n" for name, value in (variables | quick).items()]
    (lab.checkout / ".deepspeed_env").write_text("".join(lines))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def data(s3: S3Server) -> str:
    """URL of a packed data set on S3: `train` and `validation` below it."""
    url = f"s3://{s3.make_bucket()}/photographs"
    for split, images in IMAGES.items():
        pack_photographs(f"{url}/{split}", images=images, split=split)
    return url


@pytest.fixture(scope="session")
def reference(data: str, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(arguments(folder, data), ranks=2)
    assert last_step(folder) == STEPS
    return folder
