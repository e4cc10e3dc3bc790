"""Who am I among the processes of this job, and how do they agree on a number or a decision?"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from trainer.awake_clock import AwakeClock

COLLECTIVE_TIMEOUT = timedelta(days=30)
"""How long a collective waits. The watchdog notices lost ranks, and in minutes. This is only longer than any job is
suspended: torch's own clocks run on while it is, and would end the job when it wakes up."""
DEFAULT_MASTER_PORT = 29500
LONG_WAIT_SECONDS = 30.0
"""After so long at the start the terminal says who is missing."""
GOODBYE_SECONDS = 3.0
ASK_AGAIN_SECONDS = 0.2
CONNECT_SECONDS = 0.75
"""How long one try to reach rank 0 may take: a network may swallow packets instead of refusing them. With the pause
before the next try it is shorter than what AwakeClock takes for a suspension."""
MOST_NAMED = 16

log = logging.getLogger(__name__)


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


@contextlib.contextmanager
def meeting(ranks: Ranks, patience_seconds: float) -> Iterator[str | None]:
    """Wait until all ranks are there; yields None, or a sentence that names those that did not come in time.

    Call init_process_group inside this block. Its own rendezvous only says how many ranks came, and only at its end.
    """
    if ranks.world_size == 1:
        yield None
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=patience_seconds)
    try:
        if ranks.rank != 0:
            _wait_for_a_listener(address, port, patience_seconds)
        # The rendezvous of rank 0 shares this store's port (multi_tenant), so it must stay open during the block.
        store = torch.distributed.TCPStore(
            address, port, None, ranks.rank == 0, patience, wait_for_workers=False, multi_tenant=True
        )
        wait = _wait_for_all if ranks.rank == 0 else _arrive
        problem = wait(store, ranks, patience_seconds)
    except (RuntimeError, OSError):
        problem = f"rank 0 did not come to {address}, port {port}, in {patience_seconds:.0f} s, or is lost"
    yield problem


def _wait_for_a_listener(address: str, port: int, patience_seconds: float) -> None:
    """Return once somebody listens on the port; raises OSError if nobody does in time.

    torch's own client waits longer and longer between its tries: told to give up after 6 s, it took up to 30 s.
    """
    clock = AwakeClock()
    while True:
        try:
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
            return
        except OSError:
            if clock.since(0.0) > patience_seconds:
                raise
            time.sleep(ASK_AGAIN_SECONDS)


def _wait_for_all(store: torch.distributed.TCPStore, ranks: Ranks, patience_seconds: float) -> str | None:
    """On rank 0: wait for the others, and tell them the result."""
    clock, noted = AwakeClock(), False
    missing = list(range(1, ranks.world_size))
    while missing and clock.since(0.0) < patience_seconds:
        missing = [rank for rank in missing if not store.check([f"arrived/{rank}"])]
        if missing and not noted and clock.now() > LONG_WAIT_SECONDS:
            noted = True
            log.warning("still waiting for %s of %d to start", _names_of(missing), ranks.world_size)
        time.sleep(0.05)
    problem = (
        f"{_names_of(missing)} of {ranks.world_size} did not come in {patience_seconds:.0f} s; the logs of their "
        "machines say why, and cluster.preflight names machines that are not fit"
        if missing
        else ""
    )
    store.set("meeting", problem)
    if problem:  # the others read it from this process's store
        deadline = time.monotonic() + GOODBYE_SECONDS
        while store.add("read", 0) < ranks.world_size - 1 - len(missing) and time.monotonic() < deadline:
            time.sleep(0.05)
    return problem or None


def _arrive(store: torch.distributed.TCPStore, ranks: Ranks, patience_seconds: float) -> str | None:
    """On the others: say that this rank is there, and hear the result. Raises RuntimeError if there is none in time."""
    store.set(f"arrived/{ranks.rank}", "")
    clock = AwakeClock()
    while not store.check(["meeting"]):
        if clock.since(0.0) > patience_seconds + GOODBYE_SECONDS:
            raise RuntimeError("rank 0 has not told whether all are there")
        time.sleep(ASK_AGAIN_SECONDS)
    problem = store.get("meeting").decode()
    store.add("read", 1)
    return problem or None


def _names_of(missing: list[int]) -> str:
    names = ", ".join(map(str, missing[:MOST_NAMED])) + (" and others" if len(missing) > MOST_NAMED else "")
    return f"rank {names}" if len(missing) == 1 else f"ranks {names}"


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; collective."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def from_rank(source: int, tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor with the one of rank `source`, which has the same shape and type; collective."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, source)
    return tensor


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
