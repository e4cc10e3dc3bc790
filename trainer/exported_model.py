"""What is an exported model: weights and their description in one folder, and is a folder such a thing, undamaged?

`model.safetensors` holds fp32 weights by their names in the model; `config.json` what they are: the model's config and
what drawing and scoring need beside it (trainer/model_card.py), the data set's digest, the step, the run, bits per
dimension if they were evaluated, and the weights' size and checksum. Neither can execute code, and neither needs
DeepSpeed.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage import DataError, Store
from models.model import num_parameters
from trainer.checkpoint import FAR_TOO_LARGE, Weights
from trainer.config import ModelConfig, RunConfig
from trainer.engine import State
from trainer.errors import CheckpointError, ConfigError, UsageError
from trainer.model_card import ModelCard, card_from, card_from_config
from trainer.optimizer import orthogonalised_names, state_names
from trainer.record.run_folder import write_json
from trainer.safe_files import file_inside, read_file
from trainer.tensor_file import FileEntry, read_tensors, write_tensors
from trainer.typed_values import differences, plain, read

FORMAT_VERSION = 2
"""2 holds a card where 1 held the whole config of the run; both are read."""
LARGEST_DESCRIPTION = 1 << 20
"""Bytes of a description that is read."""
WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where exported weights come from."""

    run: str
    """Name of the run."""
    mlflow_run_id: str
    """Empty where MLflow did not answer."""
    step: int
    weights: Weights
    checkpoints: int
    """How many were averaged; 1 unless weights is `avg`."""
    data_digest: str
    """Of the manifest of the training data: which data set, in which version."""
    bits_per_dim: float | None
    """Over the whole validation set; None where these weights were not evaluated."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What was read from the folder of an exported model, checked."""

    card: ModelCard
    origin: Origin
    state: dict[str, Tensor]
    """fp32, by name: what the model's load_state_dict takes."""
    digest: str
    """SHA-256 of the file of weights."""


def is_exported(folder: Path) -> bool:
    """Whether a folder is, or was meant to be, that of an exported model and not of a run."""
    return (folder / DESCRIPTION_FILE).exists() or (folder / WEIGHTS_FILE).exists()


def write_exported(folder: Path, card: ModelCard, origin: Origin, state: dict[str, Tensor]) -> None:
    """Write weights, then their description; a folder without the latter is not an exported model.

    Raises UsageError where the folder holds something already or cannot be written.
    """
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"--to {folder}: is not empty; choose another folder, or delete that one")
        description = {
            "format_version": FORMAT_VERSION,
            "origin": dataclasses.asdict(origin),
            "file": write_tensors(_store(folder), WEIGHTS_FILE, tensors),
            "card": plain(card),
        }
        write_json(folder / DESCRIPTION_FILE, description)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--to {folder}: cannot be written ({reason})") from error


def load_exported(folder: Path) -> ExportedModel:
    """Read an exported model; raises CheckpointError for one that is incomplete, changed, or of another architecture,
    ConfigError for one with a config that this version does not take."""
    description, path = _description(folder), folder / WEIGHTS_FILE
    try:
        version, file = description["format_version"], description["file"]
        if version not in (1, FORMAT_VERSION):
            raise CheckpointError(
                f"{folder / DESCRIPTION_FILE}: has format {version}, and this version of the trainer reads "
                f"1 to {FORMAT_VERSION}; use the version that wrote it"
            )
        entry = FileEntry(name=WEIGHTS_FILE, bytes=file["bytes"], sha256=file["sha256"])
        source = str(folder / DESCRIPTION_FILE)
        card = (
            card_from_config(description["config"], source) if version == 1 else card_from(description["card"], source)
        )
        origin, problems = read(Origin, description["origin"], "origin")
        if problems or type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
            raise TypeError(problems)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / DESCRIPTION_FILE}: is not the description of an exported model; export the run again"
        ) from error
    try:
        file_inside(folder, WEIGHTS_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; copy the folder again, or export the run again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    # A model that is somewhat too large is found below, where the tensor that is missing has a name.
    needed = 4 * num_parameters_of(card.model)
    if not needed // FAR_TOO_LARGE <= entry["bytes"] <= needed * FAR_TOO_LARGE + LARGEST_DESCRIPTION:
        raise CheckpointError(
            f"{path}: has {entry['bytes']:,} bytes, and the model of {DESCRIPTION_FILE} takes {needed:,}; "
            "export the run again"
        )
    state = read_tensors(_store(folder), WEIGHTS_FILE, entry)
    if state is None:
        raise CheckpointError(
            f"{path}: is not the file that {DESCRIPTION_FILE} describes (incomplete or changed); copy the folder again"
        )
    if problem := misfit(card.model, state):
        raise CheckpointError(f"{path}: does not fit the model of {DESCRIPTION_FILE}: {problem}; export the run again")
    return ExportedModel(card=card, origin=origin, state=state, digest=entry["sha256"])


def load_first_weights(folder: Path, config: RunConfig) -> ExportedModel:
    """Read the exported weights that a new run of `config` begins from.

    Raises UsageError where they cannot be used or the run's model is another one; only dropout may differ.
    """
    if not is_exported(folder):
        raise UsageError(f"--from {folder}: holds no exported model; make one with python -m trainer.export")
    try:
        exported = load_exported(folder)
    except (CheckpointError, ConfigError) as error:
        raise UsageError(f"--from {str(error).splitlines()[0]}") from error
    texts = [
        f"model.{name} ({theirs}, not {mine})"
        for name, (theirs, mine) in differences(exported.card.model, config.model).items()
        if name != "dropout"
    ]
    if texts:
        raise UsageError(f"--from {folder}: was exported from a model with another {' and '.join(texts)}")
    return exported


def origin_tags(folder: Path, exported: ExportedModel) -> dict[str, str]:
    """What a run that begins from exported weights records of them, so that they are found again."""
    origin = exported.origin
    return {
        "folder": str(folder.resolve()),
        "run": origin.run,
        "mlflow_run_id": origin.mlflow_run_id or "unknown",
        "step": str(origin.step),
        "weights": origin.weights,
        "digest": exported.digest,
    }


def first_states(weights: Mapping[str, Tensor], config: RunConfig) -> Iterator[tuple[str, State]]:
    """What `Engine.load_state(..., updates=0)` takes to begin a new run with these weights: the optimizer starts
    anew, and so does the average of the weights, from them."""
    with torch.device("meta"):
        muons = orthogonalised_names(config.model.build(), config.optimizer)
    for name, weight in weights.items():
        names = state_names(name in muons, config.optimizer)
        states = {key: weight.clone() if key == "ema" else torch.zeros_like(weight) for key in names}
        yield name, {"weight": weight, **states}


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    try:
        description = json.loads(read_file(path, largest=LARGEST_DESCRIPTION))
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "not JSON"
        raise CheckpointError(f"{path}: cannot be read ({reason}); copy the folder again") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path}: is not the description of an exported model; export the run again")
    return description


def num_parameters_of(model: ModelConfig) -> int:
    """Trainable numbers of a model, without building it: what one and two periods of its units have tells the rest."""
    period = model.unit_period
    small = [model.with_units(count * period) for count in (1, 2)]  # on the CPU: configs may compute with tensors
    with torch.device("meta"):
        one, two = (num_parameters(each.build()) for each in small)
    return one + (two - one) * (model.num_units - period) // period


def misfit(model: ModelConfig, state: dict[str, Tensor]) -> str | None:
    """What of the tensors does not fit the model, in a phrase; None if all do. No memory is taken for weights."""
    with torch.device("meta"):
        expected = model.build().state_dict()
    if odd := sorted(expected.keys() ^ state.keys()):
        return f"{odd[0]} is {'missing' if odd[0] in expected else 'not part of it'}"
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not fp32 {list(expected[name].shape)}"
    return None


def _store(folder: Path) -> Store:
    """A folder of this machine, where nothing that fails is tried again."""
    return Store(str(folder), 0.0)
