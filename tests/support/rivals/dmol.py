"""Is our loss of a mixture of logistics that of the reference, with its gradients, and are its samples ours?"""

from collections.abc import Iterator

import numpy as np
import torch

from models.drawing.draw import draw
from models.likelihood import MixtureOutput, nats, split_mixture
from tests.support.rivals.case import Case, Check, Precision, relative_error


def knows(case: Case) -> bool:
    return {"labels", "l", "nll_exact"} <= case.arrays.keys() or {"l", "u_mixture", "sample"} <= case.arrays.keys()


def check(case: Case) -> Iterator[Check]:
    yield from check_loss(case) if "labels" in case.arrays else check_samples(case)


def check_loss(case: Case) -> Iterator[Check]:
    """Against the exact probabilities of the bins."""
    channels = case.arrays["l"].shape[-1]
    order = our_channels(channels // 10)
    precisions: tuple[Precision, ...] = ("float64", "float32")
    for precision in precisions:
        parameters = torch.from_numpy(case.arrays["l"][..., order]).to(getattr(torch, precision)).requires_grad_()
        loss = nats(MixtureOutput(components=channels // 10), parameters, torch.from_numpy(case.arrays["labels"]))
        loss.sum().backward()
        assert parameters.grad is not None
        gradient = parameters.grad.numpy()[..., np.argsort(order)]
        of_loss = relative_error(loss.detach().numpy(), case.arrays["nll_exact"])
        of_gradient = relative_error(gradient, case.arrays["grad_l_exact"])
        yield Check("loss", precision, "output", of_loss, "nll_exact")
        yield Check("loss", precision, "gradient", of_gradient, "grad_l_exact")


def check_samples(case: Case) -> Iterator[Check]:
    """The original draws a component by Gumbel-max, and conditions green and blue on colours that are not rounded to 8
    bits. Ours get that component, and may differ by what rounding explains: half a level, and what it does to the
    colours before."""
    components = case.arrays["l"].shape[-1] // 10
    parameters = torch.from_numpy(case.arrays["l"][..., our_channels(components)]).double()
    u_component, u_logistic = (torch.from_numpy(case.arrays[name]).double() for name in ("u_mixture", "u_logistic"))
    chosen = (parameters[..., :components] - (-u_component.log()).log()).argmax(-1, keepdim=True)
    parameters[..., :components] = torch.full_like(u_component, -1e9).scatter(-1, chosen, 0.0)
    uniforms = torch.cat([torch.full_like(u_logistic[..., :1], 0.5), u_logistic], dim=-1)
    ours = draw(MixtureOutput(components=components), parameters, uniforms).double() / 127.5 - 1
    difference = (ours - torch.from_numpy(case.arrays["sample"])).abs()
    coefficients = split_mixture(parameters).coefficients.double()
    index = chosen[..., None].expand(*chosen.shape, 3)
    on_green, red_on_blue, green_on_blue = coefficients.gather(-2, index).squeeze(-2).abs().unbind(-1)
    red, green, _ = difference.unbind(-1)
    explained = torch.stack([torch.zeros_like(red), on_green * red, red_on_blue * red + green_on_blue * green], dim=-1)
    unexplained = (difference - explained - 0.5 / 127.5).clamp(min=0)
    # split_mixture computes in fp32.
    yield Check("samples of the loss", "float32", "output", float(unexplained.max()), "values")


def our_channels(components: int) -> np.ndarray:
    """Which of the original's channels stands where in our order: [10 K].

    Theirs: K logits; then for each colour K means, K log-scales, K coefficients. Ours: K logits, K x 3 means, K x 3
    log-scales, K x 3 coefficients (red on green, red on blue, green on blue).
    """
    logits = np.arange(components)
    colours = components + np.arange(9 * components).reshape(3, 3, components)  # colour, what it is, component
    return np.concatenate([logits, *(colours[:, what].T.ravel() for what in range(3))])
