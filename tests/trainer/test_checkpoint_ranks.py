"""Does each rank read its files of a checkpoint once and get the others' tensors, and do all agree on damage?"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_ranks import LARGE_NUMBERS, LARGE_PARAMETERS, SIZES, STEPS
from tests.support.launch import ROOT
from tests.support.mapped_memory import LARGE_BYTES

SHARE_BYTES = LARGE_PARAMETERS * LARGE_NUMBERS * 4 * 2 // 2
"""Two tensors of each parameter, on two ranks."""
PARAMETER_BYTES = LARGE_NUMBERS * 4 * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.checkpoint_ranks", str(folder)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": LARGE_BYTES, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("files", SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_get_everything_and_read_each_byte_once(
    answers: dict[str, Any], folder: Path, files: int, size: int
) -> None:
    ranks = answers[f"{files} files, {size} ranks"]
    assert len(ranks) == size
    for rank in ranks:
        assert (rank["step"], rank["notes"]) == (STEPS[-1], [])
        assert sorted(rank["loaded"]) == [[f"layer.{index}", True] for index in range(7)]
        assert rank["loaded"] == ranks[0]["loaded"]  # in the same order
    written = {
        f"{path.parent.name}/{path.name}": path.stat().st_size
        for path in (folder / str(files) / f"step-{STEPS[-1]:09d}").glob("*.safetensors")
    }
    read = [name for rank in ranks for name in rank["read"]]
    assert len(written) == files and sorted(read) == sorted(written)  # nobody reads what another one has read
    assert sum(sum(rank["read"].values()) for rank in ranks) == sum(written.values())


def test_damage_on_one_rank_sends_all_to_the_older_checkpoint(answers: dict[str, Any]) -> None:
    for rank in answers["damaged"]:
        assert rank["step"] == STEPS[0] and all(same for _, same in rank["loaded"])
        assert rank["notes"] == ["checkpoint step-000000002 is damaged (1 of 2 files); trying an older one"]


def test_a_file_that_is_no_file_of_tensors_ends_all_ranks_alike(answers: dict[str, Any]) -> None:
    first, second = answers["wrong"]
    assert first == second
    assert first["code"] == 74 and "rank-00001-of-00002.attempt-1.safetensors: is not a safetensors" in first["error"]


def test_a_store_that_is_away_for_one_rank_ends_all_ranks_alike(answers: dict[str, Any]) -> None:
    assert answers["away"] == [{"error": "the store is away", "code": 69}] * 2


def test_a_rank_that_saves_holds_one_copy_of_its_share(answers: dict[str, Any]) -> None:
    for peak in answers["memory of saving"]:
        assert SHARE_BYTES <= peak < SHARE_BYTES + 2 * PARAMETER_BYTES


def test_a_rank_that_loads_holds_its_share_and_what_is_on_its_way(answers: dict[str, Any]) -> None:
    for peak in answers["memory of loading"]:
        assert SHARE_BYTES <= peak < SHARE_BYTES + 3 * PARAMETER_BYTES < 2 * SHARE_BYTES
