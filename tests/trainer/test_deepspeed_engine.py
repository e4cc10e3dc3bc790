"""Does DeepSpeed compute what plain torch computes, at every stage, and does its state move between stages?"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import _get_build_directory

from models.given import NOTHING
from models.likelihood import MixtureOutput, nats
from models.model import Model, Recompute
from tests.support.launch import SMALL_JOB, TINY_MODEL
from tests.support.tiny_model import random_images
from trainer import deepspeed_engine
from trainer.config import RunConfig, load_config
from trainer.deepspeed_engine import DeepSpeedEngine, accumulation_steps, deepspeed_config
from trainer.engine import Engine, TorchEngine, Update
from trainer.errors import ConfigError
from trainer.optimizer import orthogonalised_names
from trainer.ranks import Ranks

MUON: dict[str, object] = {
    "optimizer.name": "muon",
    "optimizer.peak_lr": 0.003,
    "optimizer.muon_peak_lr": 0.006,
    "optimizer.clip_grad_norm": 0.0,
}
MUON_STAGES = [(0, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)


def tiny(stage: int, precision: str, **changes: object) -> RunConfig:
    values = TINY_MODEL | {
        "train.zero_stage": stage,
        "train.precision": precision,
        "train.global_batch_images": 8,
        "train.micro_batch_images": 4,
        "optimizer.weight_decay": 0.1,
        "optimizer.ema_decay": 0.9,
        **changes,
    }
    return load_config(SMALL_JOB, [f"{name}={value}" for name, value in values.items()])


def new_model(config: RunConfig) -> Model:
    torch.manual_seed(1)
    return config.model.build(config.train.recompute)


def losses(engine: Engine, steps: range) -> list[float]:
    """The loss of each step on batches that are a function of the step; every update must be made."""
    return [loss for loss, _ in updates(engine, steps)]


def updates(engine: Engine, steps: range) -> list[tuple[float, Update]]:
    """As `losses`, with what each update said."""
    engine.train(True)
    result = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, 256, (8, 8, 8, 3), generator=generator, dtype=torch.uint8) // 2
        total = 0.0
        for images in batch.chunk(2):
            loss = nats(MixtureOutput(), engine.forward(images, NOTHING), images).sum() / images.numel()
            engine.backward(loss)
            total += loss.item() / 2
        update = engine.update(0.003)
        assert update.outcome == "applied"
        result.append((total, update))
    return result


@pytest.fixture(scope="module")
def oracle() -> list[float]:
    """The first twenty losses of plain torch: fp32, nothing sharded, nothing recomputed."""
    config = tiny(0, "fp32", **{"train.activation_checkpoint_every_layers": 0})
    found = losses(TorchEngine(new_model(config), config), range(20))
    assert found[-1] < found[0] - 0.3  # the weights do move
    return found


@pytest.mark.parametrize(("every", "keeps_attention"), [(0, False), (1, False), (2, False), (1, True)])
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_every_stage_precision_and_recomputation_gives_the_losses_of_plain_torch(
    device: torch.device, oracle: list[float], stage: int, precision: str, every: int, keeps_attention: bool
) -> None:
    changes = {
        "train.activation_checkpoint_every_layers": every,
        "train.activation_checkpoint_keeps_attention": keeps_attention,
    }
    config = tiny(stage, precision, **changes)
    found = losses(DeepSpeedEngine(new_model(config), config, ALONE, device), range(20))
    # bf16 has 8 bits of mantissa: 0.4 % of a value, and of the loss.
    assert found == pytest.approx(oracle, **({"abs": 1e-5} if precision == "fp32" else {"rel": 0.004}))


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (1, "bf16"), (3, "bf16")])
def test_an_engine_is_built_without_a_word(
    device: torch.device, stage: int, precision: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(stage, precision)
    DeepSpeedEngine(new_model(config), config, ALONE, device)
    assert capfd.readouterr().out == ""


OTHERS: dict[str, dict[str, object]] = {
    "summed_adam": {"optimizer.name": "summed_adam", "optimizer.eps": 1e-2},
    "rmsprop": {"optimizer.name": "rmsprop", "optimizer.decay": 0.9, "optimizer.eps": 1e-6},
}
"""Optimizers of other families of models."""


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")])
def test_another_optimizer_gives_the_losses_of_plain_torch_at_every_stage(
    device: torch.device, stage: int, precision: str, name: str
) -> None:
    plain, config = tiny(0, "fp32", **OTHERS[name]), tiny(stage, precision, **OTHERS[name])
    expected = losses(TorchEngine(new_model(plain), plain), range(10))
    assert expected[-1] < expected[0] - 0.1
    found = losses(DeepSpeedEngine(new_model(config), config, ALONE, device), range(10))
    assert found == pytest.approx(expected, **({"abs": 1e-5} if precision == "fp32" else {"rel": 0.004}))


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 0), (0, 3), (3, 2)])
def test_rmsprop_goes_on_at_another_stage(device: torch.device, saved: int, loaded: int) -> None:
    config = tiny(saved, "fp32", **OTHERS["rmsprop"])
    first = DeepSpeedEngine(new_model(config), config, ALONE, device)
    losses(first, range(4))
    states = [(name, {key: value.clone() for key, value in state.items()}) for name, state in first.state()]
    assert all(state.keys() == {"weight", "square_avg", "ema"} for _, state in states)
    config = tiny(loaded, "fp32", **OTHERS["rmsprop"])
    second = DeepSpeedEngine(config.model.build(), config, ALONE, device)
    second.load_state(states, updates=4)
    assert losses(second, range(4, 8)) == pytest.approx(losses(first, range(4, 8)), abs=1e-5)


def test_fp16_on_a_machine_without_it_is_refused(device: torch.device) -> None:
    if deepspeed_engine.get_accelerator().is_fp16_supported():
        pytest.skip("this machine computes fp16")
    with pytest.raises(ConfigError, match=r"train\.precision: fp16 is not computed by this machine; take bf16"):
        DeepSpeedEngine(new_model(tiny(1, "fp16")), tiny(1, "fp16"), ALONE, device)


class AttentionCalls(TorchDispatchMode):
    """Counts how often attention is really computed: a mode around the one that hands out kept results."""

    count = 0

    def __torch_dispatch__(
        self, op: Any, types: object, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        self.count += "scaled_dot_product" in str(op) and "backward" not in str(op)
        return op(*arguments, **(keywords or {}))


def test_selective_recomputation_computes_attention_once() -> None:
    def calls(recompute: Recompute) -> int:
        model = tiny(0, "fp32").model.build(recompute).train()
        with AttentionCalls() as counter:
            model(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), NOTHING).sum().backward()
        return counter.count

    once = calls(Recompute())
    assert once > 0
    assert calls(Recompute(every=1)) == 2 * once
    assert calls(Recompute(every=1, keeps_attention=True)) == once


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")])
def test_an_update_with_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(
    device: torch.device, stage: int, precision: str
) -> None:
    config = tiny(stage, precision)
    engine = DeepSpeedEngine(new_model(config), config, ALONE, device)
    losses(engine, range(2))
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in engine.state()}
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    for factor in (float("nan"), 1.0):
        engine.backward(engine.forward(images, NOTHING).mean() * factor)
    assert engine.update(0.003).outcome == "skipped"
    for name, state in engine.state():
        assert all(torch.equal(before[name][key], value) for key, value in state.items()), name
    losses(engine, range(2, 3))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")])
def test_an_update_with_a_gradient_whose_square_is_not_finite_is_skipped_as_well(
    device: torch.device, stage: int, precision: str, clip: float
) -> None:
    """The gradient is finite, and Adam's second moment of it would be infinite for ever."""
    config = tiny(stage, precision, **{"optimizer.clip_grad_norm": clip})
    engine = DeepSpeedEngine(new_model(config), config, ALONE, device)
    losses(engine, range(2))
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in engine.state()}
    for factor in (1e32, 1.0):
        engine.backward(engine.forward(random_images(4, 8), NOTHING).mean() * factor)
    assert engine.update(0.003).outcome == "skipped"
    for name, state in engine.state():
        assert all(torch.equal(before[name][key], value) for key, value in state.items()), name
    losses(engine, range(2, 3))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_in_host_memory_gives_the_same_losses(device: torch.device, stage: int) -> None:
    config = tiny(stage, "bf16")
    oracle = losses(DeepSpeedEngine(new_model(config), config, ALONE, device), range(4))
    offloaded = tiny(
        stage,
        "bf16",
        **{"train.offload_optimizer": "cpu", "train.offload_parameters": "cpu" if stage == 3 else "none"},
    )
    engine = DeepSpeedEngine(new_model(offloaded), offloaded, ALONE, device)
    assert losses(engine, range(4)) == pytest.approx(oracle, abs=1e-3)
    states = [(name, {key: value.clone() for key, value in state.items()}) for name, state in engine.state()]
    second = DeepSpeedEngine(new_model(offloaded), offloaded, ALONE, device)
    second.load_state(states, updates=4)
    assert losses(second, range(4, 6)) == pytest.approx(losses(engine, range(4, 6)), abs=1e-3)


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    """A folder to offload to, where DeepSpeed's async_io is built: building it here would take minutes."""
    library = Path(_get_build_directory("async_io", verbose=False)) / "async_io.so"
    if not library.exists():
        command = 'python -c "from deepspeed.ops.op_builder.cpu import AsyncIOBuilder; AsyncIOBuilder().load()"'
        pytest.skip(f"DeepSpeed's async_io is not built; install libaio-dev, then run {command}")
    return tmp_path


@pytest.mark.parametrize(("optimizer", "parameters"), [("nvme", "none"), ("nvme", "nvme"), ("none", "nvme")])
def test_state_on_a_disk_gives_the_same_losses_and_goes_on(
    device: torch.device, nvme: Path, optimizer: str, parameters: str
) -> None:
    # DeepSpeed leaves tensors of less than 1 MiB where they are.
    large = {"model.width": 512, "model.attention_width": 512, "model.ff_width": 512}
    config = tiny(3, "bf16", **large)
    oracle = losses(DeepSpeedEngine(new_model(config), config, ALONE, device), range(6))
    offloading = {"train.offload_optimizer": optimizer, "train.offload_parameters": parameters}
    offloading |= {f"{name}.dir": str(nvme) for name, kind in offloading.items() if kind == "nvme"}
    config = tiny(3, "bf16", **large, **offloading)
    engine = DeepSpeedEngine(new_model(config), config, ALONE, device)
    assert losses(engine, range(4)) == pytest.approx(oracle[:4], abs=1e-4)
    assert sum(path.stat().st_size for path in nvme.rglob("*") if path.is_file()) > 1 << 20
    states = [(name, {key: value.clone() for key, value in state.items()}) for name, state in engine.state()]
    second = DeepSpeedEngine(config.model.build(), config, ALONE, device)
    second.load_state(states, updates=4)
    assert losses(second, range(4, 6)) == pytest.approx(oracle[4:], abs=1e-3)


@pytest.mark.parametrize(
    ("saved", "precision", "loaded"),
    [(0, "fp32", 2), (2, "fp32", 0), (1, "bf16", 1), (2, "bf16", 3), (3, "bf16", 1), (3, "fp32", 3)],
)
def test_state_goes_on_exactly_at_the_same_and_at_another_stage(
    device: torch.device, saved: int, precision: str, loaded: int
) -> None:
    first = DeepSpeedEngine(new_model(tiny(saved, precision)), tiny(saved, precision), ALONE, device)
    losses(first, range(4))
    states = [(name, {key: value.clone() for key, value in state.items()}) for name, state in first.state()]
    rest = losses(first, range(4, 8))

    torch.manual_seed(99)  # other first weights, which loading must replace
    config = tiny(loaded, precision)
    second = DeepSpeedEngine(config.model.build(), config, ALONE, device)
    second.load_state(states, updates=4)
    for (name, before), (_, after) in zip(states, second.state(), strict=True):
        assert before.keys() == after.keys() == {"weight", "exp_avg", "exp_avg_sq", "ema"}
        for key in before:
            assert torch.equal(before[key], after[key]), (name, key)
    # Another stage adds gradients in another order, which bf16 rounds now and then to the other side.
    assert losses(second, range(4, 8)) == pytest.approx(
        rest, abs=1e-6 if precision == "fp32" or saved == loaded else 1e-3
    )


def test_plain_torch_goes_on_from_deepspeeds_state(device: torch.device) -> None:
    config = tiny(2, "fp32")
    first = DeepSpeedEngine(new_model(config), config, ALONE, device)
    losses(first, range(4))
    states = [(name, {key: value.clone() for key, value in state.items()}) for name, state in first.state()]
    second = TorchEngine(config.model.build(), config)
    second.load_state(states, updates=4)
    assert losses(second, range(4, 8)) == pytest.approx(losses(first, range(4, 8)), abs=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_average_of_the_weights_is_that_of_torch(device: torch.device, stage: int) -> None:
    config = tiny(stage, "fp32")
    model = new_model(config)
    oracle = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    plain = new_model(config)
    torch_engine = TorchEngine(plain, config)
    engine = DeepSpeedEngine(model, config, ALONE, device)
    for step in range(5):
        losses(torch_engine, range(step, step + 1))
        oracle.update_parameters(plain)
        losses(engine, range(step, step + 1))
    expected = dict(oracle.module.named_parameters())
    for name, state in engine.state():
        torch.testing.assert_close(state["ema"], expected[name].detach(), atol=1e-5, rtol=0)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton-Schulz of Jordan et al. 2024: the singular vectors stay, singular values move to about 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon_by_hand(config: RunConfig, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, momenta and losses of a Muon written out."""
    model = new_model(config).train()
    weights = dict(model.named_parameters())
    momenta = {name: torch.zeros_like(weights[name]) for name in orthogonalised_names(model, config.optimizer)}
    rest = [(p.ndim >= 2, p) for name, p in weights.items() if name not in momenta]
    adam = torch.optim.AdamW(
        [
            {"params": [p for is_matrix, p in rest if is_matrix], "weight_decay": 0.1},
            {"params": [p for is_matrix, p in rest if not is_matrix], "weight_decay": 0.0},
        ],
        lr=0.003,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    seen = []
    for step in range(steps):
        model.zero_grad()
        images = random_images(8, 8, seed=step) // 2
        loss = nats(MixtureOutput(), model(images), images).sum() / images.numel()
        loss.backward()
        seen.append(loss.item())
        adam.step()
        with torch.no_grad():
            for name, momentum in momenta.items():
                gradient = weights[name].grad
                assert gradient is not None
                rows, columns = gradient.shape
                momentum.copy_(0.95 * momentum + 0.05 * gradient)
                update = orthogonalised(0.05 * gradient + 0.95 * momentum) * max(1.0, rows / columns) ** 0.5
                weights[name].copy_(weights[name] * (1 - 0.006 * 0.1) - 0.006 * update)
    return weights, momenta, seen


@pytest.mark.parametrize(("stage", "precision"), MUON_STAGES)
def test_muon_is_that_by_hand(device: torch.device, stage: int, precision: str) -> None:
    config = tiny(stage, precision, **MUON)
    weights, momenta, expected = muon_by_hand(config, 4)
    engine = DeepSpeedEngine(new_model(config), config, ALONE, device)
    # bf16 rounds weights and gradients to 8 bits.
    assert losses(engine, range(4)) == pytest.approx(expected, abs=1e-5 if precision == "fp32" else 0.02)
    assert expected[-1] < expected[0] - 0.02
    states = dict(engine.state())
    for name, momentum in momenta.items():
        assert states[name].keys() == {"weight", "momentum_buffer", "ema"}
        error = (states[name]["momentum_buffer"] - momentum).norm() / momentum.norm()
        assert error < (1e-5 if precision == "fp32" else 0.05)
    for name in weights.keys() - momenta.keys():
        assert states[name].keys() == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    if precision == "fp32":
        for name, weight in weights.items():
            torch.testing.assert_close(states[name]["weight"], weight.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("saved", "precision", "loaded"), [(0, "fp32", 3), (3, "fp32", 0), (1, "bf16", 1), (1, "bf16", 3), (3, "bf16", 3)]
)
def test_muon_goes_on_exactly_at_the_same_and_at_another_stage(
    device: torch.device, saved: int, precision: str, loaded: int
) -> None:
    config = tiny(saved, precision, **MUON)
    first = DeepSpeedEngine(new_model(config), config, ALONE, device)
    losses(first, range(4))
    states = [(name, {key: value.clone() for key, value in state.items()}) for name, state in first.state()]
    rest = losses(first, range(4, 8))
    config = tiny(loaded, precision, **MUON)
    second = DeepSpeedEngine(config.model.build(), config, ALONE, device)
    second.load_state(states, updates=4)
    # Stage 3 keeps the momentum in the precision of the gradients.
    rounded = 2**-8 if (saved, loaded, precision) == (1, 3, "bf16") else 0.0
    for (_, before), (_, after) in zip(states, second.state(), strict=True):
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key].float(), before[key].float(), rtol=rounded, atol=0)
    assert losses(second, range(4, 8)) == pytest.approx(
        rest, abs=1e-3 if rounded else 1e-5 if precision == "fp32" else 1e-6
    )


@pytest.mark.parametrize(("stage", "precision"), MUON_STAGES)
def test_muon_skips_an_update_with_a_gradient_that_is_not_finite(
    device: torch.device, stage: int, precision: str
) -> None:
    config = tiny(stage, precision, **MUON)
    engine = DeepSpeedEngine(new_model(config), config, ALONE, device)
    losses(engine, range(2))
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in engine.state()}
    for factor in (float("nan"), 1.0):
        engine.backward(engine.forward(random_images(4, 8), NOTHING).mean() * factor)
    assert engine.update(0.003).outcome == "skipped"
    for name, state in engine.state():
        assert all(torch.equal(before[name][key], value) for key, value in state.items()), name
    losses(engine, range(2, 3))


@pytest.mark.parametrize("stage", [0, 2])
def test_the_gradient_norm_is_that_of_plain_torch(device: torch.device, stage: int) -> None:
    config = tiny(stage, "fp32")
    oracle, engine = TorchEngine(new_model(config), config), DeepSpeedEngine(new_model(config), config, ALONE, device)
    norms, expected = ([update.gradient_norm for _, update in updates(e, range(2))] for e in (engine, oracle))
    assert norms == pytest.approx(expected, rel=1e-4)


def test_muons_gradient_norm_is_not_told_at_stage_3(device: torch.device) -> None:
    config = tiny(3, "fp32", **MUON)  # DeepSpeed's is that of the orthogonalised update there
    [(_, update)] = updates(DeepSpeedEngine(new_model(config), config, ALONE, device), range(1))
    assert update.gradient_norm is None


def test_an_update_before_all_micro_batches_are_there_is_refused(device: torch.device) -> None:
    config = tiny(2, "fp32")
    engine = DeepSpeedEngine(new_model(config), config, ALONE, device)
    engine.train(True)
    for _ in range(engine.accumulation_steps - 1):
        with pytest.raises(AssertionError, match="after accumulation_steps backward passes"):
            engine.update(0.003)
        engine.backward(engine.forward(random_images(4, 8), NOTHING).mean())
    engine.backward(engine.forward(random_images(4, 8), NOTHING).mean())
    assert engine.update(0.003).outcome == "applied"


def test_one_function_writes_deepspeeds_configuration() -> None:
    written = deepspeed_config(tiny(2, "bf16"), world_size=2)
    assert written["train_batch_size"] == 8
    assert written["train_micro_batch_size_per_gpu"] * written["gradient_accumulation_steps"] * 2 == 8
    assert written["bf16"] == {"enabled": True}
    assert written["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in deepspeed_config(tiny(0, "fp32"), world_size=1)
    assert deepspeed_config(tiny(1, "fp16"), world_size=1)["fp16"]["loss_scale"] == 0


def test_a_batch_that_does_not_divide_is_refused_with_batches_that_would() -> None:
    with pytest.raises(ConfigError, match=r"8 is not a multiple of 3 ranks x .* 4 = 12; 12 would be"):
        accumulation_steps(tiny(1, "fp32"), world_size=3)
