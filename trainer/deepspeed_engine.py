"""How does our config become a DeepSpeed engine, and how are DeepSpeed's traps avoided?"""

import importlib
import logging
import math
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from data_pipeline.wording import counted
from models.given import Given
from models.model import Model
from trainer.config import RunConfig
from trainer.engine import State, Update, subpixels_per_update
from trainer.errors import ConfigError
from trainer.memory import reduce_bucket_elements
from trainer.model_inputs import blank_inputs
from trainer.optimizer import build_optimizer, keep_ema, orthogonalised_names, state_names
from trainer.options import AdamW, Muon, NvmeOffload
from trainer.ranks import Ranks

MUON_MOMENTUM = 0.95


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The one place where DeepSpeed's configuration is written; raises ConfigError if the batch does not divide."""
    train = config.train
    on_gpu = get_accelerator().device_name() == "cuda"
    dictionary: dict[str, Any] = {
        "train_batch_size": train.global_batch_images,
        "train_micro_batch_size_per_gpu": train.micro_batch_images,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "steps_per_print": 2**62,  # our own progress line replaces DeepSpeed's
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": on_gpu and train.zero_stage >= 2,
            # DeepSpeed's default allocates gigabytes even for a small model.
            "reduce_bucket_size": reduce_bucket_elements(config.model.account().parameters),
        },
    }
    for what, where in (("offload_optimizer", train.offload_optimizer), ("offload_param", train.offload_parameters)):
        if where.kind != "none":
            block = {"device": where.kind, "pin_memory": on_gpu}
            dictionary["zero_optimization"][what] = block | (
                {"nvme_path": where.dir} if isinstance(where, NvmeOffload) else {}
            )
            if what == "offload_optimizer" and where.kind == "nvme":
                # One buffer each for the weights, the gradient, two moments and, if one is kept, the average.
                dictionary["zero_optimization"][what]["buffer_count"] = 5 if config.optimizer.ema_decay else 4
            # We use torch's fused AdamW, as everywhere; DeepSpeed would compile its own one at the first start.
            dictionary["zero_force_ds_cpu_optimizer"] = False
    if not isinstance(config.optimizer, AdamW | Muon):
        # DeepSpeed lets ZeRO hand its flat shards only to optimizers that it knows, unless told so. Ours treat each
        # number alike.
        dictionary["zero_allow_untested_optimizer"] = True
    if isinstance(config.optimizer, Muon):
        dictionary["zero_optimization"]["reduce_scatter"] = False  # stage 3 requires this: matrices are reduced whole
    if train.precision == "bf16":
        # Micro-batch gradients are added in fp32: in bf16, 8 bits of mantissa lose the small ones.
        dictionary |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if train.precision == "fp16":
        dictionary |= {"fp16": {"enabled": True, "loss_scale": 0}}  # 0: dynamic
    return dictionary


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per rank and update; raises ConfigError naming batch sizes that would divide."""
    train = config.train
    images = train.micro_batch_images * world_size
    if train.global_batch_images % images == 0:
        return train.global_batch_images // images
    below = train.global_batch_images // images * images
    choices = " or ".join(str(choice) for choice in (below, below + images) if choice)
    raise ConfigError(
        f"train.global_batch_images: {train.global_batch_images} is not a multiple of {counted(world_size, 'rank')} x "
        f"train.micro_batch_images {train.micro_batch_images} = {images}; {choices} would be"
    )


def check_offloading(config: RunConfig) -> None:
    """Raise ConfigError if something is offloaded to NVMe and DeepSpeed cannot build its code for that here."""
    train = config.train
    offloaded = {"offload_optimizer": train.offload_optimizer, "offload_parameters": train.offload_parameters}
    where = [f"train.{name}" for name, place in offloaded.items() if place.kind == "nvme"]
    built: Any = importlib.import_module("deepspeed.git_version_info")
    if not where or built.installed_ops.get("async_io"):
        return
    program = "#include <libaio.h>\nint main() { return io_submit(nullptr, 0, nullptr); }"
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", "-o", f"{folder}/program", "-laio"]
        try:
            done = subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0
        except OSError:
            done = False
    if not done:
        raise ConfigError(
            f"{' and '.join(where)}: nvme needs a C++ compiler and the package libaio-dev on every machine, and "
            f"{compiler} cannot build a program with libaio here; install them, or choose cpu"
        )


def init_distributed(timeout: timedelta, local_rank: int) -> torch.device:
    """Join the other ranks and return this rank's device; each collective waits for `timeout`, then raises.

    Avoids three traps of DeepSpeed 0.19. Its groups ignore the timeout that they are given, and take 30 minutes. On a
    CPU it compiles an inference operator at start. That takes minutes, training never uses it, and it waits for ever on
    the lock of a build that was killed. And all of this is logged, or printed: bf16 at stage 1 says eight times how
    much memory is used.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's collectives use deprecated parts of torch. A user of the trainer can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    # Not `import deepspeed.comm.torch as ...`: that yields torch itself, which the package re-exports.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout=timeout)
    importlib.import_module("deepspeed.runtime.bf16_optimizer").see_memory_usage = lambda *_, **__: None  # type: ignore[attr-defined]
    get_accelerator().set_device(local_rank)
    if get_accelerator().device_name() == "cpu":
        backend.build_shm_op = lambda: None
        # Muon's arithmetic is not compiled: that would take a minute in the first step even of a small model.
        compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
        compiler.compile = lambda: lambda function: function
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)
    return torch.device(get_accelerator().device_name(local_rank))


def build_muon(model: Model, config: Muon) -> torch.optim.Optimizer:
    """DeepSpeed's Muon on the matrices of the model's units and AdamW on the rest, both with decoupled weight decay.

    A plain optimizer would see ZeRO's flat shards. For parameters with the attribute `use_muon` DeepSpeed puts the
    matrices together, orthogonalises their updates, and hands the optimizer its share of each.
    """
    # Imported only when it is needed, because it loads torch's compiler.
    muon: Any = importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    names = orthogonalised_names(model, config)
    muons: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_muons = name in names
        parameter.use_muon, parameter.muon_num_heads = is_muons, None  # type: ignore[attr-defined]
        (muons if is_muons else matrices if parameter.ndim >= 2 else vectors).append(parameter)
    adam = {"use_muon": False, "lr": config.peak_lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    groups = [
        {
            "params": muons,
            "use_muon": True,
            "lr": config.muon_peak_lr,
            "momentum": MUON_MOMENTUM,
            "weight_decay": config.weight_decay,
        },
        {"params": matrices, "weight_decay": config.weight_decay, **adam},
        {"params": vectors, "weight_decay": 0.0, **adam},
    ]
    optimizer: torch.optim.Optimizer = muon.MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True}
    )
    if config.ema_decay:
        keep_ema(optimizer, config.ema_decay)
    return optimizer


def skip_what_overflows(zero: Any) -> None:
    """Let stage 3 skip updates of which a gradient's square is too large for fp32, as the other stages do.

    It computes norms in fp64, and takes such a gradient for a good one. Adam keeps squares in fp32: an infinite one
    stays for ever, and that weight is never changed again.
    """
    norms_of_groups = zero._get_norm_groups

    def norms() -> list[Tensor]:
        # Of a negative norm DeepSpeed knows that it is not valid.
        return [torch.where(norm.float().square().isfinite(), norm, -1.0) for norm in norms_of_groups()]

    zero._get_norm_groups = norms


class DeepSpeedEngine:
    """ZeRO 0-3 in fp32, bf16 or fp16. State goes in and out as full fp32 tensors: they fit any stage and world size."""

    def __init__(self, model: Model, config: RunConfig, ranks: Ranks, device: torch.device) -> None:
        """Collective. Raises ConfigError for a precision that this kind of device does not compute."""
        if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError("train.precision: fp16 is not computed by this machine; take bf16 or fp32")
        self.device = device
        self.accumulation_steps = accumulation_steps(config, ranks.world_size)
        if config.train.compile:
            for unit in model.units():
                unit.compile()
        muons = orthogonalised_names(model, config.optimizer)
        self._state_names = {name: state_names(name in muons, config.optimizer) for name, _ in model.named_parameters()}
        self._optimizer: torch.optim.Optimizer
        if isinstance(config.optimizer, Muon):
            self._optimizer = build_muon(model, config.optimizer)
            self._muon_lr_ratio = config.optimizer.muon_peak_lr / config.optimizer.peak_lr
        else:
            self._optimizer = build_optimizer(model, config.optimizer, subpixels_per_update(config))
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=deepspeed_config(config, ranks.world_size)
        )
        if config.train.zero_stage == 3:
            skip_what_overflows(self._engine.optimizer)
        self._sharded = config.train.zero_stage > 0
        self._norm_is_of_updates = isinstance(config.optimizer, Muon) and config.train.zero_stage == 3
        self._replicated = config.train.zero_stage < 3
        self._fp16 = config.train.precision == "fp16"
        self._blank = blank_inputs(config.model, device)

    def forward(self, images: Tensor, given: Given) -> Tensor:
        parameters: Tensor = self._engine(images, given)
        return parameters

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # DeepSpeed wants it after every micro-batch; here it only counts

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        named: Iterator[tuple[str, nn.Parameter]] = self._engine.module.named_parameters()
        return named

    def recompute(self, images: Tensor, given: Given, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        # Beside the engine: what it does around a forward and a backward pass would add the gradients.
        loss = loss_of(self._engine.module(images, given))
        scaled = loss / self.accumulation_steps
        if isinstance(self._engine.optimizer, ZeROOptimizer):
            scaled = self._engine.optimizer.scale_if_loss(scaled)
        torch.autograd.grad(scaled, [parameter for _, parameter in self.parameters()], allow_unused=True)
        return loss.detach()

    def update(self, learning_rate: float) -> Update:
        assert self._engine.is_gradient_accumulation_boundary(), "update comes after accumulation_steps backward passes"
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * (self._muon_lr_ratio if group.get("use_muon") else 1.0)
        if not self._sharded:
            return self._update_unsharded()
        self._engine.step()
        norm = None if self._norm_is_of_updates else float(self._engine.get_global_grad_norm())
        if self._engine.was_step_applied():
            return Update("applied", norm)
        searching = self._fp16 and float(self._engine.optimizer.loss_scale) > 1
        return Update("rescaled" if searching else "skipped", norm)

    def _update_unsharded(self) -> Update:
        """Stage 0: DeepSpeed does not tell the norm and does not skip an update that would destroy the weights."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self._engine.step()
            return Update("applied", norm)
        self._engine.zero_grad()
        self._engine.micro_steps += 1  # all else that `step` counts is for DeepSpeed's schedules and monitors: unused
        return Update("skipped", norm)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        if self._replicated:
            yield from self._engine.module.named_parameters()

    def state(self) -> Iterator[tuple[str, State]]:
        self._link_optimizer_state()
        for name, parameter in self._engine.module.named_parameters():
            if self._sharded:
                state = {"weight": safe_get_full_fp32_param(parameter)}
                state |= {key: safe_get_full_optimizer_state(parameter, key) for key in self._moments(name)}
            else:
                stored = self._optimizer.state[parameter]
                state = {"weight": parameter.detach()} | {key: stored[key] for key in self._moments(name)}
            yield name, state

    def load_state(self, states: Iterable[tuple[str, State]], updates: int) -> None:
        self._create_optimizer_state()
        parameters = dict(self._engine.module.named_parameters())
        for name, state in states:
            parameter = parameters[name]
            state = {key: value.to(self.device) for key, value in state.items()}
            weight = state.pop("weight")
            # These are the weights that the model computes with; `safe_set_full_fp32_param` sets only the master copy.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(weight)
            if self._sharded:
                safe_set_full_fp32_param(parameter, weight)
            for key, value in state.items():
                if self._sharded:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    self._optimizer.state[parameter][key].copy_(value)
        for stored in self._optimizer.state.values():
            if "step" in stored:  # Muon counts no updates
                stored["step"].fill_(updates)

    def _moments(self, name: str) -> list[str]:
        """Names of the optimizer's tensors of a parameter; none before the first update."""
        return self._state_names[name] if any(self._optimizer.state.values()) else []

    def _create_optimizer_state(self) -> None:
        """Update once on a blank image at learning rate 0: DeepSpeed creates optimizer state only then."""
        for _ in range(self.accumulation_steps):
            self.backward(self.forward(*self._blank).sum() * 0.0)
        self.update(0.0)
        self._link_optimizer_state()

    def _link_optimizer_state(self) -> None:
        """Let the `safe_*` functions find the optimizer state of every parameter group.

        DeepSpeed 0.19 links all groups right after the first group's update, when the others have no state yet.
        """
        zero = self._engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
