"""How do curves become a picture in a page? One SVG with axes, a line for each run, and the numbers for the mouse."""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 600, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
"""Okabe and Ito's colours, which also the colour-blind tell apart; then they repeat with dashes."""
SETTLED_FRACTION = 0.1
"""The scale ignores this share of each curve at its beginning, where a loss is many times what it becomes."""
MOST_POINTS = 1000
MARK_PIXELS = 16


Scale = Callable[[np.ndarray], np.ndarray]
"""From values to places in the picture."""


@dataclass(frozen=True)
class Line:
    """One run's curve in a chart."""

    label: str
    run: int
    """Which of the compared runs: its colour."""
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None
    """Standard error of each y."""
    smooth: bool = False
    """Show a running mean, and the points themselves faintly behind it."""


def line_chart(title: str, x_label: str, lines: Sequence[Line], marks: Sequence[tuple[str, float]] = ()) -> str:
    """An SVG element. `marks` are horizontal lines with names, the most important ones first; shown are those inside
    the scale that leave each other room.
    """
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    right = max(float(line.x.max()) for line in lines) or 1.0
    low, high = _range(lines)
    low, high = _include_marks(low, high, [value for _, value in marks])

    def across(x: np.ndarray) -> np.ndarray:
        return LEFT + x / right * (WIDTH - LEFT - RIGHT)

    def up(y: np.ndarray) -> np.ndarray:
        # Far outside is just outside: the clip path cuts it off, and numbers stay short.
        place = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return np.clip(place, -HEIGHT, 2 * HEIGHT)

    name = html.escape(title)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" class="chart">',
        f"<title>{name}</title>",
    ]
    parts += _axes(low, high, right, x_label, across, up)
    parts.append(f'<clipPath id="c{(clip := _clip_id(title, x_label))}"><rect x="{LEFT}" y="{TOP}" '
                 f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>')  # fmt: skip
    parts.append(f'<g clip-path="url(#c{clip})">')
    taken: list[float] = []
    for text, value in marks:
        y = float(up(np.array([value]))[0])
        if low <= value <= high and all(abs(y - other) >= MARK_PIXELS for other in taken):
            taken.append(y)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="mark"/>')
            parts.append(f'<text x="{LEFT + 4}" y="{y - 4:.1f}" class="mark">{html.escape(text)}</text>')
    for line in lines:
        parts += _curve(line, across, up)
    parts.append("</g>")
    values = [{"label": line.label, "color": color_of(line.run), **_thinned(line)} for line in lines]
    frame = {"left": LEFT, "right": RIGHT, "width": WIDTH, "end": right, "x": x_label, "lines": values}
    parts.append(f"<desc>{html.escape(json.dumps(frame))}</desc>")
    parts.append("</svg>")
    return "".join(parts)


def color_of(run: int) -> str:
    """The colour of the n-th run."""
    return COLORS[run % len(COLORS)]


def number(value: float, digits: int = 4) -> str:
    """A number as a person reads it: about so many digits, thousands apart, no needless zeros."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.{digits - 2}g}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the points around each point; narrower at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _finite(line: Line) -> Line:
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    error = None if line.error is None else np.nan_to_num(line.error[keep])
    return Line(line.label, line.run, line.x[keep], line.y[keep], error, line.smooth)


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    settled = [line.y[line.x >= SETTLED_FRACTION * line.x.max()] for line in lines]
    settled = [values if len(values) else line.y for values, line in zip(settled, lines, strict=True)]
    low = min(float(np.percentile(values, 0.5)) for values in settled)
    high = max(float(np.percentile(values, 98)) for values in settled)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _include_marks(low: float, high: float, marks: Sequence[float]) -> tuple[float, float]:
    """Widen the scale to the nearest mark, if that leaves the curves half of it."""
    nearest = min(marks, key=lambda value: max(low - value, value - high, 0), default=low)
    wide_low, wide_high = min(low, nearest), max(high, nearest)
    if wide_high - wide_low > 2 * (high - low):
        return low, high
    margin = 0.05 * (wide_high - wide_low)
    return (wide_low - margin if wide_low < low else low), (wide_high + margin if wide_high > high else high)


def _axes(low: float, high: float, right: float, x_label: str, across: Scale, up: Scale) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = ['<g class="axis">']
    for value in ticks(low, high, 5):
        y = float(up(np.array([value]))[0])
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(0, right, 6):
        x = float(across(np.array([value]))[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" class="base"/></g>')
    return parts


def _curve(line: Line, across: Scale, up: Scale) -> list[str]:
    style = f'stroke="{color_of(line.run)}"' + (' stroke-dasharray="7 4"' if line.run >= len(COLORS) else "")
    x, y = _for_drawing(line)
    parts = []
    if line.error is not None and len(line.x) > 1:
        edge = np.concatenate([line.y + line.error, (line.y - line.error)[::-1]])
        outline = _points(across(np.concatenate([line.x, line.x[::-1]])), up(edge))
        parts.append(f'<polygon points="{outline}" fill="{color_of(line.run)}" class="error"/>')
    smooth = line.smooth and len(line.x) > 10
    if smooth:
        parts.append(f'<polyline points="{_points(across(x), up(y))}" {style} class="faint"/>')
        mean = running_mean(line.y, max(3, len(line.y) // 15))
        x, y = line.x[:: _stride(len(line.x))], mean[:: _stride(len(line.x))]
    parts.append(f'<polyline points="{_points(across(x), up(y))}" {style} class="line"/>')
    if not smooth and len(line.x) <= 40:
        places = zip(across(line.x), up(line.y), strict=True)
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{color_of(line.run)}"/>' for a, b in places]
    return parts


def _for_drawing(line: Line) -> tuple[np.ndarray, np.ndarray]:
    stride = _stride(len(line.x))
    return line.x[::stride], line.y[::stride]


def _stride(count: int) -> int:
    return -(-count // MOST_POINTS)


def _thinned(line: Line) -> dict[str, list[float]]:
    """What the mouse shows, with no more digits than it shows."""
    x, y = _for_drawing(line)
    return {"x": [float(f"{value:.6g}") for value in x], "y": [float(f"{value:.5g}") for value in y]}


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{number(value / limit)}{letter}"
    return number(value)


def _clip_id(*texts: str) -> str:
    """An id that is the same each time the page is made, and another for each chart."""
    return "".join(f"{ord(letter):x}" for letter in "|".join(texts))
