"""Does the command fit what the runs say, ask for runs that are fit for it, and say how far it looks ahead?"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from tests.support.launch import ROOT, SMALL_JOB, TINY_MODEL, mlflow_store
from tests.support.recorded_runs import LAW, make_scaling_runs
from trainer import scaling
from trainer.comparison import scaling_law
from trainer.comparison.run_history import Curve, RunHistory, history_of_folder
from trainer.config import load_config
from trainer.errors import UsageError
from trainer.record.run_folder import RunFiles

SHOWN = "tests/support/small_job.yaml"
CONFIG = [f"{name}={value}" for name, value in TINY_MODEL.items()] + ["model.width=128", "model.attention_width=128"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_scaling_runs(tmp_path_factory.mktemp("scaling"), noise=0.001)


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[RunHistory]:
    return [history_of_folder(folder) for folder in folders]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(scaling, "fit", lambda points, costs: scaling_law.fit(points, costs, resamples=60))


def with_steps(overrides: list[str], steps: int) -> list[str]:
    return [word for override in [*overrides, f"train.steps={steps}"] for word in ("--set", override)]


def at_step(run: RunHistory, step: float, value: float = 3.5) -> RunHistory:
    curve = Curve(np.array([step]), np.array([1e9]), np.array([value]))
    return dataclasses.replace(run, curves={**run.curves, "val/bits_per_dim": curve})


def test_tables_and_page_say_what_the_runs_give(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, options = tmp_path / "page.html", with_steps(CONFIG, 400_000)
    names = [str(folder) for folder in folders]
    assert scaling.main([*names, "--config", SHOWN, *options, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    value, low, high = (
        float(found) for found in re.findall(r"grow\w* as compute to the power +(\S+) +(\S+) to (\S+)", text)[0]
    )
    assert low <= value <= high and value == pytest.approx(LAW.growth, abs=0.08)
    assert text.count("w16-1e+11") == 1 and "12 runs, val/bits_per_dim; they differ in" in text
    config = load_config(SMALL_JOB, [*CONFIG, "train.steps=400000"])
    account, images = config.model.account(), 400_000 * config.train.global_batch_images
    truth = float(LAW.bits_per_dim(account.parameters, images * account.positions))
    (row,) = re.findall(rf"{SHOWN} .*", text.partition("\nForecast")[2])
    said, low, high = (float(found) for found in re.findall(r"(\S+) +(\S+) to (\S+)$", row)[0])
    assert low <= truth <= high and said == pytest.approx(truth, abs=0.1)
    orders = math.log10(images * account.flops.training / 1e12)
    assert f"{orders:.1f} orders of magnitude beyond a range of 2.0" in text
    assert "Henighan et al. 2020, 32x32" in text and "Checked on runs: without the largest budget" in text

    shown = page.read_text()
    assert "{{" not in shown.partition("<script>")[0] and "Compute-optimal size" in shown
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', shown)[0])
    assert [chart["title"] for chart in data["charts"]] == [
        "Bits/dim against compute",
        "Sizes of each budget",
        "Compute-optimal size",
    ]
    lines = {line["name"]: line for line in data["charts"][0]["lines"]}
    assert lines["compute-optimal, beyond all runs"]["dash"] == "dash"
    beyond = lines["compute-optimal, beyond all runs"]
    widths = np.array(beyond["high"]) - np.array(beyond["low"])
    assert widths[-1] > 2 * widths[0] > 0  # the farther, the less is known


def test_runs_in_mlflow_give_the_law_of_their_folders(
    runs: list[RunHistory], folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = mlflow_store(tmp_path)
    client = MlflowClient(store)
    experiment = client.create_experiment("sizes")
    for run in runs:
        curve = run.curves["val/bits_per_dim"]
        run_id = client.create_run(experiment, run_name=run.name).info.run_id
        client.log_batch(
            run_id,
            metrics=[Metric("val/bits_per_dim", float(curve.values[-1]), 2_000_000_000_000, int(curve.steps[-1]))],
            params=[Param(name, str(value)) for name, value in run.params.items()],
        )
    assert scaling.main(["--experiment", "sizes", "--uri", store]) == 0
    by_mlflow = capsys.readouterr().out
    assert scaling.main([str(folder) for folder in folders]) == 0
    assert by_mlflow.partition("Law:")[2] == capsys.readouterr().out.partition("Law:")[2] != ""


def test_a_budget_in_flops_has_a_best_size(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(folder) for folder in folders]
    assert scaling.main([*names, "--flops", "1e11"]) == 0
    assert "lies within the measured range" in capsys.readouterr().out
    assert scaling.main([*names, "--flops", "1e9"]) == 0
    assert "is 10 times below the smallest measured one: 1.0 orders" in capsys.readouterr().out
    assert scaling.main([*names, "--flops", "-1"]) == 2
    assert capsys.readouterr().err == "error: --flops: must be above 0, not -1.0\n"


def test_too_few_runs_are_refused_with_one_sentence(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([str(folder) for folder in folders[:9]]) == 2
    assert capsys.readouterr().err == (
        "error: a law takes at least 8 runs of 4 sizes and 3 budgets of FLOP, and these are 9 of 3 and 3\n"
    )
    assert scaling.main([str(folder) for folder in folders if "1e+12" not in folder.name]) == 2
    assert "these are 8 of 4 and 2" in capsys.readouterr().err


def test_a_point_is_what_the_last_evaluation_says_of_a_run_at_its_end(runs: list[RunHistory]) -> None:
    points, metric, notes = scaling.points_of(runs)
    assert metric == "val/bits_per_dim" and len(points) == 12
    assert notes == ["Some runs do not say which images they score: make sure that they are the same."]
    run, point = runs[4], points[4]
    assert run.model is not None
    account, images = run.model.account(), 8 * int(run.params["train.steps"])
    assert (point.parameters, point.tokens) == (account.parameters, images * account.positions)
    assert point.flops == images * account.flops.training == pytest.approx(1e11, rel=0.05)
    assert point.bits_per_dim == run.last("val/bits_per_dim")

    scored = [
        dataclasses.replace(
            r, curves={**r.curves, "final/ema_bits_per_dim": at_step(r, 1e9, 3.0).curves["val/bits_per_dim"]}
        )
        for r in runs
    ]
    assert scaling.points_of(scored)[1] == "final/ema_bits_per_dim"
    assert scaling.points_of([*scored[:-1], runs[-1]])[1] == "val/bits_per_dim"


def test_runs_that_did_not_end_are_left_out_and_named(runs: list[RunHistory]) -> None:
    points, _, notes = scaling.points_of([at_step(runs[0], 3), *runs[1:]])
    assert len(points) == 11
    assert any(
        re.fullmatch(r"w8-1e\+10 is left out: its last evaluation is at step 3 of [\d,]+, before it was done.", note)
        for note in notes
    )
    points, _, notes = scaling.points_of([at_step(runs[0], 1e9, math.nan), *runs[1:]])
    assert len(points) == 11 and "w8-1e+10 is left out: its bits/dim are not numbers above 0." in notes
    stopped = [at_step(run, 3) if "w64" in run.name else run for run in runs]
    with pytest.raises(UsageError, match="these are 9 of 3 and 3; w64.* is left out"):
        scaling.points_of(stopped)
    with pytest.raises(UsageError, match="these are 0 of 0 and 0"):
        scaling.points_of([at_step(run, 3) for run in runs])


def test_images_that_were_seen_too_often_are_told(runs: list[RunHistory]) -> None:
    epoch = Curve(np.array([1.0]), np.array([1e9]), np.array([7.0]))
    notes = scaling.points_of(
        [dataclasses.replace(runs[0], curves={**runs[0].curves, "progress/epoch": epoch}), *runs[1:]]
    )[2]
    assert any(note.startswith("1 run saw the training images more than 4 times (of them w8-1e+10)") for note in notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "its parameters do not say which model it trained"),
        ({"data": {"digest": "b" * 32, "name": "x"}}, "the runs score different images"),
    ],
)
def test_runs_that_cannot_be_on_one_law_are_refused(runs: list[RunHistory], change: dict[str, Any], words: str) -> None:
    known = [dataclasses.replace(run, data={"digest": "a" * 32, "name": "x"}) for run in runs]
    with pytest.raises(UsageError, match=words):
        scaling.points_of([dataclasses.replace(known[0], **change), *known[1:]])


def test_models_of_other_images_are_refused_among_runs_and_not_forecast_in_bits(
    runs: list[RunHistory], folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    larger = load_config(SMALL_JOB, [*CONFIG, "model.image_size=16"]).model
    with pytest.raises(UsageError, match="differ in family, image size or tokens of an image"):
        scaling.points_of([dataclasses.replace(runs[0], model=larger), *runs[1:]])
    names, options = [str(folder) for folder in folders], with_steps([*CONFIG, "model.image_size=16"], 1000)
    assert scaling.main([*names, "--config", SHOWN, *options]) == 0
    text = capsys.readouterr().out
    assert "its bits/dim are not forecast" in text
    assert re.search(rf"{SHOWN} .*– +–$", text, re.MULTILINE)


def test_a_config_of_another_family_is_refused(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs/cifar10_pixelcnn.yaml"
    assert config.exists()
    assert scaling.main([*map(str, folders), "--config", str(config)]) == 2
    assert "its model is of the family pixelcnn, not image_transformer" in capsys.readouterr().err


def test_what_the_runs_do_not_determine_is_told() -> None:
    """Bits/dim that do not depend on the size."""
    random = np.random.default_rng(0)
    points = [
        scaling_law.Trained("", size, flops / 6 / size, flops, 4.0 + 0.01 * random.standard_normal())
        for size in (1e4, 1e5, 1e6, 1e7)
        for flops in (1e12, 1e13, 1e14)
    ]
    told = scaling.doubts(scaling_law.fit(points, resamples=10), None)
    assert any("The runs do not determine the exponent of the" in sentence for sentence in told)


def test_a_name_is_only_a_name(folders: list[Path], tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    files = RunFiles(folders[0])
    name = "</script><script>alert(1)</script>"
    (evil / "config.yaml").write_text(files.config.read_text().replace("w8-1e+10", name))
    (evil / "metrics.jsonl").write_text(files.metrics.read_text())
    page = tmp_path / "page.html"
    assert scaling.main([str(evil), *map(str, folders[1:]), "--html", str(page)]) == 0
    shown = page.read_text()
    assert "alert(1)" in shown and "<script>alert(1)" not in shown
