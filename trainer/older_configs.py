"""What did a config mean that an older version of the trainer wrote?

Whatever was written stays readable: run folders, checkpoints, exports. An option that was added since has a row in
BEFORE_IT_EXISTED, one that was renamed or moved a row in MOVED. Both tables only grow. CONTRIBUTING.md says how an
option is added, renamed and removed.
"""

import ast
import copy
from collections.abc import Callable, Mapping
from typing import Any

from trainer.typed_values import flattened

BEFORE_IT_EXISTED: dict[str, Any] = {
    "data.cache_dir": None,
    "data.cache_gib": 32.0,
    "data.max_damaged_blocks": 0,
    "train.activation_checkpoint_keeps_attention": False,
    "train.offload_optimizer": "none",
    "train.offload_parameters": "none",
    "train.compile": False,
    "checkpoint.url": None,
    "checkpoint.keep_best": 0,
    "checkpoint.keep_every_steps": 0,
    "checkpoint.background": False,
    "limits.startup_seconds": 1800.0,
    "limits.step_seconds": 600.0,
    "limits.checkpoint_seconds": 1800.0,
    "limits.lost_rank_seconds": 45.0,
    "limits.run_minutes": None,
    "limits.skipped_updates": 10,
    "limits.loss_spike": 6.0,
    "limits.starts_without_progress": 3,
    "limits.replay_every_steps": 0,
    "tracking.required": False,
    "tracking.sample_every_steps": 0,
    "tracking.sample_images": 16,
    "tracking.code_changes": True,
    "tracking.system_metrics": False,
    "model.family": "image_transformer",
    "model.label_dropout": 0.0,
    "model.key_heads": 0,
    "model.stem": "previous",
    "optimizer.name": "adamw",
}
"""What each option meant while it did not exist, by its path of today. Read in place of the option's default where a
config was written complete and lacks it."""

ONCE_WORDS = (
    "model.output",
    "model.attention",
    "train.offload_optimizer",
    "train.offload_parameters",
    "optimizer.schedule",
)
"""Options that were a word, which is the `kind` of a section today."""

Settings = list[tuple[str, Any]]
"""Paths and values of today."""


def modernised(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values with every option under its path of today, and a sentence for each that has moved."""
    values = copy.deepcopy(values)
    notes = []
    for path in ONCE_WORDS:
        section, _, key = path.partition(".")
        if isinstance(values.get(section), dict) and isinstance(values[section].get(key), str):
            values[section][key] = {"kind": values[section][key]}
    for path in MOVED:
        section, _, key = path.partition(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            value = values[section].pop(key)
            for new_path, new_value in moved(path, value, values):
                _put(values, new_path.split("."), new_value)
                if new_path != path and new_value is not None:
                    notes.append(f"{path} is now {new_path}")
    return values, notes


def moved(path: str, value: Any, values: dict[str, Any]) -> Settings:
    """Where the option of this path lives today, and with which value, among the other values of its config.

    Nothing where the value only said that something is not used, which needs no option any more.
    """
    return MOVED[path](value, values) if path in MOVED else [(path, value)]


def params_of_today(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters that some version recorded of a run, all of them, under the paths and in the words of today."""
    values: dict[str, Any] = {}
    for path, text in params.items():
        _put(values, path.split("."), _literal(text))
    values, _ = modernised(values)
    flat = flattened(values)
    unsaid = {path: value for path, value in BEFORE_IT_EXISTED.items() if path.partition(".")[0] in values}
    words = {f"{path}.kind" if path in ONCE_WORDS else path: value for path, value in unsaid.items()}
    return {path: str(value) for path, value in (words | flat).items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _kind(values: dict[str, Any], section: str, key: str) -> Any:
    """The kind that an option with kinds has."""
    found = values.get(section)
    found = found.get(key) if isinstance(found, dict) else None
    return found.get("kind") if isinstance(found, dict) else found


def _to(path: str) -> Callable[[Any, dict[str, Any]], Settings]:
    return lambda value, values: [(path, value)]


def _for_attention(kinds: tuple[str, ...], name: str, nothing: Any) -> Callable[[Any, dict[str, Any]], Settings]:
    """A field of some kinds of attention, which the others had as `nothing`."""

    def settings(value: Any, values: dict[str, Any]) -> Settings:
        unused = value == nothing and _kind(values, "model", "attention") not in kinds
        return [] if unused else [(f"model.attention.{name}", value)]

    return settings


def _for_schedule(kinds: tuple[str, ...], name: str) -> Callable[[Any, dict[str, Any]], Settings]:
    """A field of some schedules, which the others had as 0."""

    def settings(value: Any, values: dict[str, Any]) -> Settings:
        unused = value == 0 and _kind(values, "optimizer", "schedule") not in kinds
        return [] if unused else [(f"optimizer.schedule.{name}", value)]

    return settings


def _components(value: Any, values: dict[str, Any]) -> Settings:
    return [] if value == 0 and _kind(values, "model", "output") != "mixture" else [("model.output.components", value)]


def _super_resolution(name: str) -> Callable[[Any, dict[str, Any]], Settings]:
    def settings(value: Any, values: dict[str, Any]) -> Settings:
        return [("model.super_resolution", None)] if value == 0 else [(f"model.super_resolution.{name}", value)]

    return settings


def _muon_peak_lr(value: Any, values: dict[str, Any]) -> Settings:
    optimizer = values.get("optimizer")
    is_muon = isinstance(optimizer, dict) and optimizer.get("name") == "muon"
    return [] if value == 0 and not is_muon else [("optimizer.muon_peak_lr", value)]


def _offload_dir(value: Any, values: dict[str, Any]) -> Settings:
    names = ("offload_optimizer", "offload_parameters")
    return [(f"train.{name}.dir", value) for name in names if _kind(values, "train", name) == "nvme"]


MOVED: dict[str, Callable[[Any, dict[str, Any]], Settings]] = {
    "model.mixtures": _components,
    "model.query_block": _for_attention(("local_1d", "local_2d", "dilated_1d"), "query_block", 0),
    "model.memory": _for_attention(("local_1d", "local_2d", "dilated_1d"), "memory", 0),
    "model.dilation_gap": _for_attention(("dilated_1d",), "gap", 0),
    "model.dilation_blocks": _for_attention(("dilated_1d",), "chunks", 0),
    "model.shift": _for_attention(("local_2d",), "shift", "generation"),
    "model.condition_size": _super_resolution("small_size"),
    "model.encoder_layers": _super_resolution("encoder_layers"),
    "optimizer.muon_peak_lr": _muon_peak_lr,
    "optimizer.warmup_steps": _to("optimizer.schedule.warmup_steps"),
    "optimizer.decay_steps": _for_schedule(("wsd",), "decay_steps"),
    "optimizer.final_lr_fraction": _for_schedule(("cosine", "wsd"), "final_lr_fraction"),
    "train.offload_dir": _offload_dir,
}
"""What became of options that were renamed or moved, by the path they had."""


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        if not isinstance(below, dict):
            below = values[key] = {}
        values = below
    values[keys[-1]] = value
