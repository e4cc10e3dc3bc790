"""What do drawing and scoring need to know of a trained model, beside its weights?

A run's config says it, and so does an exported model, which holds this and nothing else of the config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config import UNSAID, ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.older_configs import BEFORE_IT_EXISTED, modernised
from trainer.typed_values import read


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A trained model in use."""

    model: ModelConfig
    precision: Literal["fp32", "bf16", "fp16"]
    """Precision in which it was trained."""
    train_url: str
    """Data set that it was trained on, whose manifest has the names of its classes."""
    validation_url: str
    """Data set that it is scored on."""
    batch_images: int
    """Images that are scored at a time."""


def card_of(config: RunConfig) -> ModelCard:
    """What a run's config says of its model."""
    return ModelCard(
        model=config.model,
        precision=config.train.precision,
        train_url=config.data.train_url,
        validation_url=config.data.validation_url,
        batch_images=config.evaluate.batch_images,
    )


def card_from(values: Mapping[str, Any], source: str) -> ModelCard:
    """The card that some version of the trainer wrote to `source`; raises ConfigError, one problem a line."""
    card, problems = read(ModelCard, modernised(dict(values))[0], "", UNSAID | BEFORE_IT_EXISTED)
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    assert isinstance(card, ModelCard)
    return card


def card_from_config(sections: Mapping[str, Any], source: str) -> ModelCard:
    """The card of a whole config, as exports held before they had cards; raises ConfigError, KeyError, TypeError.

    What the card does not need is not looked at, whatever version wrote it.
    """
    return card_from(
        {
            "model": sections["model"],
            "precision": sections["train"]["precision"],
            "train_url": sections["data"]["train_url"],
            "validation_url": sections["data"]["validation_url"],
            "batch_images": sections["evaluate"]["batch_images"],
        },
        source,
    )
