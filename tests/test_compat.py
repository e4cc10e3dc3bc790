"""Is everything readable that an older version wrote: run folders, checkpoints, exports?"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.loader import DataConfig
from models.given import Given
from models.image_transformer.family import ImageTransformerConfig
from models.pixelcnn import PixelCNNConfig
from tests.support.launch import SMALL_JOB, mlflow_store, train
from trainer import evaluate, sample
from trainer.comparison.run_history import history_of_folder
from trainer.config import RunConfig, flat, load_config, load_written, model_config_from
from trainer.exported_model import load_exported
from trainer.older_configs import BEFORE_IT_EXISTED, MOVED, modernised, params_of_today
from trainer.options import LimitsConfig
from trainer.trained_model import load_trained_model
from trainer.typed_values import flattened, paths, read

COMPAT = Path(__file__).parent / "compat"
WRITTEN = [COMPAT / "f5483a5"]
EXPORTS = COMPAT / "768923b/exports"
RECORDED = {"f5483a5": {"raw": 6.281692930473202, "ema": 6.43698796954958}}
"""Bits/dim of the weights over the validation images, as those commits printed them."""

DATA = ["--data-url", "data/validation"]
"""Today's trainer opens only data that its user has named."""


@pytest.fixture(params=WRITTEN, ids=lambda path: path.name)
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a commit wrote, as the working directory."""
    copy = tmp_path / request.param.name
    shutil.copytree(request.param, copy)
    monkeypatch.chdir(copy)
    mlflow_store(copy)
    return copy


def run_tool(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [tool.__name__, *arguments])
    assert tool.main() == 0


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_run_scores_what_was_recorded(written: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (written / "runs/yesterday/evaluation").iterdir():
        path.unlink()
    run_tool(evaluate, monkeypatch, "--run", "runs/yesterday", "--weights", weights, *DATA)
    (result,) = (written / "runs/yesterday/evaluation").glob("*.json")
    assert json.loads(result.read_text())["bits_per_dim"] == pytest.approx(RECORDED[written.name][weights], abs=5e-4)


def test_an_export_scores_what_was_recorded(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tool(evaluate, monkeypatch, "--run", "exported", *DATA)
    (result,) = (written / "exported/evaluation").glob("*.json")
    assert json.loads(result.read_text())["bits_per_dim"] == pytest.approx(RECORDED[written.name]["ema"], abs=5e-4)


@pytest.mark.parametrize("name", sorted(path.name for path in EXPORTS.iterdir() if path.is_dir()))
def test_the_first_exports_of_every_kind_compute_what_they_did(name: str, tmp_path: Path) -> None:
    shutil.copytree(EXPORTS / name, tmp_path / name)
    trained = load_trained_model(str(tmp_path / name), "raw")
    images = torch.from_numpy(np.load(EXPORTS / "images.npy"))
    given = Given(
        labels=torch.tensor([1, 2]) if trained.card.model.num_classes else None,
        small_images=images[:, ::2, ::2] if trained.card.model.small_size else None,
    )
    with torch.no_grad():
        outputs = trained.model(images, given)[:, ::4, ::4]
    np.testing.assert_allclose(outputs.numpy(), np.load(EXPORTS / name / "outputs.npy"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ["runs/yesterday", "exported"])
def test_it_draws_and_completes(written: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tool(sample, monkeypatch, "--run", run, "--n", "2", "--out", "new.png")
    run_tool(sample, monkeypatch, "--run", run, "--n", "2", "--complete-half", "--out", "completed.png", *DATA)
    assert {path.name for path in written.glob("*.png")} == {"new.png", "completed.png"}


@pytest.mark.parametrize("config", ["runs/yesterday/config.yaml", "old.yaml"])
def test_a_run_goes_on(written: Path, config: str) -> None:
    # A user's own file of that time is the same, but for a line that did not exist then.
    text = (written / "runs/yesterday/config.yaml").read_text()
    (written / "old.yaml").write_text(text.replace("  key_heads: 0\n", ""))
    settings = ["train.steps=32", f"tracking.uri={mlflow_store(written)}"]
    settings += [f"run.dir={written}/runs/yesterday"]
    settings += [f"data.{split}_url={written}/data/{split}" for split in ("train", "validation")]
    output = train([argument for each in settings for argument in ("--set", each)], config=written / config)
    assert "going on from step-000000030" in output
    assert (written / "runs/yesterday/checkpoints/step-000000032/manifest.json").exists()
    assert load_written(written / "runs/yesterday/config.yaml").train.steps == 32


def test_a_run_is_compared_with_one_of_today(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = history_of_folder(written / "runs/yesterday")
    today = flat(load_config("runs/yesterday/config.yaml", ["model.layers=3"]))
    assert older.params == {path: str(value) for path, value in today.items()} | {"model.layers": "2"}


def test_a_new_run_begins_from_an_export(written: Path) -> None:
    exported, trained = load_exported(written / "exported"), load_trained_model("runs/yesterday", "ema")
    assert exported.card == trained.card
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(exported.state[name], weight)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_every_option_since_then_has_a_row(path: Path) -> None:
    """A missing row would give an older run the default of today."""
    values = yaml.safe_load((path / "runs/yesterday/config.yaml").read_text())
    existed = {*flattened(values), *flattened(modernised(values)[0])}
    members_it_never_had = ("model.attention.", "model.output.", "model.super_resolution", "optimizer.schedule.")
    for option in paths(RunConfig):
        known = option in existed or option in BEFORE_IT_EXISTED or option.startswith(members_it_never_had)
        assert known or option.rpartition(".")[0] in BEFORE_IT_EXISTED or option in OF_NEW_MEMBERS, (
            f"{option} is new: give it a row in BEFORE_IT_EXISTED (trainer/older_configs.py)"
        )


OF_NEW_MEMBERS = {
    "optimizer.muon_peak_lr",
    "optimizer.decay",
    *(f"model.{name}" for name in ("features", "head_features", "first_kernel", "kernel", "grouping")),
    *(f"model.{name}" for name in ("blocks", "nonlinearity", "initial_images", "convolutions", "key_pooling")),
}
"""Options of members of unions that no run of that time had."""


def test_a_pixelcnn_of_before_it_had_a_choice_of_kernels_is_what_it_was() -> None:
    values = {"family": "pixelcnn", "image_size": 16, "output": {"kind": "categorical"}, "features": 8, "layers": 2}
    model = model_config_from(values | {"head_features": 16}, "an export")
    assert model == PixelCNNConfig(
        image_size=16, features=8, layers=2, head_features=16, first_kernel=7, kernel=3, grouping="interleaved"
    )


def test_an_added_option_orphans_nothing(written: Path) -> None:
    """What CONTRIBUTING.md says of adding an option, done to copies of the config's classes."""
    add = lambda base, *fields: dataclasses.make_dataclass(  # noqa: E731
        f"Newer{base.__name__}", fields, bases=(base,), frozen=True, kw_only=True
    )
    model = add(ImageTransformerConfig, ("temper", float))
    data = add(DataConfig, ("shards_at_once", int, 4))
    limits = add(LimitsConfig, ("patience_seconds", float))
    newer = add(RunConfig, ("model", model), ("data", data), ("limits", limits, None))
    rows = BEFORE_IT_EXISTED | {"model.temper": 0.5, "data.shards_at_once": 1, "limits.patience_seconds": 9.0}
    values = modernised(yaml.safe_load((written / "runs/yesterday/config.yaml").read_text()))[0]
    config, problems = read(newer, values, "", rows)
    assert not problems
    assert (config.model.temper, config.data.shards_at_once, config.limits.patience_seconds) == (0.5, 1, 9.0)
    exported = json.loads((written / "exported/config.json").read_text())["config"]["model"]
    assert read(model, modernised({"model": exported})[0]["model"], "model", rows)[0].temper == 0.5


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        (
            "model",
            "{attention: local_2d, query_block: [8, 32], memory: [8, 16], shift: block}",
            "{attention: {kind: local_2d, query_block: [8, 32], memory: [8, 16], shift: block}}",
        ),
        (
            "model",
            "{attention: full, query_block: 0, memory: 0, dilation_gap: 0, dilation_blocks: 0, shift: generation}",
            "{attention: {kind: full}}",
        ),
        (
            "model",
            "{attention: dilated_1d, query_block: 8, memory: 4, dilation_gap: 0, dilation_blocks: 2}",
            "{attention: {kind: dilated_1d, query_block: 8, memory: 4, gap: 0, chunks: 2}}",
        ),
        ("model", "{attention: local_1d, memory: 0}", "{attention: {kind: local_1d, memory: 0}}"),
        ("model", "{output: mixture, mixtures: 10}", "{output: {kind: mixture, components: 10}}"),
        ("model", "{output: categorical, mixtures: 0}", "{output: {kind: categorical}}"),
        ("model", "{condition_size: 0, encoder_layers: 0}", "{super_resolution: null}"),
        (
            "model",
            "{condition_size: 8, encoder_layers: 4}",
            "{super_resolution: {small_size: 8, encoder_layers: 4}}",
        ),
        (
            "optimizer",
            "{name: muon, muon_peak_lr: 0.02, schedule: wsd, warmup_steps: 5, decay_steps: 0, final_lr_fraction: 0.0}",
            "{name: muon, muon_peak_lr: 0.02,"
            " schedule: {kind: wsd, warmup_steps: 5, decay_steps: 0, final_lr_fraction: 0.0}}",
        ),
        (
            "optimizer",
            "{muon_peak_lr: 0.0, schedule: noam, warmup_steps: 5, decay_steps: 0, final_lr_fraction: 0.0}",
            "{schedule: {kind: noam, warmup_steps: 5}}",
        ),
        (
            "train",
            "{offload_optimizer: nvme, offload_parameters: none, offload_dir: /nvme}",
            "{offload_optimizer: {kind: nvme, dir: /nvme}, offload_parameters: {kind: none}}",
        ),
        ("train", "{offload_optimizer: cpu, offload_dir: null}", "{offload_optimizer: {kind: cpu}}"),
    ],
)
def test_options_that_moved_are_read_where_they_live_today(section: str, old: str, new: str) -> None:
    assert modernised({section: yaml.safe_load(old)})[0] == {section: yaml.safe_load(new)}


def test_recorded_parameters_are_compared_under_their_paths_of_today() -> None:
    found = params_of_today({"model.attention": "local_2d", "model.memory": "(8, 16)", "model.shift": "block"})
    assert found["model.attention.kind"] == "local_2d"
    assert found["model.attention.memory"] == "(8, 16)"
    assert found["model.key_heads"] == "0"
    assert not found.keys() & MOVED.keys()


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.query_block=64", "model.attention.query_block", 64),
        ("model.mixtures=5", "model.output.components", 5),
        ("optimizer.warmup_steps=7", "optimizer.schedule.warmup_steps", 7),
        ("optimizer.schedule=noam", "optimizer.schedule.kind", "noam"),
        ("model.attention=full", "model.attention.kind", "full"),
        ("train.offload_optimizer=cpu", "train.offload_optimizer.kind", "cpu"),
    ],
)
def test_a_moved_option_is_understood_and_says_where_it_lives_now(
    override: str, path: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flat(load_config(SMALL_JOB, [override]))[path] == value
    old = override.partition("=")[0]
    said = capsys.readouterr().err
    assert (f"{old} is now {path}" in said) == (old in MOVED)
