"""What if any one call on a file or a store fails? Packing, training, export, sending to MLflow, each call in turn.

tests/support/each_call.py says how. Here each kind of call (what is done to which file) fails in one way, and the ways
take turns. `make test-faults` goes through all calls and all ways, and prints how many there were.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import pack_photographs
from tests.support.each_call import Scenario, with_a_fault
from tests.support.forks import Forks
from tests.support.kept_store import keep, objects_of, with_a_fault_of_the_store
from tests.support.launch import SMALL_JOB, free_port, mlflow_store, settings
from tests.support.tiny_model import random_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(14_400)]
EXPORT_IS_THERE = "is not empty; choose another folder, or delete that one"
PICTURE_IS_LEFT_OUT = "training goes on without this picture"
CHILD = "tests.test_each_call_fails"


# What a child does.


def train(arguments: list[str], fail: Callable[..., int] = with_a_fault, **fault: Any) -> int:
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
    return fail(run.main, **fault)


def train_in_a_store(arguments: list[str], **fault: Any) -> int:
    return train(arguments, with_a_fault_of_the_store, **fault)


class _NoUploader:
    def __init__(self, *_: object) -> None: ...

    def start(self) -> None: ...

    def close(self, seconds: float) -> tuple[int, None]:
        return 0, None


def pack(arguments: list[str], fail: Callable[..., int] = with_a_fault, **fault: Any) -> int:
    """The packing, with blocks of four images, so that few make several shards."""
    from data_pipeline import pack as tool
    from data_pipeline import storage
    from data_pipeline.packing import steps, tasks

    storage.FIRST_DELAY_SECONDS = 0.01
    steps.BLOCK_IMAGES = tasks.BLOCK_IMAGES = 4
    return fail(lambda: tool.main(arguments), **fault)


def pack_into_a_store(arguments: list[str], **fault: Any) -> int:
    return pack(arguments, with_a_fault_of_the_store, **fault)


def export(arguments: list[str], **fault: Any) -> int:
    from data_pipeline import storage
    from trainer import export as tool

    storage.FIRST_DELAY_SECONDS = 0.01
    return with_a_fault(lambda: tool.main(arguments), **fault)


def sync(arguments: list[str], **fault: Any) -> int:
    from trainer import tracking

    sys.argv = ["tracking", *arguments]
    return with_a_fault(tracking.main, **fault)


# What the test does.


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    modules = ["torch._dynamo", "trainer.run", "trainer.export", "trainer.tracking", "data_pipeline.pack"]
    modules += ["mlflow.store.tracking.sqlalchemy_store", "mlflow.store.db.utils", "sqlalchemy.dialects.sqlite"]
    server = Forks(tmp_path_factory.mktemp("forks"), modules, {})
    yield server
    server.close()


def of_run(folder: Path) -> dict[str, object]:
    """Weights and curve of a finished run, and what else it leaves."""
    checkpoints = folder / "run/checkpoints"
    files = {str(path.relative_to(checkpoints)): path.read_bytes() for path in checkpoints.rglob("*.*")}
    return _of_run(folder / "run", files)


def of_run_in_a_store(folder: Path) -> dict[str, object]:
    place = "/checkpoints/"
    objects = objects_of(folder / "store").items()
    return _of_run(folder / "run", {path[len(place) :]: data for path, data in objects if path.startswith(place)})


def _of_run(run: Path, checkpoints: dict[str, bytes]) -> dict[str, object]:
    manifest = json.loads(checkpoints["step-000000004/manifest.json"])
    curves: dict[str, dict[int, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        for name in ("train/bits_per_dim", "val/bits_per_dim", "optim/grad_norm", "optim/lr", "progress/images_seen"):
            if name in point["metrics"]:
                curves.setdefault(name, {})[point["step"]] = point["metrics"][name]
    for entry in manifest["files"]:
        content = checkpoints[f"step-000000004/{entry['name']}"]
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
        "checkpoints": sorted(name for name in checkpoints if name.endswith("manifest.json")),
    }


def of_shards(folder: Path) -> dict[str, object]:
    """All files of a data set by name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "data/manifest.json" in files
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def of_shards_in_a_store(folder: Path) -> dict[str, object]:
    objects = objects_of(folder / "store")
    assert "/shards/manifest.json" in objects
    return {path: hashlib.sha256(content).hexdigest() for path, content in objects.items()}


def of_export(folder: Path) -> dict[str, object]:
    return {path.name: path.read_bytes() for path in (folder / "exported").iterdir()}


def of_store(folder: Path) -> dict[str, object]:
    """What MLflow has: all but times and its own names."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        found = {
            "status": database.execute("select status, name from runs").fetchall(),
            "metrics": database.execute("select key, value, step, timestamp from metrics").fetchall(),
            "params": database.execute("select key, value from params").fetchall(),
            "tags": database.execute("select key, value from tags where key not like 'mlflow.artifact%'").fetchall(),
        }
    artifacts = [path.relative_to(folder / "mlruns").parts[2:] for path in (folder / "mlruns").rglob("*.*")]
    # A picture has a name of its own each time that it is sent.
    named = {re.sub("[0-9a-f]{8}-[0-9a-f-]+", "ID", "/".join(parts)) for parts in artifacts}
    return {name: sorted(rows) for name, rows in found.items()} | {"artifacts": sorted(named)}


SHORT = {"train__steps": 4, "checkpoint__every_steps": 2, "evaluate__images": 4, "evaluate__every_steps": 2}
SHORT |= {"tracking__system_metrics": False, "tracking__sample_every_steps": 2, "tracking__sample_images": 1}
SHORT |= {"checkpoint__background": False, "data__fetch_threads": 1, "train__global_batch_images": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pack_photographs(str(folder / "train"), images=520)
    pack_photographs(str(folder / "validation"), images=4, split="validation")
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, data: Path, forks: Forks) -> Scenario:
    """A tiny run, undisturbed so far."""
    place = tmp_path_factory.mktemp("training")
    (place / "folder").mkdir()
    arguments = settings(place / "folder/run", data, **SHORT)
    return Scenario(forks, place, f"{CHILD}:train", arguments, of_run, excused=PICTURE_IS_LEFT_OUT)


@pytest.fixture(scope="module")
def finished(training: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "folder"
    training.anew()
    assert training.run(0, None).code == 0
    shutil.copytree(training.folder, folder)
    mlflow_store(folder)
    return folder


def test_any_call_of_an_export_may_fail(forks: Forks, finished: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(tmp_path / "folder/run"), "--to", str(tmp_path / "folder/exported")]
    again = {"again": EXPORT_IS_THERE, "leftover": "exported"}
    Scenario(forks, tmp_path, f"{CHILD}:export", arguments, of_export, finished, **again).check_all()


def test_any_call_of_sending_to_mlflow_may_fail(forks: Forks, finished: Path, tmp_path: Path) -> None:
    """Of its calls on the run's files. Those on the store's are SQLite's and MLflow's own."""
    arguments = ["sync", str(tmp_path / "folder/run"), "--to", f"sqlite:///{tmp_path}/folder/mlflow.db"]
    Scenario(forks, tmp_path, f"{CHILD}:sync", arguments, of_store, finished, watched="run").check_all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a packing of ten images into three shards, but its destination."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(random_images(10, 8, seed=3)):
        path = folder / f"{number % 2}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    options = ["--source", "folder", "--input", str(folder), "--size", "8", "--split", "train"]
    return [*options, "--shard-images", "4", "--workers", "1"]


def test_any_call_of_a_packing_may_fail(forks: Forks, pictures: list[str], tmp_path: Path) -> None:
    arguments = [*pictures, "--dest", str(tmp_path / "folder/data")]
    Scenario(forks, tmp_path, f"{CHILD}:pack", arguments, of_shards).check_all()


def test_any_operation_of_a_packing_on_a_store_may_fail(forks: Forks, pictures: list[str], tmp_path: Path) -> None:
    arguments = [*pictures, "--dest", "memory://shards", "--scratch", str(tmp_path / "folder/scratch")]
    Scenario(forks, tmp_path, f"{CHILD}:pack_into_a_store", arguments, of_shards_in_a_store).check_all()


def test_any_call_of_a_run_may_fail(training: Scenario) -> None:
    training.check_all()


def test_any_operation_of_a_run_on_a_store_may_fail(forks: Forks, data: Path, tmp_path: Path) -> None:
    changes = SHORT | {"checkpoint__url": "memory://checkpoints", "data__train_url": "memory://data/train"}
    before = tmp_path / "before"
    before.mkdir()
    objects = {f"/data/train/{path.name}": path.read_bytes() for path in (data / "train").iterdir()}
    keep(before / "store", objects | {"/checkpoints/about.txt": b"a folder that is there"})
    arguments = settings(tmp_path / "folder/run", data, **changes)
    Scenario(forks, tmp_path, f"{CHILD}:train_in_a_store", arguments, of_run_in_a_store, before).check_all()
