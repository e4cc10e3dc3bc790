"""What do the tools that draw get from a run's folder: a tiny untrained model of any kind, without training."""

from pathlib import Path

import torch

from tests.support.launch import SMALL_JOB, settings
from trainer.config import load_config
from trainer.model_card import card_of
from trainer.record.own_runs import remember_urls
from trainer.record.run_folder import RunFiles
from trainer.trained_model import TrainedModel

CLASSES = {"model__num_classes": 5, "model__label_dropout": 0.1}
SUPER_RESOLUTION = {"model__super_resolution__small_size": 4, "model__super_resolution__encoder_layers": 1}


def tiny_run(folder: Path, data: Path, **changes: object) -> TrainedModel:
    """What load_trained_model gives for a run of 8x8 images; `model__num_classes=5` changes model.num_classes."""
    arguments = settings(folder, data, **changes)
    config = load_config(SMALL_JOB, arguments[1::2])
    folder.mkdir(parents=True, exist_ok=True)
    remember_urls([config.data.train_url, config.data.validation_url])
    torch.manual_seed(0)
    model = config.model.build().eval()
    return TrainedModel(model, card_of(config), config.run.name, 7, "raw", RunFiles(folder), torch.device("cpu"))
