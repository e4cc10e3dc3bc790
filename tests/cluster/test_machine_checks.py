"""Is each fault of a machine found by its check, and a machine without it left in peace?"""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cluster import machine_checks
from cluster.machine_checks import Report
from tests.support.s3_server import S3Server

HEALTHY = "0, NVIDIA H200, 1980, 1980, 0x0000000000000001, 0, 4, 143771, 34\n"


def gpus(table: str) -> Report:
    report = Report("n1", 0)
    machine_checks.read_gpus(report, table)
    return report


def test_healthy_gpus_pass() -> None:
    report = gpus(HEALTHY * 8)
    assert report.problems == []
    assert report.values == {"gpus": 8, "max_clock_mhz": 1980}


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("0x0000000000000001, 0,", "0x0000000000000001, 3,", "GPU 0 (NVIDIA H200): 3 uncorrected memory errors"),
        ("0x0000000000000001", "0x0000000000000040", "slowed down by its hardware"),
        (", 4, ", ", 60000, ", "60000 MiB are in use by another process"),
    ],
)
def test_a_sick_gpu_is_named(good: str, bad: str, words: str) -> None:
    (problem,) = gpus(HEALTHY.replace(good, bad)).problems
    assert words in problem


def test_gpus_that_do_not_count_their_errors_pass() -> None:
    assert gpus(HEALTHY.replace("001, 0, 4", "001, [N/A], 4")).problems == []


def test_an_nvidia_smi_that_fails_or_hangs_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU: Lost'; exit 15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report = Report("n1", 0)
    machine_checks.check_gpus(report)
    assert report.problems == ["GPU: nvidia-smi fails: Unable to determine the device handle for GPU: Lost"]

    def never(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    monkeypatch.setattr(machine_checks.subprocess, "run", never)
    machine_checks.check_gpus(report)
    assert report.problems[-1] == "GPU: nvidia-smi does not answer"


def test_free_memory_and_disks_are_compared_with_what_is_wanted(tmp_path: Path) -> None:
    report = Report("n1", 0)
    machine_checks.check_memory(report, 0.0)
    machine_checks.check_disks(report, [tmp_path / "not/yet/there"], 0.0)
    assert report.problems == []
    machine_checks.check_memory(report, 1e9)
    machine_checks.check_disks(report, [tmp_path], 1e9)
    assert "GiB free, 1e+09 wanted" in report.problems[0]
    assert f"GiB free in {tmp_path}" in report.problems[1]


def test_a_lock_is_stale_after_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    (tmp_path / "op/lock").touch()
    report = Report("n1", 0)
    machine_checks.check_locks(report)
    assert report.problems == []  # somebody builds
    os.utime(tmp_path / "op/lock", (time.time() - 700,) * 2)
    machine_checks.check_locks(report)
    assert report.problems == [f"lock: a killed build left {tmp_path}/op/lock 12 minutes ago; remove it"]


def test_a_store_that_hangs_is_given_up() -> None:
    report = Report("n1", 0)
    release = threading.Event()
    machine_checks.with_patience(report, "shards", 0.05, lambda: release.wait(60) and None)
    release.set()
    assert report.problems == ["shards: no answer in 0 s"]


def test_shards_are_read_and_checkpoints_written_on_disk(packed: Path, tmp_path: Path) -> None:
    report = Report("n1", 0)
    machine_checks.check_shards(report, str(packed))
    assert report.values["store_mb_s"] > 0
    machine_checks.check_writing(report, str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no shards"):
        machine_checks.check_shards(report, str(tmp_path / "new"))


def test_checkpoints_are_written_on_s3_and_a_wrong_bucket_or_key_is_a_problem(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("n1", 0)
    machine_checks.check_writing(report, f"s3://{s3_bucket}/run")
    assert s3_server.filesystem().find(s3_bucket) == []
    with pytest.raises(FileNotFoundError):
        machine_checks.check_writing(report, "s3://mistyped-bucket/run")
    assert not s3_server.filesystem().exists("mistyped-bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    machine_checks.with_patience(
        report, "writing", 60, lambda: machine_checks.check_writing(report, f"s3://{s3_bucket}/run")
    )
    (problem,) = report.problems
    assert problem.startswith("writing: PermissionError")


def test_code_is_told_apart_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "ROOT", tmp_path)
    (tmp_path / "trainer").mkdir()
    source = tmp_path / "trainer/loop.py"
    source.write_text("one")
    first = machine_checks.digest_of_code()
    assert machine_checks.digest_of_code() == first
    source.write_text("two")
    assert machine_checks.digest_of_code() != first
    source.rename(tmp_path / "trainer/other.py")
    assert len({first, machine_checks.digest_of_code()}) == 2
    assert machine_checks.commit() == ""
