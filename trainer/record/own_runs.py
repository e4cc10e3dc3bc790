"""Which MLflow store has this user named for a run?

A run's folder says where its job sent to. But a folder may come from a stranger, and a store that he chose would get
files and credentials. So a job writes down outside of the folder where it sends, and tools go by that, or by what the
environment says. The record is one small file a run; without a home for it, runs are just not known.
"""

import contextlib
import json
import os
import re
from pathlib import Path

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


def _record(key: str) -> Path:
    """Raises ValueError for what is no key of a run, RuntimeError without a home."""
    if not _KEY.fullmatch(key):
        raise ValueError(key)
    home = os.environ.get("XDG_STATE_HOME", "")
    state = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return state / "image-transformer" / "runs" / f"{key}.json"
