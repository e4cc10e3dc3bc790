"""How do the processes of a node keep blocks on a local disk, so that each is read from the store only once?

Files are named by content, so data sets and jobs share them. A file appears whole or not at all and is checked at every
read. However many processes write, the files never take more room than allowed. Losing or damaging the folder costs
time, not data: whatever goes wrong with it is one warning, and blocks come from the store.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.storage import TORN_FILE, DataError, Store, atomic_file, fill

log = logging.getLogger(__name__)

NUM_LOCKS = 256
POLL_SECONDS = 0.02
LOCK_SECONDS = 30.0  # who waits longer for another process, which may be stopped, goes to the store itself
TOUCH_SECONDS = 60.0  # how stale the time of last use may be
TORN_SECONDS = 3600.0  # an unfinished file that is older was left by a process that died
FILE_NAME = re.compile(rf"[0-9a-f]+-[0-9]+({re.escape(TORN_FILE)}.*)?")  # anything else in the folder is not ours


class BlockCache:
    """A folder of blocks of at most ``limit_bytes``, shared with other processes of the node."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.readable = self.writable = True
        """Whether blocks in the folder are used, and whether more are kept there."""
        self._warning = threading.Lock()
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked("size", None):
                self._evict(0)
        except OSError as error:
            self._give_up(error)

    def read_block(
        self, store: Store, name: str, begin: int, into: memoryview, xxh3: str, stop: threading.Event
    ) -> None:
        """As ``Store.read_block``; asks the store only when no process of the node did so before."""
        path = self.folder / f"{xxh3}-{len(into)}"
        if self._load(path, into, xxh3):
            return
        with contextlib.ExitStack() as stack:
            keep = self.writable and len(into) <= self.limit_bytes
            if self.writable:
                try:  # the others of the node wait for this one
                    stack.enter_context(self._locked(str(int(xxh3, 16) % NUM_LOCKS), stop))
                except TimeoutError:
                    keep = False
                except OSError as error:
                    self._give_up(error)
                if self._load(path, into, xxh3):
                    return
            store.read_block(name, begin, into, xxh3, stop)
            if keep and self.writable:
                self._save(path, into)

    def _give_up(self, error: OSError) -> None:
        """Keep no more blocks; one warning, whichever thread is the first to meet an error."""
        with self._warning:
            if self.writable:
                self.writable = False
                log.warning(
                    "no more caching in %s, data.cache_dir (%s); blocks come from the store", self.folder, error
                )

    def _load(self, path: Path, into: memoryview, xxh3: str) -> bool:
        """Whether the block was there, whole and right; a wrong one is removed."""
        if not self.readable:
            return False
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                size, found = fill(into, file)
            if size == status.st_size == len(into) and found == xxh3:
                if time.time() - status.st_mtime > TOUCH_SECONDS:
                    with contextlib.suppress(OSError):
                        os.utime(path)
                return True
            path.unlink(missing_ok=True)
            log.warning("%s is damaged and is read from the store again", path)
        except FileNotFoundError:  # not there, or evicted in between
            pass
        except OSError as error:
            self.readable = False
            self._give_up(error)
        return False

    def _save(self, path: Path, data: memoryview) -> None:
        """Make room, then write."""
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
            self._give_up(error)

    def _total(self) -> int:
        """Bytes in the folder as last counted; the size lock must be held."""
        try:
            total = int((self.folder / "total").read_text())
        except (FileNotFoundError, ValueError):
            total = -1
        return self._evict(0) if total < 0 else total

    def _evict(self, needed: int) -> int:
        """Remove what was used longest ago until ``needed`` bytes fit; returns the bytes that are left."""
        found, now = [], time.time()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not FILE_NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    torn = TORN_FILE in entry.name
                    if not entry.is_file(follow_symlinks=False):
                        continue
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
        """Hold one of the folder's locks; the kernel releases those of processes that die.

        Raises OSError if there is no such lock here, TimeoutError if another process does not release it.
        """
        path = str(self.folder / "locks" / name)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stop is not None and stop.is_set():
                        raise DataError("stopped while another process of the node read the block") from None
                    if time.monotonic() > deadline:
                        what = f"another process has held a lock for {LOCK_SECONDS:.0f} s"
                        raise TimeoutError(errno.ETIMEDOUT, what, path) from None
                    time.sleep(POLL_SECONDS)
            yield
        finally:
            with contextlib.suppress(OSError):
                os.close(file)
