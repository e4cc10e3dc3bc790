"""Does a browser draw the charts of a scaling law, with nothing from elsewhere?"""

import asyncio
from pathlib import Path

import pytest

from tests.support.browser import Browser
from tests.support.recorded_runs import make_scaling_runs
from tests.trainer.comparison.test_compare_view import needs_browser
from trainer import scaling


@pytest.mark.slow
@needs_browser
def test_the_page_of_a_law_draws_its_three_charts(tmp_path: Path) -> None:
    names = [str(folder) for folder in make_scaling_runs(tmp_path / "runs", noise=0.001)]
    page = tmp_path / "page.html"
    assert scaling.main([*names, "--flops", "1e14", "--html", str(page)]) == 0
    asyncio.run(_look(page.as_uri()))


async def _look(url: str) -> None:
    async with Browser(1300, 1500) as page:
        await page.open(url)
        await page.wait_for("document.body.dataset.drawn == 'yes'")
        problems = await page.run("divs.flatMap(div => Plotly.validate(div.data, div.layout) ?? [])")
        assert [problem for problem in problems if problem["code"] != "unused"] == []
        dots = "divs.map(div => [...div.querySelectorAll('.scatterlayer path.point')].length)"
        # 12 runs; 12 runs and the best size of each budget; parabolas.
        runs, budgets, _ = await page.run(dots)
        assert (runs, budgets) == (12, 15)
        legend = await page.run("divs[2].querySelector('.legend').textContent")
        assert "Henighan et al. 2020, 32x32" in legend and "compute-optimal, beyond all runs" in legend
        assert [asked for asked in page.requests if not asked.startswith(("data:", "blob:"))] == [url]
        assert page.complaints == []
