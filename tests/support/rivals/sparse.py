"""Do our patterns show each query the keys that the Sparse Transformer's own code shows it, and is attention by them
equal?"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.attention.local_attention import local_attention
from models.attention.pattern import Pattern, fixed_1d, full, sliding_1d, strided_1d
from models.image_transformer.layer import attend_in_turn
from tests.support.rivals.case import Case, Check, Precision, relative_error


def knows(case: Case) -> bool:
    return case.kind.startswith("sparse_transformer_")


def check(case: Case) -> Iterator[Check]:
    """Raises ValueError for a mode or a file of the original that is not known here."""
    if case.kind == "sparse_transformer_masks":
        for settings in case.meta["cases"]:
            yield from check_masks(case, settings)
    elif case.kind == "sparse_transformer_attention":
        yield from check_attention(case)
    else:
        raise ValueError(f"{case.name}: kind {case.kind!r} is not known")


def patterns_of(mode: str, length: int, context: int | None, settings: dict[str, Any]) -> list[Pattern]:
    """Those that the heads take in turn."""
    if mode == "all":
        return [full(length)]
    assert context is not None, f"{mode} needs a context"
    match mode:
        case "local":
            return [sliding_1d(length, context)]
        case "strided":
            return [strided_1d(length, context)]
        case "fixed":
            summary = settings["vertsize"] * settings["blocksize"]
            return [fixed_1d(length, context, summary, group) for group in range(settings["num_verts"])]
        case _:
            raise ValueError(f"mode {mode!r} is not known")


def check_masks(case: Case, settings: dict[str, Any]) -> Iterator[Check]:
    key, length, stride = settings["key"], settings["n"], settings["local_attn_ctx"]
    masks = [pattern.mask() for pattern in patterns_of(settings["mode"], length, stride, settings)]
    theirs = case.arrays[key]
    by_head = theirs.ndim == 3  # the packed form has a mask for each head, or one for all
    ours = torch.stack([masks[head % len(masks)] for head in range(len(theirs))]) if by_head else masks[0]
    if by_head and len(theirs) == 1:
        assert len(masks) == 1, f"{key}: heads differ, but there is one mask"
    yield _same(ours, theirs, key)
    if f"{key}_perm" in case.arrays:
        # The original moves positions of one remainder together; our blocks are those remainders.
        (pattern,) = patterns_of(settings["mode"], length, stride, settings)
        order = torch.tensor([slot for block in pattern.blocks for slot in block.slots])
        yield _same(order, case.arrays[f"{key}_perm"], f"{key}_perm")
        ours = ours[:, order][:, :, order]
        yield _same(ours, case.arrays[f"{key}_transposed"], f"{key}_transposed")
    if f"{key}_layout" in case.arrays:
        blocks = ours.unflatten(1, (-1, settings["blocksize"])).unflatten(3, (-1, settings["blocksize"]))
        yield _same(blocks.any(4).any(2), case.arrays[f"{key}_layout"], f"{key}_layout")


def _same(ours: Tensor, theirs: np.ndarray, detail: str) -> Check:
    """How many entries differ."""
    if tuple(ours.shape) != theirs.shape:
        raise ValueError(f"{detail}: ours is {tuple(ours.shape)}, theirs {theirs.shape}")
    return Check("sparse masks", "float64", "exact", float((ours.numpy() != theirs).sum()), detail)


def check_attention(case: Case) -> Iterator[Check]:
    """By the dense mask and block by block."""
    meta, arrays = case.meta, case.arrays
    patterns = patterns_of(meta["attn_mode"], meta["n"], meta["local_attn_ctx"], meta)
    names = ("q", "k", "v")
    precisions: tuple[Precision, ...] = ("float64", "float32")
    for precision in precisions:
        for backend in ("reference", "blocked"):
            leaves = [_by_head(arrays[name], meta["heads"], precision).requires_grad_() for name in names]
            attend = attend_in_turn([_attend_by(pattern, backend) for pattern in patterns])
            out = attend(*leaves)
            out.backward(_by_head(arrays["dout"], meta["heads"], precision))
            yield Check("sparse attention", precision, "output", _error(out, arrays["out"]), backend)
            for name, leaf in zip(names, leaves, strict=True):
                assert leaf.grad is not None
                error = _error(leaf.grad, arrays[f"grad_{name}"])
                yield Check("sparse attention", precision, "gradient", error, f"{backend}, of {name}")


def _attend_by(pattern: Pattern, backend: Any) -> Any:
    return lambda q, k, v: local_attention(q, k, v, pattern, backend=backend)


def _by_head(x: np.ndarray, heads: int, precision: Precision) -> Tensor:
    """[batch, n, heads * width] -> [batch, heads, n, width], of which each head is a run of columns."""
    return torch.from_numpy(x).to(getattr(torch, precision)).unflatten(-1, (heads, -1)).transpose(1, 2)


def _error(ours: Tensor, theirs: np.ndarray) -> float:
    return relative_error(ours.detach().transpose(1, 2).flatten(2).numpy(), theirs)
