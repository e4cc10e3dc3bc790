"""Do browsers show what the pages promise: ours its interactive curves, MLflow's both curves and the pictures?"""

import asyncio
import math
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.mlflow_server import MlflowServer
from tests.support.recorded_runs import make_run
from tests.trainer.comparison.test_page import page_of
from trainer.comparison.run_history import history_of_folder
from trainer.record.run_folder import RunFiles

VIEW_SECONDS = 120.0
# Charts that draw two different lines of three points at least.
CHARTS_OF_TWO = """[...document.querySelectorAll('.js-plotly-plot')].filter(chart => new Set(
    [...chart.querySelectorAll('path.js-line')].map(line => line.getAttribute('d')).filter(d => d.split('L').length > 2)
).size == 2)"""
PICTURES = """[...document.querySelectorAll('img')]
    .filter(image => image.naturalWidth > 0 && image.src.includes('images%2Fsamples%2Bstep%2B40'))
    .map(image => image.src)"""


# The colours of the strong lines in a chart of our page, and where its dots are.
LINES = """[...document.querySelectorAll('.chart')]
    .map(chart => [...chart.querySelectorAll('.scatterlayer path.js-line')]
    .filter(line => line.style.strokeWidth == '2px').map(line => line.style.stroke))"""
DOTS = """[...document.querySelectorAll('.chart')[0].querySelectorAll('path.point')]
    .map(dot => dot.getAttribute('transform').match(/[\\d.]+/g).map(Number))"""
PLOT = """(box => [box.left, box.top, box.width, box.height])
    (divs[0].querySelector('.nsewdrag').getBoundingClientRect())"""
BLUE, ORANGE = "rgb(0, 114, 178)", "rgb(213, 94, 0)"

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium or Chrome on the PATH (Debian: apt install chromium)"
)


@pytest.mark.slow
@needs_browser
def test_our_page_hides_runs_changes_scales_and_asks_for_nothing(two_runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of([history_of_folder(folder) for folder in two_runs]))
    asyncio.run(_use(page.as_uri()))


async def _use(url: str) -> None:
    async with Browser(1300, 1500) as page:
        await page.open(url)
        await _drawn(page, "true")
        assert await page.run(LINES) == [[BLUE, ORANGE]] * 4
        # Plotly knows every word that is said to it; some are not needed for some traces.
        problems = await page.run("divs.flatMap(div => Plotly.validate(div.data, div.layout) ?? [])")
        assert [problem for problem in problems if problem["code"] != "unused"] == []

        # A zoomed chart stays zoomed when a run is hidden, in all charts at once.
        left, top, width, height = await page.run(PLOT)
        before = await page.run("divs[0].layout.xaxis.range")
        drag = {"y": top + height / 2, "button": "left", "clickCount": 1}
        await page.send("Input.dispatchMouseEvent", type="mousePressed", x=left + width * 0.2, **drag)
        await page.send("Input.dispatchMouseEvent", type="mouseMoved", x=left + width * 0.7, **drag)
        await page.send("Input.dispatchMouseEvent", type="mouseReleased", x=left + width * 0.7, **drag)
        zoomed = [before[0] + share * (before[1] - before[0]) for share in (0.2, 0.7)]
        await page.wait_for(f"Math.abs(divs[0].layout.xaxis.range[0] - {zoomed[0]}) < 0.5")
        await page.run("boxes()[0].click()")
        await _drawn(page, "!drawn.shown[0]")
        assert await page.run(LINES) == [[ORANGE]] * 4
        assert await page.run("divs[0].layout.xaxis.range") == pytest.approx(zoomed, abs=0.5)
        await page.run("document.getElementById('none').click()")
        await _drawn(page, "!drawn.shown[1]")
        assert await page.run(LINES) == [[]] * 4
        await page.run("document.getElementById('all').click()")
        await _drawn(page, "drawn.shown[0] && drawn.shown[1]")
        assert await page.run(LINES) == [[BLUE, ORANGE]] * 4

        # Validation of the first run is 4.9, 3.9, 4.0 at the steps 10, 30, 40.
        await page.run("Plotly.relayout(divs[0], {'xaxis.autorange': true, 'yaxis.autorange': true}).then(() => null)")
        (x, y) = zip(*(await page.run(DOTS))[:3], strict=True)
        assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(20 / 30, abs=0.01)
        assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(0.9 / 1.0, abs=0.01)
        await page.run("controls.elements.logX.click(); controls.elements.logY.click()")
        await _drawn(page, "drawn.logX && drawn.logY")
        (x, y) = zip(*(await page.run(DOTS))[:3], strict=True)
        assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(math.log(3) / math.log(4), abs=0.01)
        assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(math.log(4.9 / 4.0) / math.log(4.9 / 3.9), abs=0.01)

        await page.run("document.querySelector('[name=axis][value=images]').click()")
        await _drawn(page, "drawn.axis == 'images'")
        assert await page.run("divs[0].querySelector('.xtitle').textContent") == "training images"
        assert await page.run("divs[0].querySelector('.ytitle').textContent") == "bits/dim"

        # Names are shown as they are, also where Plotly writes them.
        left, top, width, height = await page.run(PLOT)
        place = {"x": left + width / 2, "y": top + height / 2}
        await page.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        await page.wait_for("divs[0].querySelector('.hoverlayer').textContent.includes('large <b>')")
        assert "± 0.0100" in await page.run("divs[0].querySelector('.hoverlayer').textContent")

        await page.run("Plotly.downloadImage = Plotly.toImage")
        picture = await page.run("download(data.charts[0], divs[0])")
        assert picture.startswith("data:image/png;base64,")

        assert [asked for asked in page.requests if not asked.startswith(("data:", "blob:"))] == [url]
        assert page.complaints == []


async def _drawn(page: Browser, condition: str) -> None:
    """Wait until all charts are drawn as chosen."""
    await page.wait_for(f"(drawn => drawn && ({condition}))(JSON.parse(document.body.dataset.drawn ?? 'null'))")


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_browser
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
