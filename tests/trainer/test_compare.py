"""Does a comparison show what differs, what came of it, and nothing that cannot be compared?"""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import mlflow
import numpy as np
import pytest
from PIL import Image

from tests.support.launch import QUICKSTART, mlflow_store
from trainer import compare
from trainer.comparison.charts import Line, line_chart, number, running_mean, ticks
from trainer.comparison.published import PUBLISHED, data_set_key
from trainer.comparison.run_history import RunHistory, history_of_folder, history_of_run
from trainer.config import load_config
from trainer.record.run_folder import RunFiles
from trainer.record.tracker import Tracker, record_results


def shards(version: str, size: int = 32, digest: str = "ab") -> SimpleNamespace:
    protocol = {"name": version} | ({"imagenet_version": version} if version in ("A", "B", "C") else {})
    form = "imagenet" if version in ("A", "B", "C") else version
    manifest = SimpleNamespace(
        name=f"{form}-{size}", count=50000, image_size=size, source={"form": form}, protocol=protocol
    )
    return SimpleNamespace(url="/data", digest=digest * 32, manifest=manifest)


def make_run(folder: Path, name: str, best: float, *overrides: str, data: SimpleNamespace | None = None) -> Path:
    """A run of 40 steps as the trainer records one; `best` is its lowest validation bits/dim, at step 30."""
    (folder / name).mkdir()
    settings = [f"run.dir={folder / name}", f"run.name={name}", f"tracking.uri={mlflow_store(folder)}", *overrides]
    data = data or shards("A")
    tracker = Tracker(
        load_config(QUICKSTART, settings),
        world_size=4,
        datasets={"training": shards("A", digest="cd"), "validation": data},
    )
    for step in range(1, 41):
        metrics = {"train/bits_per_dim": best + 4 / step, "perf/images_per_s": 100.0 + step, "perf/mfu": 0.4}
        tracker.log(step, metrics | {"progress/images_seen": 8.0 * step})
    for step, value in ((10, best + 1), (30, best), (40, best + 0.1)):
        tracker.log(step, {"val/bits_per_dim": value, "val/bits_per_dim_stderr": 0.01, "val/images": 50000.0})
        tracker.log_image(step, "samples", Image.new("RGB", (8, 8), (step, 100, 200)))
    tracker.close("finished", code=0, reason="", step=40)
    record_results(
        RunFiles(folder / name), 40, {"final/ema_bits_per_dim": best - 0.1, "final/ema_bits_per_dim_stderr": 0.02}, []
    )
    return folder / name


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder, "small", 3.9, "model.width=96"), make_run(folder, "large <b>", 3.8, "model.width=192")]


def main(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare", *arguments])
        return compare.main()


def as_rows(rows: list[compare.Row]) -> dict[str, list[str]]:
    return dict(rows)


def test_the_table_shows_the_parameters_that_differ_and_what_came_of_them(two_runs: list[Path]) -> None:
    runs = [history_of_folder(folder) for folder in two_runs]
    assert compare.parameters_that_differ(runs) == [("model.width", ["96", "192"])]
    rows = as_rows(compare.results(runs))
    assert rows["final bits/dim"] == ["4.0000 ± 0.0100 (50,000 images)", "3.9000 ± 0.0100 (50,000 images)"]
    assert rows["best bits/dim"][0] == "3.9000 ± 0.0100 (step 30, 50,000 images)"
    assert rows["evaluated, ema weights"] == ["3.8000 ± 0.0200", "3.7000 ± 0.0200"]
    assert rows["images/s"] == ["120.5", "120.5"]
    assert rows["MFU"] == ["40.0 %", "40.0 %"]
    assert rows["ranks"] == ["4", "4"]
    hours = runs[0].rank_hours()
    assert hours == pytest.approx(4 * runs[0].wall_hours())
    assert compare.warnings(runs) == []


def test_a_folder_and_mlflow_tell_the_same(two_runs: list[Path]) -> None:
    folder = history_of_folder(two_runs[0])
    client = mlflow.MlflowClient(mlflow_store(two_runs[0].parent))
    run_id = RunFiles(two_runs[0]).read_state()["mlflow_run_id"]
    run = history_of_run(client, run_id)
    assert compare.results([run])[1:] == compare.results([folder])[1:]  # all but the words for the status
    assert run.params == folder.params
    assert run.curves.keys() == folder.curves.keys()
    for name, curve in run.curves.items():
        np.testing.assert_array_equal(curve.steps, folder.curves[name].steps)
        np.testing.assert_array_equal(curve.values, folder.curves[name].values)
        np.testing.assert_allclose(curve.times, folder.curves[name].times, rtol=0, atol=0.01)
    assert {step: read() for step, read in run.pictures["samples"].items()} == {
        step: read() for step, read in folder.pictures["samples"].items()
    }
    assert data_set_key(run.data) == data_set_key(folder.data) == "imagenet32-A"


def test_pauses_between_attempts_are_no_work() -> None:
    curve = SimpleNamespace(steps=np.array([1.0, 2.0, 3.0, 4.0]), times=np.array([100.0, 200.0, 5000.0, 5100.0]))
    history = RunHistory(
        name="", place="", status="", params={"train.global_batch_images": "8"},
        curves={"train/bits_per_dim": curve},  # type: ignore[dict-item]
        attempts=[{"started": 50.0, "world_size": 4}, {"started": 4900.0, "world_size": 2}],
    )  # fmt: skip
    assert history.wall_hours() * 3600 == pytest.approx(150 + 200)
    assert history.rank_hours() == pytest.approx((4 * 150 + 2 * 200) / 3600)
    np.testing.assert_allclose(history.working_hours(curve.times) * 3600, [50, 150, 250, 350])
    images = history.images_seen(curve.steps)
    assert images is not None
    np.testing.assert_array_equal(images, [8, 16, 24, 32])


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (("A", "A"), "imagenet32-A"),
        (("B", "B"), "imagenet32-B"),
        (("A", "B"), None),
        (("A", "photographs"), None),
        (("cifar10",), "cifar10"),
        (("chrabaszcz",), None),
    ],
)
def test_published_figures_stand_beside_runs_of_the_very_same_version_only(
    versions: tuple[str, ...], expected: str | None
) -> None:
    def history(version: str, **params: str) -> RunHistory:
        manifest: Any = shards(version).manifest
        data = {
            "name": manifest.name, "digest": version * 32, "image_size": 32, "form": manifest.source["form"],
            "version": manifest.protocol.get("imagenet_version", version),
        }  # fmt: skip
        return RunHistory(name="", place="", status="", params=params, curves={}, data=data)

    runs = [history(version) for version in versions]
    assert compare.comparable_key(runs) == expected
    assert bool(compare.warnings(runs)) == (len(set(versions)) > 1)
    super_resolution = [history(version, **{"model.super_resolution.small_size": "8"}) for version in versions]
    assert compare.comparable_key(super_resolution) is None


def test_the_published_figures_of_two_versions_do_not_mix() -> None:
    a, b = ({entry.bits_per_dim for entry in PUBLISHED[f"imagenet32-{version}"]} for version in "AB")
    assert (3.77 in a, 3.69 in a, 3.43 in a) == (True, True, False)
    assert (3.43 in b, 3.77 in b) == (True, False)
    assert all(entry.source for entries in PUBLISHED.values() for entry in entries)


def test_the_command_prints_a_table_and_writes_one_page_with_everything_in_it(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(*map(str, two_runs), "--html", str(page)) == 0
    text = capsys.readouterr().out
    assert re.search(r"model.width +96 +192", text)
    assert "3.77  Image Transformer" in text
    content = page.read_text()
    # Nothing is fetched from anywhere.
    assert re.findall(r"""(?:src|href|url)\s*[=(](?!"data:|#)""", content) == []
    assert "http" not in content
    assert content.count("data:image/png;base64,") == 2 * 3
    assert "large <b>" not in content
    assert "large &lt;b&gt;" in content
    for svg in re.findall(r"<svg.*?</svg>", content, re.DOTALL):
        frame = json.loads(html.unescape(re.search(r"<desc>(.*?)</desc>", svg)[1]))  # type: ignore[index]
        assert {line["label"] for line in frame["lines"]} == {"small", "large <b>"}
        ElementTree.fromstring(svg)
    assert content.count("<svg") == 3 * 4  # three axes of validation, training, speed and utilisation
    assert "Image Transformer" in content


def test_runs_of_an_experiment_are_found_by_a_filter(two_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    uri = mlflow_store(two_runs[0].parent)
    assert main("--experiment", "quickstart", "--filter", "params.`model.width` = '192'", "--uri", uri) == 0
    text = capsys.readouterr().out
    assert "large <b>" in text
    assert "small" not in text
    run_id = RunFiles(two_runs[0]).read_state()["mlflow_run_id"]
    assert main(run_id, "--experiment", "quickstart", "--uri", uri) == 0
    text = capsys.readouterr().out
    assert re.search(r"model.width +96 +192", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name at least one run"),
        (["nothing"], "nothing: is neither the folder of a run nor an id of MLflow"),
        (["EMPTY"], "holds no run"),
        (["0" * 32], "MLflow has no such run"),
        (["--experiment", "quickstrat"], "--experiment quickstrat: MLflow has no such experiment; it has"),
        (["--experiment", "quickstart", "--filter", "width > 3 or"], "--filter 'width > 3 or': MLflow does not"),
        (["--experiment", "quickstart", "--filter", "params.a = 'b'"], "no run that the filter finds"),
        (["RUN", "--html", "/nowhere/x.html"], "--html /nowhere/x.html: cannot be written"),
        (["0" * 32, "--uri", "sqlite:////nowhere.db"], "--uri sqlite:////nowhere.db: there is no such file"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    arguments: list[str], words: str, two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"EMPTY": str(tmp_path), "RUN": str(two_runs[0])}
    uri = [] if "--uri" in arguments else ["--uri", mlflow_store(two_runs[0].parent)]
    assert main(*(places.get(argument, argument) for argument in arguments), *uri) == 2
    assert words in capsys.readouterr().err


def test_many_runs_are_printed_in_blocks_that_fit() -> None:
    runs = [RunHistory(name=f"run-{i}", place=f"/{i}", status="", params={}, curves={}) for i in range(7)]
    text = compare.table(runs, [("bits/dim", [f"3.{i}" for i in range(7)])], width=40)
    assert max(len(line) for line in text.splitlines()) <= 40
    assert [f"run-{i}" in text and f"3.{i}" in text for i in range(7)] == [True] * 7
    assert len(text.split("\n\n")) == 2  # (40 - 8) // (2 + 5) = 4 runs, and the rest
    same = [RunHistory(name="x", place=f"/{i}", status="", params={}, curves={}) for i in range(2)]
    assert compare.unique_names(same) == ["x (/0)", "x (/1)"]


def test_a_chart_puts_points_where_they_belong() -> None:
    x, y = np.array([0.0, 50.0, 100.0]), np.array([2.0, 3.0, 4.0])
    svg = line_chart("loss", "step", [Line("a", 0, x, y)])
    (points,) = re.findall(r'<polyline points="([^"]*)"', svg)
    places = np.array([[float(number) for number in pair.split(",")] for pair in points.split()])
    np.testing.assert_allclose(np.diff(places[:, 0]), (600 - 58 - 14) / 2, atol=0.1)
    assert places[0, 1] - places[1, 1] == pytest.approx(places[1, 1] - places[2, 1], abs=0.2)  # up is more
    assert line_chart("loss", "step", [Line("a", 0, x, np.full(3, np.nan))]) == ""
    assert "nan" not in line_chart("loss", "step", [Line("a", 0, x, np.array([1.0, np.inf, 1.0]))])
    assert "paper 3" in line_chart("loss", "step", [Line("a", 0, x, y)], [("paper 3", 3.0)])


def test_numbers_and_ticks_are_round() -> None:
    assert [number(value) for value in (0, 1234567, 3.14159, 0.00012, 120.50, -2.0)] == [
        "0", "1,234,567", "3.142", "0.00012", "120.5", "-2",
    ]  # fmt: skip
    np.testing.assert_allclose(ticks(0.13, 1.02, 5), [0.2, 0.4, 0.6, 0.8, 1.0])
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - r) : i + r + 1].mean() for i in range(50) for r in [min(2, i, 49 - i)]]
    np.testing.assert_allclose(running_mean(values, 5), expected)


def test_a_reader_that_has_seen_enough_is_no_error(two_runs: list[Path]) -> None:
    command = f"{sys.executable} -m trainer.compare '{two_runs[0]}' '{two_runs[1]}' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=QUICKSTART.parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["Parameters that differ", "0"]
    assert done.stderr == ""
