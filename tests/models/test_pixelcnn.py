"""Does PixelCNN have the sizes of the paper, and which configs of it and of its successors are refused?

That its convolutions and what its pixels see are the paper's: tests/support/rivals/pixelrnn.py.
"""

from typing import Any

import pytest
import torch

from models.diagonal_bilstm import DiagonalBiLSTMConfig
from models.gated_pixelcnn import GatedPixelCNNConfig
from models.given import Given
from models.pixelcnn import PixelCNNConfig
from models.row_lstm import RowLSTMConfig
from tests.support.tiny_model import random_images

TINY: dict[str, Any] = {"image_size": 4, "features": 5, "layers": 2, "head_features": 8}


@pytest.mark.parametrize("family", [PixelCNNConfig, GatedPixelCNNConfig, RowLSTMConfig, DiagonalBiLSTMConfig])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 2}, "features: 2 is less than 3, one for each colour"),
        ({"layers": 0}, "layers: 0 is less than 1"),
        ({"image_size": 0}, "image_size: 0 is less than 1"),
        ({"image_size": 2048}, "image_size: 2048 is more than 1024"),
        ({"first_kernel": 4}, "first_kernel: 4 is even; a kernel has a pixel in its middle"),
    ],
)
def test_a_bad_size_is_refused_with_the_reason(family: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(**TINY | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": -1}, "num_classes: -1 is not between 0"),
        ({"num_classes": 3, "label_dropout": 1.0}, "label_dropout: 1.0 is not at least 0 and below 1"),
        ({"label_dropout": 0.1}, "label_dropout: 0.1, but the model has no classes to hide"),
        ({"first_kernel": 1}, "first_kernel: 1 leaves nothing above the pixel"),
    ],
)
def test_a_bad_gated_pixelcnn_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedPixelCNNConfig(**TINY | changes)


def test_the_paper_has_so_many_parameters() -> None:
    """What is stored of 7x7 and 3x3 kernels are 4x7 and 2x3; and a bias for each feature."""
    first = 3 * 256 * 4 * 7 + 256
    block = 256 * 128 + 128 + 128 * 128 * 2 * 3 + 128 + 128 * 256 + 256
    head = 256 * 1024 + 1024 + 1024 * 768 + 768
    config = PixelCNNConfig(image_size=32, features=128, layers=15, head_features=1024)
    assert config.account().parameters == first + 15 * block + head


def test_the_lstms_of_the_paper_have_so_many_parameters() -> None:
    """Of a row of 3 the input's convolution keeps 2; the states' ones see all 3, or 2 for each direction."""
    h, layers = 128, 12
    around = (3 * 2 * h * 4 * 7 + 2 * h) + (2 * h * 1024 + 1024 + 1024 * 768 + 768)
    up = h * 2 * h + 2 * h
    sizes: dict[str, Any] = {"image_size": 32, "features": h, "layers": layers, "head_features": 1024}
    row = 2 * h * 4 * h * 2 + 4 * h + 3 * h * 4 * h
    assert RowLSTMConfig(**sizes).account().parameters == around + layers * (row + up)
    diagonal = 2 * (2 * h * 4 * h + 4 * h + 2 * h * 4 * h)
    assert DiagonalBiLSTMConfig(**sizes).account().parameters == around + layers * (diagonal + up)


def test_a_class_changes_what_gated_pixelcnn_predicts_of_its_own_images_alone() -> None:
    torch.manual_seed(0)
    model = GatedPixelCNNConfig(**TINY, num_classes=2).build().eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.classes)
        images = random_images(2, 4)
        first, second = (model(images, Given(labels=torch.tensor(labels))) for labels in ([0, 1], [0, 0]))
    assert torch.equal(first[0], second[0])
    assert ((first[1] - second[1]).abs().amax(-1) > 0).all()
