"""Does the training loop make the updates it should, and does it answer what comes up between them?

In this process, with the plain torch engine: no launcher, no DeepSpeed (see tests/support/training_job.py).
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.storage import DataError, Store
from tests.support.training_job import VALIDATION_IMAGES, BrokenEngine, config_of, job_of, new_model, pictures
from trainer import loop
from trainer.checkpoint import Checkpoint, read_weights
from trainer.config import RunConfig
from trainer.engine import TorchEngine
from trainer.errors import CheckpointError, Diverged, Superseded, code_of
from trainer.loop import TrainingState, train

# Bits per dimension and gradient norm at each of the twenty steps of `config_of`, and the two evaluations.
# How they were made: on a CPU, in fp32, by printing `recorded.curve(...)` in the test below. With the
# original's rule for improbable bins, which the likelihood had before its bins were exact, the first loss was 10.532292
# and the last 7.938911; no loss differs by more than 6e-5.
# What the tolerances must bear: kernels without vector instructions (ATEN_CPU_CAPABILITY=default) differ by 7e-7; first
# weights that are changed by a millionth, by 7e-6. What they must see: without weight decay the losses differ by 1e-4;
# with a learning rate that is wrong by 1 %, by 2e-2.
LOSSES = [
    10.532253, 10.985696, 10.697274, 10.915110, 10.018741, 9.842374, 8.754783, 8.888957, 8.779616, 9.151213,
    9.072945, 8.507757, 8.410749, 8.223887, 8.209960, 7.910074, 8.573761, 8.297251, 8.172599, 7.938906,
]  # fmt: skip
GRADIENT_NORMS = [
    10.790617, 9.539314, 9.331144, 8.097475, 7.326596, 5.487898, 3.245425, 4.334388, 4.803422, 5.431980,
    5.176653, 5.922728, 4.936014, 4.889356, 4.123574, 3.644867, 4.304585, 3.521597, 3.652423, 3.224904,
]  # fmt: skip
VALIDATION = [(0, 11.365229), (20, 7.967217)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the numbers were made, on a machine with GPUs, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def broken(config: RunConfig, *, losses: set[int] = frozenset(), gradients: set[int] = frozenset()) -> BrokenEngine:
    return BrokenEngine(new_model(config), config, losses=losses, gradients=gradients)


def weights_of(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: state["weight"].clone() for name, state in engine.state()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def saved_in(folder: Path, last: int = 1) -> tuple[Checkpoint, ...]:
    """The undamaged checkpoints of a run, newest first, so many at most."""
    return read_weights(str(folder / "checkpoints"), "avg", last).checkpoints


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/*/manifest.json"))


def test_twenty_steps_give_the_losses_that_were_recorded(tmp_path: Path) -> None:
    config, state = config_of(tmp_path), TrainingState()
    job, recorded = job_of(config)
    assert train(job, state)
    assert (state.step, state.updates, state.samples) == (20, 20, 160)
    assert [step for step, _ in recorded.curve("train/bits_per_dim")] == list(range(1, 21))
    assert [value for _, value in recorded.curve("train/bits_per_dim")] == pytest.approx(LOSSES, abs=1e-5)
    assert [value for _, value in recorded.curve("optim/grad_norm")] == pytest.approx(GRADIENT_NORMS, abs=3e-5)
    for (step, value), (expected_step, expected) in zip(recorded.curve("val/bits_per_dim"), VALIDATION, strict=True):
        assert (step, value) == (expected_step, pytest.approx(expected, abs=1e-5))
    rates = [value for _, value in recorded.curve("optim/lr")]
    assert rates[:5] == pytest.approx([0.0008, 0.0016, 0.0024, 0.0032, 0.004])
    assert rates[-1] == pytest.approx(0.05 * 0.004)
    assert not recorded.events
    checkpoint = saved_in(tmp_path)[0]
    assert (checkpoint.step, checkpoint.updates, checkpoint.samples) == (20, 20, 160)
    assert checkpoint.bits_per_dim == recorded.curve("val/bits_per_dim")[-1][1]


def test_a_gradient_that_is_not_finite_skips_one_update_and_training_goes_on(tmp_path: Path) -> None:
    config, state = config_of(tmp_path, train__steps=5, checkpoint__every_steps=3), TrainingState()
    job, recorded = job_of(config, broken(config, gradients={3}))
    assert train(job, state)
    assert (state.step, state.updates, state.samples) == (5, 4, 40)
    assert recorded.curve("optim/skipped_updates") == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert [step for step, _ in recorded.curve("optim/grad_norm")] == [1, 2, 4, 5]
    # The batch of the skipped update is seen, and its weights are those of the step before.
    losses = [value for _, value in recorded.curve("train/bits_per_dim")]
    assert losses[:3] == pytest.approx(LOSSES[:3], abs=1e-5)
    assert losses[3] != pytest.approx(LOSSES[3], abs=1e-3)
    text = "step 3: a gradient is not finite; the update is skipped (training images 16-24)"
    assert recorded.events == [(3, "skipped_update", text, {"first_sample": 16, "end_sample": 24, "ranks": []})]
    # Nobody knows which micro-batch it was: both are kept.
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == [
        "step-000000003-rank-00000-0.safetensors", "step-000000003-rank-00000-1.safetensors"
    ]  # fmt: skip
    assert checkpoint_steps(tmp_path) == [5]  # that of step 3 is left out: the last ones stay for going back
    assert saved_in(tmp_path)[0].updates == 4


def test_a_loss_that_is_not_finite_names_the_rank_and_keeps_the_batch(tmp_path: Path) -> None:
    config = config_of(tmp_path, train__steps=3)
    job, recorded = job_of(config, broken(config, losses={2}))
    assert train(job, TrainingState())
    ((step, name, text, fields),) = recorded.events
    assert (step, name, fields["ranks"]) == (2, "skipped_update", [0])
    assert "the loss of rank 0 is not finite" in text
    (kept,) = (tmp_path / "skipped").iterdir()  # the second micro-batch, which went wrong
    assert kept.name == "step-000000002-rank-00000-0.safetensors"
    assert torch.equal(safetensors.torch.load_file(kept)["images"], pictures(12, 4))
    assert [step for step, _ in recorded.curve("train/bits_per_dim")] == [1, 3]


def test_a_requested_stop_leaves_a_checkpoint_from_which_the_same_losses_follow(tmp_path: Path) -> None:
    config, state = config_of(tmp_path), TrainingState()
    job, _ = job_of(config, stop=lambda: state.step == 7)
    assert not train(job, state)
    assert (state.step, state.samples) == (7, 56)
    (checkpoint,) = saved_in(tmp_path)
    assert (checkpoint.step, checkpoint.updates, checkpoint.samples) == (7, 7, 56)
    assert checkpoint.bits_per_dim is None

    torch.manual_seed(99)  # other first weights, which loading must replace
    engine = TorchEngine(new_model(config), config)
    job, recorded = job_of(config, engine, consumed=checkpoint.samples)
    loaded = job.checkpoints.newest(print)
    assert loaded is not None
    loaded.put_into(engine)
    assert train(job, TrainingState(checkpoint.step, checkpoint.updates, checkpoint.samples))
    assert [value for _, value in recorded.curve("train/bits_per_dim")] == pytest.approx(LOSSES[7:], abs=1e-5)
    assert [step for step, _ in recorded.curve("val/bits_per_dim")] == [20]  # no first evaluation once more


def no_space(monkeypatch: pytest.MonkeyPatch, folder: str, tries: int) -> list[str]:
    """Let so many writes into a checkpoint's folder fail; returns what was tried."""
    write, tried = Store.write_pieces, []

    def write_or_fail(self: Store, name: str, pieces: Any) -> int:
        if name.startswith(folder):
            tried.append(name)
            if len(tried) <= tries:
                raise DataError("the disk is full")
        return write(self, name, pieces)

    monkeypatch.setattr(Store, "write_pieces", write_or_fail)
    monkeypatch.setattr(loop, "FINISHED_PATIENCE_SECONDS", 3.5)
    monkeypatch.setattr(loop, "STOPPED_PATIENCE_SECONDS", 3.5)
    return tried


def test_the_last_checkpoint_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = no_space(monkeypatch, "step-000000004", 2)
    job, _ = job_of(config_of(tmp_path, train__steps=4))
    assert train(job, TrainingState())
    assert len(tried) == 3 and checkpoint_steps(tmp_path) == [4]


@pytest.mark.parametrize("background", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_with_the_step_that_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    tried = no_space(monkeypatch, "step-000000004", 100)
    changes = {"train__steps": 4, "checkpoint__every_steps": 3, "checkpoint__background": background}
    job, _ = job_of(config_of(tmp_path, **changes))
    says = "^all steps are done, but .* step 4 cannot be written: the disk is full; .* from step 3, which is safe$"
    with pytest.raises(CheckpointError, match=says) as caught:
        train(job, TrainingState())
    assert code_of(caught.value) == 74
    assert len(tried) > 1 and checkpoint_steps(tmp_path) == [3]


def test_a_requested_stop_that_cannot_save_says_from_where_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_space(monkeypatch, "step-000000005", 100)
    state = TrainingState()
    job, _ = job_of(config_of(tmp_path, checkpoint__every_steps=3), stop=lambda: state.step == 5)
    assert not train(job, state)
    assert state.unsaved is not None and "the same command goes on from step 3" in state.unsaved
    assert checkpoint_steps(tmp_path) == [3]


def test_a_stop_in_the_last_evaluation_leaves_the_score_to_the_next_attempt(tmp_path: Path) -> None:
    config, state = config_of(tmp_path, train__steps=3), TrainingState()
    job, _ = job_of(config, stop=lambda: state.step == 3)
    assert not train(job, state)
    (checkpoint,) = saved_in(tmp_path)
    assert (checkpoint.step, checkpoint.bits_per_dim) == (3, None)
    job, recorded = job_of(config, job.engine, consumed=24)
    assert train(job, state)
    assert not recorded.curve("train/bits_per_dim")
    (checkpoint,) = saved_in(tmp_path)
    assert recorded.curve("val/bits_per_dim") == [(3, checkpoint.bits_per_dim)]


def test_an_attempt_that_is_superseded_ends_unsaved(tmp_path: Path) -> None:
    config, state = config_of(tmp_path, checkpoint__every_steps=2), TrainingState()
    job, recorded = job_of(config, superseded=lambda: state.step == 5, stop=lambda: state.step == 5)
    with pytest.raises(Superseded, match="a newer attempt at this run has taken over"):
        train(job, state)
    assert state.step == 5
    assert checkpoint_steps(tmp_path) == [2, 4]


def test_several_skipped_updates_in_a_row_go_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    changes = {"train__steps": 12, "checkpoint__every_steps": 4, "limits__skipped_updates": 3}
    config, state = config_of(tmp_path, **changes), TrainingState()
    engine = broken(config, gradients={6, 7, 8})
    saved: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def look() -> bool:  # at the end of every step, and in evaluations
        if state.step == 4:
            saved.update(weights_of(engine))
        if state.step == 5:
            assert not same(saved, weights_of(engine))
        if state.step == 8:
            found.update(weights_of(engine))
        return False

    job, recorded = job_of(config, engine, stop=look)
    assert train(job, state)
    assert same(saved, found)
    # The update of step 5 was taken back; position and samples went on.
    assert (state.step, state.updates, state.samples) == (12, 4 + 4, 96)
    assert [name for _, name, _, _ in recorded.events] == ["skipped_update"] * 3 + ["roll_back"]
    step, _, text, fields = recorded.events[-1]
    assert (step, fields) == (8, {"checkpoint": "step-000000004"})
    assert text == (
        "step 8: back to the weights of step-000000004 after 3 skipped updates; training images 32-64 are left out"
    )


def test_skipped_updates_without_a_checkpoint_to_go_back_to_end_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, limits__skipped_updates=3)
    job, _ = job_of(config, broken(config, losses={2, 3, 4}))
    with pytest.raises(Diverged, match="3 updates in a row, up to step 4, had a loss or a gradient that is not finite"):
        train(job, TrainingState())
    assert checkpoint_steps(tmp_path) == []


def test_trouble_that_comes_back_after_going_back_ends_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint__every_steps=2, limits__skipped_updates=2)
    job, recorded = job_of(config, broken(config, gradients={3, 4, 6, 7}))
    with pytest.raises(Diverged, match="up to step 7"):
        train(job, TrainingState())
    assert [name for _, name, _, _ in recorded.events].count("roll_back") == 1
    assert checkpoint_steps(tmp_path) == [2, 4]  # at step 4 the weights of step 2 once more; none at step 6


def test_a_stop_in_the_middle_of_an_evaluation_leaves_a_checkpoint_without_a_score(tmp_path: Path) -> None:
    config, state = config_of(tmp_path, evaluate__every_steps=5, checkpoint__every_steps=5), TrainingState()
    asked = iter([False] * (VALIDATION_IMAGES // 2) + [False] * 4 + [False, True])  # at 0, steps 1 to 4, second batch
    job, recorded = job_of(config, stop=lambda: next(asked))
    assert not train(job, state)
    assert state.step == 5
    assert next(asked, None) is None
    assert recorded.curve("val/bits_per_dim") == [(0, pytest.approx(VALIDATION[0][1], abs=1e-5))]
    (checkpoint,) = saved_in(tmp_path, 5)
    assert (checkpoint.step, checkpoint.bits_per_dim) == (5, None)


def test_a_stop_in_the_first_evaluation_saves_nothing(tmp_path: Path) -> None:
    job, recorded = job_of(config_of(tmp_path), stop=lambda: True)
    assert not train(job, TrainingState())
    assert not recorded.points
    assert checkpoint_steps(tmp_path) == []
