"""Do tasks run on several processes, and does the reason arrive when one of them fails?"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.packing.tasks import StageTask
from data_pipeline.packing.workers import run_all
from data_pipeline.storage import DataError
from tests.data_pipeline.packing.test_tasks import Pixels


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_in_worker_processes_arrive_whole(tmp_path: Path, workers: int) -> None:
    tasks = [StageTask(str(tmp_path), number, Pixels(5, 1), 16, "cifar10", False) for number in range(3)]
    with pytest.raises(DataError, match="5 does not fit") as caught:
        list(run_all(tasks, workers, None))
    assert caught.value.exit_code == 65


@dataclass(frozen=True)
class OutOfMemory:
    """Work that the kernel kills."""

    def run(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_kernel_kills_ends_the_packing_in_one_sentence() -> None:
    with pytest.raises(DataError, match="^a packing process was killed, probably because memory ran out") as caught:
        list(run_all([OutOfMemory(), OutOfMemory()], 2, None))
    assert caught.value.exit_code == 69
