"""What do many tests need: a small packed data set of real photographs, and a real S3 server."""

from pathlib import Path

import pytest

from data_pipeline.loader import Shards, open_shards
from data_pipeline.pack import main as pack_main


def pack_photographs(dest: str, *, images: int, size: int = 8, split: str = "train", seed: int = 0) -> None:
    """Pack crops of photographs to a URL through the command line; small and real."""
    arguments = ["--source", "photographs", "--dest", dest, "--size", str(size), "--split", split]
    assert pack_main([*arguments, "--images", str(images), "--seed", str(seed), "--workers", "1"]) == 0


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3000 packed 8x8 crops in 6 blocks."""
    folder = tmp_path_factory.mktemp("packed") / "train"
    pack_photographs(str(folder), images=3000)
    return folder


@pytest.fixture(scope="session")
def shards(packed: Path) -> Shards:
    return open_shards(str(packed))
