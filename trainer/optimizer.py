"""Which parameters are decayed, which does Muon update, and how large is the learning rate at each step?"""

import math

import torch
from torch import nn

from models.model import Model
from trainer.options import AdamW, Cosine, Muon, Noam, OptimizerConfig, Rsqrt, WarmupStableDecay


def build_optimizer(model: nn.Module, config: AdamW) -> torch.optim.AdamW:
    """AdamW over two groups: matrices with weight decay, vectors (norm gains, biases) without.

    With `weight_decay: 0` this is Adam as in the paper. `fused` needs no compiler and is five times as fast
    on CPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    if config.ema_decay:
        keep_ema(optimizer, config.ema_decay)
    return optimizer


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
    moments = ["momentum_buffer"] if is_orthogonalised else ["exp_avg", "exp_avg_sq"]
    return moments + (["ema"] if config.ema_decay else [])


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update from `step` (0-based) to `step + 1`: a pure function, so nothing to resume.

    noam and rsqrt are tensor2tensor's (utils/learning_rate.py) with their hidden factors folded into the
    peak: base b at width d and warm-up w has the peak 10 b / sqrt(d w).
    """
    schedule, done = config.schedule, step + 1
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
