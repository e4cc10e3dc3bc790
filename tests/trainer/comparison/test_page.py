"""Is the page of a comparison one file that needs nothing else, and are the names in it only names?"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from trainer import compare
from trainer.comparison.page import comparison_page
from trainer.comparison.run_history import RunHistory, history_of_folder

MOST_BYTES = 6 << 20
"""A page can be sent by mail; of this, Plotly takes 4.8 MB."""


def page_of(runs: Sequence[RunHistory], warnings: Sequence[str] = ()) -> str:
    names = compare.unique_names(runs)
    differing, results = compare.parameters_that_differ(runs), compare.results(runs)
    return comparison_page(runs, names, differing, results, warnings, compare.comparable_key(runs))


def without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def test_the_page_asks_for_nothing_from_elsewhere(two_runs: list[Path]) -> None:
    page = page_of([history_of_folder(folder) for folder in two_runs])
    assert len(page.encode()) < MOST_BYTES
    ours = without_plotly(page)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in ours
    assert "http" not in ours.replace("http-equiv", "")
    assert re.findall(r"""(?:src|href|url)\s*[=(](?!"data:|#)""", ours) == []
    assert ours.count("data:image/png;base64,") == 2 * 3
    assert "Image Transformer" in ours
    assert "{{" not in ours


def test_tables_warnings_and_pictures_need_no_script(two_runs: list[Path]) -> None:
    page = page_of([history_of_folder(folder) for folder in two_runs], ["Some <i>warning</i>."])
    plain = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    plain = re.sub(r'<div class="needs-script" hidden>.*</figure></div></div>', "", plain)
    assert "Curves</h2><noscript>" in plain
    assert "chart" not in re.sub(r"<style>.*?</style>", "", plain, flags=re.DOTALL)
    for words in ("model.width", "<td>96</td><td>192</td>", "final bits/dim", "3.9000 ± 0.0100", "step 40", "3.77"):
        assert words in plain
    assert "Some &lt;i&gt;warning&lt;/i&gt;." in plain


def test_every_run_is_in_the_data_of_every_chart_and_in_the_legend(two_runs: list[Path]) -> None:
    page = page_of([history_of_folder(folder) for folder in two_runs])
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    titles = [chart["title"] for chart in data["charts"]]
    assert titles == ["Validation", "Training", "Speed", "Model FLOPs utilisation"]
    assert page.count('<div class="chart"></div>') == len(titles)
    assert all([line["run"] for line in chart["lines"]] == [0, 1] for chart in data["charts"])
    assert [run["name"] for run in data["runs"]] == ["small", "large &lt;b&gt;"]
    assert page.count('<input type="checkbox" name="run" checked>') == 2


def test_a_name_is_only_a_name(two_runs: list[Path]) -> None:
    run = history_of_folder(two_runs[0])
    name = '</script><script>alert("{{plotly}}")</script> <!-- {{nothing}}'
    hostile = RunHistory(name, run.place, run.status, run.params, run.curves, pictures=run.pictures)
    tame, odd = (without_plotly(page_of([found])) for found in (run, hostile))
    for mark in ("<script", "</script", "<!--", "alert("):
        extra = 1 if mark == "alert(" else 0  # as text, in the title, the tables, the legend and the data
        assert (odd.count(mark) > tame.count(mark)) == bool(extra), mark
    assert "{{nothing}}" in odd


def test_without_a_curve_there_is_no_script_of_plotly() -> None:
    page = page_of([RunHistory(name="a", place="/a", status="failed", params={}, curves={})])
    assert len(page) < 20_000
    assert "Curves" not in page
