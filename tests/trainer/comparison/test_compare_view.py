"""Does MLflow's own page compare two runs of this trainer: both curves in one chart, and the pictures of a step?"""

import asyncio
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.mlflow_server import MlflowServer
from tests.trainer.test_compare import make_run
from trainer.record.run_folder import RunFiles

VIEW_SECONDS = 120.0
# Charts that draw two different lines of three points at least.
CHARTS_OF_TWO = """[...document.querySelectorAll('.js-plotly-plot')].filter(chart => new Set(
    [...chart.querySelectorAll('path.js-line')].map(line => line.getAttribute('d')).filter(d => d.split('L').length > 2)
).size == 2)"""
PICTURES = """[...document.querySelectorAll('img')]
    .filter(image => image.naturalWidth > 0 && image.src.includes('images%2Fsamples%2Bstep%2B40'))
    .map(image => image.src)"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH (Debian: apt install chromium)")
def test_mlflows_compare_view_shows_the_curves_and_pictures_of_two_runs(tmp_path: Path) -> None:
    server = MlflowServer(tmp_path)
    server.start()
    try:
        folders = [
            make_run(tmp_path, name, best, f"tracking.uri={server.uri}") for name, best in (("one", 3.9), ("two", 3.8))
        ]
        pictures = asyncio.run(_look(f"{server.uri}/#/experiments/1/runs?compareRunsMode=CHART"))
    finally:
        server.kill()
    for folder in folders:
        run_id = RunFiles(folder).read_state()["mlflow_run_id"]
        assert [run_id in address for address in pictures].count(True) == 1


async def _look(url: str) -> list[str]:
    """The addresses of the pictures that the page shows at the last step."""
    # So tall that every chart is in view: the page draws only those.
    async with Browser(1600, 4500) as page:
        await page.open(url)
        for name in ("val/bits_per_dim", "train/bits_per_dim"):
            for run in ("one", "two"):
                await page.wait_for(f"document.body.innerText.includes('{run} ({name})')", VIEW_SECONDS)
        await page.wait_for(f"{CHARTS_OF_TWO}.length == 2", VIEW_SECONDS)  # training and validation
        # The slider of the pictures stands before the first step; a click on its right end takes the last one.
        await page.wait_for("document.querySelector('[role=slider]') !== null", VIEW_SECONDS)
        left, top, width, height = await page.run(
            """(() => {
                const track = document.querySelector('[role=slider]').parentElement.parentElement;
                track.scrollIntoView({block: 'center'});
                const box = track.getBoundingClientRect();
                return [box.left, box.top, box.width, box.height];
            })()"""
        )
        place = {"x": left + width - 2, "y": top + height / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await page.send("Input.dispatchMouseEvent", type=kind, **place)
        await page.wait_for(f"{PICTURES}.length == 2", VIEW_SECONDS)
        return list(await page.run(PICTURES))
