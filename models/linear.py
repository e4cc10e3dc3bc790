"""How are matrices multiplied when weights are bf16?

Tensor cores multiply bf16 numbers and add up in fp32. A CPU without bf16 matrix units emulates bf16 products, 10 to 20
times slower than fp32 ones. Casting to fp32, multiplying and rounding the result gives the same numbers at full speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_OF_A_PRODUCT = 4
"""On a CPU, rows of a matrix product come in fours: then each is the same to the last bit, whatever the others are and
however many (oneMKL computes the last one to three rows in another order, which depends on the number of threads)."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with x are computed: fp32 for half precision on a CPU, its own
    elsewhere."""
    on_cpu, is_half = x.device.type == "cpu", x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if on_cpu and is_half else x.dtype


class Linear(nn.Linear):
    """nn.Linear with weights drawn from N(0, std^2), zero biases, and the products of product_dtype."""

    def __init__(self, in_features: int, out_features: int, *, std: float, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        # In the constructor of the leaf: ZeRO-3 splits a module's weights among ranks as soon as it is constructed.
        nn.init.normal_(self.weight, std=std)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        if dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)
