"""Does drawing pixel by pixel give the images of whole forward passes, where kernels reach less far than the image?"""

from functools import partial
from typing import Any

import pytest
import torch

from models.decoding import Decoding, generate
from models.diagonal_bilstm import DiagonalBiLSTMConfig
from models.drawing.draw import Sampling
from models.gated_pixelcnn import GatedPixelCNNConfig
from models.given import NOTHING, Given
from models.model import ModelConfig
from models.pixelcnn import PixelCNNConfig
from models.recompute_decoder import RecomputeDecoder
from models.row_lstm import RowLSTMConfig
from tests.models.test_family_contract import opinionated
from tests.support.tiny_model import random_images

SIZES: dict[str, Any] = {"image_size": 9, "features": 5, "layers": 2, "head_features": 8, "first_kernel": 5}
CONFIGS: dict[str, ModelConfig] = {
    "pixelcnn": PixelCNNConfig(**SIZES),
    "gated_pixelcnn": GatedPixelCNNConfig(**SIZES, num_classes=3, label_dropout=0.1),
    "row_lstm": RowLSTMConfig(**SIZES),
    "diagonal_bilstm": DiagonalBiLSTMConfig(**SIZES),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_an_image_is_that_of_whole_forward_passes(family: str) -> None:
    """Its upper part is known, and of the rest a colour here and there. A class is asked for with guidance."""
    torch.manual_seed(0)
    model = opinionated(CONFIGS[family].build())
    known = torch.rand(243) < 0.2
    known[:100] = True
    asked: dict[str, Any] = {"seed": 3, "images": random_images(2, 9), "known": known, "given": NOTHING}
    if isinstance(model.config, GatedPixelCNNConfig):
        torch.nn.init.normal_(model.classes)  # type: ignore[arg-type]
        asked |= {"given": Given(labels=torch.tensor([2, 0])), "sampling": Sampling(guidance=2.0)}
    plain = generate(model, 2, decoder=partial(RecomputeDecoder, model), **asked)
    assert torch.equal(generate(model, 2, **asked), plain)


@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_draws_nearly_from_what_the_forward_pass_gives(family: str) -> None:
    torch.manual_seed(0)
    model = opinionated(CONFIGS[family].build()).bfloat16()
    given = Given(labels=torch.tensor([1])) if model.config.num_classes else NOTHING
    decoding = Decoding(model, 1, seed=1, given=given)
    drawn = torch.cat([decoding.parameters.flatten(0, 2).clone() for _ in decoding])
    with torch.no_grad():
        expected = model(decoding.images, given).reshape(243, 256)
    assert (drawn - expected).norm() < 0.03 * expected.norm()
