"""Who am I among the processes of this job, and how do they agree on a number or a decision?"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

DEFAULT_MASTER_PORT = 29500


@dataclass(frozen=True)
class Ranks:
    """This process's place, as the launcher (deepspeed, torchrun, srun) put it into the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def ranks_from_environment() -> Ranks:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE; a process started without a launcher is rank 0 of 1.

    Fills in what torch.distributed needs of MASTER_ADDR and MASTER_PORT, so that `python trainer/run.py` works too.
    """
    environment = os.environ
    world_size = int(environment.setdefault("WORLD_SIZE", "1"))
    environment.setdefault("RANK", "0")
    environment.setdefault("LOCAL_RANK", "0")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    # Alone, torch's store listens on a port of the kernel's choice (0): one found beforehand may be gone by then.
    environment.setdefault("MASTER_PORT", "0" if world_size == 1 else str(DEFAULT_MASTER_PORT))
    # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or "1"
    return Ranks(int(environment["RANK"]), world_size, int(environment["LOCAL_RANK"]), int(local))


def occupied_master_port(ranks: Ranks) -> str | None:
    """On rank 0 of several: a sentence if another process already listens on MASTER_PORT, else None.

    Without this check the job waits for its rendezvous, and fails minutes later with a socket error.
    """
    if ranks.rank != 0 or ranks.world_size == 1:
        return None
    port = int(os.environ["MASTER_PORT"])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return (
                f"port {port} of this machine is in use, perhaps by another training job; "
                f"add --master_port {port + 1} behind `deepspeed`"
            )
    return None


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; collective."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank; collective. The value must be picklable and small."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank; collective. The values must be picklable and small."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
