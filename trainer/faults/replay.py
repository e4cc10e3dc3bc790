"""Does this device compute the same result twice, bit for bit?

Hardware that is at fault now and then gives wrong numbers and no error. Every so many steps each rank computes one
micro-batch twice, from the same state of the random generators, and compares the loss and the gradient of each
parameter. The idea is torchtitan's deterministic replay.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from data_pipeline.wording import counted
from trainer.errors import Irreproducible
from trainer.faults.replicas import checksum
from trainer.ranks import from_all_ranks

LOSS = "the loss"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Choose kernels that give the same bits each time, where a GPU has others that are faster."""
    if device.type != "cuda":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give the random generators back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def gradient_checksums(
    parameters: Iterator[tuple[str, nn.Parameter]], *, discard: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Checksums of the gradients that arrive at parameters, by name. With `discard` zeros without memory replace them.

    They are those of the local micro-batch: ranks are added later.
    """
    found: dict[str, Tensor] = {}

    def arrived(name: str, gradient: Tensor) -> Tensor | None:
        found[name] = checksum(gradient)
        return gradient.new_zeros(()).expand_as(gradient) if discard else None

    handles = [parameter.register_hook(partial(arrived, name)) for name, parameter in parameters]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def compare(step: int, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Compare the checksums of two computations on each rank; collective. Raises Irreproducible, the same on all ranks.

    `step` counts the updates before this one.
    """
    names = list(first | second)
    missing = torch.tensor(-1, device=first[LOSS].device)
    pairs = [(first.get(name, missing), second.get(name, missing)) for name in names]
    one, other = (torch.stack(sums) for sums in zip(*pairs, strict=True))
    wrong = [names[index] for index in (one != other).nonzero().flatten().tolist()]
    found = from_all_ranks((socket.gethostname(), wrong))
    if any(wrong for _, wrong in found):
        raise Irreproducible(_describe(step, found))


def _describe(step: int, found: list[tuple[str, list[str]]]) -> str:
    """The sentence about results that differ. `found`: each rank's host, and the names of what differs."""
    places = []
    for rank, (host, wrong) in enumerate(found):
        if wrong:
            tensors = [name for name in wrong if name != LOSS]
            what = [LOSS] if LOSS in wrong else []
            what += [f"the gradient of {tensors[0]}"] if tensors else []
            what += [f"{counted(len(tensors) - 1, 'other tensor')}"] if len(tensors) > 1 else []
            places.append(f"rank {rank} on {host} ({' and '.join(what)})")
    return (
        f"step {step + 1}: the same micro-batch, computed twice, gave different results on {', '.join(places)}: the "
        "device there computes wrongly, or one of its kernels is not deterministic (limits.replay_every_steps=0 does "
        "not compare); the update was not made, and the last checkpoint is good"
    )
