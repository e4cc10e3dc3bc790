"""Does a network of layers with weight normalisation compute what the authors' did: forward, backward, at first?"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from models.given import NOTHING, Given
from models.weight_norm import ClassWeights, Convolution, Dense, TransposedConvolution
from tests.support.rivals.case import Case, Check, Precision, relative_error

PRECISIONS: tuple[Precision, ...] = ("float64", "float32")
THEIR_LAYERS: dict[type[nn.Module], str] = {
    Convolution: "conv2d",
    TransposedConvolution: "deconv2d",
    Dense: "dense",
    ClassWeights: "conditional_weights",
}
THEIR_WEIGHTS = {"v": "V", "g": "g", "b": "b", "weight": "hw"}


class Network(Protocol):
    """What the models under test have beside the interface of all models."""

    def parameters_of(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Intensities [B, H, W, 3] -> parameters [B, H, W, 10 K]."""
        ...

    def initialise(self, images: Tensor, given: Given = NOTHING) -> None: ...


def check_pass(case: Case, build: Callable[[], nn.Module]) -> Iterator[Check]:
    """Outputs and all gradients with the authors' weights; and who sees whom, where the case says it."""
    arrays, labels = case.arrays, labels_of(case)
    for precision in PRECISIONS:
        model, x = model_of(case, build, precision), tensor(arrays["x"], precision).requires_grad_()
        output = model.parameters_of(x, labels)
        (output * tensor(arrays["dout"], precision)).sum().backward()
        yield Check(case.kind, precision, "output", relative_error(output.detach().numpy(), arrays["out"]), "out")
        assert x.grad is not None
        yield Check(case.kind, precision, "gradient", relative_error(x.grad.numpy(), arrays["grad/x"]), "grad/x")
        for name, weight in weights_by_their_names(model, arrays).items():
            assert weight.grad is not None
            error = relative_error(in_their_layout(name, weight.grad), arrays[f"grad/{name}"])
            yield Check(case.kind, precision, "gradient", error, f"grad/{name}")
    if "dep" in arrays:
        different = (seen_by_each(model_of(case, build, "float64"), arrays, labels) != arrays["dep"]).sum()
        yield Check(case.kind, "float64", "exact", float(different), "dep: pairs of pixels")


def check_initialisation(case: Case, build: Callable[[], nn.Module]) -> Iterator[Check]:
    """Scales and biases that the first images give, and the output with them."""
    arrays, labels = case.arrays, labels_of(case)
    images = torch.from_numpy(((arrays["x_init"] + 1) * 127.5).round().astype(np.uint8))
    for precision in PRECISIONS:
        model = model_of(case, build, precision)
        for name, weight in weights_by_their_names(model, arrays).items():
            if name.endswith(("/g", "/b")):
                nn.init.constant_(weight, 7.0)  # the file has only the values that shall be found
        model.initialise(images, Given(labels=labels))
        for name, weight in weights_by_their_names(model, arrays).items():
            if name.endswith(("/g", "/b")):
                error = relative_error(in_their_layout(name, weight), arrays[f"var/{name}"])
                yield Check(case.kind, precision, "initialisation", error, name)
        with torch.no_grad():
            output = model.parameters_of(tensor(arrays["x_init"], precision), labels).numpy()
        for name in ("out_init_pass", "out_forward_after_init"):
            yield Check(case.kind, precision, "output", relative_error(output, arrays[name]), name)


def model_of(case: Case, build: Callable[[], nn.Module], precision: Precision) -> Network:
    """The model with the weights of the case. Raises ValueError where they are not as many, or of other shapes."""
    model = build().to(getattr(torch, precision)).eval()
    for name, weight in weights_by_their_names(model, case.arrays).items():
        value = in_our_layout(name, case.arrays[f"var/{name}"])
        if value.size != weight.numel():
            raise ValueError(f"{name}: has {value.shape}, ours {tuple(weight.shape)}")
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(weight.shape))
    return model  # type: ignore[return-value]


def weights_by_their_names(model: nn.Module | Network, arrays: dict[str, np.ndarray]) -> dict[str, nn.Parameter]:
    """Their names count the layers of each type in the order of their calls. Raises ValueError for other names."""
    assert isinstance(model, nn.Module)
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in model.modules()
        if type(module) in THEIR_LAYERS
    ]
    x = next(arrays[name] for name in ("x", "x_init") if name in arrays)[:1]
    labels = torch.zeros(1, dtype=torch.int64) if "h" in arrays else None
    with torch.no_grad():
        model.parameters_of(torch.from_numpy(x), labels)
    for hook in hooks:
        hook.remove()
    found: dict[str, nn.Parameter] = {}
    for kind, theirs in THEIR_LAYERS.items():
        for index, module in enumerate(module for module in called if type(module) is kind):
            for name, parameter in module.named_parameters():
                found[f"model/{theirs}_{index}/{THEIR_WEIGHTS[name]}"] = parameter
    if odd := found.keys() ^ {str(name) for name in arrays["var_names"]}:
        raise ValueError(f"variables that only one side has: {', '.join(sorted(odd))}")
    if len({id(parameter) for parameter in found.values()}) != len(list(model.parameters())):
        raise ValueError("ours has parameters that theirs has not")
    return found


def in_our_layout(name: str, value: np.ndarray) -> np.ndarray:
    """TensorFlow's [kh, kw, in, out] (transposed convolutions: [kh, kw, out, in]; dense: [in, out]) as torch's."""
    if not name.endswith("/V"):
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def in_their_layout(name: str, value: Tensor) -> np.ndarray:
    array = value.detach().numpy()
    if not name.endswith("/V"):
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def labels_of(case: Case) -> Tensor | None:
    """Raises ValueError where the condition is not a class."""
    if "h" not in case.arrays:
        return None
    one_hot = case.arrays["h"]
    labels = one_hot.argmax(1)
    if not np.array_equal(one_hot, np.eye(one_hot.shape[1])[labels]):
        raise ValueError("h is not one-hot")
    return torch.from_numpy(labels)


def seen_by_each(model: Network, arrays: dict[str, np.ndarray], labels: Tensor | None) -> np.ndarray:
    """bool [H W, H W]: whether the one pixel's output depends on the other pixel, by gradients that are exactly 0."""
    x = tensor(arrays["x"], "float64").requires_grad_()
    outputs = (model.parameters_of(x, labels) * tensor(arrays["dout"], "float64")).sum((0, 3)).flatten()
    rows = []
    for output in outputs:
        (gradient,) = torch.autograd.grad(output, x, retain_graph=True)
        rows.append((gradient.abs().amax((0, 3)) > 0).flatten())
    return torch.stack(rows).numpy()


def tensor(array: np.ndarray, precision: Precision) -> Tensor:
    return torch.from_numpy(array).to(getattr(torch, precision))
