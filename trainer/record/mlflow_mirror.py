"""How does MLflow get what a run's folder holds, each thing once, whatever fails in between?

`Mirror.catch_up` sends what is new in the folder since the last time. The training job calls it on a thread, and so do
the tools and `python -m trainer.tracking sync`; it does not matter which of them sends. To send something twice does no
harm: a point has the time at which it was recorded, and MLflow stores equal points once.

MLflow forgets nothing. Points that it has and that a newer attempt supersedes stay there. Of two values at one step it
counts the later one, and the tags `attempt.N.step` and `attempt.N.started` tell a reader which points stand.

What goes to the store itself (points, parameters, tags, data sets, how the run ended) is sent first, and files last:
they may go to another place, a bucket or a disk, which may be away or closed to us while the store answers.
"""

import contextlib
import logging
import os
import re
import sqlite3
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock, Timeout
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from PIL import Image

from trainer.errors import UNAVAILABLE, FilesUnsent, RefusedStore, code_of, is_foreseen
from trainer.pictures import open_picture
from trainer.record.redaction import one_line
from trainer.record.run_folder import RunFiles, is_superseded, write_json
from trainer.safe_files import file_inside, files_inside, read_file, tried_twice

log = logging.getLogger(__name__)

LINES_A_REQUEST = 50
LARGEST_REQUEST = 1000
"""Points in one request: MLflow's limit. Those of parameters and tags are 100."""
LARGEST_TAG_CHARACTERS = 5000
LARGEST_NAME_CHARACTERS = 200
REQUEST_SECONDS = "10"
STORE_CREATION_SECONDS = 120.0
RUN_KEY = "run.key"
"""Tag to find a run by when the answer to its creation came too late, or when its folder has lost the run's id."""
STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
SQLITE = "sqlite:///"
REMOTE_ARTIFACTS = {
    "mlflow-artifacts",
    "http",
    "https",
    "s3",
    "r2",
    "b2",
    "gs",
    "wasbs",
    "abfss",
    "hdfs",
    "viewfs",
    "ftp",
    "sftp",
}
"""Places of artifacts that are not on this machine. MLflow's others lead to local files, directly or by a detour."""
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the experiment's page open with its training runs; MLflow's default is a view for chat applications."""
_NETWORK_FILESYSTEMS = re.compile(
    r"nfs\d?|cifs|smb\w*|lustre|beegfs|gpfs|ceph|glusterfs|afs|fuse\.(sshfs|glusterfs|ceph.*|s3fs)"
)


class MirrorInUse(Exception):
    """Another process sends for this run, and will send what is there."""


class Mirror:
    """The MLflow run of one run folder. One process at a time sends; when it dies, the kernel releases its lock.

    `uri` is the store that the user named. What the folder says of a store is never asked: it may be a stranger's.
    """

    def __init__(self, files: RunFiles, uri: str) -> None:
        self._files = files
        self._uri = uri
        self._metrics, self._events = files.points(), files.happenings()
        self._lock: FileLock | None = None
        self._client: mlflow.MlflowClient | None = None
        self._run: Run | None = None
        self._attempt: int | None = None
        self._begun: dict[int, int] = {}
        self._at_files = False
        self._may_be_there = True
        """Whether an image may have arrived although its answer was lost."""

    def catch_up(self, *, end: bool) -> None:
        """Open the run unless it is open, and send what is new. With `end`, send also how the last attempt ended.

        Raises MirrorInUse, FilesUnsent if all but the files has arrived, or any error of MLflow, its store or its
        network. The next call goes on from there.
        """
        self._at_files = False
        self._take_lock()
        description = self._files.read_description()
        if not description:
            return  # nothing was recorded
        if self._client is None:
            self._client = open_client(self._uri)
        sent = self._files.read_sent()
        if self._attempt != description["attempt"]:
            self._open(description, sent)
        try:
            self._send_metrics(sent)
            self._send_events(sent)
            if end:
                self._send_end(sent)
            self._at_files = True
            self._send_files(description, sent)
        except Exception as error:
            if _is_gone(error):
                self._attempt = None  # the run was deleted meanwhile: open another
            if not self._at_files:
                raise
            self._may_be_there = True
            if isinstance(error, RefusedStore):
                raise FilesUnsent(f"{error}; the numbers of the run have arrived", error.exit_code) from error
            raise FilesUnsent(
                f"MLflow at {self._uri} does not get files of the run ({one_line(error)}); its numbers have arrived",
                code_of(error) if is_foreseen(error) else UNAVAILABLE,
            ) from error
        self._at_files = False

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until it is open."""
        return str(self._run.info.run_id) if self._run else ""

    def unsent_points(self) -> int:
        """Values of metrics that have not arrived."""
        sent = self._files.read_sent()
        return sum(len(record["metrics"]) for record in self._metrics.records(sent.get("metrics", 0)))

    @property
    def lacks_only_files(self) -> bool:
        """Whether `catch_up`, which has failed or is still at work, has sent all but files."""
        return self._at_files

    def close(self) -> None:
        """Let another process send."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        # No soft lock on a filesystem without locks: a killed process would leave it behind.
        lock = FileLock(self._files.folder / "mlflow.lock", timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise MirrorInUse(f"another process sends {self._files.folder} to MLflow") from None
        except OSError:
            pass  # a filesystem without locks: equal points are stored once anyway
        self._lock = lock

    def _open(self, description: dict[str, Any], sent: dict[str, Any]) -> None:
        """Find or create the run, and describe the attempt there unless that was done. `sent` is brought up to date."""
        assert self._client is not None
        client, files = self._client, self._files
        known = str(files.read_state().get("mlflow_run_id") or sent.get("run_id") or "")
        run = _find_run(client, known, description)
        if run is None:
            tags = {RUN_KEY: description["key"], MLFLOW_RUN_NAME: description["name"]}
            if known:
                tags["resumed_from"] = known  # deleted, or on another server
            began = int(description["attempts"][0]["started"] * 1000)
            run = client.create_run(_experiment_id(client, description, self._uri), start_time=began, tags=tags)
        run_id = run.info.run_id
        if sent.get("run_id") != run_id:
            sent.clear()
            sent |= {"run_id": run_id, "metrics": 0, "events": 0, "files": 0}
        if "files" not in sent:  # an older version sent files together with the rest
            sent |= {"files": sent["events"], "files_attempt": sent.get("attempt")}
        if sent.get("attempt") != description["attempt"]:
            _describe(client, run, description)
            sent["attempt"] = description["attempt"]
            write_json(files.sent, sent)
        named = {"mlflow_run_id": run_id, "mlflow_uri": self._uri}
        # Only if it is new: `tracking sync` may run while the job changes other entries, and no lock lies between them.
        if not named.items() <= files.read_state().items():
            files.write_state(**named)
        if STATUS.get(files.read_state().get("state", "")) == "RUNNING" and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
            sent.pop("status", None)
        self._run, self._attempt = run, description["attempt"]
        self._begun = files.attempts_begun()

    def _send_metrics(self, sent: dict[str, Any]) -> None:
        while True:
            records, position = self._metrics.read(sent["metrics"], LINES_A_REQUEST)
            if position == sent["metrics"]:
                return
            points = [
                Metric(name, value, int(record["time"] * 1000), record["step"])
                for record in records
                for name, value in record["metrics"].items()
                if not is_superseded(record, self._begun, name)
            ]
            for begin in range(0, len(points), LARGEST_REQUEST):
                self._send_points(points[begin : begin + LARGEST_REQUEST])
            sent["metrics"] = position
            write_json(self._files.sent, sent)

    def _send_points(self, points: list[Metric]) -> None:
        """Send points. This warns of each point that MLflow refuses as invalid, and leaves it out."""
        assert self._client is not None
        try:
            self._client.log_batch(self.run_id, metrics=points)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or _is_gone(error):
                raise
            if len(points) == 1:
                log.warning("MLflow refuses %s at step %d: %s", points[0].key, points[0].step, error)
                return
            middle = len(points) // 2
            self._send_points(points[:middle])
            self._send_points(points[middle:])

    def _send_events(self, sent: dict[str, Any]) -> None:
        """Send what happened, but pictures and files."""
        assert self._client is not None
        while True:
            records, position = self._events.read(sent["events"], LINES_A_REQUEST)
            if position == sent["events"]:
                return
            for record in records:
                if record["event"] not in ("image", "file"):
                    text = f"step {record['step']}: {record.get('text', '')}"
                    name = re.sub(r"[^\w.-]", "_", record["event"])[:LARGEST_NAME_CHARACTERS]
                    self._client.set_tag(self.run_id, f"event.{name}", text[:LARGEST_TAG_CHARACTERS])
            sent["events"] = position
            write_json(self._files.sent, sent)

    def _send_files(self, description: dict[str, Any], sent: dict[str, Any]) -> None:
        """Send what describes the attempt, the pictures and files of events, and `events.jsonl` itself.

        Raises RefusedStore for a place where the store must not write.
        """
        assert self._client is not None and self._run is not None
        files, described = self._files, sent.get("files_attempt") == description["attempt"]
        if described and self._events.read(sent["files"], 1)[1] == sent["files"]:
            return
        # A store names the place of files by itself, and this process would write wherever it says: so no call about
        # files comes before the place is judged. All else goes to the address that the user named, whatever that place
        # is. It may be sent before, and also where the place is refused.
        _pin_artifacts(self._run, self._uri)
        if not described:
            self._client.log_artifact(self.run_id, str(file_inside(files.folder, files.config.name)))
            try:
                texts = files_inside(files.repro, files.folder)
            except FileNotFoundError:  # somebody has deleted it
                texts = []
            for path in texts:
                self._client.log_artifact(self.run_id, str(path), "repro")
            sent["files_attempt"] = description["attempt"]
            write_json(files.sent, sent)
        told = False
        while True:
            records, position = self._events.read(sent["files"], 1)
            if position == sent["files"]:
                break
            if told:
                write_json(files.sent, sent)
            for record in records:
                self._send_file_of(record)
            told = True
            self._may_be_there = False
            sent["files"] = position
        if told:  # the last event is known to be there once the file has arrived, too
            self._client.log_artifact(self.run_id, str(file_inside(files.folder, files.events.name)))
            write_json(files.sent, sent)

    def _send_file_of(self, record: dict[str, Any]) -> None:
        """Send the picture or file of an event, if it has one."""
        assert self._client is not None
        client, run_id = self._client, self.run_id
        if record["event"] == "image" and not is_superseded(record, self._begun):
            image = _read_image(self._files.folder, record.get("file", ""))
            when = int(record["time"] * 1000)
            if image is not None and not (self._may_be_there and self._has_image(record["step"], when)):
                client.log_image(
                    run_id, image, key=_image_key(record.get("key", "")), step=record["step"], timestamp=when
                )
        elif record["event"] == "file":
            name = record.get("file", "")
            try:
                path = tried_twice(lambda: file_inside(self._files.folder, name))  # what is passed over is never sent
            except OSError as error:
                log.warning("MLflow does not get %s (%s)", self._files.folder / name, error)
            else:
                client.log_artifact(run_id, str(path), _artifact_folder(record.get("folder", "")))

    def _has_image(self, step: int, when: int) -> bool:
        assert self._client is not None
        names = (artifact.path for artifact in self._client.list_artifacts(self.run_id, "images"))
        # MLflow writes two files for an image, the small one last.
        return any(f"+step+{step}+timestamp+{when}+" in name and name.endswith(".webp") for name in names)

    def _send_end(self, sent: dict[str, Any]) -> None:
        assert self._client is not None
        state = self._files.read_state()
        # This process holds the lock, so an attempt that is recorded as running has died.
        status = {"RUNNING": "FAILED"}.get(found := STATUS[state.get("state", "failed")], found)
        if sent.get("status") == status:
            return
        ended = state.get("ended")
        self._client.set_terminated(self.run_id, status, end_time=int(ended * 1000) if ended else None)
        sent["status"] = status
        write_json(self._files.sent, sent)


def catch_up(files: RunFiles, uri: str, *, end: bool) -> Mirror:
    """Send everything that MLflow does not have yet, from this process. Raises what Mirror.catch_up raises."""
    mirror = Mirror(files, uri)
    try:
        mirror.catch_up(end=end)
    finally:
        mirror.close()
    return mirror


def open_client(uri: str) -> mlflow.MlflowClient:
    """A client of the store at a URI, after the store has answered.

    When several processes open a new sqlite store at once, one makes the tables while the others wait. MLflow itself
    would leave a store that cannot be opened any more.

    Raises MlflowException, or OSError for a store on a network disk.
    """
    quiet_mlflow()
    with _only_opener(uri):
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def quiet_mlflow() -> None:
    """Give a request ten seconds instead of MLflow's four minutes, and hide reports of database migrations."""
    # Our own loop tries again. The user's values win.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_SECONDS)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


def on_network_disk(path: str, mounts: str) -> str | None:
    """The kind of network filesystem that a path lies on; None for a local disk. `mounts`: text of /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) > 2:
            point = fields[1].replace("\\040", " ")
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, fields[2]
    return kind if _NETWORK_FILESYSTEMS.fullmatch(kind) else None


@contextlib.contextmanager
def _only_opener(uri: str) -> Iterator[None]:
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///")).resolve()
    mounts = Path("/proc/mounts")
    if mounts.exists() and (kind := on_network_disk(str(path), mounts.read_text())):
        raise OSError(
            f"{uri} lies on a network disk ({kind}), where sqlite loses data; set tracking.uri to a local disk or to "
            "the URL of a tracking server"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=STORE_CREATION_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"{uri}: another process has been opening it for {STORE_CREATION_SECONDS:.0f} s") from None
    try:
        _refuse_other_database(uri, path)
        yield
    finally:
        lock.release()


def _find_run(client: mlflow.MlflowClient, known: str, description: dict[str, Any]) -> Run | None:
    """The run by its id, else by its key (when the answer to its creation was lost); None if there is none."""
    if known:
        try:
            run = client.get_run(known)
            # A stranger's folder may name another run of this store.
            if run.info.lifecycle_stage == "active" and run.data.tags.get(RUN_KEY) == description["key"]:
                return run
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = client.get_experiment_by_name(description["experiment"])
    if experiment is None:
        return None
    query = f"tags.`{RUN_KEY}` = '{description['key']}'"
    found = list(client.search_runs([experiment.experiment_id], filter_string=query, max_results=1))
    return found[0] if found else None


def _experiment_id(client: mlflow.MlflowClient, description: dict[str, Any], uri: str) -> str:
    name, place = description["experiment"], None
    if uri.startswith(SQLITE):
        # Beside the store. MLflow would take `mlruns` in the folder where the command is started.
        place = str(_local_artifacts(uri) / (re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"))
    for _ in range(2):
        if experiment := client.get_experiment_by_name(name):
            if experiment.lifecycle_stage != "active":
                raise OSError(
                    f"the experiment {name} was deleted in MLflow: restore it or set another tracking.experiment"
                )
            return str(experiment.experiment_id)
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=_EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                raise
    raise OSError(f"the experiment {name} can neither be found nor created in MLflow")


def _describe(client: mlflow.MlflowClient, run: Run, description: dict[str, Any]) -> None:
    """Parameters, tags and data sets of the attempt that begins."""
    run_id, recorded = run.info.run_id, run.data.params
    values = description["params"]
    # MLflow refuses to change a parameter, so a tag says what a restart has changed.
    changed = {f"changed.{k}": v for k, v in values.items() if k in recorded and recorded[k] != v}
    params = [Param(key, value) for key, value in values.items() if key not in recorded]
    tags = [RunTag(key, value[:LARGEST_TAG_CHARACTERS]) for key, value in (description["tags"] | changed).items()]
    for begin in range(0, max(len(params), len(tags)), 100):
        client.log_batch(run_id, params=params[begin : begin + 100], tags=tags[begin : begin + 100])
    if not (run.inputs and run.inputs.dataset_inputs):
        client.log_inputs(run_id, datasets=[_dataset_input(data) for data in description["data"]])


def _dataset_input(data: dict[str, Any]) -> DatasetInput:
    """MLflow's record of one data set; it allows 36 characters for a digest."""
    source = resolve_dataset_source(data["url"])
    dataset = MetaDataset(source, name=data["name"], digest=data["digest"][:32])  # type: ignore[abstract]
    tags = [InputTag("mlflow.data.context", data["context"])]
    tags += [InputTag(key, str(data[key])) for key in ("version", "form", "images", "image_size")]
    return DatasetInput(dataset._to_mlflow_entity(), tags)


def _read_image(folder: Path, name: str) -> Image.Image | None:
    try:
        return open_picture(tried_twice(lambda: read_file(file_inside(folder, name), within=folder)))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s), so MLflow does not get it", folder / name, error)
        return None


def _artifact_folder(name: str) -> str | None:
    """A folder of a run's artifacts, in a form that MLflow takes; None for their top."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or None


def _image_key(key: str) -> str:
    """The name of a series of pictures, in a form that MLflow takes."""
    return "/".join(part for part in re.sub(r"[^\w\-./ ]", "_", key).split("/") if part.strip(".")) or "unnamed"


def _pin_artifacts(run: Run, uri: str) -> None:
    """Let artifacts of a run go where its store has just said, and refuse a place where the store must not write.

    Raises RefusedStore: a store names the place by itself, and this process would write to any local one.
    """
    run_id, place = run.info.run_id, str(run.info.artifact_uri)
    scheme = urllib.parse.urlsplit(place).scheme.lower()
    if scheme not in REMOTE_ARTIFACTS:
        local = Path(place if not scheme else urllib.request.url2pathname(urllib.parse.urlsplit(place).path))
        allowed = scheme in ("", "file") and uri.startswith(SQLITE) and local.is_absolute()
        if not (allowed and local.resolve().is_relative_to(_local_artifacts(uri).resolve())):
            raise RefusedStore(
                f"MLflow at {uri} keeps the files of run {run_id} in {place[:200]!r}, a place on this machine that is "
                "not the folder mlruns beside a sqlite store; nothing is written there"
            )
    # MLflow would ask the store again for the place, and keeps it here by itself.
    _artifact_repos_cache[run_id] = get_artifact_repository(place, tracking_uri=uri)


def _local_artifacts(uri: str) -> Path:
    """The folder for artifacts of a sqlite store."""
    return Path(uri.removeprefix(SQLITE)).resolve().parent / "mlruns"


def _refuse_other_database(uri: str, path: Path) -> None:
    """Raise RefusedStore for a file that is there and no MLflow store: MLflow would add its tables to any database."""
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        # Read-only, so that the file stays as it is.
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked: a store at work
            return
        tables = {str(error)}
    if tables and not {"experiments", "runs"} & tables:
        raise RefusedStore(f"{uri} is a file that is no MLflow store; name another file")


def _is_gone(error: Exception) -> bool:
    """Whether MLflow says that the run is not there any more."""
    return isinstance(error, MlflowException) and (
        error.error_code == "RESOURCE_DOES_NOT_EXIST" or "must be in the 'active' state" in str(error)
    )
