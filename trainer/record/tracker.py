"""What is recorded of a run, and where? In the run's folder first, then in MLflow, without a step waiting for it.

Only rank 0 records; the other ranks have a `NoTracker`. A call writes a line into a file of the run's folder and
returns. One thread sends new lines to MLflow (trainer/record/mlflow_mirror.py). MLflow being away never stops
training: a warning says so, another one says when it is back, and nothing is lost.
"""

import getpass
import logging
import re
import statistics
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mlflow.utils.mlflow_tags import MLFLOW_SOURCE_NAME, MLFLOW_USER
from PIL import Image

from data_pipeline.wording import counted
from trainer.config import RunConfig, as_yaml, flat
from trainer.errors import CANNOT_WRITE, FilesUnsent, MlflowUnreachable
from trainer.pictures import png
from trainer.ranks import Ranks, from_rank_0
from trainer.record.mlflow_mirror import Mirror, MirrorInUse
from trainer.record.own_runs import remember_store, remember_urls
from trainer.record.provenance import (
    code_changes,
    code_tags,
    data_description,
    digest_of_text,
    environment,
    machine_tags,
    packages,
)
from trainer.record.redaction import one_line, redact, redacted
from trainer.record.run_folder import (
    PAUSE_SECONDS,
    SYSTEM,
    Clock,
    RunFiles,
    metric_name,
    place_in_run,
    sync_command,
    working_seconds,
    write_json,
)
from trainer.record.system_metrics import SystemMetrics
from trainer.safe_files import write_file

log = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "failed"]

SEND_EVERY_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
"""The longest pause between two tries while MLflow is away."""
REQUIRED_SECONDS = 30.0
"""How long MLflow may take to answer at the start, where tracking.required asks for it."""
RECORD_SECONDS: dict[State, float] = {"finished": 10.0, "stopped": 3.0, "failed": 3.0}
"""How long the last lines of the run's record are tried at the end, before they are kept elsewhere."""
CLOSE_SECONDS: dict[State, float] = {"finished": 30.0, "stopped": 10.0, "failed": 30.0}
"""How long sending the rest at the end may take; a job that was told to stop has little time."""
MAX_PARAM_CHARACTERS = 6000


class Tracker:
    """One training run = one MLflow run, continued over any number of restarts, with one point a step. On rank 0."""

    def __init__(
        self,
        config: RunConfig,
        *,
        world_size: int,
        step: int,
        datasets: Mapping[str, Any],
        artifacts: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Begin to record in the folder `config.run.dir`, or go on there, from `step` on.

        `datasets` maps training and validation to opened shards. `artifacts` are texts to keep with the run, by file
        name (DeepSpeed's configuration). `tags` are added to those that every run has.
        """
        self._files = files = RunFiles(Path(config.run.dir))
        self._metrics, self._events = files.points(), files.happenings()
        for journal in (self._metrics, self._events):
            journal.repair()
        before = files.last_steps()
        self._last_steps = {name: last for name, last in before.items() if name.startswith(SYSTEM)}
        self._clock = Clock(files)
        now = self._clock.now()
        key, self._attempt = _describe_run(files, config, world_size, step, datasets, artifacts or {}, tags or {}, now)
        remember_store(files.folder, key, config.tracking.uri)
        checkpoints = config.checkpoint.url or str(files.folder / "checkpoints")
        remember_urls([config.data.train_url, config.data.validation_url, checkpoints])
        files.write_state(forget=("code", "reason", "ended"), state="running", started=now)
        self._record(step, {})
        self.event(step, "start", f"at step {step}, on {counted(world_size, 'rank')}", world_size=world_size)
        self._uploader = Uploader(files, config.tracking.uri)
        self._uploader.start()
        self._system: SystemMetrics | None = None
        if config.tracking.system_metrics:
            self._system = SystemMetrics(self._log_system)
            self._system.start()

    def wait_until_open(self, seconds: float) -> str | None:
        """None once MLflow has the run. After so many seconds without an answer, the reason."""
        return self._uploader.wait_until_open(seconds)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics after `step` updates, in place of what earlier attempts recorded; in one attempt only once."""
        named = {metric_name(name): float(value) for name, value in metrics.items()}
        fresh = {name: value for name, value in named.items() if step > self._last_steps.get(name, -1)}
        if fresh:
            self._last_steps |= dict.fromkeys(fresh, step)
            self._record(step, fresh)

    def event(self, step: int, name: str, text: str, **fields: Any) -> None:
        """Record that something happened: a line of `events.jsonl`, and the tag `event.NAME` with the last one."""
        entry = {"step": step, "time": self._clock.now(), "attempt": self._attempt, "event": name, "text": text}
        self._events.append(redacted(entry | fields))

    def log_image(self, step: int, key: str, image: Path | str | Image.Image) -> None:
        """Keep a picture under `samples/` and show it in MLflow, where pictures of one key form a series over steps."""
        key = re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII)
        path = self._files.samples / f"{key.replace('/', '_')}-step-{step:09d}.png"
        try:
            content = png(image) if isinstance(image, Image.Image) else Path(image).read_bytes()
            write_file(path, content, within=self._files.folder)
        except OSError as error:
            log.warning("%s: cannot be written (%s); training goes on without this picture", path, error)
            return
        file = path.relative_to(self._files.folder).as_posix()
        self.event(step, "image", "", key=key, file=file)

    def log_file(self, path: Path | str, folder: str) -> None:
        """Send a file to MLflow, into a folder of the run's artifacts; it must stay where it is."""
        last_step = max(self._last_steps.values(), default=0)
        self.event(last_step, "file", "", file=place_in_run(self._files, Path(path)), folder=folder)

    def close(self, state: State, *, code: int, reason: str, step: int) -> str | None:
        """Record how this attempt ended, in `run_state.json` (which scripts decide by) and in MLflow.

        Returns a sentence if points, events or the end are not in the run's folder. All steps done, the run has failed
        then.
        """
        if self._system is not None:
            self._system.stop()
        if state == "finished":
            self.log(step, _summary(self._files, self._clock.now()))
        lacking = [text for journal in (self._metrics, self._events) if (text := journal.finish(RECORD_SECONDS[state]))]
        if lacking and state == "finished":
            state, code, reason = "failed", CANNOT_WRITE, f"{reason}, but {'; '.join(lacking)}"
        elif lacking:
            log.warning("%s", "; ".join(lacking))
        end = {"state": state, "code": code, "reason": reason, "step": step, "ended": time.time()}
        if (unwritten := self._write_end(end, RECORD_SECONDS[state])) and state == "finished":
            lacking.append(unwritten)
        elif unwritten:
            log.warning("%s", unwritten)
        if (unsent := self._uploader.close(CLOSE_SECONDS[state])) is not None:
            log.warning("%s", unsent)
        return "; ".join(lacking) or None

    def _write_end(self, end: dict[str, Any], seconds: float) -> str | None:
        """Say in `run_state.json` how the run ended, and try for so long; a sentence if that cannot be.

        Not only twice, as what can be done without: scripts decide by it, and a full disk may have room again soon.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._files.write_state(**end)
                return None
            except OSError as error:
                if time.monotonic() > deadline:
                    why = error.strerror or error
                    return (
                        f"{self._files.state}: cannot be written ({why}), and does not say that the run {end['state']}"
                    )
            time.sleep(PAUSE_SECONDS)

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        point = {"step": step, "time": self._clock.now(), "attempt": self._attempt, "metrics": metrics}
        self._metrics.append(point)

    def _log_system(self, values: dict[str, float]) -> None:
        # As in MLflow, these points have steps of their own, so that a run that stands still shows, too.
        step = 1 + max((self._last_steps.get(name, -1) for name in values), default=-1)
        self.log(step, values)


class NoTracker:
    """What the other ranks have in place of a `Tracker`: rank 0 records for all of them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def event(self, step: int, name: str, text: str, **fields: Any) -> None:
        pass

    def log_image(self, step: int, key: str, image: Path | str | Image.Image) -> None:
        pass

    def log_file(self, path: Path | str, folder: str) -> None:
        pass

    def close(self, state: State, *, code: int, reason: str, step: int) -> str | None:
        return None


def open_tracker(
    config: RunConfig,
    ranks: Ranks,
    *,
    step: int,
    datasets: Mapping[str, Any],
    artifacts: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Tracker | NoTracker:
    """What records the run on this rank. Collective; the arguments are those of `Tracker`.

    With `tracking.required` this waits until MLflow answers. Raises MlflowUnreachable on all ranks if it does not.
    """
    tracker: Tracker | NoTracker = NoTracker()
    problem = None
    if ranks.rank == 0:
        tracker = Tracker(
            config, world_size=ranks.world_size, step=step, datasets=datasets, artifacts=artifacts, tags=tags
        )
        problem = tracker.wait_until_open(REQUIRED_SECONDS) if config.tracking.required else None
    if config.tracking.required and (problem := from_rank_0(problem)) is not None:
        raise MlflowUnreachable(
            f"tracking.required: MLflow at {redact(config.tracking.uri)} does not answer ({problem}); "
            "start it, correct tracking.uri, or set tracking.required=false"
        )
    return tracker


class Uploader(threading.Thread):
    """Sends every few seconds what is new in the run's files. While MLflow is away, it tries less and less often."""

    def __init__(self, files: RunFiles, uri: str) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._files = files
        self._mirror = Mirror(files, uri)
        self._closing = threading.Event()
        self._opened = threading.Event()
        self._problem: str | None = "no answer yet"
        self._failures = 0
        self._lacks: Literal["", "files", "all"] = ""
        """What the last try could not send."""

    def wait_until_open(self, seconds: float) -> str | None:
        """None once MLflow has the run. After so many seconds without an answer, the reason."""
        return None if self._opened.wait(seconds) else self._problem

    def close(self, seconds: float) -> str | None:
        """Send the rest and how the run ended, within so many seconds. Returns a sentence about what is left."""
        self._closing.set()
        self.join(timeout=seconds)
        problem = f"no answer in {seconds:.0f} seconds" if self.is_alive() else self._problem
        if problem is None:
            return None
        command = sync_command(self._files)
        if self._mirror.lacks_only_files:
            return f"files of the run not sent to MLflow ({problem}); run: {command}"
        points = counted(self._mirror.unsent_points(), "point")
        return f"{points} and the end of the run not sent to MLflow ({problem}); run: {command}"

    def run(self) -> None:
        pause = 0.0
        while not self._closing.wait(pause):
            self._send(end=False)
            pause = min(SEND_EVERY_SECONDS * 2 ** min(self._failures, 10), LONGEST_PAUSE_SECONDS)
        self._send(end=True)
        if self._failures and self._opened.is_set():
            time.sleep(1)  # a store that was busy for a moment
            self._send(end=True)
        self._mirror.close()

    def _send(self, *, end: bool) -> None:
        lacked, self._lacks = self._lacks, ""
        try:
            self._mirror.catch_up(end=end)
        except MirrorInUse as error:
            self._failures, self._problem = 1, str(error)
        except FilesUnsent as error:
            self._opened.set()
            self._failures, self._problem, self._lacks = self._failures + 1, one_line(error.__cause__ or error), "files"
            if lacked != "files":
                log.warning("%s; once that is mended, %s sends the files", error, sync_command(self._files))
        # Whatever goes wrong with MLflow, its store or the network, training must not stop.
        except Exception as error:  # noqa: BLE001
            self._failures, self._problem, self._lacks = self._failures + 1, one_line(error), "all"
            if lacked != "all":
                log.warning(
                    "MLflow does not answer (%s); the run goes on and keeps %s", self._problem, self._files.metrics
                )  # noqa: E501
        else:
            if self._failures and self._opened.is_set():
                log.warning("MLflow answers again and has everything that was recorded meanwhile")
            self._failures, self._problem = 0, None
            self._opened.set()


def _describe_run(
    files: RunFiles,
    config: RunConfig,
    world_size: int,
    step: int,
    datasets: Mapping[str, Any],
    artifacts: Mapping[str, str],
    more_tags: Mapping[str, str],
    now: float,
) -> tuple[str, int]:
    """Write down what MLflow is told when it opens the run, so that this can happen at any later time.

    Returns the run's key and the number of the attempt that begins at `step`.
    """
    text = redact(as_yaml(config))
    write_file(files.config, text.encode())
    repro = {"packages.txt": packages(), "environment.txt": environment(), **artifacts}
    if config.tracking.code_changes:
        repro["git.diff"] = code_changes()
    for name, content in repro.items():
        write_file(files.repro / name, redact(content).encode(), within=files.folder)
    before = files.read_description()
    # The run's lock counts attempts. Without one they are counted here.
    attempt = files.read_state().get("attempt", before.get("attempt", 0) + 1)
    machine = machine_tags(world_size)
    begins = {"started": now, "world_size": world_size, "host": machine["host"], "step": step}
    attempts = [*before.get("attempts", []), begins]
    data = [data_description(context, shards) for context, shards in datasets.items()]
    tags = {MLFLOW_SOURCE_NAME: "trainer/run.py", MLFLOW_USER: _user(), "config.sha": digest_of_text(text)}
    tags |= machine | code_tags() | {"attempts": str(len(attempts))}
    tags |= {f"data.{key}": str(data[0][key]) for key in ("name", "version", "digest")} if data else {}
    tags |= more_tags
    for number, entry in enumerate(attempts, start=1):
        tags |= {f"attempt.{number}.{key}": str(value) for key, value in entry.items()}
    params = {key: str(value)[:MAX_PARAM_CHARACTERS] for key, value in flat(config).items()}
    key = str(before.get("key") or uuid.uuid4().hex)
    description = {
        "uri": config.tracking.uri,
        "experiment": config.tracking.experiment,
        "name": config.run.name,
        "key": key,
        "attempt": attempt,
        "attempts": attempts,
        "params": params,
        "tags": tags,
        "data": data,
    }
    write_json(files.description, redacted(description))
    return key, attempt


def _summary(files: RunFiles, now: float) -> dict[str, float]:
    """The few figures that compare runs in MLflow's table and parallel coordinates."""
    # Time that was spent on steps that are thrown away was spent, too.
    times = [point["time"] for point in files.points().records()] + [now]
    curves = files.standing_points()
    values = {name: [value for _, value in curves.get(name, {}).values()]
              for name in ("val/bits_per_dim", "perf/images_per_s")}  # fmt: skip
    attempts = files.read_description().get("attempts", [])
    seconds = sum(entry["world_size"] * duration for entry, duration in working_seconds(attempts, times))
    summary = {"final/gpu_hours": seconds / 3600}
    if values["val/bits_per_dim"]:
        summary["final/val_bits_per_dim"] = values["val/bits_per_dim"][-1]
    if values["perf/images_per_s"]:
        summary["final/images_per_s"] = statistics.median(values["perf/images_per_s"])
    return summary


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
