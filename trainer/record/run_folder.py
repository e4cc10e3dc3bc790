"""What is in a run's folder: config, points, events, state, and how much of them MLflow has?

`metrics.jsonl` and `events.jsonl` are the truth about a run, and also the queue for MLflow. Lines are only added, and
`mlflow_sent.json` says how many bytes of each file have arrived in MLflow.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shlex
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from data_pipeline.typed_records import Count, Key, Time, misfits
from data_pipeline.wording import counted
from trainer.record.redaction import redacted
from trainer.safe_files import LARGEST_JOURNAL, open_to_append, open_to_read, read_file, write_file

log = logging.getLogger(__name__)

MAX_KEY_CHARACTERS = 250
PIECE_BYTES = 1 << 20
"""A longer line is none of ours."""
LARGEST_BACKLOG_LINES = 100_000
"""Lines kept in memory while the disk is full."""
PAUSE_SECONDS = 0.25
"""Between two tries to write the last lines."""
SYSTEM = "system/"
"""How names of metrics begin that are of the machine. They count minutes and not updates."""
_state_lock = threading.Lock()


@dataclass(frozen=True)
class Point:
    """A line of `metrics.jsonl`. Without metrics it says at which step its attempt begins."""

    step: Count
    time: Time
    metrics: dict[str, float]
    attempt: Count = 0
    """Which attempt recorded it, or was the last one when a tool did; 0 where an older version did not say."""


@dataclass(frozen=True)
class Event:
    """A line of `events.jsonl`; each kind of event has entries of its own, too."""

    step: Count
    time: Time
    event: str
    attempt: Count = 0
    """As of a point."""
    text: str = ""
    key: str = ""
    """Of a picture: which series of pictures it is part of."""
    file: str = ""
    """Of a picture or a file: where it is in the run's folder."""
    folder: str = ""
    """Of a file: where MLflow keeps it."""


@dataclass(frozen=True)
class Identity:
    """What must not change between two attempts of a run."""

    model: dict[str, Any]
    seed: int
    data: str


@dataclass(frozen=True)
class RunState:
    """`run_state.json`: what the last attempt left."""

    state: Literal["running", "finished", "stopped", "failed"] | None = None
    code: int | None = None
    reason: str | None = None
    step: Count | None = None
    started: Time | None = None
    ended: Time | None = None
    attempt: Count | None = None
    checkpoint_step: Count | None = None
    identity: Identity | None = None
    origin: dict[str, str] | None = None
    start_step: Count | None = None
    start_config: str | None = None
    starts_without_progress: Count | None = None
    mlflow_run_id: str | None = None
    mlflow_uri: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    started: Time
    world_size: Count
    host: str = ""
    step: Count | None = None
    """The step that it began at; older versions did not say."""


@dataclass(frozen=True)
class DataSet:
    """Training or validation images."""

    context: str
    url: str
    name: str
    digest: str
    images: Count
    image_size: Count
    form: str
    version: str


@dataclass(frozen=True)
class Description:
    """`mlflow_run.json`: what MLflow is told of a run."""

    uri: str
    experiment: str
    name: str
    key: Key
    attempt: Count
    attempts: list[Attempt]
    params: dict[str, str]
    tags: dict[str, str]
    data: list[DataSet]


@dataclass(frozen=True)
class Sent:
    """`mlflow_sent.json`: what MLflow has of a run; lines of the journals are counted in bytes."""

    run_id: str = ""
    metrics: Count = 0
    events: Count = 0
    files: Count | None = None
    """Of `events.jsonl`, how much has arrived of its pictures and files; None: as much as of the events themselves."""
    attempt: Count | None = None
    """Which attempt is described there."""
    files_attempt: Count | None = None
    """Whose files of description are there: its config and `repro/`."""
    checkpoint_step: Count | None = None
    status: str | None = None


class Journal:
    """A file of JSON lines that only grows. Readers see whole lines only.

    `kind` is the record that lines hold. A line that holds another is passed over, and the first one is warned of.
    """

    def __init__(self, path: Path, kind: type | None = None) -> None:
        self.path = path
        self._kind = kind
        self._warned = False
        self._lock = threading.Lock()
        self._backlog: list[bytes] = []
        self._torn = False
        self._file: FileIO | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; never raises. On a full disk this warns, and the line is written together with a later one."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            self._backlog = [*self._backlog, line][-LARGEST_BACKLOG_LINES:]
            error = self._write_backlog()
            if error is not None and len(self._backlog) == 1:
                why = error.strerror or error
                log.warning("%s: cannot be written (%s); its lines are kept in memory", self.path, why)

    def finish(self, seconds: float) -> str | None:
        """Write what is left, and try for so long; then close the file, which is opened again if more is to be written.

        Returns a sentence about lines that are not in the file. They are kept in the system's temporary folder.
        """
        deadline = time.monotonic() + seconds
        while (error := self._flush()) is not None and time.monotonic() < deadline:
            time.sleep(PAUSE_SECONDS)
        self.close()
        if error is None:
            return None
        why = error.strerror or error
        with self._lock:
            lines, self._backlog = self._backlog, []
        if not lines:
            return f"{self.path}: it is not known whether the disk has all of its lines ({why})"
        lacking = f"{self.path}: {counted(len(lines), 'line')} could not be written ({why})"
        try:
            spare, name = tempfile.mkstemp(prefix=f"{self.path.parent.name}-{self.path.stem}-", suffix=".jsonl")
            with open(spare, "wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(spare)
        except OSError as other:
            return f"{lacking}, nor kept elsewhere ({other.strerror})"
        return f"{lacking} and are kept in {name}: cat {shlex.quote(name)} >> {shlex.quote(str(self.path))}"

    def _flush(self) -> OSError | None:
        """Write the backlog and wait until the disk has the file; returns what was in the way."""
        with self._lock:
            if (error := self._write_backlog()) is None and self._file is not None:
                try:
                    os.fsync(self._file.fileno())
                except OSError as unsure:
                    return unsure
            return error

    def _write_backlog(self) -> OSError | None:
        failure = None
        for _ in range(2):
            if not self._backlog:
                return None
            try:
                self._write((b"\n" if self._torn else b"") + b"".join(self._backlog))
                self._backlog, self._torn = [], False
                return None
            except OSError as error:
                failure = error
                self._close()  # its handle may have gone stale: another one is tried at once
        return failure

    def _write(self, data: bytes) -> None:
        if self._file is not None and not self._is_in_place(self._file):
            self._close()
        if self._file is None:
            # Each line is one write in append mode, so lines of several processes (a tool beside the training job) do
            # not mix. The file stays open: every system call releases Python's lock, and while the sender is at work
            # the training thread may have to wait to get it back.
            self._file = open_to_append(self.path)
        written = self._file.write(data)
        if written < len(data):
            # Take back what fitted, since it is written again with the rest. If that fails, its line must be ended.
            self._torn = True
            self._file.truncate(os.fstat(self._file.fileno()).st_size - written)
            self._torn = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file; it is opened again when there is something to write."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _is_in_place(self, file: FileIO) -> bool:
        """Whether the path still leads to the open file; not so once its folder was replaced, or a server came back."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def repair(self) -> None:
        """Cut off a last line that a killed process has left unfinished."""
        if not os.path.lexists(self.path):
            return
        with open_to_append(self.path, shared=True) as file:
            end = size = os.fstat(file.fileno()).st_size
            while end and (piece := os.pread(file.fileno(), min(end, PIECE_BYTES), max(0, end - PIECE_BYTES))):
                if (last := piece.rfind(b"\n")) >= 0:
                    end += last + 1 - len(piece)
                    break
                end -= len(piece)
            if end < size:
                file.truncate(end)

    def read(self, position: int, largest_lines: int) -> tuple[list[dict[str, Any]], int]:
        """The records of the next complete lines after a byte position, and the position behind them."""
        try:
            file = open_to_read(self.path, largest=LARGEST_JOURNAL)
        except FileNotFoundError:
            return [], position
        records = []
        with file:
            if position > os.fstat(file.fileno()).st_size:  # somebody has replaced the file
                position = 0
            file.seek(position)
            for _ in range(largest_lines):
                line = file.readline(PIECE_BYTES)
                length = len(line)
                while line and not line.endswith(b"\n") and (rest := file.readline(PIECE_BYTES)):
                    line = rest  # of a line that is too long to be one of ours
                    length += len(rest)
                if not line.endswith(b"\n"):
                    break
                position += length
                if length == len(line) and (record := self._parse(line)) is not None:
                    records.append(record)
        return records, position

    def records(self, position: int = 0) -> Iterator[dict[str, Any]]:
        """All records from a byte position on."""
        while True:
            found, following = self.read(position, 1000)
            yield from found
            if following == position:
                return
            position = following

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """The record of a line; None for the remains of one that a full disk or a lost machine has left, and for what
        is no record of this kind."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        if self._kind is not None and (odd := misfits(self._kind, line)):
            if not self._warned:
                log.warning("%s: a line is passed over, as %s is missing or odd in it", self.path, " and ".join(odd))
                self._warned = True
            return None
        return value


class RunFiles:
    """The files of a run's folder, by name, and its state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.jsonl"
        self.events = folder / "events.jsonl"
        self.state = folder / "run_state.json"
        self.samples = folder / "samples"
        self.repro = folder / "repro"
        """Describes the code and the machine of the run."""
        self.description = folder / "mlflow_run.json"
        """What MLflow is told when the run is opened there: parameters, tags, data sets."""
        self.sent = folder / "mlflow_sent.json"

    def points(self) -> Journal:
        """What was measured: `Point` records."""
        return Journal(self.metrics, Point)

    def happenings(self) -> Journal:
        """What happened: `Event` records."""
        return Journal(self.events, Event)

    def read_state(self) -> dict[str, Any]:
        """What the last attempt left in `run_state.json`: a `RunState`, or empty for a new run.

        This warns of an entry that is damaged, and leaves it out.
        """
        return _read_json(self.state, RunState, keep_others=True)

    def read_description(self) -> dict[str, Any]:
        """The `Description`; empty if there is none, or, with a warning, if it is damaged."""
        return _read_json(self.description, Description)

    def read_sent(self) -> dict[str, Any]:
        """What MLflow has: `Sent`; empty if it has nothing, or, with a warning, if that is damaged."""
        return _read_json(self.sent, Sent)

    def write_state(self, *, forget: Collection[str] = (), **changes: Any) -> None:
        """Change entries of `run_state.json` in one atomic replacement, without secrets. Raises OSError.

        Entries in `forget` are removed.
        """
        with _state_lock:
            kept = {name: value for name, value in self.read_state().items() if name not in forget}
            write_json(self.state, kept | redacted(changes))

    def attempts_begun(self) -> dict[int, int]:
        """The step at which each attempt began, by its number; without those of older versions."""
        return _begun(self.points().records())

    def standing_points(self) -> dict[str, dict[int, tuple[float, float]]]:
        """The curve of each metric: (time, value) by step, in order of the steps.

        What belongs to weights that were thrown away is left out: a newer attempt has begun at an earlier step.
        """
        records = list(self.points().records())
        begun = _begun(records)
        curves: dict[str, dict[int, tuple[float, float]]] = {}
        for record in sorted(records, key=attempt_of):
            for name, value in record["metrics"].items():
                if not is_superseded(record, begun, name):
                    curves.setdefault(name, {})[record["step"]] = (record["time"], value)
        return {name: dict(sorted(by_step.items())) for name, by_step in curves.items()}

    def standing_pictures(self) -> dict[str, bool]:
        """Whether each picture that was recorded stands, by its file; see standing_points."""
        begun = self.attempts_begun()
        pictures = (record for record in self.happenings().records() if record["event"] == "image")
        return {record.get("file", ""): not is_superseded(record, begun) for record in sorted(pictures, key=attempt_of)}

    def last_steps(self) -> dict[str, int]:
        """The last step of each metric's curve."""
        return {name: max(by_step) for name, by_step in self.standing_points().items()}


def attempt_of(record: dict[str, Any]) -> int:
    """The number of the attempt that recorded a point or an event."""
    return int(record.get("attempt", 0))


def is_superseded(record: dict[str, Any], begun: Mapping[int, int], metric: str = "") -> bool:
    """Whether a newer attempt began before the step of a record, with weights that know nothing of it.

    `begun` has the step at which each attempt began. The machine's own metrics have other steps, and stay.
    """
    if metric.startswith(SYSTEM):
        return False
    attempt, step = attempt_of(record), record["step"]
    return any(number > attempt and step > began for number, began in begun.items())


def _begun(points: Iterable[dict[str, Any]]) -> dict[int, int]:
    return {attempt_of(point): point["step"] for point in points if not point["metrics"]}


def _read_json(path: Path, record: type, *, keep_others: bool = False) -> dict[str, Any]:
    """A JSON object; empty if there is no such file. If it is damaged, this warns and returns an empty one.

    With `keep_others`, an entry that does not fit the record leaves the others as they are.
    Raises UnsafeFile for a link and the like, or another OSError.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        return {}
    odd = misfits(record, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        odd = [""]
    if odd and (not keep_others or "" in odd):
        log.warning("%s is damaged and is written anew", path)
        return {}
    if odd:
        log.warning("%s: %s is damaged and is left out", path, " and ".join(odd))
    return {name: entry for name, entry in value.items() if name not in odd}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file atomically. Raises OSError."""
    write_file(path, json.dumps(value, indent=1).encode())


def working_seconds(attempts: list[dict[str, Any]], times: list[float]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each attempt of a run and how long it ran: from its start to its last sign of life, in seconds.

    `attempts` have `started`, in order; `times` are those of all points and events. Pauses between attempts do not
    count.
    """
    ends = [attempt["started"] for attempt in attempts[1:]] + [float("inf")]
    for attempt, end in zip(attempts, ends, strict=True):
        alive = [time for time in times if attempt["started"] <= time < end]
        yield attempt, max(alive, default=attempt["started"]) - attempt["started"]


class Clock:
    """Times for records, in seconds since 1970: they only grow, from one attempt to the next and whatever is set.

    In MLflow the newest of two values at one step counts, so a machine whose clock is behind must not write older ones.
    """

    def __init__(self, files: RunFiles) -> None:
        latest = max((record["time"] for record in files.points().records()), default=0.0)
        self._ahead = max(time.time(), latest + 0.001) - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._ahead


def metric_name(name: str) -> str:
    """The name in a form that MLflow takes: letters, digits, `_ - . space : /`, no empty parts, no `.` and `..`."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    return "/".join(part for part in parts if part.strip(".") != "")[:MAX_KEY_CHARACTERS] or "unnamed"


def place_in_run(files: RunFiles, path: Path) -> str:
    """A path relative to the run's folder if it lies inside, so that the folder can be moved; else absolute."""
    path, folder = path.resolve(), files.folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def sync_command(files: RunFiles) -> str:
    """The command that sends a run to MLflow, for a shell."""
    return f"python -m trainer.tracking sync {shlex.quote(str(files.folder))}"
