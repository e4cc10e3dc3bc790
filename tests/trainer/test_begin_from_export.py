"""Does a run that begins from exported weights begin with their score, record their origin, and go on without them?"""

import json
import os
import shutil
import sys
from pathlib import Path

import mlflow
import pytest

from tests.support.launch import SMALL_JOB, curve, free_port, settings, train
from trainer import evaluate, export, run, sample
from trainer.exported_model import load_exported
from trainer.record.run_folder import Journal

EVERY_IMAGE = {"train__steps": 4, "evaluate__images": None, "evaluate__every_steps": 100}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, splits: Path) -> Path:
    """The exported average of the weights of a short run."""
    folder = tmp_path_factory.mktemp("origin")
    train(settings(folder / "run", splits, train__steps=8, run__name="the first", optimizer__ema_decay=0.5))
    assert export.main(["--run", str(folder / "run"), "--weights", "ema", "--to", str(folder / "exported")]) == 0
    return folder / "exported"


def test_a_new_run_begins_with_the_score_of_the_exported_weights_and_tells_their_origin(
    exported: Path, tmp_path: Path, splits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")  # the tools write their results beside the weights
    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", str(copy)])
    assert evaluate.main() == 0
    assert "(step 8, ema weights)" in capsys.readouterr().out
    (score,) = curve(copy, "final/ema_bits_per_dim")
    monkeypatch.setattr(sys, "argv", ["sample", "--run", str(copy), "--n", "1"])
    assert sample.main() == 0
    assert "1 image from ema weights of step 8" in capsys.readouterr().out

    arguments = ["--from", str(copy), *settings(tmp_path / "run", splits, **EVERY_IMAGE, run__seed=7)]
    text = train(arguments, ranks=2)
    assert f"begins from {copy}: ema weights of step 8 of the first" in text
    first, last = curve(tmp_path / "run", "val/bits_per_dim")
    assert first == (0, pytest.approx(score[1], abs=1e-5))
    assert last[1] < first[1]
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    tags = mlflow.MlflowClient(state["mlflow_uri"]).get_run(state["mlflow_run_id"]).data.tags
    source = json.loads((exported.parent / "run/run_state.json").read_text())
    assert {key.removeprefix("origin."): value for key, value in tags.items() if key.startswith("origin.")} == {
        "folder": str(copy),
        "run": "the first",
        "mlflow_run_id": source["mlflow_run_id"],
        "step": "8",
        "weights": "ema",
        "digest": load_exported(copy).digest,
    }
    (event,) = [event for event in Journal(tmp_path / "run/events.jsonl").records() if event["event"] == "origin"]
    assert event["origin"]["digest"] == tags["origin.digest"]

    # The same command goes on, although the export is gone.
    shutil.rmtree(copy)
    text = train([*arguments, "--set", "train.steps=6"])
    assert f"going on from step-000000004, not from {copy}, as it began" in text
    steps = [step for step, _ in curve(tmp_path / "run")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert mlflow.MlflowClient(state["mlflow_uri"]).get_run(state["mlflow_run_id"]).data.tags["origin.step"] == "8"


def test_weights_that_cannot_be_used_end_in_one_sentence_before_anything_starts(
    exported: Path, tmp_path: Path, splits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(source: Path | None, **changes: object) -> str:
        for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("MASTER_PORT", os.environ.get("MASTER_PORT", str(free_port())))
        begin = ["--from", str(source)] if source else []
        arguments = [*begin, *settings(tmp_path / "run", splits, **changes)]
        monkeypatch.setattr(sys, "argv", ["trainer/run.py", "--config", str(SMALL_JOB), *arguments])
        assert run.main() == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and len(text.splitlines()) == 1
        return text

    assert f"--from {tmp_path}/none: holds no exported model" in fail(tmp_path / "none")
    assert "holds no exported model" in fail(exported.parent / "run")  # a run, and not what was exported of it
    assert "another model.ff_width (16, not 32)" in fail(exported, model__ff_width=32)
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x")
    assert f"--from {damaged}/model.safetensors: is not the file that config.json describes" in fail(damaged)
    assert not (tmp_path / "run").exists()

    # An attempt that began elsewhere and has no checkpoint yet.
    (tmp_path / "run").mkdir()
    for origin, source, words in (
        ({}, exported, "began without --from and has no checkpoint yet"),
        ({"folder": "/before", "digest": "x"}, None, "began from /before"),
        ({"folder": "/before", "digest": "x"}, exported, "began from /before"),
    ):
        (tmp_path / "run/run_state.json").write_text(json.dumps({"origin": origin}))
        assert words in fail(source)
