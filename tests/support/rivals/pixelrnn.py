"""Are the layers of PixelCNN, PixelRNN and Gated PixelCNN those of loops written from the papers, and do their models
see what they should?

No authors' code of these exists. Which pixels see which is measured by gradients on our whole models.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.diagonal_bilstm import DiagonalBiLSTM, DiagonalBiLSTMConfig, DiagonalBiLSTMLayer, down_a_row, skew, unskew
from models.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig
from models.gated_pixelcnn import Layer as GatedLayer
from models.lstm_cell import LSTMState
from models.masked_convolution import MaskedConvolution, kernel_mask
from models.pixelcnn import PixelCNN, PixelCNNConfig
from models.row_lstm import RowLSTM, RowLSTMConfig, RowLSTMLayer
from tests.support.rivals.case import Case, Check, Precision, relative_error

PRECISIONS: tuple[Precision, ...] = ("float64", "float32")


def knows(case: Case) -> bool:
    return case.kind in CHECKS


def check(case: Case) -> Iterator[Check]:
    """Raises ValueError for settings that ours do not have."""
    if case.meta.get("groups", 3) != 3:
        raise ValueError(f"groups: {case.meta['groups']}, but images have 3 colours")
    yield from CHECKS[case.kind](case)


def outputs(case: Case, kind: str, compute: Callable[[Callable[[str], Tensor]], dict[str, Tensor]]) -> Iterator[Check]:
    """What `compute` gives, in both precisions, beside the arrays of the same names. It gets a function that gives
    arrays by name."""
    for precision in PRECISIONS:
        dtype = getattr(torch, precision)
        with torch.no_grad():
            ours = compute(lambda name, dtype=dtype: torch.from_numpy(case.arrays[name]).to(dtype))
        for name, result in ours.items():
            assert result.dtype == dtype
            yield Check(kind, precision, "output", relative_error(result.numpy(), case.arrays[name]), name)


def stored(full: Tensor) -> Tensor:
    """A kernel [rows, columns, in, out] as models/masked_convolution.py stores it: without what no pixel sees."""
    rows, columns = full.shape[:2]
    part = full[: rows // 2 + 1] if rows > 1 else full[:, : columns // 2 + 1]
    part = part.permute(3, 2, 0, 1)
    return part[..., 0, 0] if (rows, columns) == (1, 1) else part


def masks(case: Case, name: str, full: np.ndarray, mask: Any, gates: int = 1) -> Iterator[Check]:
    """Ours bit for bit beside theirs [rows, columns, in, out]."""
    rows, columns, features_in, features_out = full.shape
    kernel = (rows, columns)
    ours = kernel_mask(features_in, features_out, kernel, mask, case.meta["group_layout"], gates)
    theirs = stored(torch.from_numpy(full))
    wrong = int((ours.view(theirs.shape) != theirs).sum())
    wrong += int(full.sum()) - int(theirs.sum())  # what is not stored is not seen
    yield Check("pixelrnn masks", "float64", "exact", wrong, name)


def put(parameter: Tensor, value: Tensor) -> None:
    """Raises ValueError where it does not fit, which copying would not always notice."""
    if parameter.shape != value.shape:
        raise ValueError(f"ours is {tuple(parameter.shape)}, theirs {tuple(value.shape)}")
    parameter.copy_(value)


def check_convolution(case: Case) -> Iterator[Check]:
    rows, columns, features_in, features_out = case.arrays["w"].shape
    mask, grouping = case.meta["mask"], case.meta["group_layout"]
    yield from masks(case, "mask", case.arrays["mask"], mask)

    def compute(array: Callable[[str], Tensor]) -> dict[str, Tensor]:
        x = array("x")
        ours = MaskedConvolution(features_in, features_out, (rows, columns), mask=mask, grouping=grouping).to(x.dtype)
        put(ours.weight, stored(array("w")))
        put(ours.bias, array("b"))
        return {"out": ours(x)}

    yield from outputs(case, "masked convolution", compute)


def check_row_lstm(case: Case) -> Iterator[Check]:
    kernel, features_in, gates = case.arrays["w_is"].shape
    if kernel != len(case.arrays["w_ss"]):
        raise ValueError(f"kernels of {kernel} and {len(case.arrays['w_ss'])} columns, but ours has one size for both")
    grouping = case.meta["group_layout"]
    yield from masks(case, "mask_is", case.arrays["mask_is"][None], "B", gates=4)

    def compute(array: Callable[[str], Tensor]) -> dict[str, Tensor]:
        x = array("x")
        ours = RowLSTMLayer(features_in, gates // 4, kernel, grouping).to(x.dtype)
        weight = stored(array("w_is")[None])
        put(ours.input_to_state.weight, weight)
        put(ours.input_to_state.bias, array("b"))
        put(ours.state_to_state.weight, array("w_ss").flatten(0, 1).T)
        above = None
        if "h0" in case.arrays:
            above = LSTMState(*(array(name).expand(len(x), -1, -1) for name in ("h0", "c0")))
        states = ours(x, above)
        return {"out": states.hidden, "cell": states.cell}

    yield from outputs(case, "Row LSTM", compute)


def check_diagonal_bilstm(case: Case) -> Iterator[Check]:
    features_in, gates = case.arrays["w_is_left"].shape
    yield from masks(case, "mask_is", case.arrays["mask_is"][None, None], "B", gates=4)

    def compute(array: Callable[[str], Tensor]) -> dict[str, Tensor]:
        x = array("x")
        ours = DiagonalBiLSTMLayer(features_in, gates // 4, case.meta["group_layout"]).to(x.dtype)
        put(ours.input_to_state.weight, torch.cat([array("w_is_left"), array("w_is_right")], dim=1).T)
        put(ours.input_to_state.bias, torch.cat([array("b_left"), array("b_right")]))
        put(ours.from_left, array("w_ss_left").flatten(0, 1).T)
        put(ours.from_right, array("w_ss_right").flatten(0, 1).T)
        left, right = ours(x)
        assert torch.equal(unskew(skew(x), x.shape[2]), x)
        moved = skew(x)
        return {"left": left, "right_before_shift": right, "out": left + down_a_row(right), "skewed_x": moved}

    yield from outputs(case, "Diagonal BiLSTM", compute)


def check_gated_layers(case: Case) -> Iterator[Check]:
    """All layers of the case one after the other; the first reads the image in both stacks."""
    count = len({name.partition("/")[0] for name in case.arrays if re.fullmatch(r"l\d+/.*", name)})

    def compute(array: Callable[[str], Tensor]) -> dict[str, Tensor]:
        vertical, horizontal = None, array("x")
        results = {}
        for number in range(1, count + 1):
            weight = array(f"l{number}/w_v")  # rows above and its own, columns, in, out
            rows, columns, _, twice = weight.shape
            features_in = horizontal.shape[-1]
            mask: Any = "A" if number == 1 else "B"
            ours = GatedLayer(features_in, twice // 2, columns, case.meta["group_layout"], mask=mask).to(weight.dtype)
            put(ours.vertical.weight, weight[: rows - (number == 1)].permute(3, 2, 0, 1))
            put(ours.vertical.bias, array(f"l{number}/b_v"))
            put(ours.to_horizontal.weight, array(f"l{number}/w_vh").T)
            put(ours.to_horizontal.bias, array(f"l{number}/b_vh"))
            put(ours.horizontal.weight, array(f"l{number}/w_h").permute(2, 1, 0)[:, :, None])
            put(ours.horizontal.bias, array(f"l{number}/b_h"))
            put(ours.out.weight, array(f"l{number}/w_o").T)
            put(ours.out.bias, array(f"l{number}/b_o"))
            vertical, horizontal = ours(horizontal, vertical, None)
            results |= {f"v{number}": vertical, f"h{number}": horizontal}
        return results

    yield from outputs(case, "Gated PixelCNN", compute)


def check_dependency(case: Case) -> Iterator[Check]:
    rows, columns = case.meta["H"], case.meta["W"]
    for name, theirs in case.arrays.items():
        ours = (
            torch.ones(theirs.shape, dtype=torch.bool).tril(-1) if name == "strict_past" else seen(name, rows, columns)
        )
        yield Check("pixels seen", "float64", "exact", int((ours.numpy() != theirs).sum()), name)


def seen(name: str, rows: int, columns: int) -> Tensor:
    """bool [H W, H W]: which output pixel of ours depends on which input pixel, in the settings that the name says.

    The reference has no colours: a first convolution with mask A hides the whole pixel itself. Of ours, which see the
    colours before their own in it, that is true of blue, which is therefore the input that counts. Of layers alone
    ('only'), which do not hide the pixel itself, all inputs count.

    Raises ValueError for a name that says none of ours.
    """
    many = rows + columns  # no limit of what can be seen needs more layers
    sizes: dict[str, Any] = {"image_size": max(rows, columns), "features": 6, "head_features": 6}
    torch.manual_seed(0)

    def found(pattern: str) -> list[int] | None:
        match = re.fullmatch(pattern, name)
        return [int(number) if number.isdigit() else many for number in match.groups()] if match else None

    # Outputs of a whole model, or of a part of it, for an input [B, H, W, F].
    network: Callable[[Tensor], Tensor]
    if numbers := found(r"pixelcnn_k(\d+)A_then_(\d+)_k(\d+)B"):
        first, layers, kernel = numbers
        network = pixelcnn(first, layers, kernel, sizes).parameters_of
    elif numbers := found(r"pixelcnn_k(\d+)_limit"):
        kernel = numbers[0]
        network = pixelcnn(kernel, many, kernel, sizes).parameters_of
    elif numbers := found(r"gated_k(\d+)_(\d+)_layers(?:_vertical)?"):
        gated = gated_model(numbers[0], numbers[1] - 1, numbers[0], sizes)
        network = (lambda x: gated.stacks(x)[0]) if name.endswith("vertical") else gated.parameters_of
    elif numbers := found(r"gated_k(\d+)_then_(\d+)_k(\d+)"):
        network = gated_model(*numbers, sizes).parameters_of
    elif numbers := found(r"gated_k(\d+)_limit"):
        network = gated_model(numbers[0], many, numbers[0], sizes).parameters_of
    elif numbers := found(r"rowlstm_k(\d+)A_then_(\d+)"):
        network = row_lstm(numbers[0], numbers[1], sizes).logits
    elif numbers := found(r"rowlstm_k(\d+)A_limit"):
        network = row_lstm(numbers[0], many, sizes).logits
    elif numbers := found(r"rowlstm_only_(\d+)"):
        network = torch.nn.Sequential(*row_lstm(1, numbers[0], sizes).layers)
    elif numbers := found(r"diag_k(\d+)A_then_(\d+)"):
        network = diagonal_bilstm(numbers[0], numbers[1], sizes).logits
    elif numbers := found(r"diag_k(\d+)A_limit"):
        network = diagonal_bilstm(numbers[0], many, sizes).logits
    elif numbers := found(r"diag_only_(\d+)"):
        network = torch.nn.Sequential(*diagonal_bilstm(1, numbers[0], sizes).layers)
    else:
        raise ValueError(f"{name}: not a setting that is known here")
    is_alone = "only" in name
    # Some of several images, since one alone may find ReLUs closed.
    x = torch.randn(4, rows, columns, 2 * sizes["features"] if is_alone else 3, dtype=torch.float64)
    touched = inputs_touched(network, x)
    return touched.any(-1) if is_alone else touched[..., 2]


def inputs_touched(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """bool [H W, H W, F]: whether the output of the one pixel depends on an input of the other, by gradients, which are
    exactly zero where it does not."""
    x.requires_grad_()
    pixels = network(x).flatten(3).flatten(1, 2)
    factors = torch.randn(pixels.shape[-1], dtype=x.dtype)  # so that gradients of a pixel's features do not cancel
    rows = []
    for pixel in (pixels @ factors).sum(0):
        (gradient,) = torch.autograd.grad(pixel, x, retain_graph=True)
        rows.append(gradient.abs().amax(0).flatten(0, 1) > 0)
    return torch.stack(rows)


def pixelcnn(first: int, layers: int, kernel: int, sizes: dict[str, Any]) -> PixelCNN:
    config = PixelCNNConfig(first_kernel=first, layers=max(layers, 1), kernel=kernel, **sizes)
    return with_layers(config.build(), layers)


def gated_model(first: int, layers: int, kernel: int, sizes: dict[str, Any]) -> GatedPixelCNN:
    config = GatedPixelCNNConfig(first_kernel=first, layers=max(layers, 1), kernel=kernel, **sizes)
    return with_layers(config.build(), layers)


def row_lstm(first: int, layers: int, sizes: dict[str, Any]) -> RowLSTM:
    return with_layers(RowLSTMConfig(first_kernel=first, layers=max(layers, 1), **sizes).build(), layers)


def diagonal_bilstm(first: int, layers: int, sizes: dict[str, Any]) -> DiagonalBiLSTM:
    return with_layers(DiagonalBiLSTMConfig(first_kernel=first, layers=max(layers, 1), **sizes).build(), layers)


Whole = TypeVar("Whole", PixelCNN, GatedPixelCNN, RowLSTM, DiagonalBiLSTM)


def with_layers(model: Whole, layers: int) -> Whole:
    """The model in float64 with no more layers after its first than these: a config has one at least."""
    if layers < 0:
        raise ValueError(f"{layers} layers after the first one")
    del (model.blocks if isinstance(model, PixelCNN) else model.layers)[layers:]
    return model.double()


CHECKS: dict[str, Callable[[Case], Iterator[Check]]] = {
    "masked_conv2d": check_convolution,
    "row_lstm": check_row_lstm,
    "diagonal_bilstm": check_diagonal_bilstm,
    "gated_pixelcnn_two_layers": check_gated_layers,
    "dependency_patterns": check_dependency,
}
