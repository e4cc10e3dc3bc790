"""Which options does the trainer have, section by section?

The sections `model` and `data` are owned by `models/` and `data_pipeline/`. An option that is the same in nearly every
experiment has a default here; what makes an experiment has none. Each section checks its own ranges;
`trainer/config.py` puts the sections together and checks what concerns two of them.
"""

import dataclasses
import math
from typing import Literal

from models.model import Recompute


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
    seed: int = 0
    """Seed of initial weights, order of samples and dropout."""
    world_size: int | None = None
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
class NoOffload:
    """It stays on the device."""

    kind: Literal["none"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuOffload:
    """It lives in the memory of the host."""

    kind: Literal["cpu"] = "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NvmeOffload:
    """It lives on a local NVMe disk."""

    kind: Literal["nvme"] = "nvme"
    dir: str
    """Folder on that disk."""

    def __post_init__(self) -> None:
        require(self, (self.dir != "", "dir: must not be empty"))


Offload = NoOffload | CpuOffload | NvmeOffload


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """Optimizer updates in the whole run."""
    global_batch_images: int
    """Images per optimizer update, over all ranks and accumulated micro-batches."""
    micro_batch_images: int
    """Images per rank in one forward and backward pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights and activations; with bf16 and fp16 the optimizer keeps fp32 master weights."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards over the ranks: 1 optimizer state, 2 and gradients, 3 and weights (0: nothing)."""
    activation_checkpoint_every_layers: int = 0
    """Recompute every n-th layer in the backward pass instead of storing its activations; 0 stores all."""
    activation_checkpoint_keeps_attention: bool = False
    """Selective: of the recomputed layers, keep the results of attention and recompute only the rest."""
    offload_optimizer: Offload = NoOffload()
    """Where the optimizer's state lives and is updated: on the GPU, in host memory (from stage 1 on), or on a local
    disk (stage 3)."""
    offload_parameters: Offload = NoOffload()
    """Where the weights of layers that are not in use wait; needs stage 3, and nvme bf16 or fp16."""
    compile: bool = False
    """Compile the layers with torch.compile: slower to start, faster steps."""
    log_every_steps: int = 50
    """Steps between two points of the training curves."""

    @property
    def recompute(self) -> Recompute:
        """What the backward pass computes a second time."""
        return Recompute(
            every=self.activation_checkpoint_every_layers, keeps_attention=self.activation_checkpoint_keeps_attention
        )

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
                self.offload_optimizer.kind == "none"
                or self.zero_stage >= (3 if self.offload_optimizer.kind == "nvme" else 1),
                "offload_optimizer: cpu needs zero_stage 1 or higher, nvme needs stage 3",
            ),
            (
                self.offload_parameters.kind == "none" or self.zero_stage == 3,
                "offload_parameters: needs zero_stage 3",
            ),
            (
                # DeepSpeed 0.19 writes them in half precision there, without a word.
                self.offload_parameters.kind != "nvme" or self.precision != "fp32",
                "offload_parameters: nvme needs precision bf16 or fp16 (fp32 weights would be rounded to 16 bits)",
            ),
            (self.log_every_steps >= 1, "log_every_steps: must be at least 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noam:
    """Linear warm-up, then step^-1/2 (Vaswani et al. 2017)."""

    kind: Literal["noam"] = "noam"
    warmup_steps: int
    """Steps until the peak."""

    def __post_init__(self) -> None:
        require(self, (self.warmup_steps >= 1, "warmup_steps: must be at least 1"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rsqrt:
    """Constant, then step^-1/2."""

    kind: Literal["rsqrt"] = "rsqrt"
    warmup_steps: int
    """Steps until the decay begins."""

    def __post_init__(self) -> None:
        require(self, (self.warmup_steps >= 1, "warmup_steps: must be at least 1"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to final_lr_fraction."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int
    """Steps until the peak."""
    final_lr_fraction: float = 0.0
    """The rate after the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.warmup_steps >= 0, "warmup_steps: must be at least 0"),
            (0 <= self.final_lr_fraction <= 1, "final_lr_fraction: must be between 0 and 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, constant, then linear decay over the last decay_steps."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int
    """Steps until the peak."""
    decay_steps: int
    """Length of the final decay."""
    final_lr_fraction: float = 0.0
    """The rate after the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.warmup_steps >= 0, "warmup_steps: must be at least 0"),
            (self.decay_steps >= 0, "decay_steps: must be at least 0"),
            (0 <= self.final_lr_fraction <= 1, "final_lr_fraction: must be between 0 and 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential:
    """Multiplied by the same factor before every update, also the first (PixelCNN++, PixelSNAIL)."""

    kind: Literal["exponential"] = "exponential"
    factor: float
    """A little below 1."""

    def __post_init__(self) -> None:
        require(self, (0 < self.factor <= 1, "factor: must be above 0 and at most 1"))


Schedule = Noam | Rsqrt | Cosine | WarmupStableDecay | Exponential


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW; with weight_decay 0, Adam as in the paper."""

    name: Literal["adamw"] = "adamw"
    peak_lr: float
    """Highest learning rate of the schedule."""
    schedule: Schedule
    """How the learning rate changes from step to step."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) on matrices; vectors (norms, biases) have none."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per update of the exponential moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        _require_decay(self)
        _require_adam(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummedAdam:
    """Adam as in the code of PixelCNN++ and PixelSNAIL: of the gradients of a loss in nats that is summed over the
    images of an update, not averaged, and with eps inside the root: m / sqrt(v + eps)."""

    name: Literal["summed_adam"] = "summed_adam"
    peak_lr: float
    """Learning rate before it decays."""
    schedule: Schedule
    """How the learning rate changes from step to step."""
    beta1: float = 0.95
    beta2: float = 0.9995
    eps: float = 1e-8
    """Under the root, so that it is a squared gradient of the summed loss."""
    clip_grad_norm: float = 0.0
    """Largest global norm of the gradient of the mean loss in nats per sub-pixel; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per update of the exponential moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        _require_adam(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSProp:
    """RMSProp as in torch, without momentum: g / (sqrt(v) + eps), v an average of squared gradients. PixelRNN and
    Gated PixelCNN were trained with it."""

    name: Literal["rmsprop"] = "rmsprop"
    peak_lr: float
    """Highest learning rate of the schedule."""
    schedule: Schedule
    """How the learning rate changes from step to step."""
    decay: float = 0.99
    """Of the average of squared gradients, per update."""
    eps: float = 1e-8
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per update of the exponential moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        require(self, (0 <= self.decay < 1, "decay: must be at least 0 and below 1"))
        _require_usual(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon (Jordan et al. 2024), momentum that is made orthogonal, on the matrices of the layers, and AdamW on
    embeddings, head, norms and biases. Needs bf16 at zero_stage 1 or 3, or fp32 at 0 or 3."""

    name: Literal["muon"] = "muon"
    peak_lr: float
    """Highest learning rate of the schedule, of what AdamW updates."""
    muon_peak_lr: float
    """The same of the matrices that Muon updates, whose update has a spectral norm of about 1 before this factor. 0.02
    is usual."""
    schedule: Schedule
    """How both learning rates change from step to step."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors (norms, biases) have none."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per update of the exponential moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        require(self, (0 < self.muon_peak_lr < math.inf, "muon_peak_lr: must be above 0 and finite"))
        _require_decay(self)
        _require_adam(self)


OptimizerConfig = AdamW | SummedAdam | RMSProp | Muon


def _require_decay(optimizer: AdamW | Muon) -> None:
    require(optimizer, (0 <= optimizer.weight_decay < math.inf, "weight_decay: must be at least 0"))


def _require_adam(optimizer: AdamW | SummedAdam | Muon) -> None:
    require(
        optimizer,
        (0 <= optimizer.beta1 < 1, "beta1: must be at least 0 and below 1"),
        (0 <= optimizer.beta2 < 1, "beta2: must be at least 0 and below 1"),
    )
    _require_usual(optimizer)


def _require_usual(optimizer: OptimizerConfig) -> None:
    require(
        optimizer,
        (0 < optimizer.peak_lr < math.inf, "peak_lr: must be above 0 and finite"),
        (0 < optimizer.eps < math.inf, "eps: must be above 0"),
        (0 <= optimizer.clip_grad_norm < math.inf, "clip_grad_norm: must be at least 0"),
        (0 <= optimizer.ema_decay < 1, "ema_decay: must be at least 0 and below 1"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: int = 1000
    """Steps between two evaluations while training; the last step is always evaluated."""
    images: int | None = None
    """Validation images per evaluation while training; null takes all. The last one always takes all."""
    batch_images: int = 32
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
    url: str | None = None
    """Folder or URL (s3://bucket/prefix) of the checkpoints; null puts them into the run's folder."""
    every_steps: int = 1000
    """Steps between two checkpoints; the last step and a requested stop always write one."""
    keep_last: int = 2
    """Newest complete checkpoints kept; older ones are deleted after a newer one is complete."""
    keep_best: int = 1
    """Kept besides: so many checkpoints with the lowest validation bits/dim."""
    keep_every_steps: int = 0
    """Kept besides, for ever: checkpoints whose step is a multiple of this; 0 keeps none."""
    background: bool = True
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
    startup_seconds: float = 1800.0
    """Longest time from the start to the first step, compilation included; beyond it the job is taken for hung.
    Ranks that have not started after half of it, or after 10 minutes, are missing."""
    step_seconds: float = 900.0
    """Longest time of one update, or of one batch of an evaluation; more than ``data.read_deadline_seconds``, so that a
    store that is away is named as such."""
    checkpoint_seconds: float = 1800.0
    """Longest time of writing or reading a checkpoint."""
    lost_rank_seconds: float = 45.0
    """A rank that gives no sign of life for so long is lost, and the others end."""
    run_minutes: float | None = None
    """Stop with a checkpoint and exit code 75 after so many minutes; null sets no limit."""
    skipped_updates: int = 10
    """Updates in a row that may be skipped because a loss or a gradient is not finite. Then the run goes back to the
    last checkpoint once and leaves the images in between out; the second time it ends with exit code 76."""
    loss_spike: float = 6.0
    """Warn when the loss rises above its running mean by so many standard deviations; 0 never warns."""
    starts_without_progress: int = 3
    """End with exit code 70 at a start after so many that got no further than the one before."""
    replay_every_steps: int = 0
    """Every so many steps each rank computes one micro-batch twice. The run ends with exit code 81 if any bit of the
    loss or of a gradient differs; 0 never does."""

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
            (self.replay_every_steps >= 0, "replay_every_steps: must be at least 0"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    uri: str = "sqlite:///mlflow.db"
    """MLflow store: `sqlite:///mlflow.db` beside the command, or the http(s) URL of a tracking server."""
    experiment: str = "image_transformer"
    """MLflow experiment that the run belongs to."""
    required: bool = False
    """End with exit code 69 when MLflow does not answer at the start, instead of training without it."""
    sample_every_steps: int = 0
    """Steps between two grids of images drawn from the model; 0 draws none."""
    sample_images: int = 16
    """Images in such a grid."""
    code_changes: bool = True
    """Record in `repro/git.diff`, and in MLflow, how the checkout's files differ from its commit. Whoever may see the
    run may read these lines; keys of known forms in them are hidden."""
    system_metrics: bool = True
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
