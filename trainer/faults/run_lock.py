"""May this job write to the run's folder, and is it still the newest attempt that may?

There are two defences. A lock on `run.lock` keeps a second job out while the first one lives; the kernel releases it
when the holder dies. An attempt number in `run_state.json` stops a holder that nobody can see any more: tasks of a
requeued job that still run on a node that was lost. They find a newer number and end without writing. On a file system
without locks (Lustre mounted without them, NFS 3) the number is the only defence, and a warning says so.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from trainer.errors import RunInUse
from trainer.record.run_folder import RunFiles
from trainer.safe_files import open_to_append, read_file

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 5.0
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What flock says where there are none."""


class RunLock:
    """Rank 0's right to write to a run's folder; held until the process ends."""

    def __init__(self, files: RunFiles) -> None:
        """Take the lock and the next attempt number. Raises RunInUse naming the holder, OSError of the disk."""
        self._files = files
        path = files.folder / "run.lock"
        self._file = open_to_append(path, shared=True)
        self._looked = time.monotonic()
        self._superseded = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            job = os.environ.get("SLURM_JOB_ID")
            if not (job and holder.get("job") == job):
                raise RunInUse(
                    f"run.dir: {files.folder} is in use by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', '?')}{' of job ' + str(holder['job']) if holder.get('job') else ''}; "
                    "stop it first, or choose another run.dir"
                ) from None
            log.warning("an earlier attempt of this job still runs on %s; it ends when it notices", holder.get("host"))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s is on a file system without locks (%s): a second job there is not refused, but ends this one, when "
                "it is noticed after some seconds", files.folder, error.strerror,
            )  # fmt: skip
        self._file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        self._file.write(json.dumps(holder).encode())
        # Points say which attempt recorded them, so a number must not come again where the state was lost.
        before = (files.read_state().get("attempt", 0), files.read_description().get("attempt", 0))
        self.attempt = max(before) + 1
        files.write_state(attempt=self.attempt)

    def superseded(self) -> bool:
        """Whether a newer attempt has taken over. Reads the disk only every few seconds."""
        now = time.monotonic()
        if not self._superseded and now - self._looked >= LOOK_AGAIN_SECONDS:
            self._looked = now
            self._superseded = int(self._files.read_state().get("attempt", 0)) > self.attempt
        return self._superseded


def _holder(path: Path) -> dict[str, object]:
    try:
        holder = json.loads(read_file(path))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}
