"""How does one YAML file plus `--set` become a checked, frozen RunConfig?

The sections `model` and `data` are plain dataclasses owned by `models/` and `data_pipeline/`, those of the trainer
stand in `trainer/options.py`. `trainer/typed_values.py` reads them; `trainer/older_configs.py` first turns what an
older version wrote into what this version reads; `RunConfig` checks what concerns two sections.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from data_pipeline.loader import DataConfig
from models.diagonal_bilstm import DiagonalBiLSTMConfig
from models.gated_pixelcnn import GatedPixelCNNConfig
from models.image_transformer.family import ImageTransformerConfig
from models.pixelcnn import PixelCNNConfig
from models.pixelcnnpp import PixelCNNPPConfig
from models.pixelsnail import PixelSNAILConfig
from models.row_lstm import RowLSTMConfig
from trainer.errors import ConfigError
from trainer.older_configs import BEFORE_IT_EXISTED, modernised, moved
from trainer.options import (
    CheckpointConfig,
    EvaluateConfig,
    LimitsConfig,
    Muon,
    OptimizerConfig,
    RunSettings,
    TrackingConfig,
    TrainConfig,
)
from trainer.safe_files import read_file
from trainer.typed_values import flattened, paths, plain, read, set_value, unknown

MAX_CONFIG_BYTES = 1 << 20

ModelConfig = (
    ImageTransformerConfig
    | PixelCNNConfig
    | GatedPixelCNNConfig
    | RowLSTMConfig
    | DiagonalBiLSTMConfig
    | PixelCNNPPConfig
    | PixelSNAILConfig
)
"""The model families: a union that `model.family` tells apart."""

UNSAID = {"model.family": "image_transformer"}
"""What files mean that were written when there was no other family."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    run: RunSettings
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    tracking: TrackingConfig = TrackingConfig()

    def problems(self) -> list[str]:
        """What no section can see alone, one sentence each."""
        found = []
        train = self.train
        if train.global_batch_images % train.micro_batch_images:
            found.append(
                f"train.global_batch_images: {train.global_batch_images} is not a multiple of "
                f"train.micro_batch_images {train.micro_batch_images}"
            )
        if train.precision != "fp32" and train.zero_stage == 0:
            # DeepSpeed's stage-0 bf16 optimizer takes a zero-gradient step when it is built, which shortens
            # the first real one.
            found.append(f"train.zero_stage: {train.precision} needs stage 1 or higher (stage 0 trains fp32 only)")
        if isinstance(self.optimizer, Muon):
            # DeepSpeed 0.19 lays the momentum out by whole matrices at stage 2, and at stage 1 in fp32, where it cannot
            # be read parameter by parameter; and at stage 3 it measures and clips the orthogonalised update.
            if (train.precision, train.zero_stage) not in (("bf16", 1), ("bf16", 3), ("fp32", 0), ("fp32", 3)):
                found.append(
                    "optimizer.name: muon needs train.precision bf16 with train.zero_stage 1 or 3, or fp32 with 0 or "
                    f"3, not {train.precision} with {train.zero_stage}"
                )
            if train.offload_optimizer.kind != "none" or train.offload_parameters.kind != "none":
                found.append("optimizer.name: muon needs train.offload_optimizer and train.offload_parameters none")
            if train.zero_stage == 3 and self.optimizer.clip_grad_norm:
                found.append("optimizer.clip_grad_norm: must be 0 for muon with train.zero_stage 3")
        if train.activation_checkpoint_every_layers > self.model.num_units:
            found.append(
                f"train.activation_checkpoint_every_layers: {train.activation_checkpoint_every_layers} "
                f"is more than model.layers {self.model.num_units}"
            )
        return found


SECTIONS: dict[str, Any] = get_type_hints(RunConfig)


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """The checked config of a YAML file with `section.key=value` overrides applied in order.

    Options that have moved are understood in both, and a note on stderr says where they live now. Raises ConfigError
    that lists every problem found, each with its path in the file.
    """
    values, notes = modernised(_read_yaml(Path(path)))
    problems = []
    for override in overrides:
        problems += _apply_override(values, override, notes)
    config = _checked(values, str(path), problems)
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"note: {path}: {'; '.join(notes)}", file=sys.stderr)
    return config


def config_from(values: dict[str, Any], source: str) -> RunConfig:
    """The checked config that some version of the trainer wrote to `source`, complete; raises ConfigError."""
    return _checked(modernised(values)[0], source, [], BEFORE_IT_EXISTED)


def load_written(path: Path) -> RunConfig:
    """The checked config that some version of the trainer wrote into a run's folder; raises ConfigError."""
    try:
        text = read_file(path, largest=MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    return config_from(_parsed(text, path), str(path))


def model_config_from(values: dict[str, Any], source: str) -> ModelConfig:
    """The checked `model` section that some version of the trainer wrote to `source`; raises ConfigError."""
    model, problems = read(ModelConfig, modernised({"model": values})[0]["model"], "model", BEFORE_IT_EXISTED)
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    assert isinstance(model, ModelConfig)
    return model


def _checked(
    values: dict[str, Any], source: str, problems: list[str], missing: Mapping[str, Any] = UNSAID
) -> RunConfig:
    """The config of these values, or a ConfigError with all problems, those given first."""
    problems = problems + _misplaced(values)
    config, found = read(RunConfig, {name: values[name] for name in values if name in SECTIONS}, "", missing)
    problems += found
    if not problems:
        assert isinstance(config, RunConfig)
        problems = config.problems()
        if not problems:
            return config
    raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


def as_yaml(config: RunConfig) -> str:
    """The resolved, complete config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def flat(config: RunConfig) -> dict[str, Any]:
    """`{"model.layers": 3, ...}`: one entry for each option."""
    return flattened(dataclasses.asdict(config))


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys (YAML lets the last win) and aliases, and reads 3e-4 as a number, not text.

    Nine aliases of nine aliases of ... are a few lines of YAML and gigabytes as values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, f"*{event.anchor}: aliases are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            raise ConstructorError(
                None, None, f"{key} is given twice, on lines {seen[key]} and {line}", key_node.start_mark
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        beside = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), beside, n=1)
        raise ConfigError(f"{path}: no such config file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: is larger than 1 MiB, so it is not a config file")
        return _parsed(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    """The sections of a YAML file, not yet checked."""
    try:
        values = yaml.load(text.decode(), _Loader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-99-99
        raise ConfigError(f"{path}: is not YAML") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(SECTIONS)}")
    return values


def _apply_override(values: dict[str, Any], override: str, notes: list[str]) -> list[str]:
    """Write `section.key=value` into values; what is wrong with it."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return [f"--set {override}: write it as section.key=value, for example --set model.layers=4"]
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return [f"--set {override}: the value is not YAML"]
    if keys[0] not in SECTIONS:
        return [f"--set {override}: {unknown(keys[0], list(SECTIONS), '', 'section')}"]
    for new_path, new_value in moved(path, value, values):
        if new_path != path and new_value is not None:
            notes.append(f"{path} is now {new_path}")
        set_value(RunConfig, values, new_path.split("."), new_value)
    return []


def _misplaced(values: dict[str, Any]) -> list[str]:
    """Unknown sections, and keys that belong under one."""
    found = []
    for name in sorted(map(str, values.keys() - SECTIONS.keys())):
        homes = [path for path in paths(RunConfig) if path.rpartition(".")[2] == name]
        found.append(
            f"{name} belongs under a section ({', '.join(homes)})"
            if homes
            else unknown(name, list(SECTIONS), "", "section")
        )
    return found
