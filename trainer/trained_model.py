"""How do the tools (evaluate, sample) get a trained model out of a run's folder, without DeepSpeed?"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.model import Model
from trainer.checkpoint import Checkpoint, Weights, checkpoints_url, read_weights
from trainer.config import RunConfig, load_written
from trainer.errors import CheckpointError, UnsafeFile, UsageError
from trainer.exported_model import is_exported, load_exported, misfit, num_parameters_of
from trainer.model_card import ModelCard, card_of
from trainer.record.own_runs import is_own_url
from trainer.record.run_folder import RunFiles
from trainer.safe_files import refuse_links


@dataclass(frozen=True)
class TrainedModel:
    """A model in fp32 with weights of a run or of an exported model, ready to evaluate or sample."""

    model: Model
    card: ModelCard
    run: str
    """Name of the run that trained it."""
    step: int
    weights: Weights
    """What the weights are, whatever was asked for: an exported model has those that it was exported with."""
    files: RunFiles
    device: torch.device
    checkpoints: tuple[Checkpoint, ...] = ()
    """Those of the run that the weights come from, newest first; none for an exported model."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which every tool names a run and its weights."""
    parser.add_argument("--run", required=True, help="folder of a run (run.dir of its config) or of an exported model")
    parser.add_argument(
        "--weights",
        choices=["raw", "ema", "avg"],
        default="raw",
        help="raw: the newest weights (default); ema: their moving average; avg: the mean of the last checkpoints",
    )
    parser.add_argument("--last", type=int, default=5, help="avg: over so many checkpoints, if that many are kept (5)")
    parser.add_argument(
        "--checkpoint-url", metavar="URL", help="where the run's checkpoints are, if you have not trained it here"
    )


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """The option that names the data set, for tools that open it."""
    parser.add_argument(
        "--data-url", metavar="URL", help="the data set to use, for a model that you have not trained here"
    )


def load_trained_model(
    run_dir: str, weights: Weights, last: int = 1, checkpoint_url: str | None = None
) -> TrainedModel:
    """Load a run's newest checkpoint, or with weights `avg` the mean of its `last` ones; or an exported model, which
    has the weights that it was exported with.

    `checkpoint_url` says where the checkpoints are. Without it they are in the folder, or where a run that this user
    has trained had them. Raises UsageError for a folder without a run or a run without a checkpoint, CheckpointError
    for damaged ones.
    """
    if last < 1:
        raise UsageError(f"--last: must be at least 1, not {last}")
    files = RunFiles(Path(run_dir))
    if is_exported(files.folder):
        exported = load_exported(files.folder)
        if weights not in ("raw", exported.origin.weights):  # raw is the default: nobody may have asked for it
            raise UsageError(f"--weights {weights}: {run_dir} holds {exported.origin.weights} weights; leave it out")
        origin = exported.origin
        return _on_device(exported.card, origin.run, exported.state, origin.step, origin.weights, files)
    if not files.config.exists():
        raise UsageError(f"{run_dir}: holds no run (no config.yaml); give the run.dir of a config")
    config = load_written(files.config)
    url = _own_checkpoints(run_dir, config) if checkpoint_url is None else checkpoint_url
    saved = read_weights(url, weights, last, num_parameters_of(config.model))
    step, checkpoints = saved.checkpoints[0].step, saved.checkpoints
    if problem := misfit(config.model, saved.state):
        raise CheckpointError(f"{run_dir}: the newest checkpoint does not fit the model of config.yaml: {problem}")
    return _on_device(card_of(config), config.run.name, saved.state, step, weights, files, checkpoints)


def own_data(trained: TrainedModel, url: str, named: str | None) -> str:
    """The data set to open: the one that the user has just named, else `url`, which the model's folder says.

    Raises UsageError for that of a folder if no job of this user had its data there: it may be a stranger's choice.
    """
    if named is None and not is_own_url(url):
        raise UsageError(
            f"{trained.files.folder}: names the data set {url[:200]!r}, which you have not trained with on this "
            "machine; it is not opened unless you name it, or another one, with --data-url"
        )
    return url if named is None else named


def _own_checkpoints(run_dir: str, config: RunConfig) -> str:
    """Where a run's checkpoints are, if its folder holds them or this user's job had them there.

    Raises UsageError for another place, and for links in the folder.
    """
    url = checkpoints_url(run_dir, config)
    own = is_own_url(url)
    if config.checkpoint.url is None:
        try:
            refuse_links(Path(url).resolve() if own else Path(url))
        except UnsafeFile as error:
            raise UsageError(f"{error}, or name that folder with --checkpoint-url") from error
    elif not own:
        raise UsageError(
            f"{run_dir}: has its checkpoints in {url[:200]!r}, and you have not trained it on this machine; they are "
            "not opened unless you name that place, or another one, with --checkpoint-url"
        )
    return url


def _on_device(
    card: ModelCard,
    run: str,
    state: dict[str, Tensor],
    step: int,
    weights: Weights,
    files: RunFiles,
    checkpoints: tuple[Checkpoint, ...] = (),
) -> TrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = card.model.build()
    model.load_state_dict(state)
    return TrainedModel(model.to(device).eval(), card, run, step, weights, files, device, checkpoints)
