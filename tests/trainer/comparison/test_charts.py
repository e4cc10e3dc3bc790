"""Do the charts show each curve where it belongs, on a scale that shows what matters, and text as text?"""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from trainer.comparison.charts import COLORS, MOST_POINTS, charts, color_of, dash_of, first_scale, running_mean
from trainer.comparison.published import PUBLISHED
from trainer.comparison.run_history import Curve, RunHistory


def history(steps: Sequence[float], values: Sequence[float], metric: str = "val/bits_per_dim") -> RunHistory:
    """A run of one curve; a step takes 8 images and an hour."""
    curve = Curve(np.array(steps, dtype=float), 3600.0 * np.array(steps, dtype=float), np.array(values, dtype=float))
    attempts = [{"started": 0.0, "world_size": 1}]
    params = {"train.global_batch_images": "8"}
    return RunHistory(name="", place="", status="", params=params, curves={metric: curve}, attempts=attempts)


def test_points_stand_where_they_belong_on_each_axis() -> None:
    (chart,) = charts([history([1, 2, 4], [4.0, 3.5, 3.25])], ["a"], None)["charts"]
    assert (chart["title"], chart["unit"]) == ("Validation", "bits/dim")
    (line,) = chart["lines"]
    assert line["y"] == [4.0, 3.5, 3.25]
    assert line["x"] == {"step": [1, 2, 4], "images": [8, 16, 32], "time": [1, 2, 4]}
    assert line["dots"]


def test_what_is_not_finite_is_left_out() -> None:
    data = charts([history([1, 2, 3, 4], [np.inf, 3.0, np.nan, 2.0])], ["a"], None)
    (line,) = data["charts"][0]["lines"]
    assert (line["x"]["step"], line["y"]) == ([2, 4], [3.0, 2.0])
    json.dumps(data, allow_nan=False)
    assert charts([history([1], [np.nan])], ["a"], None)["charts"] == []


def test_noisy_curves_have_a_running_mean_and_long_ones_fewer_points() -> None:
    values = 3 + np.random.default_rng(0).normal(size=3500)
    (line,) = charts([history(range(1, 3501), values, "train/bits_per_dim")], ["a"], None)["charts"][0]["lines"]
    assert MOST_POINTS / 2 < len(line["y"]) == len(line["mean"]) == len(line["x"]["step"]) <= MOST_POINTS
    assert np.std(line["mean"]) < 0.2 * np.std(line["y"])
    expected = [values[max(0, i - r) : i + r + 1].mean() for i in range(50) for r in [min(2, i, 49 - i)]]
    np.testing.assert_allclose(running_mean(values[:50], 5), expected[:48] + expected[48:])


def test_the_first_scale_shows_what_curves_become() -> None:
    steps = np.arange(1.0, 1001.0)
    low, high = first_scale([(steps, 3 + 5 * np.exp(-steps / 20))])
    assert 2.5 < low < 3.0 < high < 3.5
    assert first_scale([(steps, np.full(1000, 2.0))]) == pytest.approx((1.9, 2.1))


def test_a_published_figure_is_in_the_first_scale_if_one_is_near() -> None:
    steps = np.arange(1.0, 101.0)
    values = np.linspace(4.0, 3.8, 100)
    low, high = first_scale([(steps, values)], [3.2, 3.7])
    assert 3.2 < low < 3.7 < 3.9 < high
    # The first one, which is the paper's, even where another is in the scale anyway.
    low, high = first_scale([(steps, values)], [3.7, 3.9])
    assert low < 3.7
    assert first_scale([(steps, values)], [2.0]) == first_scale([(steps, values)])


def test_published_figures_are_marks_of_the_validation_only() -> None:
    run = history([1, 2], [4.0, 3.9])
    (chart,) = charts([run], ["a"], "imagenet32-A")["charts"]
    assert len(chart["marks"]) == len(PUBLISHED["imagenet32-A"])
    assert chart["marks"][0]["label"] == "Image Transformer 3.77"
    values = [mark["value"] for mark in chart["marks"][1:]]
    assert values == sorted(values)
    assert charts([run], ["a"], None)["charts"][0]["marks"] == []
    (training,) = charts([history([1, 2], [4.0, 3.9], "train/bits_per_dim")], ["a"], "imagenet32-A")["charts"]
    assert training["marks"] == []


def test_runs_are_told_apart_by_colour_and_dashes() -> None:
    looks = {(color_of(run), dash_of(run)) for run in range(4 * len(COLORS))}
    assert len(looks) == 4 * len(COLORS)


def test_names_are_shown_as_they_are() -> None:
    data = charts([history([1], [3.0])], ['<a href="x">%{y}</a> & co'], None)
    assert data["runs"][0]["name"] == '&lt;a href="x"&gt;%{y}&lt;/a&gt; &amp; co'
