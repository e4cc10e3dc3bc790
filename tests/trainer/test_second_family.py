"""Does a model of another family than the Image Transformer go through every command, from training to the demo?"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.drawing.draw import Sampling
from models.pixelcnn import PixelCNN
from tests.support.launch import ROOT, curve, mlflow_store, train
from trainer import compare, evaluate, export, plan, sample
from trainer.demo import Wish, _Drawing, prepare
from trainer.trained_model import load_trained_model

PIXELCNN = ROOT / "configs/cifar10_pixelcnn.yaml"
ROW_LSTM = ROOT / "configs/cifar10_row_lstm.yaml"
DATA = ROOT / "tests/compat/f5483a5/data"


def settings(folder: Path, steps: int) -> list[str]:
    values: dict[str, object] = {
        "run.dir": folder / "run",
        "model.image_size": 16,
        "model.features": 8,
        "model.layers": 2,
        "model.head_features": 16,
        "data.train_url": folder / "data/train",
        "data.validation_url": folder / "data/validation",
        "data.lanes": 2,
        "train.steps": steps,
        "train.global_batch_images": 8,
        "train.micro_batch_images": 4,
        "train.activation_checkpoint_every_layers": 2,
        "train.log_every_steps": 1,
        "optimizer.peak_lr": 1e-3,
        "optimizer.schedule.warmup_steps": 0,
        "tracking.uri": mlflow_store(folder),
    }
    return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]


def use(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [tool.__name__, *arguments])
    assert tool.main() == 0


@pytest.mark.timeout(600)
def test_pixelcnn_goes_through_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, tmp_path / "data")
    train(settings(tmp_path, 6), config=PIXELCNN)
    assert "going on from step-000000006" in train(settings(tmp_path, 8), config=PIXELCNN)
    bits = [value for _, value in curve(tmp_path / "run")]
    assert len(bits) == 8 and bits[-1] < bits[0]

    use(evaluate, monkeypatch, "--run", "run", "--weights", "ema")
    (scored,) = (tmp_path / "run/evaluation").glob("*.json")
    assert 5 < json.loads(scored.read_text())["bits_per_dim"] < 8.1
    assert export.main(["--run", "run", "--weights", "raw", "--to", "exported"]) == 0
    use(sample, monkeypatch, "--run", "exported", "--n", "2", "--out", "new.png")
    use(sample, monkeypatch, "--run", "run", "--n", "1", "--complete-half", "--out", "completed.png")
    for name in ("new.png", "completed.png"):
        with Image.open(name) as picture:
            assert len(picture.getcolors(1 << 20) or []) > 10
    capsys.readouterr()
    assert plan.main(["--config", str(PIXELCNN), "--gpu", "H200", "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert "3.537 M parameters, 3,072 tokens an image" in text and "attention" not in text.partition("Memory")[0]
    use(compare, monkeypatch, "run", "--html", "comparison.html")
    assert (tmp_path / "comparison.html").exists()

    trained = load_trained_model("exported", "raw")
    assert isinstance(trained.model, PixelCNN)
    demo = prepare(trained)
    assert demo.modes == ["new", "complete"]
    original = torch.zeros(16, 16, 3, dtype=torch.uint8)
    drawing = _Drawing(trained, Wish("complete", 1, 0, 0.99, Sampling()), original)
    while (message := drawing.advance())["done"] < message["total"]:
        pass
    assert message["total"] == 768


@pytest.mark.timeout(600)
def test_a_row_lstm_of_two_ranks_goes_on_with_one_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, tmp_path / "data")
    sharded = ["--set", "train.zero_stage=2"]
    train(settings(tmp_path, 3) + sharded, ranks=2, config=ROW_LSTM)
    assert "going on from step-000000003" in train(settings(tmp_path, 5) + sharded, config=ROW_LSTM)
    bits = [value for _, value in curve(tmp_path / "run")]
    assert len(bits) == 5 and bits[-1] < bits[0]
    assert export.main(["--run", "run", "--weights", "ema", "--to", "exported"]) == 0
    use(sample, monkeypatch, "--run", "exported", "--n", "1", "--out", "new.png")
    with Image.open("new.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 10
