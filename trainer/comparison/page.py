"""How does a comparison of runs look in a browser? One file with everything in it, so that it can be sent to others."""

import base64
import html
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.comparison.charts import charts, color_of, dash_of
from trainer.comparison.published import PUBLISHED, Published
from trainer.comparison.run_history import RunHistory

PICTURE_STEPS = 4
"""Rows of pictures of one kind: the last one of each run, and earlier ones, evenly spread."""
Row = tuple[str, list[str]]

_PUBLISHED_COLUMNS = ("model", "bits/dim", "measure", "parameters", "version is", "reproduced", "source")

_TEMPLATE = Path(__file__).with_name("page.html")


def comparison_page(
    runs: Sequence[RunHistory],
    names: Sequence[str],
    differing: Sequence[Row],
    results: Sequence[Row],
    warnings: Sequence[str],
    published_key: str | None,
) -> str:
    """The whole page. `published_key` names the data set whose published figures may stand beside these runs."""
    title = " · ".join(names) if len(names) <= 4 else f"{len(names)} runs"
    data = charts(runs, names, published_key)
    parts = [f"<h1>{html.escape(title)}</h1>", _lead(runs)]
    parts += [f'<p class="card warning">{html.escape(text)}</p>' for text in warnings]
    parts += ["<h2>Results</h2>", _table(names, results, key_rows=("final bits/dim", "best bits/dim"))]
    if differing and len(runs) > 1:
        parts += ["<h2>Parameters that differ</h2>", _table(names, differing)]
    parts.append(_curves(data, names))
    parts.append(_pictures(runs, names))
    parts.append(_published(published_key))
    body = "\n".join(part for part in parts if part)
    return whole_page(title, body, data, script="compare_charts.js", with_plotly=bool(data["charts"]))


def whole_page(title: str, body: str, data: Mapping[str, Any], *, script: str, with_plotly: bool) -> str:
    """A page in one file: the template with its body in HTML, and the script of this folder that draws the data."""
    words = {
        "title": html.escape(title),
        "body": body,
        "data": _in_script(json.dumps(data, allow_nan=False, separators=(",", ":"))),
        "plotly": _plotly() if with_plotly else "",
        "script": _TEMPLATE.with_name(script).read_text(encoding="utf-8"),
    }
    # In one pass, so that nobody's words are taken for a place to fill in.
    return re.sub(r"{{(\w+)}}", lambda place: words[place[1]], _TEMPLATE.read_text(encoding="utf-8"))


def _plotly() -> str:
    """Plotly's script, 4.8 MB: its licence (MIT) stands at its beginning."""
    # Loaded here, because only a page needs it and the table should not wait.
    library: Any = importlib.import_module("plotly.offline")
    return str(library.get_plotlyjs()).replace("</script", "<\\/script")


def _in_script(text: str) -> str:
    """JSON that cannot end the script element that holds it."""
    return text.replace("<", "\\u003c")


def _lead(runs: Sequence[RunHistory]) -> str:
    sets = dict.fromkeys(str(run.data["name"]) for run in runs if run.data)
    scored = f"Scored on {', '.join(sets)}. " if sets else ""
    return f'<p class="lead">{html.escape(scored)}Bits per dimension, lower is better; ± is the standard error.</p>'


def _table(names: Sequence[str], rows: Sequence[Row], key_rows: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{_sample(index)}{html.escape(name)}</th>" for index, name in enumerate(names))
    lines = [
        f"<tr{' class=key' if name in key_rows else ''}><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    ]
    return (
        f'<div class="card"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _curves(data: Mapping[str, Any], names: Sequence[str]) -> str:
    """The controls of all charts, which are also their legend, and an empty place for each chart."""
    if not data["charts"]:
        return ""
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{key}"{" checked" if index == 0 else ""}>'
        f"{html.escape(label)}</label>"
        for index, (key, label) in enumerate(data["axes"].items())
    )
    runs = "".join(
        f'<label><input type="checkbox" name="run" checked>{_sample(index)}{html.escape(name)}</label>'
        for index, name in enumerate(names)
    )
    figures = "".join(
        f'<figure class="card"><figcaption>{html.escape(chart["title"])}</figcaption><div class="chart"></div></figure>'
        for chart in data["charts"]
    )
    smooth = any("mean" in line for chart in data["charts"] for line in chart["lines"])
    hint = "Drag over a chart to zoom in; double-click to go back."
    if smooth:
        hint += " Where values are noisy, the strong line is a running mean; recorded values are faint."
    if any(chart["marks"] for chart in data["charts"]):
        hint += " Dotted lines are published figures; point at a name to see its source."
    return (
        "<h2>Curves</h2><noscript><p>The curves need JavaScript; tables and pictures do not.</p></noscript>"
        f'<div class="needs-script" hidden><form id="controls" class="card" autocomplete="off">'
        f"<fieldset><legend>Runs:</legend>{runs}"
        '<button type="button" id="all">all</button><button type="button" id="none">none</button></fieldset>'
        f"<fieldset><legend>Against:</legend>{axes}</fieldset>"
        "<fieldset><legend>Logarithmic:</legend>"
        '<label><input type="checkbox" name="logY">vertical axis</label>'
        '<label><input type="checkbox" name="logX">horizontal axis</label></fieldset></form>'
        f'<p class="hint">{hint}</p><div class="charts">{figures}</div></div>'
    )


def _pictures(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    keys = sorted({key for run in runs for key in run.pictures}, key=lambda key: (key != "samples", key))
    parts = []
    for key in keys:
        shown = [(index, run, run.pictures[key]) for index, run in enumerate(runs) if key in run.pictures]
        heads = [f"<div>{_sample(index)}{html.escape(names[index])}</div>" for index, _, _ in shown]
        # The last of each run, whatever its step, then the same steps side by side.
        rows = [[_picture(run, key, max(pictures)) for _, run, pictures in shown]]
        for step in _earlier_steps([set(pictures) for _, _, pictures in shown]):
            rows.append([_picture(run, key, step) if step < max(pictures) else "" for _, run, pictures in shown])
        if _is_map(key):  # wide, and with numbers to read: below each other
            cells = [cell for column in zip(heads, *rows, strict=True) for cell in column]
            columns = "1fr"
        else:
            cells = [cell or "<div></div>" for row in [heads, *rows] for cell in row]
            columns = f"repeat({len(shown)}, minmax(140px, 1fr))"
        parts.append(f"<h2>{html.escape(_heading(key))}</h2>")
        parts.append(f'<div class="card pictures" style="grid-template-columns: {columns}">{"".join(cells)}</div>')
    return "\n".join(parts)


def _earlier_steps(known: Sequence[set[int]]) -> list[int]:
    """Some steps before the last one of each run, newest first: evenly spread over the steps that most runs have."""
    before = [steps - {max(steps)} for steps in known]
    counts = {step: sum(step in steps for steps in before) for steps in before for step in steps}
    common = sorted(step for step, count in counts.items() if count == max(counts.values()))
    if not common:
        return []
    return sorted({common[round(index)] for index in np.linspace(0, len(common) - 1, PICTURE_STEPS - 1)}, reverse=True)


def _picture(run: RunHistory, key: str, step: int) -> str:
    if step not in run.pictures[key]:
        return ""
    content = base64.b64encode(run.pictures[key][step]()).decode()
    text = html.escape(f"{_heading(key)} of {run.name} at step {step}")
    kind = ' class="map"' if _is_map(key) else ""
    return (
        f'<figure><img{kind} alt="{text}" src="data:image/png;base64,{content}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def _heading(key: str) -> str:
    return f"Bits of each position, {key.removeprefix('bits-')} weights" if _is_map(key) else key.capitalize()


def _is_map(key: str) -> bool:
    """Whether pictures of this kind are the heat maps of trainer.evaluate."""
    return key.startswith("bits-")


def _published(key: str | None) -> str:
    if key not in PUBLISHED:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in _cells(entry)) + "</tr>"
        for entry in PUBLISHED[key]
    )
    heads = "".join(f"<th>{column}</th>" for column in _PUBLISHED_COLUMNS)
    return (
        f"<h2>Published for {html.escape(key)}</h2>"
        '<p class="lead">Unconditional models, and only the same version of the images: figures of another version of '
        "downsampled ImageNet cannot be compared. ≤ marks what is only a bound: of the model itself, bits/dim are not "
        "more. Nothing is known of others' attempts where no word stands under reproduced.</p>"
        f'<div class="card"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cells(entry: Published) -> tuple[str, ...]:
    """What the table of published figures says of one, as _PUBLISHED_COLUMNS."""
    known = (
        ""
        if entry.version == "only one"
        else {"data loader": "read from its data loader"}.get(entry.version_from, entry.version_from)
    )
    measure = {"bound": "another bound"}.get(entry.measure, entry.measure)
    return entry.model, str(entry), measure, entry.parameters, known, entry.reproduced, entry.source


def _sample(index: int) -> str:
    """A bit of the n-th run's line."""
    dashes = {"solid": "", "dash": "9 4", "dot": "3 3", "dashdot": "9 3 3 3"}[dash_of(index)]
    return (
        f'<svg class="sample" viewBox="0 0 26 10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" '
        f'stroke="{color_of(index)}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )
