"""Are PixelCNN's convolutions, and what its pixels see, those of the paper? tests/reference has its words as loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.pixelcnn import MaskedConvolution, PixelCNNConfig, kernel_mask
from tests.models.test_family_contract import seen_by_each

REFERENCE = Path(__file__).parents[1] / "reference"
TINY: dict[str, Any] = {"image_size": 4, "features": 5, "layers": 2, "head_features": 8}


def reference(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"pixelrnn_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}


@pytest.mark.parametrize(
    ("case", "mask"),
    [("conv_A_k7_interleaved", "A"), ("conv_B_k3_interleaved", "B"), ("conv_B_k1_interleaved_nondivisible", "B")],
)
def test_a_masked_convolution_is_that_of_the_loops(case: str, mask: Any) -> None:
    expected = reference(case)
    kernel, _, features_in, features_out = expected["w"].shape
    stored = (features_out, features_in, kernel // 2 + 1, kernel)
    weight, visible = (expected[name][: kernel // 2 + 1].permute(3, 2, 0, 1) for name in ("w", "mask"))
    assert torch.equal(kernel_mask(features_in, features_out, kernel, mask), visible)
    assert not expected["mask"][kernel // 2 + 1 :].any()
    convolution = MaskedConvolution(features_in, features_out, kernel, mask=mask).double()
    assert visible.shape == stored
    with torch.no_grad():
        convolution.weight.copy_(weight.reshape(convolution.weight.shape))
        convolution.bias.copy_(expected["b"])
        torch.testing.assert_close(convolution(expected["x"]), expected["out"], rtol=0, atol=1e-12)


def test_pixels_see_what_the_paper_lets_them_see_and_the_blind_spot_stays() -> None:
    torch.manual_seed(0)
    model = PixelCNNConfig(image_size=9, features=6, layers=3, head_features=6).build().eval()
    seen = seen_by_each(model)  # sub-pixels
    pixels = seen.view(81, 3, 81, 3).any(3).any(1)
    pixels.fill_diagonal_(False)  # of its own pixel, colours before it
    assert torch.equal(pixels, reference("dependency_9x9")["pixelcnn_k7A_then_3_k3B"])
    past = torch.ones(81, 81).tril(-1).bool()
    assert (past & ~pixels).any() and not (pixels & ~past).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 2}, "features: 2 is less than 3, one for each colour"),
        ({"layers": 0}, "layers: 0 is less than 1"),
        ({"image_size": 0}, "image_size: 0 is less than 1"),
    ],
)
def test_a_bad_config_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCNNConfig(**TINY | changes)


def test_the_paper_has_so_many_parameters() -> None:
    """What is stored of 7x7 and 3x3 kernels are 4x7 and 2x3; and a bias for each feature."""
    first = 3 * 256 * 4 * 7 + 256
    block = 256 * 128 + 128 + 128 * 128 * 2 * 3 + 128 + 128 * 256 + 256
    head = 256 * 1024 + 1024 + 1024 * 768 + 768
    config = PixelCNNConfig(image_size=32, features=128, layers=15, head_features=1024)
    assert config.account().parameters == first + 15 * block + head
