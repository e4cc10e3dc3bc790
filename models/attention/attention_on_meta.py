"""What does a fused attention kernel allocate and keep? So that memory can be added up without data and without a GPU.

Tensors on torch's meta device have shapes and no values. Attention among them is one operator, which stands for the
fused kernels of a GPU (models/attention/local_attention_triton.py, and torch's own): it stores no scores.

Shapes: B batch, N heads, K heads of keys and values, L and M positions, D head width.
"""

from typing import Any

import torch
from torch import Tensor


def attention_on_meta(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q and the result [B, N, L, D], k and v [B, K, M, D]."""
    return torch.ops.image_transformer.attention_on_meta(q, k, v)[0]


@torch.library.custom_op("image_transformer::attention_on_meta", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("attention_on_meta computes nothing; it is for tensors on the meta device")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of each query's scores, fp32 [B, N, L]."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _, log_sum = ctx.saved_tensors
    delta, summed = torch.empty_like(log_sum), torch.empty_like(q, dtype=torch.float32)
    results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    del delta, summed
    return results


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
