"""Does drawing pixel by pixel give the images of whole forward passes, where kernels reach less far than the image?"""

from functools import partial
from typing import Any

import pytest
import torch

from models.decoding import Decoding, generate
from models.diagonal_bilstm import DiagonalBiLSTMConfig
from models.drawing.draw import Sampling
from models.gated_pixelcnn import GatedPixelCNNConfig
from models.given import Given
from models.likelihood import MixtureOutput
from models.model import Model, ModelConfig
from models.neighbours import LearnedPredictor
from models.pixelcnn import PixelCNNConfig
from models.pixelcnnpp import PixelCNNPPConfig
from models.pixelsnail import PixelSNAILConfig
from models.recompute_decoder import RecomputeDecoder
from models.row_lstm import RowLSTMConfig
from models.weight_norm import ClassWeights, WeightNormed
from tests.models.test_family_contract import AROUND, opinionated
from tests.support.tiny_model import random_given, random_images

SIZES: dict[str, Any] = {"image_size": 9, "features": 5, "layers": 2, "head_features": 8, "first_kernel": 5}
CONFIGS: dict[str, ModelConfig] = {
    "pixelcnn": PixelCNNConfig(**SIZES),
    "gated_pixelcnn": GatedPixelCNNConfig(**SIZES, num_classes=3, label_dropout=0.1),
    "row_lstm": RowLSTMConfig(**SIZES),
    "diagonal_bilstm": DiagonalBiLSTMConfig(**SIZES),
    "pixelcnnpp": PixelCNNPPConfig(
        image_size=12, output=MixtureOutput(components=3), features=5, blocks=1, num_classes=3
    ),
    "pixelcnnpp, predictors and stem": PixelCNNPPConfig(image_size=8, features=7, blocks=2, **AROUND),
    "pixelsnail": PixelSNAILConfig(
        image_size=9, output=MixtureOutput(components=3), features=8, blocks=2, convolutions=2
    ),
    "pixelsnail, pooled keys": PixelSNAILConfig(
        image_size=9, features=4, blocks=2, convolutions=1, key_pooling=3, nonlinearity="concat_elu", **AROUND
    ),
}


def made(family: str) -> Model:
    """With random numbers where weights begin at 0 or small ones."""
    torch.manual_seed(0)
    model = opinionated(CONFIGS[family].build())
    for module in model.modules():
        match module:
            case WeightNormed():
                torch.nn.init.normal_(module.b, std=0.3)
            case ClassWeights() | LearnedPredictor():
                torch.nn.init.normal_(module.weight)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_an_image_is_that_of_whole_forward_passes(family: str) -> None:
    """Its upper part is known, and of the rest a value here and there. A class is asked for, where a model can be, with
    guidance."""
    model = made(family)
    known = torch.rand(len(model.generation_order)) < 0.2
    known[: 2 * len(known) // 5] = True
    images, given = random_images(2, model.config.image_size), random_given(model.config, 2)
    asked: dict[str, Any] = {"seed": 3, "images": images, "known": known, "given": given}
    if isinstance(model.config, GatedPixelCNNConfig):
        torch.nn.init.normal_(model.classes)  # type: ignore[arg-type]
        asked |= {"given": Given(labels=torch.tensor([2, 0])), "sampling": Sampling(guidance=2.0)}
    plain = generate(model, 2, decoder=partial(RecomputeDecoder, model), **asked)
    assert torch.equal(generate(model, 2, **asked), plain)


@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_draws_nearly_from_what_the_forward_pass_gives(family: str) -> None:
    model = made(family).bfloat16()
    given = random_given(model.config, 1)
    decoding = Decoding(model, 1, seed=1, given=given)
    drawn = torch.cat([decoding.parameters.flatten().clone() for _ in decoding])
    with torch.no_grad():
        expected = model(decoding.images, given).flatten()
    assert (drawn - expected).norm() < 0.03 * expected.norm()
