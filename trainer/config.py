"""Which options exist, and how does one YAML file plus `--set` become a checked, frozen RunConfig?

The sections `model` and `data` are plain dataclasses owned by `models/` and `data_pipeline/`; the trainer's
own sections are below, so that every option of the trainer can be read on one page. pydantic checks types;
each dataclass checks its own ranges; `RunConfig` checks what concerns two sections.
"""

import dataclasses
import difflib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from data_pipeline.loader import DataConfig
from models.image_transformer import ImageTransformerConfig
from trainer.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


def require(section: object, *rules: tuple[bool, str]) -> None:
    """Raise one ValueError that lists every rule that does not hold; a rule's text begins with its field."""
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ValueError("\n".join(f"{text}, not {getattr(section, text.partition(':')[0])!r}" for text in broken))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    name: str
    """Name of the MLflow run."""
    dir: str
    """Folder of config, metrics, checkpoints and samples; the same folder means the same run."""
    seed: int
    """Seed of initial weights, order of samples and dropout."""
    world_size: int | None
    """Ranks this run must have; null accepts any. The launcher only warns of a mistyped hostfile; this stops it."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.name != "", "name: must not be empty"),
            (self.dir != "", "dir: must not be empty"),
            (self.seed >= 0, "seed: must be at least 0"),
            (self.world_size is None or self.world_size >= 1, "world_size: must be null or at least 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """Optimizer updates in the whole run."""
    global_batch_images: int
    """Images per optimizer update, over all ranks and accumulated micro-batches."""
    micro_batch_images: int
    """Images per rank in one forward and backward pass."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Precision of weights and activations; with bf16 and fp16 the optimizer keeps fp32 master weights."""
    zero_stage: Literal[0, 1, 2, 3]
    """What ZeRO shards over the ranks: 1 optimizer state, 2 and gradients, 3 and weights (0: nothing)."""
    activation_checkpoint_every_layers: int
    """Recompute every n-th layer in the backward pass instead of storing its activations; 0 stores all."""
    activation_checkpoint_keeps_attention: bool
    """Selective: of the recomputed layers, keep the results of attention and recompute only the rest."""
    offload_optimizer: Literal["none", "cpu", "nvme"]
    """Where the optimizer's state lives and is updated: on the GPU, in host memory, or on a local disk (stage 3)."""
    offload_parameters: Literal["none", "cpu", "nvme"]
    """Where the weights of layers that are not in use wait; needs stage 3, and nvme bf16 or fp16."""
    offload_dir: str | None
    """Folder on a local NVMe disk, where one of the two is `nvme`; otherwise null."""
    compile: bool
    """Compile the layers with torch.compile: slower to start, faster steps."""
    log_every_steps: int
    """Steps between two points of the training curves."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.steps >= 1, "steps: must be at least 1"),
            (self.global_batch_images >= 1, "global_batch_images: must be at least 1"),
            (self.micro_batch_images >= 1, "micro_batch_images: must be at least 1"),
            (
                self.activation_checkpoint_every_layers >= 0,
                "activation_checkpoint_every_layers: must be at least 0",
            ),
            (
                not self.activation_checkpoint_keeps_attention or self.activation_checkpoint_every_layers >= 1,
                "activation_checkpoint_keeps_attention: needs activation_checkpoint_every_layers of at least 1",
            ),
            (
                self.offload_optimizer == "none" or self.zero_stage >= (3 if self.offload_optimizer == "nvme" else 1),
                "offload_optimizer: cpu needs zero_stage 1 or higher, nvme needs stage 3",
            ),
            (
                self.offload_parameters == "none" or self.zero_stage == 3,
                "offload_parameters: needs zero_stage 3",
            ),
            (
                # DeepSpeed 0.19 writes them in half precision there, without a word.
                self.offload_parameters != "nvme" or self.precision != "fp32",
                "offload_parameters: nvme needs precision bf16 or fp16 (fp32 weights would be rounded to 16 bits)",
            ),
            (
                ("nvme" in (self.offload_optimizer, self.offload_parameters)) == (self.offload_dir is not None),
                "offload_dir: must be a folder where something is offloaded to nvme, and null elsewhere",
            ),
            (self.log_every_steps >= 1, "log_every_steps: must be at least 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"]
    """adamw: AdamW; with weight_decay 0, Adam as in the paper. muon: Muon (Jordan et al. 2024), momentum that is made
    orthogonal, on the matrices of the layers, and AdamW on embeddings, head, norms and biases; needs bf16 at zero_stage
    1 or 3, or fp32 at 0 or 3."""
    peak_lr: float
    """Highest learning rate of the schedule."""
    muon_peak_lr: float
    """The same of the matrices that Muon updates, whose update has a spectral norm of about 1 before this factor; 0 for
    adamw. 0.02 is usual."""
    schedule: Literal["noam", "rsqrt", "cosine", "wsd"]
    """noam: linear warm-up, then step^-1/2 (Vaswani et al. 2017). rsqrt: constant, then step^-1/2.
    cosine: linear warm-up, then a half cosine down to final_lr_fraction.
    wsd: linear warm-up, constant, then linear decay over the last decay_steps."""
    warmup_steps: int
    """Steps until the peak (noam, cosine, wsd) or until the decay begins (rsqrt)."""
    decay_steps: int
    """Length of the final decay of wsd; 0 for the others."""
    final_lr_fraction: float
    """Where cosine and wsd end, as a fraction of peak_lr; 0 for the others."""
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    """Decoupled weight decay (AdamW) on matrices; vectors (norms, biases) have none."""
    clip_grad_norm: float
    """Largest global gradient norm; 0 does not clip."""
    ema_decay: float
    """Decay per update of the exponential moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        require(
            self,
            (0 < self.peak_lr < math.inf, "peak_lr: must be above 0 and finite"),
            (
                (0 < self.muon_peak_lr < math.inf) if self.name == "muon" else self.muon_peak_lr == 0,
                "muon_peak_lr: must be above 0 and finite for muon, and 0 for adamw",
            ),
            (self.warmup_steps >= 0, "warmup_steps: must be at least 0"),
            (
                self.schedule not in ("noam", "rsqrt") or self.warmup_steps >= 1,
                "warmup_steps: must be at least 1 for noam and rsqrt",
            ),
            (
                self.decay_steps >= 0 and (self.schedule == "wsd" or self.decay_steps == 0),
                "decay_steps: must be 0 for schedules other than wsd",
            ),
            (0 <= self.final_lr_fraction <= 1, "final_lr_fraction: must be between 0 and 1"),
            (0 <= self.beta1 < 1, "beta1: must be at least 0 and below 1"),
            (0 <= self.beta2 < 1, "beta2: must be at least 0 and below 1"),
            (0 < self.eps < math.inf, "eps: must be above 0"),
            (0 <= self.weight_decay < math.inf, "weight_decay: must be at least 0"),
            (0 <= self.clip_grad_norm < math.inf, "clip_grad_norm: must be at least 0"),
            (0 <= self.ema_decay < 1, "ema_decay: must be at least 0 and below 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: int
    """Steps between two evaluations while training; the last step is always evaluated."""
    images: int | None
    """Validation images per evaluation while training; null takes all. The last one always takes all."""
    batch_images: int
    """Images per rank in one forward pass."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.every_steps >= 1, "every_steps: must be at least 1"),
            (self.images is None or self.images >= 1, "images: must be null or at least 1"),
            (self.batch_images >= 1, "batch_images: must be at least 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    url: str | None
    """Folder or URL (s3://bucket/prefix) of the checkpoints; null puts them into the run's folder."""
    every_steps: int
    """Steps between two checkpoints; the last step and a requested stop always write one."""
    keep_last: int
    """Newest complete checkpoints kept; older ones are deleted after a newer one is complete."""
    keep_best: int
    """Kept besides: so many checkpoints with the lowest validation bits/dim."""
    keep_every_steps: int
    """Kept besides, for ever: checkpoints whose step is a multiple of this; 0 keeps none."""
    background: bool
    """Write files while training goes on; a host holds one copy of its share of the state meanwhile."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.url is None or (self.url != "" and "@" not in self.url),
                "url: must be null, a folder or a URL without a password",
            ),
            (self.every_steps >= 1, "every_steps: must be at least 1"),
            (self.keep_last >= 1, "keep_last: must be at least 1"),
            (self.keep_best >= 0, "keep_best: must be at least 0"),
            (self.keep_every_steps >= 0, "keep_every_steps: must be at least 0"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    startup_seconds: float
    """Longest time from the start to the first step, compilation included; beyond it the job is taken for hung.
    Ranks that have not started after half of it, or after 10 minutes, are missing."""
    step_seconds: float
    """Longest time of one update, or of one batch of an evaluation; more than ``data.read_deadline_seconds``, so that a
    store that is away is named as such."""
    checkpoint_seconds: float
    """Longest time of writing or reading a checkpoint."""
    lost_rank_seconds: float
    """A rank that gives no sign of life for so long is lost, and the others end."""
    run_minutes: float | None
    """Stop with a checkpoint and exit code 75 after so many minutes; null sets no limit."""
    skipped_updates: int
    """Updates in a row that may be skipped because a loss or a gradient is not finite. Then the run goes back to the
    last checkpoint once and leaves the images in between out; the second time it ends with exit code 76."""
    loss_spike: float
    """Warn when the loss rises above its running mean by so many standard deviations; 0 never warns."""
    starts_without_progress: int
    """End with exit code 70 at a start after so many that got no further than the one before."""

    def __post_init__(self) -> None:
        require(
            self,
            (0 < self.startup_seconds < math.inf, "startup_seconds: must be above 0 and finite"),
            (0 < self.step_seconds < math.inf, "step_seconds: must be above 0 and finite"),
            (0 < self.checkpoint_seconds < math.inf, "checkpoint_seconds: must be above 0 and finite"),
            (5 <= self.lost_rank_seconds < math.inf, "lost_rank_seconds: must be at least 5 and finite"),
            (
                self.run_minutes is None or 0 < self.run_minutes < math.inf,
                "run_minutes: must be null or above 0",
            ),
            (self.skipped_updates >= 1, "skipped_updates: must be at least 1"),
            (0 <= self.loss_spike < math.inf, "loss_spike: must be at least 0"),
            (self.starts_without_progress >= 1, "starts_without_progress: must be at least 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    uri: str
    """MLflow store: `sqlite:///mlflow.db` beside the command, or the http(s) URL of a tracking server."""
    experiment: str
    """MLflow experiment that the run belongs to."""
    required: bool
    """End with exit code 69 when MLflow does not answer at the start, instead of training without it."""
    sample_every_steps: int
    """Steps between two grids of images drawn from the model; 0 draws none."""
    sample_images: int
    """Images in such a grid."""
    system_metrics: bool
    """Record processor, memory, disk, network and GPU use of the first machine."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.uri.startswith(("sqlite:///", "http://", "https://")),
                "uri: must begin with sqlite:///, http:// or https://",
            ),
            (
                "@" not in self.uri,
                "uri: must not hold a password (it belongs in MLflow's credentials file)",
            ),
            (self.experiment != "", "experiment: must not be empty"),
            (self.sample_every_steps >= 0, "sample_every_steps: must be at least 0"),
            (1 <= self.sample_images <= 1024, "sample_images: must be between 1 and 1024"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    run: RunSettings
    model: ImageTransformerConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    limits: LimitsConfig
    tracking: TrackingConfig

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
        if self.optimizer.name == "muon":
            # DeepSpeed 0.19 lays the momentum out by whole matrices at stage 2, and at stage 1 in fp32, where it cannot
            # be read parameter by parameter; and at stage 3 it measures and clips the orthogonalised update.
            if (train.precision, train.zero_stage) not in (("bf16", 1), ("bf16", 3), ("fp32", 0), ("fp32", 3)):
                found.append(
                    "optimizer.name: muon needs train.precision bf16 with train.zero_stage 1 or 3, or fp32 with 0 or "
                    f"3, not {train.precision} with {train.zero_stage}"
                )
            if train.offload_optimizer != "none" or train.offload_parameters != "none":
                found.append("optimizer.name: muon needs train.offload_optimizer and train.offload_parameters none")
            if train.zero_stage == 3 and self.optimizer.clip_grad_norm:
                found.append("optimizer.clip_grad_norm: must be 0 for muon with train.zero_stage 3")
        if train.activation_checkpoint_every_layers > self.model.layers:
            found.append(
                f"train.activation_checkpoint_every_layers: {train.activation_checkpoint_every_layers} "
                f"is more than model.layers {self.model.layers}"
            )
        return found


SECTIONS: dict[str, type] = get_type_hints(RunConfig)


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """The checked config of a YAML file with `section.key=value` overrides applied in order.

    Raises ConfigError that lists every problem found, each with its path in the file.
    """
    values = _read_yaml(Path(path))
    problems = [problem for override in overrides if (problem := _apply_override(values, override))]
    return _checked(values, str(path), problems)


def config_from(values: dict[str, Any], source: str) -> RunConfig:
    """The checked config of sections that were read from `source`; raises ConfigError as load_config does."""
    return _checked(values, source, [])


def _checked(values: dict[str, Any], source: str, problems: list[str]) -> RunConfig:
    problems = problems + _key_problems(values)
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if not isinstance(values.get(name), dict):
            continue  # reported by _key_problems
        known = {field.name for field in dataclasses.fields(section)}
        given = {key: value for key, value in values[name].items() if key in known}
        try:
            # JSON, because only there does pydantic's strict mode take objects for dataclasses.
            sections[name] = TypeAdapter(section).validate_json(json.dumps(given), strict=True)
        except ValidationError as error:
            problems += _type_problems(name, error)
        except TypeError:  # a YAML date or another value that JSON lacks
            problems.append(f"{name}: holds a value that is neither text, number, boolean, list nor null")
    if not problems:
        config = RunConfig(**sections)
        problems = config.problems()
        if not problems:
            return config
    raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


def as_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def flat(config: RunConfig) -> dict[str, Any]:
    """`{"model.layers": 3, ...}`: one entry for each option."""
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }


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
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(SECTIONS)}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Write `section.key=value` into values; return what is wrong with it, or None."""
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key) or "." in key:
        return f"--set {override}: write it as section.key=value, for example --set model.layers=4"
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        return f"--set {override}: the value is not YAML"
    if section not in SECTIONS:
        return f"--set {override}: {_unknown(section, list(SECTIONS))}"
    if not isinstance(values.setdefault(section, {}), dict):
        return None  # reported with the section
    values[section][key] = value
    return None


def _key_problems(values: dict[str, Any]) -> list[str]:
    """Unknown and missing sections and keys, with the nearest known name."""
    fields = {name: [field.name for field in dataclasses.fields(section)] for name, section in SECTIONS.items()}
    found = []
    for name in values.keys() - SECTIONS.keys():
        homes = [section for section, keys in fields.items() if name in keys]
        found.append(
            f"{name} belongs under a section ({', '.join(f'{h}.{name}' for h in homes)})"
            if homes
            else _unknown(str(name), list(SECTIONS))
        )
    for name, keys in fields.items():
        if name not in values:
            found.append(f"{name}: this section is missing")
        elif not isinstance(values[name], dict):
            found.append(f"{name}: must be a section with the keys {', '.join(keys)}")
        else:
            for key in values[name].keys() - set(keys):
                homes = [section for section, known in fields.items() if key in known]
                hint = f"; it belongs under {homes[0]}" if homes else ""
                found.append(_unknown(str(key), keys, name) if not hint else f"{name}.{key}: unknown key{hint}")
    return sorted(found)


def _unknown(name: str, known: list[str], section: str | None = None) -> str:
    prefix = f"{section}." if section else ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    kind = "key" if section else "section"
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{prefix}{name}: unknown {kind}; {hint}"


def _type_problems(section: str, error: ValidationError) -> list[str]:
    """pydantic's findings, one for each field, in words that name the option and its value."""
    found: dict[str, list[str]] = {}
    for item in error.errors():
        if item["type"] == "value_error":  # raised by a dataclass's __post_init__: already one problem a line
            for line in str(item["ctx"]["error"]).splitlines():
                name, _, text = line.partition(": ")
                found.setdefault(f"{section}.{name}", []).append(text)
            continue
        field = f"{section}.{item['loc'][0]}" if item["loc"] else section
        if item["type"] == "missing":
            found.setdefault(field, []).append("is missing")
        else:
            text = item["msg"][0].lower() + item["msg"][1:]
            found.setdefault(field, []).append(f"{text}, not {item['input']!r}")
    return [f"{field}: {'; or '.join(texts)}" for field, texts in found.items()]
