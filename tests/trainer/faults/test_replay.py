"""Is a device that computes wrongly found before the optimizer sees its gradient, and is nothing else changed by it?"""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import sabotage
from tests.support.launch import curve, finish, settings, start, train
from trainer.errors import IRREPRODUCIBLE, Irreproducible, code_of
from trainer.faults.replay import LOSS, compare, gradient_checksums, random_state_kept
from trainer.faults.replicas import checksum

HOST = os.uname().nodename
CHANGES = {
    "train__steps": 8,
    "train__global_batch_images": 16,  # two micro-batches a rank
    "model__dropout": 0.1,
    "checkpoint__every_steps": 4,
    "tracking__system_metrics": False,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, splits: Path) -> list[tuple[int, float]]:
    """The curve of a run without replay: ZeRO 2, two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder / "run", splits, **CHANGES), ranks=2)
    return curve(folder / "run")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_computes_wrongly_is_named_before_the_update(
    tmp_path: Path, splits: Path, undisturbed: list[tuple[int, float]], stage: int
) -> None:
    arguments = settings(tmp_path / "run", splits, **CHANGES, train__zero_stage=stage, limits__replay_every_steps=1)
    ranks = start(arguments, ranks=2, sabotage={1: sabotage.a_gradient_is_computed_wrongly})
    code, text = finish(ranks)
    assert (code, ranks[1].returncode) == (81, 81), text
    where = f"rank 1 on {HOST} (the gradient of {sabotage.TENSOR})"
    assert f"error: step 6: the same micro-batch, computed twice, gave different results on {where}: " in text
    recorded = curve(tmp_path / "run")
    assert [step for step, _ in recorded] == [1, 2, 3, 4, 5]
    if stage == 2:  # replay changes no bit of the training, dropout included
        assert recorded == undisturbed[:5]
    for (_, one), (_, other) in zip(recorded, undisturbed[:5], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    # The same command goes on from the checkpoint of step 4. Nothing is wrong any more, and nothing is found.
    if stage == 2:
        train(arguments, ranks=2)
        for (_, one), (_, other) in zip(curve(tmp_path / "run"), undisturbed, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_a_fault_is_found_and_none_is_imagined_in_bf16_with_recomputed_layers(tmp_path: Path, splits: Path) -> None:
    changes = {"train__precision": "bf16", "train__activation_checkpoint_every_layers": 1}
    arguments = settings(tmp_path / "run", splits, **CHANGES, **changes, limits__replay_every_steps=1)
    code, text = finish(start(arguments, ranks=1, sabotage={0: sabotage.a_gradient_is_computed_wrongly}))
    assert code == 81, text
    assert f"error: step 6: the same micro-batch, computed twice, gave different results on rank 0 on {HOST} (" in text
    assert f"(the gradient of {sabotage.TENSOR})" in text
    assert [step for step, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_gradients_are_seen_as_they_arrive_and_can_be_discarded() -> None:
    layer = nn.Linear(3, 2)
    inputs = torch.arange(3.0)
    with gradient_checksums(layer.named_parameters(), discard=True) as discarded:
        found = torch.autograd.grad(layer(inputs).sum(), list(layer.parameters()))
    assert all(gradient.stride() == (0,) * gradient.ndim for gradient in found)  # no memory
    with gradient_checksums(layer.named_parameters()) as kept:
        layer(inputs).sum().backward()
    assert layer.weight.grad is not None
    assert discarded.keys() == kept.keys() == {"weight", "bias"}
    assert all(torch.equal(discarded[name], kept[name]) for name in kept)
    assert torch.equal(kept["weight"], checksum(torch.arange(3.0).expand(2, 3)))
    kept.clear()
    layer(inputs).sum().backward()
    assert not kept  # the hooks are gone


def test_what_differs_is_named() -> None:
    one = {LOSS: torch.tensor(1), "a": torch.tensor(2), "b": torch.tensor(3)}
    compare(4, one, dict(one))
    with pytest.raises(Irreproducible, match=r"step 5: .* on rank 0 on \S+ \(the loss\): ") as caught:
        compare(4, one, one | {LOSS: torch.tensor(0)})
    assert code_of(caught.value) == IRREPRODUCIBLE == 81
    with pytest.raises(Irreproducible, match=r"\(the loss and the gradient of a and 1 other tensor\)"):
        compare(4, one, {LOSS: torch.tensor(0), "a": torch.tensor(0)})


def test_the_random_generator_is_given_back() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with random_state_kept(torch.device("cpu")):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)
