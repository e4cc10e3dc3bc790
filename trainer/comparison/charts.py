"""Which curves, scales and published figures do the charts of a comparison show? Plotly draws them in the browser.

What `charts` gives is the data of the page; its script `trainer/comparison/compare_charts.js` turns it into Plotly's
traces.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.comparison.published import PUBLISHED
from trainer.comparison.run_history import Curve, RunHistory

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
"""Okabe and Ito's colours, which also the colour-blind tell apart."""
DASHES = ("solid", "dash", "dot", "dashdot")
"""The next eight runs have the same colours and the next dashes; names of SVG's lines in Plotly."""
SETTLED_FRACTION = 0.1
"""The first scale ignores this share of each curve at its beginning, where a loss is many times what it becomes."""
MOST_POINTS = 1000
"""Points of a line; of longer curves every n-th is shown."""
MOST_MARKED_POINTS = 40
"""Curves of so few points, such as validation, show each as a dot."""


@dataclass(frozen=True)
class Chart:
    """One metric's chart."""

    title: str
    unit: str
    """What stands at its vertical axis."""
    format: str
    """How the mouse's values are written, in d3's notation."""
    smooth: bool = False
    """Show a running mean, and the points themselves faintly behind it."""
    tick_format: str = ""
    """How the numbers at the axis are written; Plotly's choice by default."""


CHARTS = {
    "val/bits_per_dim": Chart("Validation", "bits/dim", ".4f"),
    "train/bits_per_dim": Chart("Training", "bits/dim", ".4f", smooth=True),
    "perf/images_per_s": Chart("Speed", "images/s", ",.4~r", smooth=True),
    "perf/mfu": Chart("Model FLOPs utilisation", "share of the GPUs' peak", ".1%", smooth=True, tick_format=".0~%"),
    "optim/grad_norm": Chart("Gradient norm before clipping", "L2 norm", ".4~g", smooth=True),
    "optim/lr": Chart("Learning rate", "learning rate", ".3~g", tick_format="~g"),
    "mem/peak_gib": Chart("Peak memory", "GiB", ".2f"),
    "data/wait_fraction": Chart("Waiting for data", "share of the time", ".2%", smooth=True, tick_format="~%"),
}

_Axis = Callable[[RunHistory, Curve], np.ndarray | None]
AXES: dict[str, tuple[str, _Axis]] = {
    "step": ("step", lambda run, curve: curve.steps),
    "images": ("training images", lambda run, curve: run.images_seen(curve.steps)),
    "time": ("hours at work", lambda run, curve: run.working_hours(curve.times)),
}
"""What curves are drawn against: its label, and the places of a curve's points; None where a run does not say."""


def charts(runs: Sequence[RunHistory], names: Sequence[str], published_key: str | None) -> dict[str, Any]:
    """The data of all charts for the page: only numbers that JSON has, and texts that Plotly shows as they are.

    `published_key` names the data set whose figures are lines in the chart of the validation.
    """
    shown = []
    for metric, chart in CHARTS.items():
        lines = [
            line
            for index, run in enumerate(runs)
            if metric in run.curves and (line := _line(index, run, metric, chart.smooth))
        ]
        if not lines:
            continue
        marks = _marks(published_key) if metric.startswith("val/") else []
        places = [(np.array(line["x"]["step"]), np.array(line["y"])) for line in lines]
        low, high = first_scale(places, [mark["value"] for mark in marks])
        shown.append(
            {
                "title": chart.title,
                "unit": chart.unit,
                "format": chart.format,
                "tickFormat": chart.tick_format,
                "scale": [low, high],
                "lines": lines,
                "marks": marks,
            }
        )
    return {
        "axes": {key: label for key, (label, _) in AXES.items()},
        "runs": [
            {"name": as_plotly_text(name), "color": color_of(index), "dash": dash_of(index)}
            for index, name in enumerate(names)
        ],
        "charts": shown,
    }


def color_of(run: int) -> str:
    """The colour of the n-th run."""
    return COLORS[run % len(COLORS)]


def dash_of(run: int) -> str:
    """The dashes of the n-th run's lines."""
    return DASHES[run // len(COLORS) % len(DASHES)]


def as_plotly_text(text: str) -> str:
    """Text as Plotly shows it letter by letter: unescaped, it would read tags and links in it."""
    return html.escape(text, quote=False)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the points around each point; narrower at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def first_scale(curves: Sequence[tuple[np.ndarray, np.ndarray]], marks: Sequence[float] = ()) -> tuple[float, float]:
    """The values between which a chart shows its curves (steps, values) at first.

    These are the values that the curves settle to, without the height from which a loss begins. The first mark is
    included if that leaves the curves half of the scale; otherwise the nearest mark is.
    """
    settled = [values[steps >= SETTLED_FRACTION * steps.max()] for steps, values in curves]
    low = min(float(np.percentile(values, 0.5)) for values in settled)
    high = max(float(np.percentile(values, 98)) for values in settled)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    nearest = sorted(marks, key=lambda value: max(low - value, value - high, 0))[:1]
    for mark in [*marks[:1], *nearest]:
        wide_low, wide_high = min(low, mark), max(high, mark)
        if wide_high - wide_low <= 2 * (high - low):
            margin = 0.05 * (wide_high - wide_low)
            return (wide_low - margin if wide_low < low else low), (wide_high + margin if wide_high > high else high)
    return low, high


def _line(index: int, run: RunHistory, metric: str, smooth: bool) -> dict[str, Any] | None:
    """One run's curve: `y`, its places `x` on each axis, and its `error` or running `mean`; None without a point."""
    curve = run.curves[metric]
    places = {key: axis(run, curve) for key, (_, axis) in AXES.items()}
    keep = np.isfinite(curve.values)
    if not keep.any():
        return None
    y = curve.values[keep]
    stride = -(-len(y) // MOST_POINTS)

    def shown(values: np.ndarray, digits: int) -> list[float]:
        return [float(f"{value:.{digits}g}") for value in values[::stride]]

    line: dict[str, Any] = {
        "run": index,
        "x": {key: shown(x[keep], 7) for key, x in places.items() if x is not None},
        "y": shown(y, 6),
        "dots": not smooth and len(y) <= MOST_MARKED_POINTS,
    }
    if smooth and len(y) > 10:
        line["mean"] = shown(running_mean(y, max(3, len(y) // 15)), 6)
    if spread := run.curves.get(f"{metric}_stderr"):
        line["error"] = shown(np.nan_to_num(np.interp(curve.steps[keep], spread.steps, spread.values)), 4)
    return line


def _marks(published_key: str | None) -> list[dict[str, Any]]:
    """The published figures: the paper's first, then from the best one on. The first ones get room for their names."""
    entries = sorted(
        PUBLISHED.get(published_key or "", ()),
        key=lambda entry: (entry.model != "Image Transformer", entry.bits_per_dim),
    )
    return [
        {
            "value": entry.bits_per_dim,
            "label": as_plotly_text(f"{entry.model} {entry}"),
            "source": as_plotly_text(entry.source),
        }
        for entry in entries
    ]
