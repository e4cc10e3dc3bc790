"""What do many tests need: a small packed data set of real photographs, a real S3 server, a process group of one."""

import os
import signal
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import s3fs
import torch
import torch.distributed

from data_pipeline import storage
from data_pipeline.loader import Shards, open_shards
from data_pipeline.pack import main as pack_main
from tests.support.s3_server import S3Server
from trainer.deepspeed_engine import init_distributed
from trainer.ranks import ranks_from_environment

# Which runs were trained here is remembered outside of their folders; of tests, not beside the user's own.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-")


def pack_photographs(dest: str, *, images: int, size: int = 8, split: str = "train", seed: int = 0) -> None:
    """Pack crops of photographs to a URL through the command line; small and real."""
    arguments = ["--source", "photographs", "--dest", dest, "--size", str(size), "--split", split]
    assert pack_main([*arguments, "--images", str(images), "--seed", str(seed), "--workers", "1"]) == 0


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """A job that a test runs in this process leaves none of its own behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3000 packed 8x8 crops in 6 blocks."""
    folder = tmp_path_factory.mktemp("packed") / "train"
    pack_photographs(str(folder), images=3000)
    return folder


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packed 8x8 crops: 3000 in `train`, 400 of other photographs in `validation`."""
    folder = tmp_path_factory.mktemp("splits")
    pack_photographs(str(folder / "train"), images=3000)
    pack_photographs(str(folder / "validation"), images=400, split="validation")
    return folder


@pytest.fixture(scope="session")
def shards(packed: Path) -> Shards:
    return open_shards(str(packed))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server. Its ``environment`` is for child processes; in this one, use the fixture ``s3_bucket``."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a new bucket of the server, which the environment of this process points at."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    forget_filesystems()
    yield s3_server.make_bucket()
    forget_filesystems()


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The device of the only rank of a process group. One for all tests: DeepSpeed keeps its first groups for ever."""
    ranks_from_environment()
    yield init_distributed(timedelta(seconds=60), local_rank=0)
    torch.distributed.destroy_process_group()


def forget_filesystems() -> None:
    """Let the next access read the environment again; s3fs and this project keep one client per process."""
    storage.filesystem_of.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
