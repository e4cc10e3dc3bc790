"""Does Muon train the matrices of layers on any number of ranks, and is refused where DeepSpeed's cannot be saved?"""

from pathlib import Path

import pytest

from tests.support.launch import SMALL_JOB, TINY_MODEL, curve, settings, train
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError
from trainer.memory import num_orthogonalised, state_bytes
from trainer.optimizer import orthogonalised_names

MUON: dict[str, object] = {
    "optimizer.name": "muon",
    "optimizer.peak_lr": 0.003,
    "optimizer.muon_peak_lr": 0.006,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad_norm": 0.0,
    "optimizer.ema_decay": 0.9,
}


def muon(stage: int, precision: str, **changes: object) -> RunConfig:
    values = TINY_MODEL | MUON | {"train.zero_stage": stage, "train.precision": precision}
    values |= {"train.global_batch_images": 8, "train.micro_batch_images": 4}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(SMALL_JOB, [f"{name}={value}" for name, value in values.items()])


def matrices(config: RunConfig) -> dict[str, int]:
    """Sizes of the parameters that Muon updates, by name."""
    model = config.model.build()
    names = orthogonalised_names(model, config.optimizer)
    return {name: p.numel() for name, p in model.named_parameters() if name in names}


def test_it_updates_the_matrices_of_layers_alone() -> None:
    parts = ("attention.qkv", "attention.out", "feed_forward.hidden", "feed_forward.out")
    names = {f"layers.{index}.{part}.weight" for index in (0, 1) for part in parts}
    assert matrices(muon(0, "fp32")).keys() == names


@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (1, "bf16")])
def test_two_ranks_give_the_curve_of_one_also_after_a_change_of_their_number(
    tmp_path: Path, splits: Path, stage: int, precision: str
) -> None:
    changes = MUON | {"train.zero_stage": stage, "train.precision": precision, "checkpoint.every_steps": 4}
    one = settings(tmp_path / "one", splits, **changes)
    two = settings(tmp_path / "two", splits, **changes | {"train.steps": 4})
    train(one)
    train(two, ranks=2)
    assert "going on from step-000000004" in train([*two, "--set", "train.steps=6"])
    expected = [value for _, value in curve(tmp_path / "one")]
    assert [value for _, value in curve(tmp_path / "two")] == pytest.approx(
        expected, abs=1e-5 if precision == "fp32" else 5e-3
    )
    scores = curve(tmp_path / "two", "val/bits_per_dim")
    assert scores[-1][1] < scores[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__zero_stage": 2}, "muon needs train.precision bf16 with train.zero_stage 1 or 3"),
        ({"train__zero_stage": 1, "train__precision": "fp32"}, "not fp32 with 1"),
        ({"train__precision": "fp16"}, "not fp16 with 1"),
        ({"train__offload_optimizer": "cpu"}, "muon needs train.offload_optimizer and train.offload_parameters none"),
        ({"train__zero_stage": 3, "optimizer__clip_grad_norm": 1.0}, "clip_grad_norm: must be 0 for muon"),
        ({"optimizer__muon_peak_lr": 0.0}, "muon_peak_lr: must be above 0 and finite"),
        ({"optimizer__name": "adamw", "optimizer__muon_peak_lr": 0.01}, "muon_peak_lr: adamw has no such key"),
    ],
)
def test_what_deepspeed_cannot_do_with_it_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        muon(1, "bf16", **changes)


def test_a_matrix_has_one_moment() -> None:
    config = muon(1, "bf16")
    assert num_orthogonalised(config) == sum(matrices(config).values())
    bytes_of = {
        stage: state_bytes(config, 10**6, "cuda", stage=stage, ranks=4, orthogonalised=600_000).optimizer
        for stage in (1, 3)
    }
    both = 8 * 10**6 + 8 * 400_000  # weights and average in fp32, and the rest's two moments
    assert bytes_of == {1: (both + 4 * 600_000) // 4, 3: (both + 2 * 600_000) // 4}
    assert num_orthogonalised(load_config(SMALL_JOB, [])) == 0
