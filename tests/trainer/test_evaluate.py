"""Is the reported bits/dim the mean over every image, each counted once?"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import pack_photographs
from tests.support.launch import ROOT, curve, free_port, settings, train
from tests.support.tiny_run import tiny_run
from trainer import evaluate
from trainer.lossless_formats import available_codecs
from trainer.record.run_folder import RunFiles


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with a mixture, 37 validation images, which two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("trained")
    for split, images in (("train", 520), ("validation", 37)):
        pack_photographs(str(folder / split), images=images, split=split)
    changes = {"train__steps": 2, "checkpoint__every_steps": 2, "optimizer__ema_decay": 0.5}
    train(settings(folder / "run", folder, evaluate__batch_images=4, **changes))
    return folder / "run"


LAUNCHERS = {
    "alone": [sys.executable, "-m"],
    # Without the two dashes torchrun takes --run for a beginning of one of its own options.
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT", "-m",
                 "--"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", "2",
                  "--master_port", "PORT", "--module"],
}  # fmt: skip


def run_evaluate(launcher: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(free_port()) if part == "PORT" else part for part in LAUNCHERS[launcher]]
    command += ["trainer.evaluate", "--run", str(folder), "--weights", "ema"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_one_rank_and_two_ranks_of_both_launchers_give_one_result(trained: Path, tmp_path: Path) -> None:
    results, maps = [], []
    for launcher in LAUNCHERS:
        folder = trained
        if launcher != "alone":  # copies, because a step is recorded once in a run
            folder = tmp_path / launcher
            shutil.copytree(trained, folder)
            RunFiles(folder).description.unlink()
            lines = (line for line in RunFiles(folder).metrics.read_text().splitlines(True) if "final/ema" not in line)
            RunFiles(folder).metrics.write_text("".join(lines))
        done = run_evaluate(launcher, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("bits/dim over all 37 validation images") == 1
        # 9 rows of 4
        assert done.stdout.count("as one file of 36 images") == len(available_codecs())
        results.append([curve(folder, f"final/ema_bits_per_dim{end}")[-1][1] for end in ("", "_stderr", "_green")])
        maps.append(np.load(folder / "evaluation/bits-ema-step-000000002.npy"))
    for result, by_position in zip(results[1:], maps[1:], strict=True):
        assert result == pytest.approx(results[0], rel=1e-7)
        np.testing.assert_allclose(by_position, maps[0], rtol=1e-5)

    mean, _, green = results[0]
    assert maps[0].mean() == pytest.approx(mean, rel=1e-5)
    assert maps[0][:, :, 1].mean() == pytest.approx(green, rel=1e-5)
    details = json.loads((trained / "evaluation/bits-ema-step-000000002.json").read_text())
    assert np.mean(details["bits_per_dim_by_row"]) == pytest.approx(mean, rel=1e-5)
    client = mlflow.MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    run = client.get_run(RunFiles(trained).read_state()["mlflow_run_id"])
    assert run.data.metrics["final/ema_bits_per_dim"] == mean
    names = {Path(file.path).suffix for file in client.list_artifacts(run.info.run_id, "evaluation")}
    assert names == {".png", ".npy", ".json"}
    with Image.open(trained / "evaluation/bits-ema-step-000000002.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 50


@pytest.mark.slow
def test_a_mistake_is_told_once_by_two_ranks(tmp_path: Path) -> None:
    done = run_evaluate("torchrun", tmp_path / "nothing")
    assert done.returncode != 0
    assert done.stderr.count("holds no run") == 1


def test_images_scored_at_once_can_be_fewer_where_the_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "validation"):
        pack_photographs(str(tmp_path / split), images=4, split=split)
    tiny = tiny_run(tmp_path / "run", tmp_path)
    capsys.readouterr()
    asked: list[int] = []

    def full(*_: object, batch_images: int, **__: object) -> None:
        asked.append(batch_images)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluate, "load_trained_model", lambda *_: tiny)
    monkeypatch.setattr(evaluate, "evaluation_batches", full)
    for options, code in (([], 70), (["--batch-images", "3"], 70), (["--batch-images", "0"], 2)):
        monkeypatch.setattr(sys, "argv", ["evaluate", "--run", "some/run", *options])
        assert evaluate.main() == code
    assert asked == [tiny.card.batch_images, 3]
    *first, last = capsys.readouterr().err.splitlines()
    assert (
        first == ["error: the device's memory ran out (CUDA out of memory.); a smaller --batch-images needs less"] * 2
    )
    assert last == "error: --batch-images: must be at least 1, not 0"
