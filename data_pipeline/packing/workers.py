"""How are tasks run on several processes, which count the images they are done with?"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from data_pipeline.storage import EXIT_UNREACHABLE, DataError


class Task(Protocol):
    """Something to do in any process; what it returns is sent back."""

    def run(self) -> Any: ...


def run_all(tasks: Sequence[Task], workers: int, progress: Any) -> Iterator[tuple[int, Any]]:
    """Run tasks, on several processes if asked, and yield (index, result) as they finish.

    progress: a shared counter of images (``multiprocessing.Value``) that the tasks add to.
    """
    if workers <= 1:
        set_progress(progress)
        try:
            for index, task in enumerate(tasks):
                yield index, task.run()
        finally:
            set_progress(None)
        return
    # Not fork: a filesystem of s3fs must not be inherited.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.packing.tasks"])  # all that tasks need is imported once
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(progress,))
    try:
        futures = {pool.submit(run_task, task): index for index, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process was killed, probably because memory ran out: use fewer --workers and run the same "
            "command again, it goes on where it was",
            EXIT_UNREACHABLE,
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def without_memory(error: MemoryError) -> str:
    """The sentence for memory that ran out in a process which could still say so."""
    said = f" ({error})" if str(error) else ""
    return (
        f"the memory ran out{said}: use fewer --workers, or a machine with more of it, and run the same command again"
    )


def run_task(task: Task) -> Any:
    return task.run()


def start_worker(progress: Any) -> None:
    """Prepare a worker process: it counts images, and ends when the process that started it is gone."""
    set_progress(progress)

    def leave_with_parent() -> None:
        try:
            parent = multiprocessing.parent_process()
            assert parent is not None
            parent.join()
        finally:  # also if waiting fails: a worker that nobody waits for must not go on
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


_progress: Any = None


def set_progress(progress: Any) -> None:
    """Name the counter this process adds to."""
    global _progress
    _progress = progress


def count_progress(images: int) -> None:
    """Add to the shared counter, if there is one."""
    if _progress is not None:
        with _progress.get_lock():
            _progress.value += images
