"""How does an LSTM's state change (van den Oord et al. 2016, Pixel Recurrent Neural Networks, equation 3)?

Gates are o, f, i, g, in the order of the paper. The cell state is at least fp32, because what is added to it along an
image would get lost in half precision.

Shapes: h features of the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LSTMState(NamedTuple):
    """What one step of a recurrence leaves to the next."""

    hidden: Tensor
    """[..., h]: what the layer's output is made of."""
    cell: Tensor
    """[..., h], fp32, or fp64 in a model of fp64."""


def lstm_cell(gates: Tensor, cell: Tensor | None) -> LSTMState:
    """The state after gates [..., 4 h] before their nonlinearities; the cell state before them is 0 if it is None."""
    wide = torch.promote_types(gates.dtype, torch.float32)
    output, forget, enter, new = gates.to(wide).chunk(4, dim=-1)
    after = enter.sigmoid() * new.tanh()
    if cell is not None:
        after = after + forget.sigmoid() * cell
    return LSTMState((output.sigmoid() * after.tanh()).to(gates.dtype), after)
