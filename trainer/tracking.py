"""What is recorded of a run, and where? `metrics.jsonl` in the run's folder first, then MLflow.

Only rank 0 records; on the other ranks every call does nothing. MLflow being away never stops training: the file has
every point, and one warning says that MLflow does not.
"""

import json
import logging
import os
import platform
import subprocess
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME, MLFLOW_USER

from trainer.config import RunConfig, as_yaml, flat

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MAX_PARAM_CHARACTERS = 6000
State = Literal["running", "finished", "stopped", "failed"]
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment's page on training runs; MLflow's default is the view for chat applications."""
_MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class RunFiles:
    """The run folder's own record: `config.yaml`, `metrics.jsonl` and `run_state.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.jsonl"
        self.state = folder / "run_state.json"

    def read_state(self) -> dict[str, Any]:
        """What the last attempt left in `run_state.json`; empty for a new run."""
        return json.loads(self.state.read_text()) if self.state.exists() else {}

    def write_state(self, **changes: Any) -> None:
        """Change entries of `run_state.json` in one atomic replacement."""
        temporary = self.state.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.read_state() | changes, indent=1))
        os.replace(temporary, self.state)

    def append(self, step: int, metrics: dict[str, float], now: float) -> None:
        """Add one point to `metrics.jsonl`."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "time": now, "metrics": metrics}) + "\n")

    def last_steps(self) -> dict[str, int]:
        """The last step recorded of each metric; a half-written last line (a killed run) is dropped."""
        last: dict[str, int] = {}
        if not self.metrics.exists():
            return last
        complete = []
        for line in self.metrics.read_text().splitlines():
            try:
                point = json.loads(line)
            except ValueError:
                continue
            complete.append(line)
            for name in point["metrics"]:
                last[name] = max(last.get(name, -1), point["step"])
        self.metrics.write_text("".join(f"{line}\n" for line in complete))
        return last


class Tracker:
    """One training run = one MLflow run, continued over any number of restarts, with one point a step."""

    def __init__(self, config: RunConfig, *, rank: int, world_size: int, datasets: dict[str, Any]) -> None:
        """Open or go on with the run of `config.run.dir`; `datasets` maps training and validation to open shards."""
        self._files = RunFiles(Path(config.run.dir)) if rank == 0 else None
        self._client: mlflow.MlflowClient | None = None
        self._run_id = ""
        if self._files is None:
            return
        self._files.config.write_text(as_yaml(config))
        self._last_steps = self._files.last_steps()
        self._warned = False
        quiet_mlflow()
        try:
            self._client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
            self._run_id = self._open_run(config, world_size, datasets)
        except MlflowException as error:
            self._warn(error)
        self._files.write_state(
            state="running", mlflow_run_id=self._run_id, mlflow_uri=config.tracking.uri, started=time.time()
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics after `step` updates; a step that an earlier attempt recorded is not recorded twice."""
        if self._files is None:
            return
        fresh = {name: value for name, value in metrics.items() if step > self._last_steps.get(name, -1)}
        if not fresh:
            return
        self._last_steps |= dict.fromkeys(fresh, step)
        now = time.time()
        self._files.append(step, fresh, now)
        self._call(lambda client: client.log_batch(self._run_id, metrics=_points(step, fresh, now)))

    def close(self, state: State, *, code: int, reason: str, step: int) -> None:
        """Record how this attempt ended, in `run_state.json` (which scripts decide by) and in MLflow."""
        if self._files is None:
            return
        self._files.write_state(state=state, code=code, reason=reason, step=step, ended=time.time())
        self._call(lambda client: client.set_terminated(self._run_id, _MLFLOW_STATUS[state]))

    def _open_run(self, config: RunConfig, world_size: int, datasets: dict[str, Any]) -> str:
        client, files = self._client, self._files
        assert client is not None and files is not None
        tags = {
            MLFLOW_SOURCE_NAME: "trainer/run.py",
            MLFLOW_USER: os.environ.get("USER", "unknown"),
            "world_size": str(world_size),
            "versions.python": platform.python_version(),
            **{f"versions.{name}": version(name) for name in ("torch", "deepspeed", "mlflow", "webdataset")},
            **git_revision(),
        }
        known = files.read_state().get("mlflow_run_id")
        try:
            run = client.get_run(known) if known else None
        except MlflowException:
            run, tags = None, tags | {"resumed_from": str(known)}  # deleted, or another server
        if run is None:
            experiment = client.get_experiment_by_name(config.tracking.experiment)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(config.tracking.experiment, tags=_EXPERIMENT_TAGS)
            )
            run = client.create_run(experiment_id, tags=tags | {MLFLOW_RUN_NAME: config.run.name})
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        run_id: str = run.info.run_id
        recorded = run.data.params
        values = {key: str(value)[:MAX_PARAM_CHARACTERS] for key, value in flat(config).items()}
        # MLflow refuses to change a parameter: what a restart changed is told by a tag.
        tags |= {f"changed.{k}": v for k, v in values.items() if k in recorded and recorded[k] != v}
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in values.items() if key not in recorded],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        client.log_artifact(run_id, str(files.config))
        if not (run.inputs and run.inputs.dataset_inputs):
            client.log_inputs(run_id, datasets=[_dataset_input(c, s) for c, s in datasets.items()])
        return run_id

    def _call(self, request: Any) -> None:
        if self._client is None or not self._run_id:
            return
        try:
            request(self._client)
        except MlflowException as error:
            self._warn(error)

    def _warn(self, error: MlflowException) -> None:
        if not self._warned:
            log.warning("MLflow does not answer (%s); the run goes on and keeps %s", error, self._files.metrics)  # type: ignore[union-attr]
        self._warned = True


def record_results(files: RunFiles, step: int, metrics: dict[str, float], artifacts: list[Path]) -> None:
    """Add what a tool found out about a run to its files and its MLflow run; files go to the run's `samples`."""
    now = time.time()
    last_steps = files.last_steps()
    fresh = {name: value for name, value in metrics.items() if step > last_steps.get(name, -1)}
    if fresh:
        files.append(step, fresh, now)
    state = files.read_state()
    if not state.get("mlflow_run_id"):
        return
    quiet_mlflow()
    try:
        client = mlflow.MlflowClient(tracking_uri=state["mlflow_uri"])
        if fresh:
            client.log_batch(state["mlflow_run_id"], metrics=_points(step, fresh, now))
        for path in artifacts:
            client.log_artifact(state["mlflow_run_id"], str(path), "samples")
    except MlflowException as error:
        log.warning("MLflow does not answer (%s); the results are in %s", error, files.folder)


def quiet_mlflow() -> None:
    """Two retries instead of MLflow's four minutes of them, and no report of its database migrations."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


def git_revision() -> dict[str, str]:
    """Commit of this code and whether it was changed, as MLflow tags; empty outside a git checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {MLFLOW_GIT_COMMIT: commit, "git.dirty": str(bool(changes)).lower()}


def _points(step: int, metrics: dict[str, float], now: float) -> list[Metric]:
    return [Metric(name, value, int(now * 1000), step) for name, value in metrics.items()]


def _dataset_input(context: str, shards: Any) -> DatasetInput:
    """MLflow's record of one data set: where it is, and the digest of its manifest (36 characters at most)."""
    source = resolve_dataset_source(shards.url)
    dataset = MetaDataset(source, name=shards.manifest.name, digest=shards.digest[:32])  # type: ignore[abstract]
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
