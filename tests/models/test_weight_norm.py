"""Do layers with weight normalisation depend on the direction of v alone, and is dropout drawn once where a unit is
recomputed? tests/models/test_rivals_reference.py compares them with their authors' code."""

import pytest
import torch

from models.likelihood import nats
from models.model import ModelConfig, Recompute
from models.pixelcnnpp import PixelCNNPPConfig
from models.pixelsnail import PixelSNAILConfig
from models.weight_norm import Convolution, Dense, TransposedConvolution, WeightNormed
from tests.support.tiny_model import random_images

LAYERS = [
    Convolution(3, 5, (2, 3), sees="above"),
    Convolution(3, 5, (2, 2), sees="above and left", stride=2),
    TransposedConvolution(3, 5, sees="above"),
    TransposedConvolution(3, 5, sees="above and left"),
    Dense(3, 5),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__} {tuple(layer.v.shape)}")
def test_each_feature_s_weight_has_the_length_g(layer: WeightNormed) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.nn.init.uniform_(layer.g, 0.5, 2.0)
    lengths = layer.weight().transpose(0, layer.out_axis).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, layer.g)
    before = layer(x)
    with torch.no_grad():
        layer.v.mul_(7.0)
    torch.testing.assert_close(layer(x), before)


CONFIGS: dict[str, ModelConfig] = {
    "pixelcnnpp": PixelCNNPPConfig(image_size=8, features=4, blocks=1, dropout=0.5),
    "pixelsnail": PixelSNAILConfig(image_size=8, features=4, blocks=2, convolutions=1, dropout=0.5),
}


@pytest.mark.parametrize("keeps_attention", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_recomputed_unit_drops_what_it_dropped_at_first(family: str, keeps_attention: bool) -> None:
    config, images = CONFIGS[family], random_images(2, 8)
    gradients = []
    for recompute in (Recompute(), Recompute(every=1, keeps_attention=keeps_attention)):
        torch.manual_seed(0)
        model = config.build(recompute).train()
        nats(config.output, model(images), images).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, again in zip(*gradients, strict=True):
        assert first is not None
        torch.testing.assert_close(again, first)
