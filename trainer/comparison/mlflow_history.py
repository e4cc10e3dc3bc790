"""What happened in a run that MLflow has?"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from data_pipeline.typed_records import parse_record
from trainer.comparison.run_history import PICTURE, READ, RunHistory, curve_of, is_work, model_of
from trainer.errors import MlflowUnreachable, UsageError
from trainer.older_configs import params_of_today
from trainer.record.mlflow_mirror import open_client
from trainer.record.redaction import one_line
from trainer.record.run_folder import Attempt

log = logging.getLogger(__name__)

MOST_RUNS = 50

_LOGGED_PICTURE = re.compile(r"(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+(?P<time>\d+)\+.*(?<!compressed)\.png")


def history_of_run(client: mlflow.MlflowClient, run_id: str) -> RunHistory:
    """A run from MLflow. Raises UsageError if there is none of that id, MlflowUnreachable if MLflow goes away."""
    with _reading(client):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise UsageError(f"{run_id}: MLflow has no such run; give --uri of the store that has it") from error
            raise
        return _history(client, run)


def _history(client: mlflow.MlflowClient, run: Run) -> RunHistory:
    run_id = run.info.run_id
    curves, times, attempts = {}, set(), _attempts(run.data.tags)
    for name in run.data.metrics:
        if name.startswith(READ):
            by_step: dict[int, tuple[float, float]] = {}
            for point in sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp):
                if _stands(point.step, point.timestamp, attempts):
                    by_step[point.step] = (point.timestamp / 1000, point.value)
                if is_work(name):
                    times.add(point.timestamp / 1000)
            if by_step:
                curves[name] = curve_of(by_step)
    return RunHistory(
        name=str(run.info.run_name or run_id[:8]),
        place=run_id,
        status=str(run.info.status).lower(),
        params=params_of_today(run.data.params),
        model=model_of(run.data.params),
        curves=curves,
        data=_validation_data(run),
        attempts=attempts,
        times=sorted(times),
        gpu=run.data.tags.get("gpu.name"),
        pictures=_pictures_of_run(client, run_id, attempts),
    )


def histories_of_experiment(client: mlflow.MlflowClient, name: str, filter_string: str) -> list[RunHistory]:
    """The newest runs of an experiment that match a filter of MLflow's.

    Raises UsageError if there are none, MlflowUnreachable if MLflow goes away.
    """
    with _reading(client):
        return [_history(client, run) for run in _runs_of(client, name, filter_string)]


def _runs_of(client: mlflow.MlflowClient, name: str, filter_string: str) -> list[Run]:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(found.name for found in client.search_experiments()))
        raise UsageError(f"--experiment {name}: MLflow has no such experiment; it has {known}")
    try:
        runs = client.search_runs([experiment.experiment_id], filter_string=filter_string, max_results=MOST_RUNS)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UsageError(
            f"--filter {filter_string!r}: MLflow does not understand it ({one_line(error)}); "
            "an example is \"params.`model.width` = '512' and metrics.`final/val_bits_per_dim` < 4\""
        ) from error
    if not runs:
        raise UsageError(f"--experiment {name}: no run{' that the filter finds' if filter_string else ''}")
    return list(runs)


def open_store(uri: str) -> mlflow.MlflowClient:
    """A client of a store that exists. Raises UsageError, or MlflowUnreachable if it does not answer."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UsageError(f"--uri {uri}: there is no such file")
    try:
        return open_client(uri)
    except (MlflowException, OSError) as error:
        raise MlflowUnreachable(f"--uri: MLflow at {uri} does not answer ({one_line(error)})") from error


@contextlib.contextmanager
def _reading(client: mlflow.MlflowClient) -> Iterator[None]:
    """Raise MlflowUnreachable where MLflow goes away while it is read."""
    try:
        yield
    except (MlflowException, OSError) as error:
        text = f"--uri: MLflow at {client.tracking_uri} has stopped answering ({one_line(error)}); run this again"
        raise MlflowUnreachable(text) from error


def _stands(step: int, timestamp: int, attempts: list[dict[str, Any]]) -> bool:
    """Whether no newer attempt has begun before this step; `timestamp`, in milliseconds, says which are newer."""
    newer = (attempt for attempt in attempts if int(attempt["started"] * 1000) > timestamp)
    return all(step <= attempt.get("step", step) for attempt in newer)


def _validation_data(run: Run) -> dict[str, Any]:
    for entry in run.inputs.dataset_inputs if run.inputs else []:
        tags = {tag.key: tag.value for tag in entry.tags}
        if tags.get("mlflow.data.context") == "validation":
            return {"name": entry.dataset.name, "digest": entry.dataset.digest, **tags}
    return {}


def _attempts(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while started := tags.get(f"attempt.{len(found) + 1}.started"):
        rest = (tags.get(f"attempt.{len(found) + 1}.{name}") for name in ("world_size", "step"))
        try:
            world_size, step = (None if text is None else int(text) for text in rest)
            said = {"started": float(started), "world_size": world_size, "step": step}
            parse_record(Attempt, json.dumps(said).encode())
        except (KeyError, ValueError):
            log.warning("attempt %d is passed over, as MLflow says odd things of it", len(found) + 1)
            break
        found.append({key: value for key, value in said.items() if value is not None})
    return found


def _pictures_of_run(
    client: mlflow.MlflowClient, run_id: str, attempts: list[dict[str, Any]]
) -> dict[str, dict[int, Callable[[], bytes]]]:
    found: dict[str, dict[int, Callable[[], bytes]]] = {}
    for folder, pattern in (("images", _LOGGED_PICTURE), ("samples", PICTURE), ("evaluation", PICTURE)):
        places = [artifact.path for artifact in client.list_artifacts(run_id, folder)]
        matches = [(match, place) for place in places if (match := pattern.fullmatch(Path(place).name))]
        for match, place in sorted(matches, key=lambda found: int(found[0].groupdict().get("time", 0))):
            step, time = int(match["step"]), match.groupdict().get("time")
            if time is not None and not _stands(step, int(time), attempts):
                continue

            def read(path: str = place) -> bytes:
                with _reading(client):
                    return Path(client.download_artifacts(run_id, path)).read_bytes()

            found.setdefault(match["key"].replace("~", "/"), {})[step] = read
    return found
