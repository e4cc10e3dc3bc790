"""How do the tools (evaluate, sample) get a trained model out of a run's folder, without DeepSpeed?"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from models.image_transformer import ImageTransformer
from trainer.checkpoint import newest_of_run, read_weights
from trainer.config import RunConfig, load_config
from trainer.exit_codes import UsageError
from trainer.tracking import RunFiles

Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class TrainedModel:
    """A model in fp32 with the weights of a run's newest complete checkpoint, ready to evaluate or sample."""

    model: ImageTransformer
    config: RunConfig
    step: int
    files: RunFiles
    device: torch.device


def load_trained_model(run_dir: str, weights: Weights) -> TrainedModel:
    """Load a run's newest checkpoint; UsageError for a folder without a run, CheckpointError without a checkpoint."""
    files = RunFiles(Path(run_dir))
    if not files.config.exists():
        raise UsageError(f"{run_dir}: holds no run (no config.yaml); give the run.dir of a config")
    config = load_config(files.config, [])
    fs, checkpoint = newest_of_run(run_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = ImageTransformer(config.model)
    model.load_state_dict(read_weights(fs, checkpoint, "weight" if weights == "raw" else "ema"))
    return TrainedModel(model.to(device).eval(), config, checkpoint.step, files, device)
