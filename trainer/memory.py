"""How much memory does a rank need, part by part, at each ZeRO stage and with each choice of recomputation?

Activations are not estimated: the model itself runs forward and backward without data (on torch's meta device, or on
fake CPU tensors) while every storage that lives is counted, so the number follows the code. What DeepSpeed keeps is
arithmetic on the number of parameters, as measured of DeepSpeed 0.19 (tests/trainer/test_memory.py runs it again).

Not modelled: the CUDA context, NCCL's buffers, and fragmentation of the allocator.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.likelihood import nats
from models.model import Recompute
from trainer.config import RunConfig
from trainer.model_inputs import blank_inputs
from trainer.optimizer import orthogonalised_names
from trainer.options import RMSProp

MAX_REDUCE_BUCKET_ELEMENTS = 50_000_000
STAGE_3_GATHERED = 1.6
"""Copies of the weights that ZeRO-3 holds at its peak: the gathered weights, which DeepSpeed keeps for the backward
pass where a model is not too large, and what the collectives put together. Measured with two ranks: 1.4 to 1.7."""
STAGE_3_MAX_LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: larger models are gathered in parts."""

Target = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class States:
    """What a rank keeps from update to update, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights, Adam's moments, RMSProp's one or Muon's momentum, the average of the weights."""
    buffers: int
    """Where gradients are put together for a reduction and weights are gathered."""
    update: int
    """Only while weights are updated, when the activations are gone: a copy of the gradients."""
    host: int
    """Of these, what is offloaded to the host's memory or disk and not counted above."""

    def peak(self, activations: int) -> int:
        """The most that is needed at a time, with so many bytes of activations."""
        return self.weights + self.gradients + self.optimizer + self.buffers + max(activations, self.update)


def reduce_bucket_elements(num_parameters: int) -> int:
    """Gradients that are reduced together, for DeepSpeed's `reduce_bucket_size`.

    DeepSpeed allocates the buffer in full, and two of them: with its default of 5e8 elements, 3.7 GiB in fp32 however
    small the model is.
    """
    return min(num_parameters, MAX_REDUCE_BUCKET_ELEMENTS)


def num_orthogonalised(config: RunConfig) -> int:
    """Of the model's parameters, those that are updated by Muon."""
    with torch.device("meta"):
        model = config.model.build()
    names = orthogonalised_names(model, config.optimizer)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


def state_bytes(
    config: RunConfig, num_parameters: int, target: Target, *, stage: int, ranks: int, orthogonalised: int = 0
) -> States:
    """What one of `ranks` ranks keeps at a ZeRO stage, with so many parameters, of which Muon updates so many."""
    precision = config.train.precision
    weight, gradient = (4, 4) if precision == "fp32" else (2, 4 if precision == "bf16" else 2)
    share = num_parameters / ranks
    master = 0 if stage == 0 else 4
    moments = 4 if isinstance(config.optimizer, RMSProp) else 8
    optimizer = (master + moments + (4 if config.optimizer.ema_decay else 0)) * (
        num_parameters if stage == 0 else share
    )
    # One moment instead of two, at stage 3 in the precision of the gradients.
    momentum = 2 if stage == 3 and precision == "bf16" else 4
    optimizer -= (8 - momentum) * orthogonalised / (1 if stage == 0 else ranks)
    # On CUDA two: one is filled while the other is reduced. On a CPU, as measured, the second is not always there.
    buckets = round((2 if target == "cuda" else 1.5) * weight * reduce_bucket_elements(num_parameters))
    weights: float = weight * num_parameters
    gradients: float = gradient * (share if stage >= 2 else num_parameters)
    buffers, update = buckets, 4 * share
    if stage == 0:
        buffers, update = 0, weight * num_parameters if ranks > 1 else 0  # one flat copy, to be reduced
    elif stage == 1 and precision == "bf16":
        gradients, buffers = gradients + weight * num_parameters, 0  # micro-batch's in bf16, their sum in fp32
    elif stage == 3:
        weights = weight * share
        gathered = STAGE_3_GATHERED * weight * min(num_parameters, STAGE_3_MAX_LIVE) if ranks > 1 else 0
        buffers = round(buckets + gathered)
    host = 0.0
    if config.train.offload_optimizer.kind != "none" and stage >= 1:
        host, optimizer = host + optimizer, 0
    if config.train.offload_parameters.kind != "none" and stage == 3:
        host, weights = host + weights, 0
    return States(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        buffers=buffers,
        update=round(update),
        host=round(host),
    )


def activation_bytes(config: RunConfig, target: Target, recompute: Recompute) -> int:
    """Most memory that one micro-batch's forward and backward pass and loss need at a time, besides weights and
    gradients that stay."""
    units = config.model.num_units
    # Every further period of units adds the same to what is kept at the peak, which lies at the end of the model.
    period = math.lcm(max(1, recompute.every), config.model.unit_period)
    few, more = 2 * period + units % period, 3 * period + units % period
    if units <= more:
        return _traced_peak(config, target, recompute)
    low, high = (
        _traced_peak(dataclasses.replace(config, model=config.model.with_units(count)), target, recompute)
        for count in (few, more)
    )
    return low + (units - few) // period * (high - low)


def _traced_peak(config: RunConfig, target: Target, recompute: Recompute) -> int:
    device = torch.device("cpu" if target == "cpu" else "meta")
    with torch.device("meta"):
        model = config.model.build(recompute)
    # On the meta device, attention allocates what the fused kernels of a GPU do.
    without_values = FakeTensorMode(allow_non_fake_inputs=True) if target == "cpu" else contextlib.nullcontext()
    with without_values:
        _put_on(model, device, _DTYPES[config.train.precision])
        images, given = blank_inputs(config.model, device, config.train.micro_batch_images)
        storages = _LiveStorages(model)
        with storages:
            parameters = model(images, given)
            loss = nats(config.model.output, parameters, images).sum() / images.numel()
            del parameters
            loss.backward()
    return storages.peak


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators make, until each is freed; those of the model's weights do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _free(self, num_bytes: int) -> None:
        self._live -= num_bytes


def _put_on(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters and buffers of the same shapes there, whose gradients are dropped as soon as they are complete."""

    def drop_gradient(parameter: Tensor) -> None:
        parameter.grad = None

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            moved.register_post_accumulate_grad_hook(drop_gradient)
            setattr(module, name, moved)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
