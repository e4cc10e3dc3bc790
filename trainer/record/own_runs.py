"""Which MLflow stores and which data has this user named himself?

A run's folder says where its job sent to, and where its data and checkpoints are. But a folder may come from a
stranger. A store that he chose would get files and credentials, and a URL that he chose would be asked with them. So a
job writes down outside of the folder what its user named, and tools go by that, or by what is named to them. The record
is one small file a run and a URL; without a home for it, nothing is known.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.storage import normalised, path_of, scheme_of
from trainer.record.redaction import redact
from trainer.safe_files import read_file, write_file

TRACKING_URI = "MLFLOW_TRACKING_URI"
_KEY = re.compile(r"[0-9a-f]{32}")


def is_store(uri: str) -> bool:
    """Whether this is the address of a store that the trainer can send to, without a password in it."""
    return uri.startswith(("sqlite:///", "http://", "https://")) and "@" not in uri


def remember_store(folder: Path, key: str, uri: str) -> None:
    """Write down that this user trains the run of this key in a folder and sends it to a store. Never raises."""
    if uri.startswith("sqlite:///"):  # tools may be started elsewhere
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        path = _record(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = json.dumps({"folder": str(folder.resolve()), "uri": uri})
        write_file(path, content.encode(), mode=0o600)


def own_store(key: str, folder: Path | None = None) -> str | None:
    """The store that a job of this user on this machine sent a run to; None for a run of somebody else.

    With `folder`, None also for another folder than the one in which the run was trained.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        record = json.loads(read_file(_record(key), largest=1 << 16))
        if is_store(str(record["uri"])) and (folder is None or record["folder"] == str(folder.resolve())):
            return str(record["uri"])
    return None


def store_of_environment() -> str | None:
    """The store that MLflow's own variable names, if the trainer can send there."""
    uri = os.environ.get(TRACKING_URI, "")
    return uri if is_store(uri) else None


def remember_urls(urls: Iterable[str]) -> None:
    """Write down that this user trains with data or checkpoints at these URLs. Never raises."""
    for url in urls:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            path = _url_record(url)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(path, json.dumps({"url": redact(url)}).encode(), mode=0o600)


def is_own_url(url: str) -> bool:
    """Whether a job of this user on this machine has had its data or checkpoints at a URL."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return _url_record(url).is_file()
    return False


def _record(key: str) -> Path:
    """Raises ValueError for what is no key of a run, RuntimeError without a home."""
    if not _KEY.fullmatch(key):
        raise ValueError(key)
    return _home() / "runs" / f"{key}.json"


def _url_record(url: str) -> Path:
    """Raises ValueError for what is no URL of data, RuntimeError without a home."""
    # Tools may be started elsewhere, and a folder may be reached over links.
    place = str(Path(path_of(url)).resolve()) if scheme_of(url) == "file" else normalised(url)
    return _home() / "urls" / f"{hashlib.sha256(place.encode()).hexdigest()}.json"


def _home() -> Path:
    """Raises RuntimeError if there is none."""
    home = os.environ.get("XDG_STATE_HOME", "")
    state = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return state / "image-transformer"
