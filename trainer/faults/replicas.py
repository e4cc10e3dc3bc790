"""Do all ranks hold the same weights, bit for bit, and if not, whose are wrong?

At ZeRO stages 0 to 2 every rank has a full copy of the weights it computes with, and all copies come from the same
arithmetic. A bit that flips in one rank's memory stays wrong at stage 0. At stages 1 and 2 the next update sends all
weights anew, and only a bit that is stuck comes back each time. Nothing else notices: the loss stays finite.
"""

import socket
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor

from data_pipeline.wording import counted
from trainer.errors import DifferentWeights
from trainer.ranks import from_all_ranks

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(replicas: Iterable[tuple[str, Tensor]]) -> None:
    """Compare each named tensor with its copies on all other ranks by a checksum; collective.

    One reduction of two integers a tensor. Raises DifferentWeights, the same on all ranks.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    named = [(name, checksum(tensor)) for name, tensor in replicas]
    if not named:
        return
    sums = torch.stack([checksum for _, checksum in named])
    largest = torch.cat([sums, -sums])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    if torch.equal(largest[: len(named)], -largest[len(named) :]):
        return
    found = from_all_ranks((socket.gethostname(), sums.tolist()))
    raise DifferentWeights(_describe([name for name, _ in named], found))


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's raw bits, read as integers, as an int64 without dimensions. Any flipped bit changes it."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _describe(names: list[str], found: list[tuple[str, list[int]]]) -> str:
    """The sentence about checksums that differ. `found`: each rank's host, and its checksum of each name."""
    wrong_of_rank: dict[int, list[str]] = {}
    known = True
    for index, name in enumerate(names):
        column = [sums[index] for _, sums in found]
        ((usual, votes), *others) = Counter(column).most_common()
        if not others:
            continue
        majority = 2 * votes > len(column)
        known = known and majority
        for rank, checksum in enumerate(column):
            if checksum != usual or not majority:
                wrong_of_rank.setdefault(rank, []).append(name)
    places = [f"rank {rank} on {found[rank][0]}" for rank in sorted(wrong_of_rank)]
    tensors = [name for name in names if any(name in wrong for wrong in wrong_of_rank.values())]
    what = tensors[0] + (f" and {counted(len(tensors) - 1, 'other tensor')}" if len(tensors) > 1 else "")
    whose = " and ".join(places) + (" holds" if len(places) == 1 else " hold")
    verdict = (
        f"{whose} other values of {what} than the other ranks"
        if known
        else f"{whose} different values of {what}, and no majority says which are right"
    )
    return (
        f"{verdict}: memory is at fault there, or hardware that computes differently; no checkpoint was written of "
        "these weights, and the last one is good"
    )
