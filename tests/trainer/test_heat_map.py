"""Does a heat map show every map on one scale, in a picture that any machine can make without leaving traces?"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support.launch import ROOT
from trainer.heat_map import heat_map

DARK, LIGHT = (68, 1, 84), (253, 231, 36)
"""The ends of matplotlib's viridis."""


def test_each_map_is_shown_on_one_scale() -> None:
    picture = np.asarray(heat_map({"low": np.zeros((8, 8)), "high": np.ones((8, 8))}, "bits"))
    height, width, _ = picture.shape
    dark, light = ((picture == color).all(axis=2) for color in (DARK, LIGHT))
    middle, scale = int(0.475 * width), int(0.88 * width)  # between the panels, and between them and the scale
    panel = 0.25 * height * width  # less than each of the two takes
    assert dark[:, :middle].sum() > panel
    assert light[:, middle:scale].sum() > panel
    assert not light[:, :middle].any()
    assert not dark[:, middle:scale].any()
    assert dark[:, scale:].any()


def test_a_few_outliers_do_not_hide_the_rest() -> None:
    array = np.linspace(0, 1, 400).reshape(20, 20)
    array[0, 0] = 1e6
    colors = {tuple(color) for color in np.asarray(heat_map({"a": array}, "bits")).reshape(-1, 3)}
    assert len(colors) > 100


def test_the_size_depends_on_the_number_of_maps_only() -> None:
    rng = np.random.default_rng(0)
    sizes = {
        heat_map({name: scale * rng.normal(size=(side, side)) for name in ("a", "b")}, unit).size
        for side, scale, unit in ((8, 1.0, "bits"), (64, 1e5, "a long name of a unit"), (32, 0.0, ""))
    }
    assert len(sizes) == 1
    assert heat_map({"a": np.ones((8, 8))}, "bits").width < sizes.pop()[0]


def test_nothing_is_printed_or_left_in_the_users_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    program = "import numpy, trainer.heat_map as h; h.heat_map({'a': numpy.ones((4, 4))}, 'bits').save('map.png')"
    kept = {"PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name in kept}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=environment | {"HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "map.png"]
    assert list(home.iterdir()) == []


def test_matplotlib_is_loaded_for_a_picture_only() -> None:
    program = "import sys, trainer.evaluate; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
