"""Is this machine fit for the job: its code, versions, GPUs, memory, disks, shard store, checkpoint store and MLflow?

Each check adds to a `Report`: values for the table, problems that make the machine unfit, and warnings.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fsspec.core
import torch
from fsspec.implementations.local import LocalFileSystem

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "models", "data_pipeline", "cluster")
LIBRARIES = ("torch", "deepspeed", "webdataset", "mlflow", "numpy", "fsspec", "s3fs", "triton")
STALE_LOCK_SECONDS = 600.0
READ_BYTES = 16 << 20
MLFLOW_SECONDS = 5.0
SMALLEST_SHM = 256 << 20
"""NCCL and torch keep buffers in /dev/shm; containers often have 64 MiB of it."""
GPU_FIELDS = (
    "index", "name", "clocks.sm", "clocks.max.sm", "clocks_throttle_reasons.active",
    "ecc.errors.uncorrected.volatile.total", "memory.used", "memory.total", "temperature.gpu",
)  # fmt: skip
HARDWARE_SLOWDOWN = 0x8 | 0x40 | 0x80
"""Bits of NVML's throttle reasons: hardware slowdown, hardware thermal, power brake."""
OCCUPIED_MIB = 2048


@dataclass
class Report:
    """What one rank found out about its machine."""

    node: str
    rank: int
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What the job needs of each machine."""

    run_dir: Path
    data_urls: list[str]
    checkpoint_url: str | None
    mlflow_uri: str | None
    disks: list[Path]
    min_disk_gib: float
    min_memory_gib: float
    seconds: float
    """Patience with each store."""


def check_machine(report: Report, wanted: Wanted, *, first_on_machine: bool) -> None:
    """Run every check that a rank can do alone; those of the whole machine on its first rank only."""
    report.values["code"] = digest_of_code()
    report.values["commit"] = commit()
    report.values["versions"] = versions()
    if not first_on_machine:
        return
    check_memory(report, wanted.min_memory_gib)
    check_disks(report, [wanted.run_dir, *wanted.disks], wanted.min_disk_gib)
    check_locks(report)
    check_gpus(report)
    for url in wanted.data_urls:
        with_patience(report, f"shards at {url}", wanted.seconds, lambda url=url: check_shards(report, url))  # type: ignore[misc]
    stores = [str(wanted.run_dir), wanted.checkpoint_url] if wanted.checkpoint_url else [str(wanted.run_dir)]
    for url in stores:
        with_patience(report, f"writing to {url}", wanted.seconds, lambda url=url: check_writing(report, url))  # type: ignore[misc]
    if report.rank == 0 and wanted.mlflow_uri:
        check_mlflow(report, wanted.mlflow_uri)


def with_patience(report: Report, what: str, seconds: float, check: Callable[[], None]) -> None:
    """Run a check that may hang, in a thread. An error is a problem, and so is no result after so many seconds."""
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            check()
        except Exception as error:  # noqa: BLE001 (libraries of storage raise nearly anything; all of it is the finding)
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        report.problems.append(f"{what}: no answer in {seconds:.0f} s")
    for error in errors:
        text = str(error).splitlines()[0] if str(error) else "no message"
        report.problems.append(f"{what}: {type(error).__name__}: {text}")


def digest_of_code() -> str:
    """A digest of all source files, so that changes without a commit count too."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def commit() -> str:
    """The commit of the checkout, for people; empty outside of one."""
    command = ["git", "-c", f"safe.directory={ROOT}", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """Versions of what the ranks must have in common."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_memory(report: Report, least_gib: float) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    report.values["memory_gib"] = kib / 2**20
    if kib / 2**20 < least_gib:
        report.problems.append(f"memory: {kib / 2**20:.1f} GiB free, {least_gib:g} wanted")
    shm = shutil.disk_usage("/dev/shm").free
    if shm < SMALLEST_SHM:
        text = f"/dev/shm: {shm >> 20} MiB free, {SMALLEST_SHM >> 20} needed; containers take --shm-size or --ipc=host"
        report.problems.append(text)


def check_disks(report: Report, folders: list[Path], least_gib: float) -> None:
    for folder in dict.fromkeys(folders):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**30
        report.values["disk_gib"] = min(free, report.values.get("disk_gib", free))
        if free < least_gib:
            report.problems.append(f"disk: {free:.2f} GiB free in {folder}, {least_gib:g} wanted")


def check_locks(report: Report) -> None:
    """When the build of a torch extension is killed, it leaves a lock, and every later start silently waits for it."""
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    for lock in Path(home).rglob("lock"):
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue  # its build ended just now
        if age > STALE_LOCK_SECONDS:
            report.problems.append(f"lock: a killed build left {lock} {age / 60:.0f} minutes ago; remove it")


def check_gpus(report: Report) -> None:
    if shutil.which("nvidia-smi") is None:
        if torch.cuda.is_available():
            report.warnings.append("GPU: there is no nvidia-smi to ask for their health")
        return
    query = [f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        report.problems.append("GPU: nvidia-smi does not answer")
        return
    if result.returncode:
        report.problems.append(f"GPU: nvidia-smi fails: {(result.stdout + result.stderr).strip().splitlines()[-1]}")
        return
    read_gpus(report, result.stdout)


def read_gpus(report: Report, table: str) -> None:
    """Judge nvidia-smi's answer, one GPU a line with GPU_FIELDS."""
    clocks = []
    for line in table.strip().splitlines():
        gpu = dict(zip(GPU_FIELDS, (cell.strip() for cell in line.split(",")), strict=True))
        name = f"GPU {gpu['index']} ({gpu['name']})"
        if gpu["ecc.errors.uncorrected.volatile.total"] not in ("0", "[N/A]", "N/A"):
            errors = gpu["ecc.errors.uncorrected.volatile.total"]
            report.problems.append(f"{name}: {errors} uncorrected memory errors; it needs a reset or a replacement")
        reasons = gpu["clocks_throttle_reasons.active"]
        if reasons.startswith("0x") and int(reasons, 16) & HARDWARE_SLOWDOWN:
            report.problems.append(f"{name}: slowed down by its hardware ({reasons}, {gpu['temperature.gpu']} C)")
        if gpu["memory.used"].isdigit() and int(gpu["memory.used"]) > OCCUPIED_MIB:
            report.problems.append(f"{name}: {gpu['memory.used']} MiB are in use by another process")
        if gpu["clocks.max.sm"].isdigit():
            clocks.append(int(gpu["clocks.max.sm"]))
    report.values["gpus"] = len(table.strip().splitlines())
    report.values["max_clock_mhz"] = min(clocks, default=0)


def check_shards(report: Report, url: str) -> None:
    """Read the beginning of one shard, as a training rank would."""
    filesystem, path = open_store(url)
    shards = sorted(name for name in filesystem.ls(path, detail=False) if name.endswith(".tar"))
    if not shards:
        raise FileNotFoundError("there are no shards")
    size = min(READ_BYTES, filesystem.size(shards[0]))
    start = time.perf_counter()
    content = filesystem.cat_file(shards[0], start=0, end=size)
    speed = len(content) / (time.perf_counter() - start) / 1e6
    if len(content) != size:
        raise OSError(f"{len(content)} bytes came instead of {size}")
    report.values["store_mb_s"] = min(speed, report.values.get("store_mb_s", speed))


def check_writing(report: Report, url: str) -> None:
    """Write a small file beside the checkpoints, read it back and remove it."""
    filesystem, path = open_store(url)
    if isinstance(filesystem, LocalFileSystem):  # elsewhere it would make a bucket of a mistyped name
        filesystem.makedirs(path, exist_ok=True)
    name = f"{path}/.preflight-{report.node}-{os.getpid()}"
    content = os.urandom(1024)
    filesystem.pipe_file(name, content)
    try:
        if filesystem.cat_file(name) != content:
            raise OSError("what was written came back different")
    finally:
        filesystem.rm_file(name)


def open_store(url: str) -> tuple[Any, str]:
    """The filesystem and the path of a URL; on S3 with short timeouts and few retries."""
    options: dict[str, Any] = {"skip_instance_cache": True}
    if url.startswith("s3://"):
        retries = {"total_max_attempts": 2, "mode": "standard"}
        options |= {
            "use_listings_cache": False,
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 10, "retries": retries},
        }
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


def check_mlflow(report: Report, uri: str) -> None:
    """A warning only: training goes on without MLflow, and keeps its points in a file."""
    if not uri.startswith("http"):
        return  # a local file, in a folder that the trainer makes
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=MLFLOW_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        report.warnings.append(f"MLflow at {uri} answers {error.code}")
    except OSError as error:
        report.warnings.append(f"MLflow at {uri} does not answer ({getattr(error, 'reason', error)})")
