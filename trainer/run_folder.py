"""How do the tools (evaluate, sample) get a trained model out of a run's folder, without DeepSpeed?"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from models.image_transformer import ImageTransformer
from trainer.checkpoint import Weights, checkpoints_url, intact, read_weights
from trainer.config import RunConfig, load_config
from trainer.exit_codes import UsageError
from trainer.tracking import RunFiles


@dataclass(frozen=True)
class TrainedModel:
    """A model in fp32 with the weights of a run's newest complete checkpoint, ready to evaluate or sample."""

    model: ImageTransformer
    config: RunConfig
    step: int
    files: RunFiles
    device: torch.device


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which every tool names a run and its weights."""
    parser.add_argument("--run", required=True, help="folder of a run (run.dir of its config)")
    parser.add_argument(
        "--weights",
        choices=["raw", "ema", "avg"],
        default="raw",
        help="raw: the newest weights (default); ema: their moving average; avg: the mean of the last checkpoints",
    )
    parser.add_argument("--last", type=int, default=5, help="avg: over so many checkpoints, if that many are kept (5)")


def load_trained_model(run_dir: str, weights: Weights, last: int = 1) -> TrainedModel:
    """Load a run's newest checkpoint, or with weights `avg` the mean of its `last` ones.

    Raises UsageError for a folder without a run, CheckpointError for a run without a checkpoint.
    """
    if last < 1:
        raise UsageError(f"--last: must be at least 1, not {last}")
    files = RunFiles(Path(run_dir))
    if not files.config.exists():
        raise UsageError(f"{run_dir}: holds no run (no config.yaml); give the run.dir of a config")
    config = load_config(files.config, [])
    store, checkpoints = intact(checkpoints_url(run_dir, config), last if weights == "avg" else 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = ImageTransformer(config.model)
    model.load_state_dict(read_weights(store, checkpoints, weights))
    return TrainedModel(model.to(device).eval(), config, checkpoints[0].step, files, device)
