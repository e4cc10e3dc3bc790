"""From which code, packages, data and machine does a run come?"""

import hashlib
import os
import platform
import socket
import subprocess
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from trainer.record.redaction import HIDDEN

ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 20.0
LARGEST_DIFF_CHARACTERS = 4 << 20
_ENVIRONMENT = ("CUDA_", "DS_", "LD_PRELOAD", "NCCL_", "OMP_", "PYTORCH_", "SLURM_JOB", "SLURM_N", "TORCH_", "TRITON_")
"""Prefixes of the variables that change how a run computes. No others are recorded."""
_RECORDED_VALUES = """
CUDA_DEVICE_MAX_CONNECTIONS CUDA_DEVICE_ORDER CUDA_HOME CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING CUDA_VISIBLE_DEVICES
DS_ACCELERATOR DS_BUILD_OPS DS_SKIP_CUDA_CHECK LD_PRELOAD NCCL_ALGO NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT
NCCL_BUFFSIZE NCCL_CHECKS_DISABLE NCCL_COLLNET_ENABLE NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_DEBUG NCCL_DEBUG_SUBSYS
NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_HCA NCCL_IB_QPS_PER_CONNECTION NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_TC
NCCL_IB_TIMEOUT NCCL_MAX_NCHANNELS NCCL_MIN_NCHANNELS NCCL_NET NCCL_NET_GDR_LEVEL NCCL_NET_PLUGIN NCCL_NVLS_ENABLE
NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_PROTO NCCL_SHM_DISABLE NCCL_SOCKET_FAMILY NCCL_SOCKET_IFNAME NCCL_TOPO_FILE
OMP_NUM_THREADS OMP_PLACES OMP_PROC_BIND OMP_WAIT_POLICY PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
PYTORCH_NVML_BASED_CUDA_CHECK SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_JOB_PARTITION
SLURM_NNODES SLURM_NODEID SLURM_NODELIST SLURM_NPROCS SLURM_NTASKS SLURM_NTASKS_PER_NODE TORCH_CPP_LOG_LEVEL
TORCH_CUDA_ARCH_LIST TORCH_DISTRIBUTED_DEBUG TORCH_EXTENSIONS_DIR TORCH_LOGS TORCH_NCCL_ASYNC_ERROR_HANDLING
TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC
TORCH_NCCL_TRACE_BUFFER_SIZE TRITON_CACHE_DIR TRITON_INTERPRET
"""
"""Of these, those that are known to hold no secret; of others the name is recorded and the value hidden."""


def code_tags() -> dict[str, str]:
    """Commit of this code and whether it was changed since; empty outside a git checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if not commit:
        return {}
    return {"mlflow.source.git.commit": commit.strip(), "git.dirty": str(bool(changes)).lower()}


def code_changes() -> str:
    """The patch that turns the recorded commit into the code that ran. New files are named, not included."""
    names = (_git("ls-files", "--others", "--exclude-standard") or "").splitlines()
    text = "".join(f"# not tracked: {name}\n" for name in names) + (
        _git("diff", "--no-ext-diff", "--no-color", "HEAD") or ""
    )
    if len(text) > LARGEST_DIFF_CHARACTERS:
        return text[:LARGEST_DIFF_CHARACTERS] + "\n# cut off here\n"
    return text


def packages() -> str:
    """Every installed package with its version, as `pip install --requirement` reads it."""
    found = {f"{item.metadata['Name']}=={item.version}" for item in distributions() if item.metadata["Name"]}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def environment() -> str:
    """The variables of the environment that change how a run computes, with the values of those that are well known."""
    recorded = set(_RECORDED_VALUES.split())
    named = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)}
    return "".join(f"{name}={value if name in recorded else HIDDEN}\n" for name, value in named.items())


def machine_tags(world_size: int) -> dict[str, str]:
    """Versions, device and job, as MLflow tags to search by."""
    tags = {
        "world_size": str(world_size),
        "host": socket.gethostname(),
        "versions.python": platform.python_version(),
        **{f"versions.{name}": version(name) for name in ("torch", "deepspeed", "mlflow", "webdataset")},
    }
    if torch.cuda.is_available():
        tags["gpu.name"] = torch.cuda.get_device_name(0)
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm.job_id"] = job
    return tags


def data_description(context: str, shards: Any) -> dict[str, Any]:
    """What identifies one data set: `context` is training or validation, `shards` are opened.

    Published figures compare only within a `version`. For ImageNet it is A, B or C, which differ by 0.26 bits/dim; for
    other data sets, how the images were brought to their size.
    """
    manifest = shards.manifest
    return {
        "context": context,
        "url": shards.url,
        "name": manifest.name,
        "digest": shards.digest,
        "images": manifest.count,
        "image_size": manifest.image_size,
        "form": str(manifest.source.get("form", "")),
        "version": str(manifest.protocol.get("imagenet_version") or manifest.protocol.get("name", "")),
    }


def digest_of_text(text: str) -> str:
    """The first 16 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """What git prints; None if git fails or is missing."""
    try:
        # No lock files: a run must not disturb somebody's commit.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace")
