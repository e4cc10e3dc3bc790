"""How do tests start the main job for real: a tiny model on tiny shards, in one process or several."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import mlflow

from trainer.tracking import quiet_mlflow

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "trainer/run.py")]
QUICKSTART = ROOT / "configs/quickstart.yaml"

TINY_MODEL = {
    "model.image_size": 8,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.attention_width": 16,
    "model.ff_width": 16,
    "model.query_block": 16,
    "model.memory": 16,
    "model.mixtures": 2,
}


def mlflow_store(folder: Path) -> str:
    """The URI of an empty MLflow store in a folder: a copy, because making one takes MLflow seconds of migrations."""
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
    """Arguments that turn the quickstart into a run of seconds; `train__steps=5` changes train.steps."""
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
    arguments: list[str], *, ranks: int, config: Path = QUICKSTART, environment: dict[str, str] | None = None
) -> list["subprocess.Popen[str]"]:
    """Start the job's processes as a launcher would; stdout and stderr of each are pipes."""
    port = free_port()
    common = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (environment or {})
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
        variables = common | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}
        command = [*RUN, "--config", str(config), *arguments]
        processes.append(
            subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return processes


def finish(processes: list["subprocess.Popen[str]"], timeout: float = 240) -> tuple[int, str]:
    """Wait for all processes; the exit code of rank 0 and what all of them printed."""
    texts = []
    try:
        for process in processes:
            texts += [text for text in process.communicate(timeout=timeout) if text]
    finally:
        for process in processes:
            process.kill()
    return processes[0].returncode, "".join(texts)


def train(arguments: list[str], *, ranks: int = 1, **options: object) -> str:
    """Run the job to its end, which must be a good one; returns what it printed."""
    code, text = finish(start(arguments, ranks=ranks, **options))  # type: ignore[arg-type]
    assert code == 0, text
    return text


def curve(run_dir: Path, name: str = "train/bits_per_dim") -> list[tuple[int, float]]:
    """(step, value) of a metric, in the order of recording."""
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(point["step"], point["metrics"][name]) for point in points if name in point["metrics"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
