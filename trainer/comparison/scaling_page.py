"""How does a scaling law look in a browser? One file with its charts and tables, as that of a comparison."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.comparison.charts import as_plotly_text, color_of, dash_of
from trainer.comparison.page import whole_page
from trainer.comparison.published_laws import PUBLISHED_LAWS
from trainer.comparison.scaling_law import CONFIDENCE, Estimate, Fit, Target, budgets_of, levels, valleys

POINTS = 41
"""Of a line that has an interval."""


@dataclass(frozen=True)
class Table:
    """As the terminal and the page show it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def scaling_page(fit: Fit, target: Target | None, tables: Sequence[Table], sentences: Sequence[str]) -> str:
    """The whole page."""
    title = f"Scaling law of {len(fit.runs)} runs"
    shown = scaling_charts(fit, target)
    figures = "".join(
        f'<figure class="card"><figcaption>{html.escape(chart["title"])}</figcaption>'
        '<div class="chart law"></div></figure>'
        for chart in shown
    )
    parts = [
        f"<h1>{title}</h1>",
        '<p class="lead">Bits per dimension by training FLOP and size of the model, lower is better. Intervals and '
        f"shaded bands are of {CONFIDENCE:.0%}, from runs drawn anew, and hold if the law does.</p>",
        *(f'<p class="card warning">{html.escape(text)}</p>' for text in sentences),
        "<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>",
        '<div class="needs-script" hidden><p class="hint">Drag over a chart to zoom in; double-click to go back; '
        f'click a name below a chart to hide its line.</p><div class="charts">{figures}</div></div>',
        *(_table(table) for table in tables),
    ]
    return whole_page(title, "\n".join(parts), {"charts": shown}, script="scaling_charts.js", with_plotly=True)


def scaling_charts(fit: Fit, target: Target | None) -> list[dict[str, Any]]:
    """The data of the charts: only numbers that JSON has, and texts that Plotly shows as they are."""
    least, most = fit.measured
    forecast = target if target and target.same_images else None
    return [
        {
            "title": "Bits/dim against compute",
            "x": "training FLOP",
            "y": "bits/dim",
            "format": ".4f",
            "logY": False,
            "lines": [*_by_size(fit), *_frontier(fit, fit.best_bits_per_dim, forecast), *_config_bits(fit, forecast)],
        },
        {
            "title": "Sizes of each budget",
            "x": "parameters",
            "y": "bits/dim",
            "format": ".4f",
            "logY": False,
            "lines": _by_budget(fit),
        },
        {
            "title": "Compute-optimal size",
            "x": "training FLOP",
            "y": "parameters",
            "format": ".3~s",
            "logY": True,
            "lines": [
                *_frontier(fit, fit.best_size, target),
                *_valleys(fit),
                *_config_size(target),
                *_published(np.geomspace(least, max(most, target.flops if target else most), 2)),
            ],
        },
    ]


def _by_size(fit: Fit) -> list[dict[str, Any]]:
    """The runs of each size, and what the law says of it."""
    lines = []
    for index, group in enumerate(levels([run.parameters for run in fit.runs])):
        runs = [fit.runs[place] for place in group]
        flops = np.geomspace(min(run.flops for run in runs) / 1.5, max(run.flops for run in runs) * 1.5, POINTS)
        said = fit.law.bits_per_dim(runs[0].parameters, flops / fit.cost.of(runs[0].parameters))
        name = f"{short(runs[0].parameters)} parameters"
        lines.append(_line(name, flops, said, index=index, legend=False))
        bits = [run.bits_per_dim for run in runs]
        lines.append(_dots(name, [run.flops for run in runs], bits, index=index, texts=[run.name for run in runs]))
    return lines


def _by_budget(fit: Fit) -> list[dict[str, Any]]:
    """The runs of each budget with at least two of them, what the law says of it, and its lowest point."""
    lines = []
    for index, budget in enumerate(group for group in budgets_of(fit.runs) if len(group) > 1):
        flops = float(np.exp(np.mean(np.log([run.flops for run in budget]))))
        sizes = np.geomspace(min(r.parameters for r in budget) / 2, max(r.parameters for r in budget) * 2, POINTS)
        name = f"{flops:.3g} FLOP"
        lines.append(
            _line(name, sizes, fit.law.bits_per_dim(sizes, flops / fit.cost.of(sizes)), index=index, legend=False)
        )
        bits = [run.bits_per_dim for run in budget]
        lines.append(
            _dots(name, [run.parameters for run in budget], bits, index=index, texts=[run.name for run in budget])
        )
        best, needs = fit.best_size(flops).value, fit.best_bits_per_dim(flops).value
        if sizes[0] <= best <= sizes[-1]:
            lines.append(
                _dots(f"best size at {name}", [best], [needs], index=index, symbol="star", size=12, legend=False)
            )
    return lines


def _frontier(fit: Fit, value_at: Callable[[float], Estimate], target: Target | None) -> list[dict[str, Any]]:
    """A value of the compute-optimal model with its interval: solid where runs are, dashed beyond."""
    least, most = fit.measured
    parts = [(least, most, "solid", "compute-optimal")]
    if target and target.flops > most:
        parts.append((most, target.flops, "dash", "compute-optimal, beyond all runs"))
    if target and target.flops < least:
        parts.append((target.flops, least, "dash", "compute-optimal, beyond all runs"))
    lines = []
    for begin, end, dash, name in parts:
        flops = np.geomspace(begin, end, POINTS)
        values = [value_at(float(budget)) for budget in flops]
        line = _line(name, flops, [estimate.value for estimate in values], dash=dash, width=3)
        line |= {"low": _numbers([e.low for e in values]), "high": _numbers([e.high for e in values])}
        lines.append(line)
    return lines


def _config_bits(fit: Fit, target: Target | None) -> list[dict[str, Any]]:
    if target is None or target.parameters is None or target.tokens is None:
        return []
    said = fit.bits_per_dim(target.parameters, target.tokens)
    dots = _dots(f"forecast for {target.name}", [target.flops], [said.value], symbol="diamond", size=11)
    return [dots | {"error": {"above": _numbers([said.high - said.value]), "below": _numbers([said.value - said.low])}}]


def _config_size(target: Target | None) -> list[dict[str, Any]]:
    if target is None or target.parameters is None:
        return []
    return [_dots(target.name, [target.flops], [target.parameters], symbol="diamond", size=11)]


def _valleys(fit: Fit) -> list[dict[str, Any]]:
    found = valleys(fit.runs)
    if not found:
        return []
    return [
        _dots(
            "lowest point of a parabola through a budget's runs", [v.flops for v in found], [v.best_size for v in found]
        )
    ]


def _published(flops: np.ndarray) -> list[dict[str, Any]]:
    return [
        _line(law.name, flops, [law.best_size(float(budget)) for budget in flops], index=index, dash="dot", width=1.5)
        for index, law in enumerate(PUBLISHED_LAWS)
    ]


def _line(
    name: str,
    x: Any,
    y: Any,
    *,
    index: int | None = None,
    dash: str | None = None,
    width: float = 1.5,
    legend: bool = True,
) -> dict[str, Any]:
    return {
        "name": as_plotly_text(name),
        "x": _numbers(x),
        "y": _numbers(y),
        "color": None if index is None else color_of(index),
        "dash": dash or ("solid" if index is None else dash_of(index)),
        "width": width,
        "legend": legend,
    }


def _dots(
    name: str,
    x: Any,
    y: Any,
    *,
    index: int | None = None,
    symbol: str = "circle",
    size: int = 8,
    legend: bool = True,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    line = _line(name, x, y, index=index, legend=legend) | {"dots": {"symbol": symbol, "size": size}}
    return line | ({"texts": [as_plotly_text(text) for text in texts]} if texts else {})


def _numbers(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
    rows = "".join(
        f"<tr><th>{html.escape(row[0])}</th>" + "".join(f"<td>{html.escape(text)}</td>" for text in row[1:]) + "</tr>"
        for row in table.rows
    )
    return (
        f"<h2>{html.escape(table.title)}</h2>"
        f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def short(value: float) -> str:
    """Three digits and a unit: `206 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= value < 1000 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
