"""Are products of half-precision weights the rounded fp32 ones, forward and backward?"""

import torch

from models.linear import Linear, product_dtype


def test_half_precision_on_a_cpu_multiplies_in_fp32_and_rounds_once() -> None:
    layer = Linear(24, 16, std=0.1, bias=True).bfloat16()
    x = torch.randn(8, 24).bfloat16()
    expected = x.float() @ layer.weight.float().T + layer.bias.float()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())


def test_gradients_reach_half_precision_weights() -> None:
    layer = Linear(24, 16, std=0.1, bias=True).bfloat16()
    x = torch.randn(8, 24).bfloat16()
    upstream = torch.randn(8, 16).bfloat16()
    layer(x).backward(upstream)
    assert layer.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.grad, (upstream.float().T @ x.float()).bfloat16())
    torch.testing.assert_close(layer.bias.grad, upstream.float().sum(0).bfloat16())


def test_full_precision_is_left_alone() -> None:
    layer = Linear(24, 16, std=0.1).double()
    x = torch.randn(8, 24, dtype=torch.float64)
    assert layer(x).dtype == torch.float64
    assert product_dtype(x) == torch.float64
    assert product_dtype(x.to("meta").bfloat16()) == torch.bfloat16
