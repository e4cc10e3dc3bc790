"""What is the smallest model of each kind that the tests can use?"""

from typing import Any

import torch
from torch import Tensor

from models.image_transformer import ImageTransformerConfig

TINY: dict[str, Any] = {
    "image_size": 4,
    "input": "categorical",
    "output": "categorical",
    "mixtures": 0,
    "attention": "local_1d",
    "query_block": 8,
    "memory": 8,
    "dilation_gap": 0,
    "dilation_blocks": 0,
    "shift": "generation",
    "layers": 2,
    "width": 16,
    "heads": 2,
    "key_heads": 0,
    "attention_width": 16,
    "ff_width": 24,
    "block": "paper",
    "norm": "post",
    "position": "sine",
    "dropout": 0.0,
    "num_classes": 0,
    "label_dropout": 0.0,
    "condition_size": 0,
    "encoder_layers": 0,
}
PIXELS = {"input": "ordinal", "output": "categorical"}
MIXTURE = {"input": "ordinal", "output": "mixture", "mixtures": 3}
HEADS: dict[str, dict[str, Any]] = {"sub-pixels": {}, "pixels": PIXELS, "mixture": MIXTURE}
"""What a position is and how it is distributed."""

PATTERNS: dict[str, dict[str, Any]] = {
    "1d": {},
    "1d short memory": {"query_block": 8, "memory": 3},
    "2d": {"attention": "local_2d", "query_block": (2, 2), "memory": (2, 1)},
    "2d block shift": {"attention": "local_2d", "query_block": (2, 2), "memory": (1, 2), "shift": "block"},
    "full": {"attention": "full", "query_block": 0, "memory": 0},
    "dilated": {"attention": "dilated_1d", "query_block": 4, "memory": 2, "dilation_gap": 1, "dilation_blocks": 2},
}
MODERN = {"block": "modern", "norm": "pre", "position": "rotary"}
BLOCKS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, norm first": {"norm": "pre", "position": "learned"},
    "modern": MODERN,
    "modern, keys in groups": {**MODERN, "heads": 4, "key_heads": 2},
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "classes": {"num_classes": 5},
    "super-resolution": {"condition_size": 2, "encoder_layers": 1},
}


def tiny_config(**changes: Any) -> ImageTransformerConfig:
    return ImageTransformerConfig(**{**TINY, **changes})


def random_images(num_images: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, size, size, 3), dtype=torch.uint8, generator=generator)


def random_conditions(config: ImageTransformerConfig, num_images: int) -> dict[str, Tensor]:
    """The labels and condition that a model of this config takes."""
    inputs = {}
    if config.num_classes:
        inputs["labels"] = torch.arange(num_images) % config.num_classes
    if config.condition_size:
        inputs["condition"] = random_images(num_images, config.condition_size, seed=1)
    return inputs
