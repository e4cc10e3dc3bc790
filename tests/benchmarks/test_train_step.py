"""Does the benchmark of the training step time only models that train alike, and does its command still run?"""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import report, train_step
from models.image_transformer.family import ImageTransformer
from tests.support.launch import SMALL_JOB, TINY_MODEL
from tests.support.tiny_model import PATTERNS, random_images, tiny_config

TINY = [f"--set={name}={value}" for name, value in (TINY_MODEL | {"train.micro_batch_images": 2}).items()]


@pytest.mark.usefixtures("device")
def test_the_command_writes_its_numbers_and_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")

    def scaled(model: ImageTransformer) -> None:
        attend = model.attends[0]
        train_step.attend_by(model, lambda q, k, v: attend(2 * q, k, 3 * v))

    monkeypatch.setitem(train_step.VARIANTS, "flex_raster", scaled)
    monkeypatch.setitem(train_step.VARIANTS, "dense_mask", train_step.with_dense_mask)
    build = train_step.build
    monkeypatch.setattr(train_step, "build", lambda *args: build(*args[:-1], [*args[-1], "flex_raster"]))
    arguments = ["--config", str(SMALL_JOB), *TINY, "--json", str(tmp_path / "numbers.json")]
    assert train_step.main(arguments) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert 0 < numbers["cpu_step_share_of_matmul_small_job"] < 1
    assert numbers["cpu_step_speedup_vs_dense_mask_small_job"] > 0
    missing = numbers["details"]["missing"]
    assert "no gradients on a CPU" in missing["flex"]
    assert "trains differently" in missing["flex_raster"]
    assert "training step of small_job on a CPU" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize("name", ["2d", "2d block shift"])
def test_raster_order_changes_the_storage_and_not_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = tiny_config(**PATTERNS[name]).build()
    raster, images = copy.deepcopy(model), random_images(2, 4)
    mask = model.patterns[0][0].mask()
    train_step.in_raster_order(raster)
    assert raster.stored_in_raster_order and not model.stored_in_raster_order
    train_step.attend_by(raster, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(raster(images), model(images))
