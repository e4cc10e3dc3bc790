"""Does a run whose first weights depend on images begin alike on any number of ranks, and only once?"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.loader import evaluation_batches, open_shards, train_batches
from models.model import Model
from tests.support.launch import ROOT, curve, mlflow_store, train
from trainer import export, sample
from trainer.config import load_config
from trainer.model_inputs import model_inputs
from trainer.scoring import score

PIXELCNNPP = ROOT / "configs/cifar10_pixelcnnpp.yaml"
DATA = ROOT / "tests/compat/f5483a5/data"


def settings(folder: Path, name: str, steps: int) -> list[str]:
    values: dict[str, object] = {
        "run.dir": folder / name,
        "model.image_size": 16,
        "model.output.components": 2,
        "model.features": 4,
        "model.blocks": 1,
        "model.dropout": 0.0,  # which would differ between ranks
        "data.train_url": folder / "data/train",
        "data.validation_url": folder / "data/validation",
        "data.lanes": 2,
        "train.steps": steps,
        "train.global_batch_images": 8,
        "train.micro_batch_images": 4,
        "train.zero_stage": 2,
        "train.log_every_steps": 1,
        "evaluate.images": 16,
        "tracking.uri": mlflow_store(folder),
    }
    return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]


def first_model(arguments: list[str]) -> tuple[Model, float]:
    """The weights that the first images give, computed without the trainer, and what they score."""
    config = load_config(PIXELCNNPP, arguments[1::2])
    torch.manual_seed(config.run.seed)
    model = config.model.build()
    count = model.initial_images
    sizes = {"rank": 0, "world_size": 1, "global_batch_images": count, "micro_batch_images": count}
    batches = train_batches(
        open_shards(config.data.train_url),
        seed=config.run.seed,
        lanes=config.data.lanes,
        consumed_samples=0,
        fetch_threads=1,
        prefetch_batches=1,
        **sizes,
    )
    model.initialise(*model_inputs(next(batches), config.model))
    shards = open_shards(config.data.validation_url)
    images = evaluation_batches(shards, rank=0, world_size=1, batch_images=16, limit=16)
    scores = score(model.eval(), config.model, images, torch.device("cpu"), 16)
    return model, scores["val/bits_per_dim"]


@pytest.mark.timeout(600)
def test_pixelcnnpp_begins_on_two_ranks_goes_on_on_one_and_is_exported_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, tmp_path / "data")
    train(settings(tmp_path, "two", 3), ranks=2, config=PIXELCNNPP)
    assert "going on from step-000000003" in train(settings(tmp_path, "two", 5), config=PIXELCNNPP)
    train(settings(tmp_path, "one", 5), config=PIXELCNNPP)
    bits = {name: [value for _, value in curve(tmp_path / name)] for name in ("one", "two")}
    assert bits["two"] == pytest.approx(bits["one"], abs=2e-4)
    _, expected = first_model(settings(tmp_path, "one", 5))
    for name in ("one", "two"):
        assert curve(tmp_path / name, "val/bits_per_dim")[0] == (0, pytest.approx(expected, abs=1e-4))

    assert export.main(["--run", "two", "--weights", "ema", "--to", "exported"]) == 0
    monkeypatch.setattr(sys, "argv", ["sample", "--run", "exported", "--n", "1", "--out", "new.png"])
    assert sample.main() == 0
    with Image.open("new.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 10
