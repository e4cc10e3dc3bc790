"""How does a comparison of runs look in a browser? One file with everything in it, so that it can be sent to others."""

import base64
import html
from collections.abc import Callable, Sequence

import numpy as np

from trainer.comparison.charts import Line, color_of, line_chart
from trainer.comparison.published import PUBLISHED
from trainer.comparison.run_history import Curve, RunHistory

CHARTS = {
    "val/bits_per_dim": "Validation, bits/dim",
    "train/bits_per_dim": "Training, bits/dim",
    "perf/images_per_s": "Speed, images/s",
    "perf/mfu": "Model FLOPs utilisation",
    "optim/grad_norm": "Gradient norm before clipping",
    "optim/lr": "Learning rate",
    "mem/peak_gib": "Peak memory, GiB",
    "data/wait_fraction": "Share of time waiting for data",
}
PICTURE_STEPS = 4
"""Rows of pictures of one kind: the last ones, and others evenly spread before them."""
_Axis = Callable[[RunHistory, Curve], np.ndarray | None]
_AXES: dict[str, tuple[str, _Axis]] = {
    "step": ("step", lambda run, curve: curve.steps),
    "images": ("training images", lambda run, curve: run.images_seen(curve.steps)),
    "time": ("hours at work", lambda run, curve: run.working_hours(curve.times)),
}

Row = tuple[str, list[str]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --page: #f6f7f9; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3442; --page: #12161d; --card: #1a202b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 12px; }
.lead { color: var(--soft); margin: 0 0 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  overflow-x: auto; }
.warning { border-left: 4px solid #d55e00; margin: 0 0 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-top: 1px solid var(--line); vertical-align: top; }
thead th, tbody:first-child tr:first-child > * { border-top: 0; } thead th { padding-bottom: 8px; }
tbody th { font-weight: 400; color: var(--soft); white-space: nowrap; width: 1%; padding-right: 28px; }
tr.key td { font-weight: 600; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.axes { display: inline-flex; margin-bottom: 12px; border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
.axes label { padding: 5px 14px; cursor: pointer; background: var(--card); color: var(--soft); }
input.axis-choice { position: absolute; opacity: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
figure { margin: 0; } .charts figcaption { font-weight: 600; margin-bottom: 4px; }
.by { display: none; }
#by-step:checked ~ .charts .by-step, #by-images:checked ~ .charts .by-images, #by-time:checked ~ .charts .by-time
  { display: block; }
#by-step:checked ~ .axes [for=by-step], #by-images:checked ~ .axes [for=by-images],
#by-time:checked ~ .axes [for=by-time] { background: var(--ink); color: var(--card); }
input.axis-choice:focus-visible ~ .axes { outline: 2px solid #0072b2; }
svg.chart { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); }
svg .axis line { stroke: var(--line); } svg .axis .base { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .faint { fill: none; stroke-width: 1; opacity: .28; }
svg .error { opacity: .14; } svg line.mark { stroke: var(--soft); stroke-dasharray: 3 4; }
svg text.mark { font-size: 11px; } svg line.cursor { stroke: var(--soft); }
#tip { position: fixed; pointer-events: none; display: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px 10px; font-size: 13px; box-shadow: 0 2px 10px #0003; }
.pictures { display: grid; gap: 12px 16px; align-items: start; }
.pictures img { width: 100%; max-width: 560px; image-rendering: pixelated; border-radius: 4px; display: block;
  background: #fff; }
.pictures figcaption { color: var(--soft); font-size: 13px; margin-top: 3px; }
"""

# The nearest point of every curve under the mouse. The page is complete without it.
_SCRIPT = """
const tip = document.getElementById("tip");
const shown = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(5)));
for (const svg of document.querySelectorAll("svg.chart")) {
  const frame = JSON.parse(svg.querySelector("desc").textContent);
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor"); cursor.setAttribute("y1", 12); cursor.setAttribute("y2", 280);
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width * frame.width;
    const place = (across - frame.left) / (frame.width - frame.left - frame.right) * frame.end;
    if (place < 0 || place > frame.end) { svg.dispatchEvent(new Event("mouseleave")); return; }
    cursor.setAttribute("x1", across); cursor.setAttribute("x2", across); svg.append(cursor);
    tip.replaceChildren();
    const head = document.createElement("div"); head.textContent = frame.x + " " + shown(place); tip.append(head);
    for (const line of frame.lines) {
      let best = 0;
      line.x.forEach((x, i) => { if (Math.abs(x - place) < Math.abs(line.x[best] - place)) best = i; });
      if (place > line.x[line.x.length - 1] * 1.02) continue;
      const row = document.createElement("div"), dot = document.createElement("span");
      dot.className = "dot"; dot.style.background = line.color;
      row.append(dot, line.label + "  " + shown(line.y[best])); tip.append(row);
    }
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
  svg.addEventListener("mouseleave", () => { tip.style.display = "none"; cursor.remove(); });
}
"""


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
    parts = [f"<h1>{html.escape(title)}</h1>", _lead(runs)]
    parts += [f'<p class="card warning">{html.escape(text)}</p>' for text in warnings]
    parts += ["<h2>Results</h2>", _table(names, results, key_rows=("final bits/dim", "best bits/dim"))]
    if differing and len(runs) > 1:
        parts += ["<h2>Parameters that differ</h2>", _table(names, differing)]
    parts += ["<h2>Curves</h2>", _charts(runs, names, published_key)]
    parts.append(_pictures(runs, names))
    parts.append(_published(published_key))
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<div id="tip"></div>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


def _lead(runs: Sequence[RunHistory]) -> str:
    sets = dict.fromkeys(str(run.data["name"]) for run in runs if run.data)
    scored = f"Scored on {', '.join(sets)}. " if sets else ""
    return f'<p class="lead">{html.escape(scored)}Bits per dimension, lower is better; ± is the standard error.</p>'


def _table(names: Sequence[str], rows: Sequence[Row], key_rows: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{_dot(index)}{html.escape(name)}</th>" for index, name in enumerate(names))
    lines = [
        f"<tr{' class=key' if name in key_rows else ''}><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    ]
    return (
        f'<div class="card"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _charts(runs: Sequence[RunHistory], names: Sequence[str], published_key: str | None) -> str:
    choices = "".join(
        f'<input type="radio" name="axis" class="axis-choice" id="by-{key}"{" checked" if key == "step" else ""}>'
        for key in _AXES
    )
    labels = "".join(f'<label for="by-{key}">{html.escape(label)}</label>' for key, (label, _) in _AXES.items())
    # The paper's figure first, then from the best one on.
    entries = sorted(
        PUBLISHED.get(published_key or "", ()),
        key=lambda entry: (entry.model != "Image Transformer", entry.bits_per_dim),
    )
    marks = [(f"{entry.model} {entry}", entry.bits_per_dim) for entry in entries]
    figures = []
    for metric, title in CHARTS.items():
        if not any(metric in run.curves for run in runs):
            continue
        charts = "".join(
            f'<div class="by by-{key}">'
            + line_chart(title, label, _lines(runs, names, metric, axis), marks if metric[:4] == "val/" else ())
            + "</div>"
            for key, (label, axis) in _AXES.items()
        )
        figures.append(f'<figure class="card"><figcaption>{html.escape(title)}</figcaption>{charts}</figure>')
    return f'<div>{choices}<div class="axes">{labels}</div><div class="charts">{"".join(figures)}</div></div>'


def _lines(runs: Sequence[RunHistory], names: Sequence[str], metric: str, axis: _Axis) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        if (curve := run.curves.get(metric)) is None or (x := axis(run, curve)) is None:
            continue
        error = None
        if spread := run.curves.get(f"{metric}_stderr"):
            error = np.interp(curve.steps, spread.steps, spread.values)
        smooth = metric.startswith(("train/", "perf/", "optim/grad"))
        lines.append(Line(names[index], index, x, curve.values, error, smooth))
    return lines


def _pictures(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    keys = sorted({key for run in runs for key in run.pictures}, key=lambda key: (key != "samples", key))
    parts = []
    for key in keys:
        shown = [(index, run, run.pictures[key]) for index, run in enumerate(runs) if key in run.pictures]
        cells = [f"<div>{_dot(index)}{html.escape(names[index])}</div>" for index, _, _ in shown]
        # The last of each run, whatever its step, then the same steps side by side.
        cells += [_picture(run, key, max(pictures)) for _, run, pictures in shown]
        for step in _earlier_steps([set(pictures) for _, _, pictures in shown]):
            cells += [_picture(run, key, step) if step < max(pictures) else "<div></div>" for _, run, pictures in shown]
        columns = f"grid-template-columns: repeat({len(shown)}, minmax(140px, 1fr))"
        parts.append(f"<h2>{html.escape(_heading(key))}</h2>")
        parts.append(f'<div class="card pictures" style="{columns}">{"".join(cells)}</div>')
    return "\n".join(parts)


def _earlier_steps(known: Sequence[set[int]]) -> list[int]:
    """Some steps before the last ones, newest first, evenly spread over those that the most runs have."""
    before = [steps - {max(steps)} for steps in known]
    counts = {step: sum(step in steps for steps in before) for steps in before for step in steps}
    common = sorted(step for step, count in counts.items() if count == max(counts.values()))
    if not common:
        return []
    return sorted({common[round(index)] for index in np.linspace(0, len(common) - 1, PICTURE_STEPS - 1)}, reverse=True)


def _picture(run: RunHistory, key: str, step: int) -> str:
    if step not in run.pictures[key]:
        return "<div></div>"
    content = base64.b64encode(run.pictures[key][step]()).decode()
    text = html.escape(f"{_heading(key)} of {run.name} at step {step}")
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{content}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def _heading(key: str) -> str:
    return (
        f"Bits of each position, {key.removeprefix('bits-')} weights" if key.startswith("bits-") else key.capitalize()
    )


def _published(key: str | None) -> str:
    if key not in PUBLISHED:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(entry.model)}</td><td>{entry}</td><td>{html.escape(entry.parameters)}</td>"
        f"<td>{html.escape(entry.source)}</td></tr>"
        for entry in PUBLISHED[key]
    )
    return (
        f"<h2>Published for {html.escape(key)}</h2>"
        '<p class="lead">Unconditional models, and only the same version of the images: figures of another version of '
        "downsampled ImageNet cannot be compared. ≤ marks upper bounds.</p>"
        '<div class="card"><table><thead><tr><th>model</th><th>bits/dim</th><th>parameters</th><th>source</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _dot(index: int) -> str:
    return f'<span class="dot" style="background:{color_of(index)}"></span>'
