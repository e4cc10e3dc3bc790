"""Does a comparison show what differs, what came of it, and nothing that cannot be compared?"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.image_transformer.shape import Full, Local1D
from tests.support.launch import ROOT, mlflow_store
from tests.support.recorded_runs import shards
from tests.support.tiny_model import tiny_config
from trainer import compare
from trainer.comparison.run_history import RunHistory, history_of_folder, model_of
from trainer.config import flat, load_config
from trainer.record.run_folder import RunFiles


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


def test_parameters_that_only_some_runs_have_differ() -> None:
    small = {"model.attention.kind": "full", "model.super_resolution": "None", "run.name": "a"}
    large = {"model.attention.kind": "local_1d", "model.attention.memory": "32", "run.name": "b"}
    large |= {"model.super_resolution.small_size": "8"}
    runs = [RunHistory(name="", place="", status="", params=params, curves={}) for params in (small, large, {})]
    assert compare.parameters_that_differ(runs) == [
        ("model.attention.kind", ["full", "local_1d", "–"]),
        ("model.attention.memory", ["–", "32", "–"]),
        ("model.super_resolution.small_size", ["–", "8", "–"]),
    ]
    assert compare.parameters_that_differ(runs[1:]) == []  # the parameters of the last one are not known


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


def test_the_command_prints_a_table_and_writes_a_page(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(*map(str, two_runs), "--html", str(page)) == 0
    text = capsys.readouterr().out
    assert re.search(r"model.width +96 +192", text)
    assert "3.77  Image Transformer" in text
    assert text.endswith(f"{page}\n")
    assert "large &lt;b&gt;" in page.read_text()


def test_of_folders_and_without_a_page_neither_drawing_nor_mlflow_is_loaded(two_runs: list[Path]) -> None:
    program = """if True:
        import sys
        from trainer import compare
        compare.main()
        print([name for name in ("plotly", "matplotlib", "mlflow") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(two_runs[0])], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_runs_of_an_experiment_are_found_by_a_filter(two_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    uri = mlflow_store(two_runs[0].parent)
    assert main("--experiment", "small_job", "--filter", "params.`model.width` = '192'", "--uri", uri) == 0
    text = capsys.readouterr().out
    assert "large <b>" in text
    assert "small" not in text
    run_id = RunFiles(two_runs[0]).read_state()["mlflow_run_id"]
    assert main(run_id, "--experiment", "small_job", "--uri", uri) == 0
    text = capsys.readouterr().out
    assert re.search(r"model.width +96 +192", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name at least one run"),
        (["nothing"], "nothing: is neither the folder of a run nor an id of MLflow"),
        (["EMPTY"], "holds no run"),
        (["0" * 32], "MLflow has no such run"),
        (["--experiment", "smal_job"], "--experiment smal_job: MLflow has no such experiment; it has"),
        (["--experiment", "small_job", "--filter", "width > 3 or"], "--filter 'width > 3 or': MLflow does not"),
        (["--experiment", "small_job", "--filter", "params.a = 'b'"], "no run that the filter finds"),
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


def test_numbers_are_round() -> None:
    assert [compare.number(value) for value in (0, 1234567, 3.14159, 0.00012, 120.50, -2.0)] == [
        "0", "1,234,567", "3.142", "0.00012", "120.5", "-2",
    ]  # fmt: skip


def test_a_reader_that_has_seen_enough_is_no_error(two_runs: list[Path]) -> None:
    command = f"{sys.executable} -m trainer.compare '{two_runs[0]}' '{two_runs[1]}' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Parameters that differ", "0"]
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["cifar10_sparse", "celeba_sr_2d", "cifar10_row_lstm", "cifar10_pixelcnnpp"])
def test_a_model_is_known_by_the_parameters_that_were_recorded(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml", [])
    assert model_of({key: str(value) for key, value in flat(config).items()}) == config.model


@pytest.mark.parametrize(
    "params", [{}, {"model.layers": "2"}, {"model.attention": "1", "model.attention.kind": "full"}]
)
def test_parameters_that_describe_no_model_have_no_receptive_field(params: dict[str, str]) -> None:
    assert model_of(params) is None
    run = RunHistory(name="", place="", status="", params=params, curves={}, model=model_of(params))
    assert "receptive field" not in dict(compare.results([run]))


def test_the_receptive_field_stands_beside_the_results() -> None:
    local = tiny_config(image_size=8, attention=Local1D(query_block=8, memory=8), layers=1)
    runs = [
        RunHistory(name="", place="", status="", params={}, curves={}, model=model)
        for model in (local, replace(local, attention=Full()), None)
    ]
    assert dict(compare.results(runs))["receptive field"] == ["5 of 36 pixels", "36 of 36 pixels", "–"]
