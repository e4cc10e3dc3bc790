"""How do tests start the main job for real: a tiny model on tiny shards, in one process or several."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import mlflow

from tests.support.preloaded import Rank, start_rank
from trainer.record.mlflow_mirror import quiet_mlflow
from trainer.record.run_folder import RunFiles

ROOT = Path(__file__).resolve().parents[2]
SMALL_JOB = ROOT / "tests/support/small_job.yaml"

Process = Rank | subprocess.Popen[str]

TINY_MODEL = {
    "model.image_size": 8,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.attention_width": 16,
    "model.ff_width": 16,
    "model.attention.query_block": 16,
    "model.attention.memory": 16,
    "model.output.components": 2,
}


def mlflow_store(folder: Path) -> str:
    """The URI of an empty MLflow store in a folder: a copy, because making one takes MLflow seconds of migrations."""
    folder.mkdir(exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(_empty_mlflow_store(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


@lru_cache(maxsize=1)
def _empty_mlflow_store() -> Path:
    path = Path(tempfile.mkdtemp(prefix="mlflow-")) / "mlflow.db"
    quiet_mlflow()
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def settings(run_dir: Path, data: Path, **changes: object) -> list[str]:
    """Arguments that turn the small job into a run of seconds; `train__steps=5` changes train.steps."""
    values: dict[str, object] = TINY_MODEL | {
        "run.dir": run_dir,
        "data.train_url": data / "train",
        "data.validation_url": data / "validation",
        "train.steps": 6,
        "train.global_batch_images": 8,
        "train.micro_batch_images": 4,
        "train.precision": "fp32",
        "train.log_every_steps": 1,
        "evaluate.images": 16,
        "evaluate.batch_images": 128,
        "checkpoint.every_steps": 4,
        "tracking.uri": mlflow_store(run_dir.parent),
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [argument for name, value in values.items() for argument in ("--set", f"{name}={_yaml(value)}")]


def start(
    arguments: list[str],
    *,
    ranks: int,
    config: Path = SMALL_JOB,
    environment: dict[str, str] | None = None,
    sabotage: dict[int, Callable[[], None]] | None = None,
) -> list[Rank]:
    """Start the job's processes as a launcher would; `sabotage` says what goes wrong in which rank."""
    port = free_port()
    common = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (environment or {})
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
        variables = common | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}
        folder = Path(tempfile.mkdtemp(prefix=f"rank-{rank}-"))
        wrong = (sabotage or {}).get(rank)
        processes.append(start_rank(["--config", str(config), *arguments], variables, folder, wrong))
    return processes


def finish(processes: Sequence[Process], timeout: float = 240) -> tuple[int, str]:
    """Wait for all processes; the exit code of rank 0 and what all of them printed."""
    texts: list[str] = []
    try:
        for process in processes:
            texts += process.communicate(timeout=timeout)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode is not None
    return processes[0].returncode, "".join(texts)


def train(arguments: list[str], *, ranks: int = 1, **options: object) -> str:
    """Run the job to its end, which must be a good one; returns what it printed."""
    code, text = finish(start(arguments, ranks=ranks, **options))  # type: ignore[arg-type]
    assert code == 0, text
    return text


def wait_for_step(run_dir: Path, step: int, processes: Sequence[Process]) -> None:
    """Wait until a run has recorded so many steps; its processes must live."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and (points := curve(run_dir)) and points[-1][0] >= step:
            return
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {finish(processes)}")


def curve(run_dir: Path, name: str = "train/bits_per_dim") -> list[tuple[int, float]]:
    """(step, value) of a metric, without the steps of weights that were thrown away."""
    points = RunFiles(run_dir).standing_points().get(name, {})
    return [(step, value) for step, (_, value) in points.items()]


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
