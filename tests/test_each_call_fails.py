"""What if any one call on a file fails? An export, with each call in turn.

tests/support/each_call.py says how. Here each kind of call (what is done to which file) fails in one way, and the ways
take turns. `make test-faults` goes through all calls and all ways, and prints how many there were.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import pack_photographs
from tests.support.each_call import Scenario, with_a_fault
from tests.support.forks import Forks
from tests.support.launch import SMALL_JOB, free_port, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(14_400)]
EXPORT_IS_THERE = "is not empty; choose another folder, or delete that one"
PICTURE_IS_LEFT_OUT = "training goes on without this picture"
CHILD = "tests.test_each_call_fails"


# What a child does.


def train(arguments: list[str], **fault: Any) -> int:
    """The job, in plain torch, which is seconds faster to build, and without MLflow: that has a test of its own."""
    from data_pipeline import storage
    from trainer import checkpoint, run
    from trainer.engine import TorchEngine
    from trainer.record import tracker

    def engine(config: Any, ranks: Any, device: Any) -> TorchEngine:
        import torch

        torch.manual_seed(config.run.seed)
        return TorchEngine(config.model.build(config.train.recompute), config)

    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    sys.argv = ["trainer/run.py", "--config", str(SMALL_JOB), *arguments]
    changes = {
        (storage, "FIRST_DELAY_SECONDS"): 0.01,
        (checkpoint, "FIRST_PAUSE_SECONDS"): 0.05,
        (run, "build_engine"): engine,
        (run, "share_cores"): lambda ranks: None,  # one thread is enough
        (tracker, "Uploader"): _NoUploader,
        (tracker, "code_tags"): dict,  # asks git
        (tracker, "packages"): lambda: "",  # reads the metadata of hundreds
    }
    for (module, name), value in changes.items():
        setattr(module, name, value)
    return with_a_fault(run.main, **fault)


class _NoUploader:
    def __init__(self, *_: object) -> None: ...

    def start(self) -> None: ...

    def close(self, seconds: float) -> tuple[int, None]:
        return 0, None


def export(arguments: list[str], **fault: Any) -> int:
    from data_pipeline import storage
    from trainer import export as tool

    storage.FIRST_DELAY_SECONDS = 0.01
    return with_a_fault(lambda: tool.main(arguments), **fault)


# What the test does.


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    server = Forks(tmp_path_factory.mktemp("forks"), ["torch._dynamo", "trainer.run", "trainer.export"], {})
    yield server
    server.close()


def of_run(folder: Path) -> dict[str, object]:
    """Weights and curve of a finished run, and what else it leaves."""
    run = folder / "run"
    manifest = json.loads((run / "checkpoints/step-000000004/manifest.json").read_text())
    curves: dict[str, dict[int, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        for name in ("train/bits_per_dim", "val/bits_per_dim", "optim/grad_norm", "optim/lr", "progress/images_seen"):
            if name in point["metrics"]:
                curves.setdefault(name, {})[point["step"]] = point["metrics"][name]
    for entry in manifest["files"]:
        content = (run / "checkpoints/step-000000004" / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    state = json.loads((run / "run_state.json").read_text())
    return {
        "weights": [entry["sha256"] for entry in manifest["files"]],
        "samples": manifest["samples"],
        "curves": curves,
        "state": [state[key] for key in ("state", "code", "reason", "step", "checkpoint_step")],
        "files": sorted(
            path.name
            for path in run.rglob("*")
            if path.is_file() and not re.search("checkpoints|unfinished|samples", str(path))
        ),
        "pictures": sorted(path.name for path in (run / "samples").glob("*.png")),
        "checkpoints": sorted(path.parent.name for path in (run / "checkpoints").glob("*/manifest.json")),
    }


def of_export(folder: Path) -> dict[str, object]:
    return {path.name: path.read_bytes() for path in (folder / "exported").iterdir()}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Scenario:
    """A tiny run, undisturbed so far."""
    place = tmp_path_factory.mktemp("training")
    pack_photographs(str(place / "data/train"), images=520)
    pack_photographs(str(place / "data/validation"), images=4, split="validation")
    changes = {"train__steps": 4, "checkpoint__every_steps": 2, "evaluate__images": 4, "evaluate__every_steps": 2}
    changes |= {"tracking__system_metrics": False, "tracking__sample_every_steps": 2, "tracking__sample_images": 1}
    changes |= {"checkpoint__background": False, "data__fetch_threads": 1, "train__global_batch_images": 4}
    (place / "folder").mkdir()
    arguments = settings(place / "folder/run", place / "data", **changes)
    return Scenario(forks, place, f"{CHILD}:train", arguments, of_run, excused=PICTURE_IS_LEFT_OUT)


@pytest.fixture(scope="module")
def finished(training: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "folder"
    training.anew()
    assert training.run(0, None).code == 0
    shutil.copytree(training.folder, folder)
    return folder


def test_any_call_of_an_export_may_fail(forks: Forks, finished: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(tmp_path / "folder/run"), "--to", str(tmp_path / "folder/exported")]
    again = {"again": EXPORT_IS_THERE, "leftover": "exported"}
    Scenario(forks, tmp_path, f"{CHILD}:export", arguments, of_export, finished, **again).check_all()
