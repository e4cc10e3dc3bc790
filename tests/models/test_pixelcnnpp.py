"""Is PixelCNN++ its authors' in size, and does it begin and learn as it should? tests/models/test_rivals_reference.py
compares what it computes with their code."""

from typing import Any

import pytest
import torch
from torch import nn

from models.likelihood import MixtureOutput, PredictorMixtureOutput, bits_per_dim, nats
from models.pixelcnnpp import PixelCNNPPConfig
from models.weight_norm import layers
from tests.support.tiny_model import random_images

TINY: dict[str, Any] = {"image_size": 8, "output": MixtureOutput(components=2), "features": 4, "blocks": 1}


@pytest.mark.parametrize(
    ("blocks", "features", "num_classes", "parameters"),
    [(5, 160, 0, 53_659_080), (5, 160, 10, 53_863_880), (2, 64, 0, 3_874_632), (3, 96, 0, 12_247_112)],
)
def test_it_has_as_many_parameters_as_the_running_original(
    blocks: int, features: int, num_classes: int, parameters: int
) -> None:
    config = PixelCNNPPConfig(image_size=32, features=features, blocks=blocks, num_classes=num_classes)
    with torch.device("meta"):
        model = config.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 6}, "image_size: 6 is not a multiple of 4"),
        ({"features": 0}, "features: 0 is less than 1"),
        ({"blocks": 0}, "blocks: 0 is less than 1"),
        ({"dropout": 1.0}, "dropout: 1.0 is not at least 0 and below 1"),
        ({"initial_images": 0}, "initial_images: 0 is less than 1"),
    ],
)
def test_a_bad_config_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCNNPPConfig(**TINY | changes)


def test_the_first_images_decide_the_first_scales_whatever_the_length_of_v() -> None:
    torch.manual_seed(0)
    model, images = PixelCNNPPConfig(**TINY).build(), random_images(16, 8)
    with torch.no_grad():
        for layer in layers(model):
            layer.v.mul_(torch.rand(1).item() + 0.1)
    model.initialise(images)
    output = model(images)
    assert output.mean((0, 1, 2)).abs().max() < 1e-4
    assert (output.var((0, 1, 2), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("initialised", [False, True])
def test_around_guesses_a_smooth_image_costs_little_before_any_training(initialised: bool) -> None:
    torch.manual_seed(0)
    row = torch.arange(16)
    images = (60 + 3 * row[:, None, None] + 2 * row[:, None] + torch.tensor([0, 30, 60]))[None].to(torch.uint8)
    model = PixelCNNPPConfig(**TINY | {"image_size": 16, "output": PredictorMixtureOutput()}).build()
    if initialised:
        model.initialise(images)
    assert bits_per_dim(nats(model.config.output, model(images), images).sum().item(), images.numel()) < 3.5


def test_the_first_scales_depend_on_dropout_in_training_alone() -> None:
    model, images = PixelCNNPPConfig(**TINY, dropout=0.5).build(), random_images(16, 8)
    scales = []
    for seed, mode in ((0, True), (0, True), (1, True), (0, False), (1, False)):
        torch.manual_seed(seed)
        model.train(mode).initialise(images)
        scales.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[3], scales[4])
    assert not torch.equal(scales[0], scales[2]) and not torch.equal(scales[0], scales[3])


def test_it_learns_an_image_with_a_gradient() -> None:
    torch.manual_seed(0)
    row, noise = torch.arange(16), torch.randint(0, 4, (1, 16, 16, 3))
    images = (12 * row[:, None, None] + 6 * row[:, None] + torch.tensor([0, 30, 60]) + noise).to(torch.uint8)
    model = PixelCNNPPConfig(**TINY | {"image_size": 16, "features": 12}).build()
    model.initialise(images)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    bits = []
    for _ in range(31):
        total = nats(model.config.output, model(images), images).sum()
        bits.append(bits_per_dim(total.item(), images.numel()))
        optimizer.zero_grad()
        (total / images.numel()).backward()
        optimizer.step()
    assert bits[-1] < bits[0] - 3
