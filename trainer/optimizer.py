"""Which parameters are decayed, which does Muon update, and how large is the learning rate at each step?"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from models.model import Model
from trainer.options import (
    AdamW,
    Cosine,
    Exponential,
    Muon,
    Noam,
    OptimizerConfig,
    RMSProp,
    Rsqrt,
    SummedAdam,
    WarmupStableDecay,
)


def build_optimizer(
    model: nn.Module, config: AdamW | SummedAdam | RMSProp, subpixels_per_update: int
) -> torch.optim.Optimizer:
    """The optimizer of a config, which keeps the average of the weights, too. Muon is in deepspeed_engine.py."""
    match config:
        case AdamW():
            optimizer: torch.optim.Optimizer = _adamw(model, config)
        case SummedAdam():
            optimizer = _summed_adam(model, config, subpixels_per_update)
        case RMSProp():
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.RMSprop(parameters, lr=config.peak_lr, alpha=config.decay, eps=config.eps)
    if config.ema_decay:
        keep_ema(optimizer, config.ema_decay)
    return optimizer


def _adamw(model: nn.Module, config: AdamW) -> torch.optim.AdamW:
    """AdamW over two groups: matrices with weight decay, vectors (norm gains, biases) without.

    With `weight_decay: 0` this is Adam as in the paper. `fused` needs no compiler and is five times as fast
    on CPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


class AdamUnderTheRoot(torch.optim.Optimizer):
    """Adam whose eps stands inside the root: the update is lr m / sqrt(v + eps), with both moments corrected for their
    start at 0. Its state has the names of torch's."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                updates = int(state["step"])
                mean = state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                root = (square / (1 - beta2**updates)).add_(eps).sqrt_()
                weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**updates))


def _summed_adam(model: nn.Module, config: SummedAdam, subpixels_per_update: int) -> AdamUnderTheRoot:
    """Adam of the summed loss, from the gradients of the mean loss in nats per sub-pixel.

    The sum over an update's images has S times these gradients, S sub-pixels. Dividing m and sqrt(v + eps) by S leaves
    the update as it is, so eps / S^2 does what eps does there.
    """
    return AdamUnderTheRoot(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps / subpixels_per_update**2,
    )


def orthogonalised_names(model: Model, config: OptimizerConfig) -> set[str]:
    """Names of the parameters that Muon updates: the matrices of the model's units. None under another optimizer.

    Not embeddings and the head: their rows are separate vectors. Ask while the parameters have their shapes.
    """
    if not isinstance(config, Muon):
        return set()
    matrices = {id(p) for unit in model.units() for p in unit.parameters() if p.ndim == 2}
    return {name for name, parameter in model.named_parameters() if id(parameter) in matrices}


def state_names(is_orthogonalised: bool, config: OptimizerConfig) -> list[str]:
    """Names of the optimizer's tensors that have the full shape of a parameter."""
    if isinstance(config, RMSProp):
        moments = ["square_avg"]
    else:
        moments = ["momentum_buffer"] if is_orthogonalised else ["exp_avg", "exp_avg_sq"]
    return moments + (["ema"] if config.ema_decay else [])


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update from `step` (0-based) to `step + 1`: a pure function, so nothing to resume.

    noam and rsqrt are tensor2tensor's (utils/learning_rate.py) with their hidden factors folded into the
    peak: base b at width d and warm-up w has the peak 10 b / sqrt(d w).
    """
    schedule, done = config.schedule, step + 1
    if isinstance(schedule, Exponential):
        return config.peak_lr * schedule.factor**done
    warmup = schedule.warmup_steps
    match schedule:
        case Noam():
            return config.peak_lr * min(done / warmup, math.sqrt(warmup / done))
        case Rsqrt():
            return config.peak_lr * math.sqrt(warmup / max(done, warmup))
    if done <= warmup:
        return config.peak_lr * done / warmup
    match schedule:
        case Cosine():
            progress = (done - warmup) / max(1, total_steps - warmup)
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case WarmupStableDecay():
            share = min(1.0, (total_steps - done) / schedule.decay_steps) if schedule.decay_steps else 1.0
    return config.peak_lr * (schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * share)


def keep_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep an exponential moving average of every weight beside Adam's moments, as the state `ema`.

    ZeRO hands the optimizer its fp32 shards, so at every stage the average is fp32 and sharded like them. It is updated
    exactly when the weights are: an update that DeepSpeed skips does not reach the optimizer. It starts at the weights
    after the first update, as torch's AveragedModel does.
    """

    def update(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = optimizer.state[weight]
                if "ema" in state:
                    state["ema"].lerp_(weight.detach(), 1 - decay)
                else:
                    state["ema"] = weight.detach().clone()

    optimizer.register_step_post_hook(update)
