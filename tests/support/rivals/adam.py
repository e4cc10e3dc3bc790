"""Does our optimizer make the updates of the Adam that the authors wrote?"""

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from tests.support.rivals.case import Case, Check, Precision, relative_error
from trainer.optimizer import build_optimizer
from trainer.options import Exponential, SummedAdam

SUBPIXELS = 128 * 32 * 32 * 3
"""In the loss that the gradients are taken to be of: the authors' are of its sum, ours of its mean."""


def knows(case: Case) -> bool:
    return case.kind == "adam_updates" and {"lr", "p0_0", "grad_p0", "p0"} <= case.arrays.keys()


def check(case: Case) -> Iterator[Check]:
    arrays, meta = case.arrays, case.meta
    config = SummedAdam(
        peak_lr=1.0,
        schedule=Exponential(factor=1.0),  # the file has the rate of each step
        beta1=meta["mom1"],
        beta2=meta["mom2"],
        eps=meta.get("eps", 1e-8),
    )
    names = sorted(name for name in arrays if re.fullmatch(r"p\d+", name))
    precisions: tuple[Precision, ...] = ("float64", "float32")
    for precision in precisions:
        dtype = getattr(torch, precision)
        weights = nn.ParameterList(torch.from_numpy(arrays[f"{name}_0"]).to(dtype) for name in names)
        optimizer = build_optimizer(weights, config, SUBPIXELS)
        steps: list[list[np.ndarray]] = [[] for _ in names]
        for step, rate in enumerate(arrays["lr"]):
            for name, weight in zip(names, weights, strict=True):
                weight.grad = torch.from_numpy(arrays[f"grad_{name}"][step]).to(dtype) / SUBPIXELS
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            optimizer.step()
            for weight, after in zip(weights, steps, strict=True):
                after.append(weight.detach().numpy().copy())
        for name, after in zip(names, steps, strict=True):
            yield Check("Adam", precision, "output", relative_error(np.stack(after), arrays[name]), name)
