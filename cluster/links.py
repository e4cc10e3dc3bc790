"""How well are the machines of a job connected: who reaches whom, whose clock is off, which pair is slow?"""

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

PROBE_SECONDS = 5.0
PINGS = 5
MAX_ROUNDS = 16
"""Rounds of pairs. Up to 16 machines meet in all pairs; of more, each meets 15 or 16 others."""
SMALL_BYTES, LARGE_BYTES = 1 << 20, 64 << 20
SMALL_IS_QUICK_SECONDS = 0.03
PAIR_BYTES = {"gloo": 2 << 20, "nccl": 64 << 20}
REPEATS = 3


class Clock:
    """A server that tells everybody who connects what time it is here."""

    def __init__(self) -> None:
        if socket.has_dualstack_ipv6():
            self._socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self._socket = socket.create_server(("", 0), backlog=1024)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, contextlib.suppress(OSError):
                connection.sendall(repr(time.time()).encode())

    def close(self) -> None:
        self._socket.close()


def address_towards(host: str, port: int) -> str:
    """The address under which another machine reaches this one, of IPv4 or IPv6; raises OSError if there is none."""
    unreached = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0])
        except OSError as error:
            unreached = error
    raise unreached


def clock_offset(address: str, port: int) -> float:
    """How many seconds the other machine's clock is ahead of ours; raises OSError when it cannot be reached."""
    answers = []
    for _ in range(PINGS):
        sent = time.time()
        with socket.create_connection((address, port), timeout=PROBE_SECONDS) as connection:
            text = connection.recv(64)
        received = time.time()
        answers.append((received - sent, float(text) - (sent + received) / 2))
    return min(answers)[1]  # of the quickest answer, which the network delayed least


def collective_speeds(device: torch.device) -> dict[str, float]:
    """All-reduce and all-gather over all ranks, in Gbit/s that each rank's link carries; collective."""
    world = dist.get_world_size()
    small = _seconds(lambda: dist.all_reduce(torch.ones(SMALL_BYTES // 4, device=device)), device)
    size = LARGE_BYTES if small < SMALL_IS_QUICK_SECONDS else SMALL_BYTES
    sent = torch.ones(size // 4, device=device)
    parts = sent.chunk(world)
    pieces = [torch.empty_like(parts[0]) for _ in range(world)]
    one = parts[0].contiguous()
    share = (world - 1) / world
    reduce = _seconds(lambda: dist.all_reduce(sent), device)
    gather = _seconds(lambda: dist.all_gather(pieces, one), device)
    return {
        "all_reduce": 2 * share * size * 8 / reduce / 1e9,
        "all_gather": share * one.numel() * 4 * world * 8 / gather / 1e9,
    }


def pair_speeds(backend: str, device: torch.device, leaders: list[int]) -> dict[int, float]:
    """Gbit/s there and back between this rank and others of `leaders`, one rank a machine; collective."""
    rank = dist.get_rank()
    block = torch.ones(PAIR_BYTES[backend] // 4, device=device)
    speeds: dict[int, float] = {}
    for pairs in rounds_of_pairs(leaders):
        for low, high in pairs:
            if rank not in (low, high):
                continue
            other = high if rank == low else low

            def there_and_back(other: int = other, first: bool = rank == low) -> None:
                for sends in (first, not first):
                    (dist.send if sends else dist.recv)(block, other)

            there_and_back()  # the first exchange connects
            best = min(_once(there_and_back, device) for _ in range(REPEATS))
            speeds[other] = 2 * block.numel() * 4 * 8 / best / 1e9
        dist.barrier()
    return speeds


def rounds_of_pairs(members: list[int]) -> list[list[tuple[int, int]]]:
    """A tournament: in each round everybody has one partner at most, and no pair meets twice."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    rounds = []
    for _ in range(min(len(circle) - 1, MAX_ROUNDS)):
        half = len(circle) // 2
        meets = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in meets if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def slow_nodes(links: dict[tuple[str, str], float], fraction: float) -> dict[str, float]:
    """Machines whose fastest link is slower than this fraction of what is usual, with its Gbit/s.

    The fastest link is judged, because a link is as slow as the slower of its two ends: a machine with one good link is
    good. With two machines alone, nobody can tell which of them is slow.
    """
    best: dict[str, float] = {}
    for pair, speed in links.items():
        for node in pair:
            best[node] = max(speed, best.get(node, 0.0))
    if len(best) < 3:
        return {}
    usual = statistics.median(best.values())
    return {node: speed for node, speed in best.items() if speed < fraction * usual}


def join(backend: str, store: dist.Store, rank: int, world: int, seconds: float) -> None:
    """Form a group of the machines that can reach each other."""
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    """The best of some repeats, as the slowest rank saw it; the same on all ranks."""
    collective()
    best = torch.tensor([min(_once(collective, device) for _ in range(REPEATS))], device=device)
    dist.all_reduce(best, dist.ReduceOp.MAX)
    return float(best)


def _once(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
