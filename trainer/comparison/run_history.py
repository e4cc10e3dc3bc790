"""What happened in a run? Its parameters, curves, pictures and time, read from its folder."""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ModelConfig, flat, load_written, model_config_from
from trainer.errors import ConfigError, UsageError
from trainer.older_configs import params_of_today
from trainer.record.run_folder import RunFiles, working_seconds
from trainer.safe_files import read_file, refuse_links

READ = ("train/", "val/", "perf/", "optim/", "progress/", "final/", "data/", "mem/")
"""Metrics that are read; MLflow's system metrics are left out."""
PICTURE = re.compile(r"(?P<key>.+)-step-(?P<step>\d+)\.png")


@dataclass(frozen=True)
class Curve:
    """One metric's points, in order of their steps."""

    steps: np.ndarray
    times: np.ndarray
    """Seconds since 1970."""
    values: np.ndarray


@dataclass(frozen=True)
class RunHistory:
    """What a comparison knows of a run."""

    name: str
    place: str
    """Its folder, or its id in MLflow."""
    status: str
    params: Mapping[str, str]
    curves: Mapping[str, Curve]
    data: Mapping[str, Any] = field(default_factory=dict)
    """The validation images: name, digest, version, image_size, form; empty where nothing says so."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Each start of the run: `started`, `world_size`, and, but for older versions, the `step` that it began at."""
    times: list[float] = field(default_factory=list)
    """When points were recorded, those included that the curves have no more; empty: the times of the curves."""
    gpu: str | None = None
    model: ModelConfig | None = None
    """Its config; None where its parameters do not say, or this version does not understand them."""
    pictures: Mapping[str, Mapping[int, Callable[[], bytes]]] = field(default_factory=dict)
    """By key and step, a function that reads the PNG."""

    def last(self, metric: str) -> float | None:
        """The value at the highest step."""
        curve = self.curves.get(metric)
        return float(curve.values[-1]) if curve else None

    def at(self, metric: str, step: float) -> float | None:
        """The value recorded at exactly this step."""
        if (curve := self.curves.get(metric)) is None:
            return None
        found = curve.values[curve.steps == step]
        return float(found[0]) if len(found) else None

    def median(self, metric: str) -> float | None:
        curve = self.curves.get(metric)
        return float(np.median(curve.values)) if curve else None

    def images_seen(self, steps: np.ndarray) -> np.ndarray | None:
        """Training images consumed after so many steps."""
        if seen := self.curves.get("progress/images_seen"):
            return np.interp(steps, np.concatenate([[0], seen.steps]), np.concatenate([[0], seen.values]))
        batch = count_in(self.params.get("train.global_batch_images"))
        return steps * float(batch) if batch else None

    def working_hours(self, times: np.ndarray) -> np.ndarray:
        """Hours that the run had been at work at these times; pauses between attempts do not count."""
        spent = np.zeros(len(times))
        for attempt, seconds in working_seconds(self._starts(), self._all_times()):
            spent += np.clip(times - attempt["started"], 0, seconds)
        return spent / 3600

    def wall_hours(self) -> float:
        return sum(seconds for _, seconds in working_seconds(self._starts(), self._all_times())) / 3600

    def rank_hours(self) -> float | None:
        """Hours times ranks; None for a run whose number of ranks is not recorded."""
        if not self.attempts:
            return None
        spent = working_seconds(self.attempts, self._all_times())
        return sum(int(attempt["world_size"]) * seconds for attempt, seconds in spent) / 3600

    def _starts(self) -> list[dict[str, Any]]:
        return self.attempts or [{"started": min(self._all_times(), default=0.0)}]

    def _all_times(self) -> list[float]:
        return self.times or sorted(
            float(time) for name, curve in self.curves.items() if is_work(name) for time in curve.times
        )


def count_in(text: str | None) -> int | None:
    """The number of steps, images or the like that a parameter says; None for one that says something else."""
    return int(text) if text and re.fullmatch("[0-9]{1,15}", text) else None


def model_of(params: Mapping[str, str]) -> ModelConfig | None:
    """The config of the model of a run, of the parameters that were recorded of it."""
    values: dict[str, Any] = {}
    for name, text in params.items():
        if name.startswith("model."):
            *sections, key = name.split(".")[1:]
            place = values
            for section in sections:
                below = place.setdefault(section, {})
                if not isinstance(below, dict):
                    return None
                place = below
            place[key] = _literal(text)
    try:
        return model_config_from(_with_lists(values), "model") if values else None
    except ConfigError:
        return None


def _with_lists(values: Any) -> Any:
    """Sections that are numbered from 0 on as the lists that they were."""
    if not isinstance(values, dict):
        return values
    below = {key: _with_lists(value) for key, value in values.items()}
    return list(below.values()) if below and list(below) == [str(index) for index in range(len(below))] else below


def _literal(text: str) -> Any:
    """A parameter's value, which was recorded as Python writes it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def history_of_folder(folder: Path) -> RunHistory:
    """A run from its folder, without MLflow. Raises UsageError for a folder that holds no run."""
    files = RunFiles(folder)
    if not files.metrics.exists():
        raise UsageError(f"{folder}: holds no run (no {files.metrics.name}); give the run.dir of a config")
    curves = {name: points for name, points in files.standing_points().items() if name.startswith(READ)}
    description = files.read_description()
    params = description.get("params")
    if params is None:
        try:
            params = {key: str(value) for key, value in flat(load_written(files.config)).items()}
        except ConfigError:  # damaged
            params = {}
    return RunHistory(
        name=description.get("name") or params.get("run.name") or folder.name,
        place=str(folder),
        status=str(files.read_state().get("state", "")),
        params=params_of_today(params),
        model=model_of(params),
        curves={name: curve_of(points) for name, points in curves.items()},
        data=next((data for data in description.get("data", []) if data["context"] == "validation"), {}),
        attempts=description.get("attempts", []),
        times=sorted(record["time"] for record in files.points().records() if any(map(is_work, record["metrics"]))),
        gpu=description.get("tags", {}).get("gpu.name"),
        pictures=_pictures_of_folder(files),
    )


def is_work(metric: str) -> bool:
    """Whether a metric is recorded while the run trains; what tools add long after (final/...) is not."""
    return metric.startswith(READ) and not metric.startswith("final/")


def curve_of(by_step: dict[int, tuple[float, float]]) -> Curve:
    steps = sorted(by_step)
    times, values = zip(*(by_step[step] for step in steps), strict=True)
    return Curve(np.array(steps, dtype=float), np.array(times, dtype=float), np.array(values, dtype=float))


def _pictures_of_folder(files: RunFiles) -> dict[str, dict[int, Callable[[], bytes]]]:
    found: dict[str, dict[int, Callable[[], bytes]]] = {}
    standing = files.standing_pictures()
    for folder in (files.samples, files.folder / "evaluation"):
        if folder.is_symlink():
            refuse_links(folder)
        for path in sorted(folder.glob("*.png")):
            stands = standing.get(path.relative_to(files.folder).as_posix(), True)
            if stands and (match := PICTURE.fullmatch(path.name)):
                found.setdefault(match["key"], {})[int(match["step"])] = partial(_read_png, path, files.folder)
    return found


def _read_png(path: Path, folder: Path) -> bytes:
    """A picture of a run's folder, which goes into the page: nothing else must."""
    content = read_file(path, within=folder)
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UsageError(f"{path}: is not a PNG file; delete it")
    return content
