"""What is the smallest model of each kind that the tests can use?"""

from typing import Any

import torch
from torch import Tensor

from models.given import Given
from models.image_transformer.family import ImageTransformerConfig
from models.image_transformer.shape import (
    Dilated1D,
    Fixed1D,
    Full,
    Local1D,
    Local2D,
    Sliding1D,
    Strided1D,
    SuperResolution,
)
from models.likelihood import CategoricalOutput, MixtureOutput, PredictorCategoricalOutput, PredictorMixtureOutput
from models.model import ModelConfig

TINY: dict[str, Any] = {
    "image_size": 4,
    "input": "categorical",
    "output": CategoricalOutput(),
    "attention": Local1D(query_block=8, memory=8),
    "layers": 2,
    "width": 16,
    "heads": 2,
    "attention_width": 16,
    "ff_width": 24,
    "block": "paper",
    "norm": "post",
    "position": "sine",
}
PIXELS = {"input": "ordinal", "output": CategoricalOutput()}
MIXTURE = {"input": "ordinal", "output": MixtureOutput(components=3)}
NEIGHBOURS = {"input": "ordinal", "output": PredictorMixtureOutput(scales=1), "stem": "neighbourhood"}
"""Everything that sees the pixels around."""
NEIGHBOURS_OF_SUBPIXELS = {"output": PredictorCategoricalOutput(), "stem": "neighbourhood"}
CHANNELS_OF_PIXELS = {"input": "ordinal", "output": PredictorCategoricalOutput(), "stem": "neighbourhood"}
"""A token for each pixel, whose channels are drawn one after the other."""
HEADS: dict[str, dict[str, Any]] = {"sub-pixels": {}, "pixels": PIXELS, "mixture": MIXTURE}
"""What a position is and how it is distributed."""

PATTERNS: dict[str, dict[str, Any]] = {
    "1d": {},
    "1d short memory": {"attention": Local1D(query_block=8, memory=3)},
    "2d": {"attention": Local2D(query_block=(2, 2), memory=(2, 1))},
    "2d block shift": {"attention": Local2D(query_block=(2, 2), memory=(1, 2), shift="block")},
    "full": {"attention": Full()},
    "dilated": {"attention": Dilated1D(query_block=4, memory=2, gap=1, chunks=2)},
    "sliding": {"attention": Sliding1D(window=5)},
    "strided": {"attention": Strided1D(stride=4)},
    "fixed": {"attention": Fixed1D(query_block=8, summary=2, groups=2)},
}
MODERN = {"block": "modern", "norm": "pre", "position": "rotary"}
BLOCKS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, norm first": {"norm": "pre", "position": "learned"},
    "modern": MODERN,
    "modern, keys in groups": {**MODERN, "heads": 4, "key_heads": 2},
}
GIVEN: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "classes": {"num_classes": 5},
    "super-resolution": {"super_resolution": SuperResolution(small_size=2, encoder_layers=1)},
}


def tiny_config(**changes: Any) -> ImageTransformerConfig:
    return ImageTransformerConfig(**{**TINY, **changes})


def random_images(num_images: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, size, size, 3), dtype=torch.uint8, generator=generator)


def random_given(config: ModelConfig, num_images: int) -> Given:
    """The labels and small images that a model of this config takes."""
    labels = torch.arange(num_images) % config.num_classes if config.num_classes else None
    small_images = random_images(num_images, config.small_size, seed=1) if config.small_size else None
    return Given(labels=labels, small_images=small_images)
