"""How do two or more runs differ, in their settings and in their results?

python -m trainer.compare runs/small runs/large --html comparison.html
python -m trainer.compare --experiment imagenet64 --filter "params.`model.width` = '512'" --html comparison.html

RUN is the folder of a run, which needs no server, or the id of a run in MLflow. The command prints the parameters that
differ and the results of each run. `--html` writes one file with curves and pictures, which opens in any browser.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.wording import counted
from models.receptive_field import receptive_field
from trainer.command_line import run_tool
from trainer.comparison.chosen_runs import RUN_ID, add_run_options, chosen_runs
from trainer.comparison.page import comparison_page
from trainer.comparison.published import PUBLISHED, Published, data_set_key
from trainer.comparison.run_history import RunHistory, count_in
from trainer.errors import UsageError

_NOT_COMPARED = ("run.name", "run.dir", "tracking.", "data.cache", "checkpoint.url")
"""Parameters that begin like this say where things are, not what was trained."""
_NONE = "–"

Row = tuple[str, list[str]]


def parameters_that_differ(runs: Sequence[RunHistory]) -> list[Row]:
    """Each parameter whose value differs between two of the runs, with its value in every run.

    Runs may differ in having a parameter at all: only local attention has a memory. Runs whose parameters are not known
    differ from none.
    """
    names = sorted({name for run in runs for name in run.params if not name.startswith(_NOT_COMPARED)})
    rows = []
    for name in names:
        values = [run.params.get(name, _NONE) for run in runs]
        is_section = any(other.startswith(f"{name}.") for other in names)  # null in some runs: its options say more
        known = {value for value, run in zip(values, runs, strict=True) if run.params}
        if len(known) > 1 and not is_section:
            rows.append((name, values))
    return rows


def results(runs: Sequence[RunHistory]) -> list[Row]:
    """The results of each run: a row for each measure that at least one of them has."""
    hours = "GPU-hours" if all(run.gpu for run in runs) else "rank-hours (on GPUs: GPU-hours)"
    measures: list[tuple[str, Callable[[RunHistory], str]]] = [
        ("status", lambda run: run.status),
        ("steps", lambda run: _steps(run)),
        ("images seen", lambda run: _value(run.last("progress/images_seen"))),
        ("final bits/dim", lambda run: _bits(run, best=False)),
        ("best bits/dim", lambda run: _bits(run, best=True)),
    ]
    for weights in ("raw", "ema", "avg"):
        measures.append((f"evaluated, {weights} weights", lambda run, weights=weights: _evaluated(run, weights)))  # type: ignore[misc]
    measures += [
        ("receptive field", _receptive_field),
        ("training bits/dim", lambda run: _value(run.last("train/bits_per_dim"))),
        ("images/s", lambda run: _value(run.median("perf/images_per_s"))),
        ("MFU", lambda run: _percent(run.median("perf/mfu"))),
        ("peak memory, GiB", lambda run: _value(run.last("mem/peak_gib"))),
        ("ranks", _ranks),
        ("wall time, hours", lambda run: _value(run.wall_hours(), 3)),
        (hours, lambda run: _value(run.rank_hours(), 3)),
        ("GPU", lambda run: run.gpu or _NONE),
        ("validation images", lambda run: _data(run)),
    ]
    rows = [(name, [measure(run) for run in runs]) for name, measure in measures]
    return [(name, values) for name, values in rows if set(values) != {_NONE}]


def warnings(runs: Sequence[RunHistory]) -> list[str]:
    """Why the figures must not be compared as they stand: a sentence for each reason."""
    found = []
    digests = {str(run.data.get("digest", ""))[:32] for run in runs}
    if len(digests - {""}) > 1:
        found.append("These runs score different images: their bits/dim must not be compared with each other.")
    if len(digests) > 1 and "" in digests:
        found.append("Some runs do not say which images they score: make sure that they are the same.")
    counts = {run.last("val/images") for run in runs} - {None}
    if len(counts) > 1:
        found.append("The last evaluations scored different numbers of images.")
    return found


def comparable_key(runs: Sequence[RunHistory]) -> str | None:
    """The data set whose published figures may stand beside these runs: all of them score the same version of it.

    None where they do not, and where a run starts from a small image, which is another task.
    """
    keys = {data_set_key(run.data) for run in runs}
    unconditional = not any("model.super_resolution.small_size" in run.params for run in runs)
    return keys.pop() if len(keys) == 1 and unconditional else None


def table(runs: Sequence[RunHistory], rows: Sequence[Row], width: int) -> str:
    """The rows as text, a column for each run. Columns that do not fit into the width form another block below."""
    label = max(len(name) for name, _ in rows)
    columns = [[unique_names(runs)[index], *(values[index] for _, values in rows)] for index in range(len(runs))]
    widths = [min(max(map(len, column)), 40) for column in columns]
    blocks, begin = [], 0
    while begin < len(runs):
        end, used = begin, label
        while end < len(runs) and (end == begin or used + 2 + widths[end] <= width):
            used += 2 + widths[end]
            end += 1
        lines = [
            "  ".join([name.ljust(label), *(_fit(columns[i][row], widths[i]) for i in range(begin, end))]).rstrip()
            for row, name in enumerate(["", *(name for name, _ in rows)])
        ]
        blocks.append("\n".join(lines))
        begin = end
    return "\n\n".join(blocks)


def unique_names(runs: Sequence[RunHistory]) -> list[str]:
    """The runs' names, each with its place behind it where two runs have the same name."""
    names = [run.name for run in runs]
    places = [run.place[:8] if RUN_ID.fullmatch(run.place) else run.place for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({place})" for name, place in zip(names, places, strict=True)]


def number(value: float, digits: int = 4) -> str:
    """A number as a person reads it: about so many digits, a comma at thousands, no needless zeros."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.{digits - 2}g}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--html", metavar="FILE", help="write one page with tables, curves and pictures to FILE")
    arguments = parser.parse_args()
    return run_tool(lambda: _compare(arguments))


def _compare(arguments: argparse.Namespace) -> None:
    runs = chosen_runs(arguments)
    rows = parameters_that_differ(runs)
    outcome = results(runs)
    notes = warnings(runs)
    key = comparable_key(runs)
    width = shutil.get_terminal_size((120, 24)).columns
    if rows and len(runs) > 1:
        print(f"Parameters that differ\n{table(runs, rows, width)}\n")
    print(f"Results (bits/dim ± standard error)\n{table(runs, outcome, width)}")
    for note in notes:
        print(f"\nwarning: {note}")
    if key in PUBLISHED:
        lines = "\n".join(f"  {str(entry):>6}  {entry.model}  ({_grounds(entry)})" for entry in PUBLISHED[key])
        print(f"\nPublished for {key}\n{lines}")
    if arguments.html:
        path = Path(arguments.html)
        page = comparison_page(runs, unique_names(runs), rows, outcome, notes, key)
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--html {path}: cannot be written ({error.strerror})") from error
        print(f"\n{path}")


def _grounds(entry: Published) -> str:
    """What a published figure rests on."""
    words = [entry.source, {"bound": "another bound"}.get(entry.measure, entry.measure)]
    words += [f"version {entry.version}: {entry.version_from}"] if entry.version != "only one" else []
    words += [f"reproduced: {entry.reproduced}"] if entry.reproduced else []
    return "; ".join(words)


def _receptive_field(run: RunHistory) -> str:
    """What the first position that is generated of the pixel in the middle sees of the pixels before it."""
    config = run.model
    if config is None or (field := receptive_field(config)) is None:
        return _NONE
    return f"{field.seen:,} of {field.past:,} pixels"


def _steps(run: RunHistory) -> str:
    last = max((int(curve.steps[-1]) for name, curve in run.curves.items() if name.startswith("train/")), default=0)
    planned = count_in(run.params.get("train.steps"))
    return f"{last:,} of {planned:,}" if planned else f"{last:,}"


def _bits(run: RunHistory, *, best: bool) -> str:
    curve = run.curves.get("val/bits_per_dim")
    if curve is None:
        return _NONE
    index = int(curve.values.argmin()) if best else -1
    step, value = float(curve.steps[index]), float(curve.values[index])
    error, images = run.at("val/bits_per_dim_stderr", step), run.at("val/images", step)
    text = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    where = [f"step {step:,.0f}"] if best else []
    where += [counted(round(images), "image")] if images is not None else []
    return f"{text} ({', '.join(where)})" if where else text


def _evaluated(run: RunHistory, weights: str) -> str:
    value, error = (run.last(f"final/{weights}_bits_per_dim{end}") for end in ("", "_stderr"))
    if value is None:
        return _NONE
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _data(run: RunHistory) -> str:
    if not run.data:
        return _NONE
    version = run.data["version"] if data_set_key(run.data) else ""
    return str(run.data["name"]) + (f" (version {version})" if version in ("A", "B", "C") else "")


def _ranks(run: RunHistory) -> str:
    return ", ".join(dict.fromkeys(str(attempt["world_size"]) for attempt in run.attempts)) or _NONE


def _value(value: float | None, digits: int = 4) -> str:
    return _NONE if value is None else number(value, digits)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f} %"


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
