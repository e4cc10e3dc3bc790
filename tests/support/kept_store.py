"""What if an operation on a store of objects fails? fsspec's store in memory, which is kept in a file between commands.

It takes the place of `memory://` in a child of tests/support/forks.py. An object appears when its writer closes it, as
on S3. Operations are named as in tests/support/file_calls.c, and counted from 1 on.
"""

import errno
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from data_pipeline import storage


class KeptStore(MemoryFileSystem):  # type: ignore[misc]
    """Objects of a store that is kept in the file `kept`, and of which one operation fails."""

    kept = Path()
    strike_at, way = 0, ""
    trace: list[str] = []
    struck = ""
    _lock = threading.RLock()
    _inside = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> Any:
        return self._operate("write", path, lambda: self._put(path, value, mode), lambda: self._halve(path, value))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        assert mode == "wb", mode
        return _Upload(self, path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        return self._operate("read", path, lambda: super(KeptStore, self).cat_file(path, start, end))

    def info(self, path: str, **options: Any) -> Any:
        return self._operate("stat", path, lambda: super(KeptStore, self).info(path))

    def exists(self, path: str, **options: Any) -> Any:
        return self._operate("stat", path, lambda: super(KeptStore, self).exists(path))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._operate("list", path, lambda: super(KeptStore, self).ls(path, detail))

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        return self._operate("list", path, lambda: super(KeptStore, self).find(path, *arguments, **options))

    def rm_file(self, path: str) -> Any:
        return self._operate("unlink", path, lambda: super(KeptStore, self).rm_file(path))

    def rmdir(self, path: str) -> Any:
        return self._operate("unlink", path, lambda: super(KeptStore, self).rmdir(path))

    def _put(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and path in self.store:
            raise FileExistsError(path)
        self.store[path] = MemoryFile(self, path, value)

    def _halve(self, path: str, value: bytes) -> None:
        """The store says that all is well, and has half of it."""
        self._put(path, bytes(value[: len(value) // 2]))

    def _operate(self, verb: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        with self._lock:
            if KeptStore._inside:  # fsspec's own operations are made of others
                return act()
            KeptStore._inside = True
            try:
                return self._fail(verb, path, act, half)
            finally:
                KeptStore._inside = False

    def _fail(self, verb: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        self.trace.append(f"{verb} {path}")
        way = self.way if len(self.trace) == self.strike_at else ""
        if way:
            KeptStore.struck = self.trace[-1]
        if way in ("EIO", "ENOSPC"):
            number = getattr(errno, way)
            raise OSError(number, os.strerror(number), path)
        result = half() if half is not None and way.startswith("half") else act()
        if verb in ("write", "unlink"):
            self._keep()
        if way == "then SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "done, but EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return result

    def _keep(self) -> None:
        keep(self.kept, {path: file.getvalue() for path, file in self.store.items()})


class _Upload:
    """An object that is being written. What is discarded never appears."""

    def __init__(self, store: KeptStore, path: str) -> None:
        self._store, self._path, self._content, self.closed = store, path, bytearray(), False

    def write(self, piece: memoryview) -> int:
        self._content += piece
        return len(piece)

    def close(self) -> None:
        self._store.pipe_file(self._path, bytes(self._content))
        self.closed = True

    def discard(self) -> None:
        self._content.clear()


def objects_of(kept: Path) -> dict[str, bytes]:
    """The objects of a store that was kept in a file, by path."""
    found: dict[str, bytes] = pickle.loads(kept.read_bytes()) if kept.exists() else {}
    return found


def keep(kept: Path, objects: dict[str, bytes]) -> None:
    beside = kept.with_suffix(".new")
    beside.write_bytes(pickle.dumps(objects))
    beside.replace(kept)


def with_a_fault_of_the_store(command: Callable[[], int], root: str, number: int, way: str | None, report: str) -> int:
    """In a child: as `with_a_fault` of tests/support/each_call.py, for operations on `memory://`, kept below `root`."""
    KeptStore.kept = Path(root) / "store"
    for path, content in objects_of(KeptStore.kept).items():
        MemoryFileSystem().pipe_file(path, content)
    fsspec.register_implementation("memory", KeptStore, clobber=True)
    storage.filesystem_of.cache_clear()
    KeptStore.strike_at, KeptStore.way = number, way or ""
    code = command()
    Path(report).write_text(KeptStore.struck if way else "\n".join(KeptStore.trace))
    return code
