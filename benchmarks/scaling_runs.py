"""Which size of the quickstart's model suits which budget? Runs of 5 widths on 3 budgets, for trainer.scaling.

    python -m benchmarks.scaling_runs

Runs that were made before are not made again (benchmarks/equal_compute.py). Each leaves a small folder in
`results/scaling/`, its config and its last score, which `python -m trainer.scaling benchmarks/results/scaling/*` reads.
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

from benchmarks.equal_compute import SCORED_IMAGES, Journal, Result, Wanted, make_missing, wanted
from benchmarks.report import write_section
from trainer import scaling
from trainer.config import RunConfig, as_yaml, load_config
from trainer.record.run_folder import RunFiles

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results") / "scaling"
RECIPE = "configs/quickstart.yaml"
WIDTHS = {1 / 16: (16, 32, 48, 64, 96), 1 / 4: (32, 48, 64, 96), 1.0: (48, 64, 96, 32)}
"""By budget, in units of the first quickstart's compute. The narrower, the more time a FLOP takes."""
SECTION = "size of the quickstart's model"
COMMAND = "python -m benchmarks.scaling_runs"


def of_width(width: int) -> RunConfig:
    """The quickstart's config, but for its width and what grows with it."""
    sizes = {"heads": 2, "width": width, "attention_width": width, "ff_width": 3 * width}
    return load_config(ROOT / RECIPE, [f"model.{name}={value}" for name, value in sizes.items()])


def wanted_runs() -> dict[str, Wanted]:
    """By name, the small ones first."""
    return {
        f"w{width}-{budget:g}": wanted(of_width(width), budget, seed=0)
        for budget, widths in WIDTHS.items()
        for width in widths
    }


def write_folder(folder: Path, result: Result) -> None:
    """What trainer.scaling reads of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    files, train = RunFiles(folder), result.config.train
    run = dataclasses.replace(result.config.run, name=folder.name, dir=f"runs/scaling/{folder.name}")
    files.config.write_text(as_yaml(dataclasses.replace(result.config, run=run)))
    point = {"final/raw_bits_per_dim": round(result.raw_mean, 4), "val/images": SCORED_IMAGES}
    seen = {"progress/images_seen": train.steps * train.global_batch_images}
    lines = [{"step": 0, "time": 1.0, "metrics": {}}, {"step": train.steps, "time": 2.0, "metrics": point | seen}]
    files.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write(journal: Journal, runs: dict[str, Wanted]) -> None:
    """The folders of all runs, and what trainer.scaling says of them, as a section of RESULTS.md."""
    folders = []
    for name, run in runs.items():
        if result := journal.find(run):
            write_folder(FOLDER / name, result)
            folders.append(str((FOLDER / name).relative_to(ROOT)))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = scaling.main([*folders, "--flops", "1e15"])
    if code:
        raise SystemExit(code)
    first = next(iter(runs.values())).config
    text = f"""Widths (w) on 4.19 TFLOP, a quarter and a sixteenth of that, with feed-forward networks three times as
wide; {first.train.global_batch_images} images a step, one seed, the first {SCORED_IMAGES} validation crops, raw weights
(on small budgets an average still holds the first ones). What `python -m trainer.scaling
benchmarks/results/scaling/* --flops 1e15` says:

```
{said.getvalue().strip()}
```"""
    write_section(SECTION, COMMAND, text)


def main() -> int:
    journal, runs = Journal(), wanted_runs()
    make_missing(runs.values(), journal)
    write(journal, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
