"""How do the processes of a node keep blocks on a local disk, so that each is read from the store only once?

Files are named by content, so data sets and jobs share them. A file appears whole or not at all and is checked at every
read. However many processes write, the files never take more room than allowed. Losing or damaging the folder costs
time, not data.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.storage import EXIT_CANNOT_WRITE, TORN_FILE, DataError, Store, atomic_file, fill

log = logging.getLogger(__name__)

NUM_LOCKS = 256
POLL_SECONDS = 0.02
TOUCH_SECONDS = 60.0  # how stale the time of last use may be
TORN_SECONDS = 3600.0  # an unfinished file that is older was left by a process that died


class BlockCache:
    """A folder of blocks of at most ``limit_bytes``, shared with other processes of the node."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.writable = True
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataError(f"cannot make the cache folder {folder}: {error.strerror}", EXIT_CANNOT_WRITE) from error
        with self._locked("size", None):
            self._evict(0)

    def read_block(
        self, store: Store, name: str, begin: int, into: memoryview, xxh3: str, stop: threading.Event
    ) -> None:
        """As ``Store.read_block``; asks the store only when no process of the node did so before."""
        path = self.folder / f"{xxh3}-{len(into)}"
        if self._load(path, into, xxh3):
            return
        with self._locked(str(int(xxh3, 16) % NUM_LOCKS), stop):  # the others of the node wait for this one
            if self._load(path, into, xxh3):
                return
            store.read_block(name, begin, into, xxh3, stop)
            if self.writable and len(into) <= self.limit_bytes:
                self._save(path, into)

    def _load(self, path: Path, into: memoryview, xxh3: str) -> bool:
        """Whether the block was there, whole and right; a wrong one is removed."""
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                size, found = fill(into, file)
        except OSError:  # not there, or evicted in between
            return False
        if not size == status.st_size == len(into) or found != xxh3:
            log.warning("%s is damaged and is read from the store again", path)
            path.unlink(missing_ok=True)
            return False
        if time.time() - status.st_mtime > TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
        return True

    def _save(self, path: Path, data: memoryview) -> None:
        """Make room, then write; a full disk ends the caching, not the training."""
        try:
            with self._locked("size", None):
                total = self._total() + len(data)
                if total > self.limit_bytes:
                    total = self._evict(len(data)) + len(data)
                # The file is counted before it is there. If the process dies in between, the number is too large, and
                # the next eviction corrects it.
                (self.folder / "total").write_text(str(total))
                with atomic_file(str(path), durable=False) as file:
                    file.write(data)
        except OSError as error:
            self.writable = False
            log.warning("no more caching in %s (%s); blocks come from the store", self.folder, error)

    def _total(self) -> int:
        """Bytes in the folder as last counted; the size lock must be held."""
        try:
            return int((self.folder / "total").read_text())
        except (OSError, ValueError):
            return self._evict(0)

    def _evict(self, needed: int) -> int:
        """Remove what was used longest ago until ``needed`` bytes fit; returns the bytes that are left."""
        found, now = [], time.time()
        for entry in os.scandir(self.folder):
            if "-" not in entry.name:
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                torn = TORN_FILE in entry.name
                if torn and now - status.st_mtime > TORN_SECONDS:
                    os.unlink(entry.path)
                else:
                    found.append((now if torn else status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + needed <= self.limit_bytes:
                break
            if TORN_FILE not in path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        (self.folder / "total").write_text(str(total))
        return total

    @contextlib.contextmanager
    def _locked(self, name: str, stop: threading.Event | None) -> Iterator[None]:
        """Hold one of the folder's locks; the kernel releases those of processes that die."""
        with (self.folder / "locks" / name).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stop is not None and stop.is_set():
                        raise DataError("stopped while another process of the node read the block") from None
                    time.sleep(POLL_SECONDS)
            yield
