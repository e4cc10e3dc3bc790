"""Does an exported model load as what it was, without DeepSpeed, and is anything else refused with one sentence?"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from models.given import NOTHING
from models.likelihood import MixtureOutput, nats
from models.model import Model, num_parameters
from tests.support.launch import ROOT, SMALL_JOB, TINY_MODEL
from tests.support.tiny_model import random_images
from trainer import export as export_tool
from trainer.checkpoint import Checkpoint, Weights
from trainer.config import RunConfig, as_yaml, load_config
from trainer.engine import TorchEngine
from trainer.errors import CheckpointError, ConfigError, UsageError
from trainer.exported_model import (
    Origin,
    first_states,
    is_exported,
    load_exported,
    load_first_weights,
    num_parameters_of,
    write_exported,
)
from trainer.model_card import card_of
from trainer.record.run_folder import Journal, RunFiles
from trainer.trained_model import TrainedModel, load_trained_model

ORIGIN = Origin(
    run="tiny",
    mlflow_run_id="0123",
    step=7,
    weights="ema",
    checkpoints=1,
    data_digest="d",
    bits_per_dim=4.5,
)


def config_of(**changes: object) -> RunConfig:
    values = TINY_MODEL | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(SMALL_JOB, [f"{name}={value}" for name, value in values.items()])


def new_model(seed: int = 0, **changes: object) -> Model:
    torch.manual_seed(seed)
    return config_of(**changes).model.build().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported model, freshly written."""
    write_exported(tmp_path / "exported", card_of(config_of()), ORIGIN, new_model().state_dict())
    return tmp_path / "exported"


def test_what_was_exported_is_what_is_loaded(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    exported, expected = load_exported(folder), new_model().state_dict()
    assert (exported.card, exported.origin) == (card_of(config_of()), ORIGIN)
    assert exported.state.keys() == expected.keys()
    assert all(torch.equal(exported.state[name], expected[name]) for name in expected)


def test_bf16_weights_are_exported_in_fp32(tmp_path: Path) -> None:
    write_exported(tmp_path / "e", card_of(config_of()), ORIGIN, new_model().bfloat16().state_dict())
    assert {tensor.dtype for tensor in load_exported(tmp_path / "e").state.values()} == {torch.float32}


def test_the_tools_load_it_in_place_of_a_run(folder: Path) -> None:
    trained = load_trained_model(str(folder), "ema")
    images = random_images(2, 8)
    assert torch.equal(trained.model(images), new_model().to(trained.device)(images))
    assert (trained.step, trained.run, trained.card) == (7, "tiny", card_of(config_of()))
    unasked = load_trained_model(str(folder), "raw")  # --weights was not given
    assert (unasked.step, unasked.weights) == (7, "ema")
    with pytest.raises(UsageError, match="--weights avg: .* holds ema weights; leave it out"):
        load_trained_model(str(folder), "avg")


def test_it_loads_without_deepspeed(folder: Path) -> None:
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path; from trainer.exported_model import load_exported\n"
        f"print(len(load_exported(Path({str(folder)!r})).state))"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(printed.stdout) == len(new_model().state_dict())


def rewrite(folder: Path, change: Any) -> None:
    """Change the description."""
    path = folder / "config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def refit(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights, with a description that has their size and checksum: somebody who knows the format."""
    card = load_exported(folder).card
    for path in folder.iterdir():
        path.unlink()
    write_exported(folder, card, ORIGIN, tensors)


def damage(folder: Path, kind: str) -> None:
    weights, description = folder / "model.safetensors", folder / "config.json"
    state = new_model().state_dict()
    match kind:
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "flipped bit":
            content = bytearray(weights.read_bytes())
            content[-5] ^= 1
            weights.write_bytes(content)
        case "no weights":
            weights.unlink()
        case "no description":
            description.unlink()
        case "half a description":
            description.write_text(description.read_text()[:200])
        case "a list":
            description.write_text("[]")
        case "no origin":
            rewrite(folder, lambda d: d.pop("origin"))
        case "another format":
            rewrite(folder, lambda d: d.update(format_version=99))
        case "another architecture":
            rewrite(folder, lambda d: d["card"]["model"].update(layers=3))
        case "another width":
            rewrite(folder, lambda d: d["card"]["model"].update(ff_width=32))
        case "a missing tensor":
            refit(folder, {name: tensor for name, tensor in state.items() if name != "head.bias"})
        case "a tensor too many":
            refit(folder, state | {"extra": torch.zeros(1)})
        case "a pickle":
            torch.save(state, weights)
            rewrite(folder, lambda d: d["file"].update(_described(weights)))


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated weights", "is not the file that config.json describes"),
        ("flipped bit", "is not the file that config.json describes"),
        ("no weights", "model.safetensors: is missing"),
        ("no description", "config.json: cannot be read"),
        ("half a description", "config.json: cannot be read"),
        ("a list", "is not the description of an exported model"),
        ("no origin", "is not the description of an exported model"),
        ("another format", "has format 99, and this version of the trainer reads 1"),
        ("another architecture", "does not fit the model .* layers.2.* is missing"),
        ("another width", r"does not fit the model .* is torch.float32 \[.*\], not fp32 \[.*\]"),
        ("a missing tensor", "does not fit the model .*head.bias is missing"),
        ("a tensor too many", "does not fit the model .*extra is not part of it"),
        ("a pickle", "is not a safetensors file"),
    ],
)
def test_a_damaged_or_other_model_is_refused_in_one_sentence(folder: Path, kind: str, message: str) -> None:
    damage(folder, kind)
    assert is_exported(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_exported(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 10_000_000},
        {"layers": 4096},  # allowed, but not in a file of this size
        {"image_size": 1_000_000_000},
        {"width": 1_000_000_000},
        {"width": 65536, "ff_width": 65536},
        {"ff_width": 10**30},
        {"num_classes": 10_000_000},
        {"super_resolution": {"small_size": 4, "encoder_layers": 10_000_000}},
        {"layers": 2.0},
        {"layers": "2"},
    ],
    ids=str,
)
def test_an_absurd_model_is_refused_before_anything_is_built(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    description = json.loads(path.read_text())
    description["card"]["model"] |= changes
    path.write_text(json.dumps(description))
    began = time.process_time()
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_exported(folder)
    assert str(caught.value).count("\n") == 0
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "changes",
    [
        {"origin": {"run": ["x"]}},
        {"origin": None},
        {"file": {"bytes": 1.0, "sha256": "x"}},
        {"file": {"bytes": 10**30, "sha256": 3}},
        {"file": []},
        {"card": 5},
        {"format_version": [1]},
    ],
    ids=str,
)
def test_odd_values_of_a_description_are_one_sentence(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_exported(folder)
    assert str(caught.value).count("\n") == 0


def test_the_parameters_of_a_model_are_counted_without_building_it() -> None:
    for units in (1, 2, 5):
        model = config_of().model.with_units(units)
        assert num_parameters_of(model) == num_parameters(model.build())


def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="is not empty; choose another folder"):
        write_exported(folder, card_of(config_of()), ORIGIN, new_model(seed=1).state_dict())
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--to .*file/exported: cannot be written"):
        write_exported(tmp_path / "file" / "exported", card_of(config_of()), ORIGIN, new_model().state_dict())


def losses(engine: TorchEngine, steps: range) -> Iterator[float]:
    engine.train(True)
    for step in steps:
        for part in random_images(8, 8, seed=step).chunk(engine.accumulation_steps):
            loss = nats(MixtureOutput(), engine.forward(part, NOTHING), part).sum() / part.numel()
            engine.backward(loss)
        engine.update(0.003)
        yield loss.item()


def test_a_run_can_begin_from_it_as_from_the_weights_themselves(folder: Path) -> None:
    config = config_of(train__precision="fp32")
    expected = list(losses(TorchEngine(new_model(), config), range(4)))
    engine = TorchEngine(new_model(seed=9), config)
    engine.load_state(first_states(load_first_weights(folder, config).state, config), updates=0)
    assert list(losses(engine, range(4))) == pytest.approx(expected, abs=1e-6)
    assert list(losses(TorchEngine(new_model(seed=9), config), range(4))) != pytest.approx(expected, abs=1e-3)


def test_a_run_with_another_model_cannot_begin_from_it(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"another model.attention.memory \(16, not 8\) and model.heads \(2, not 4\)"):
        load_first_weights(folder, config_of(model__heads=4, model__attention__memory=8))
    exported = load_first_weights(folder, config_of(model__dropout=0.1))
    assert next(first_states(exported.state, config_of()))[1].keys() >= {"weight", "exp_avg", "ema"}
    assert "ema" not in next(first_states(exported.state, config_of(optimizer__ema_decay=0.0)))[1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7, as the tool sees it."""
    files = RunFiles(tmp_path / "run")
    files.folder.mkdir()
    files.write_state(mlflow_run_id="0123")
    files.config.write_text(as_yaml(config_of()))
    checkpoint = Checkpoint(7, 7, 56, None, {}, "digest of the data", [])

    def load(run_dir: str, weights: Weights, last: int, checkpoint_url: None) -> TrainedModel:
        used = (checkpoint,) * (last if weights == "avg" else 1)
        card = card_of(config_of())
        return TrainedModel(new_model(), card, "quickstart", 7, weights, files, torch.device("cpu"), used)

    monkeypatch.setattr(export_tool, "load_trained_model", load)
    return files.folder


def test_the_command_tells_what_the_weights_are(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(run / "metrics.jsonl")
    for step, name, value in ((6, "ema", 1.0), (7, "raw", 2.0), (7, "ema", 3.0), (7, "ema", 4.25)):
        journal.append({"step": step, "time": 0.0, "metrics": {f"final/{name}_bits_per_dim": value}})
    to = tmp_path / "to"
    assert export_tool.main(["--run", str(run), "--weights", "ema", "--to", str(to)]) == 0
    assert capsys.readouterr().out == f"{to}: ema weights of step 7, 4.2500 bits/dim\n"
    assert load_exported(to).origin == Origin(
        run="quickstart",
        mlflow_run_id="0123",
        step=7,
        weights="ema",
        checkpoints=1,
        data_digest="digest of the data",
        bits_per_dim=4.25,
    )


def test_averaged_checkpoints_are_counted_and_weights_without_a_score_have_none(run: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(run), "--weights", "avg", "--last", "3", "--to", str(tmp_path / "to")]
    assert export_tool.main(arguments) == 0
    origin = load_exported(tmp_path / "to").origin
    assert (origin.checkpoints, origin.bits_per_dim) == (3, None)


def test_an_export_is_not_exported_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_tool.main(["--run", str(folder), "--to", str(folder.parent / "to")]) == 2
    assert "is an exported model already; copy the folder" in capsys.readouterr().err


def test_other_safetensors_tools_read_the_weights(folder: Path) -> None:
    assert safetensors.torch.load_file(folder / "model.safetensors").keys() == new_model().state_dict().keys()
