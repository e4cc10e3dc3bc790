"""Which size of model suits a budget of compute, and what will it reach? A scaling law of runs that were made.

python -m trainer.scaling runs/scaling/* --html scaling.html
python -m trainer.scaling --experiment scaling --config configs/imagenet64_big.yaml

RUN is the folder of a run, or its id in MLflow. The runs differ in size and in training FLOP (at least 4 sizes, 3
budgets and 8 runs) and in what has to follow from these, as the learning rate, and in nothing else. One number counts
of each: the last bits/dim, after its learning rate has come down. `--config` or `--flops` asks for another budget.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.wording import counted
from trainer.command_line import run_tool
from trainer.compare import number, parameters_that_differ, unique_names
from trainer.comparison.chosen_runs import add_run_options, chosen_runs
from trainer.comparison.published_laws import PUBLISHED_LAWS
from trainer.comparison.run_history import RunHistory, count_in
from trainer.comparison.scaling_law import (
    CONFIDENCE,
    LARGEST_EXPONENT,
    LEAST_FLOOR,
    Estimate,
    Fit,
    Target,
    Trained,
    budgets_of,
    fit,
    growth_of,
    valleys,
    what_is_missing,
)
from trainer.comparison.scaling_page import Table, scaling_page, short
from trainer.config import ModelConfig, load_config
from trainer.errors import UsageError

METRICS = ("final/ema_bits_per_dim", "final/raw_bits_per_dim", "final/avg_bits_per_dim", "val/bits_per_dim")
"""The first one that all runs have is fitted; those of trainer.evaluate score all validation images."""
MOST_EPOCHS = 4.0
"""Up to so many, repeated data are about as good as new ones (Muennighoff et al. 2023, of language)."""
LARGEST_COST_ERROR = 0.15
_NONE = "–"


def points_of(runs: Sequence[RunHistory]) -> tuple[list[Trained], str, list[str]]:
    """What the law is fitted to, the metric that was taken, and sentences about what to mind.

    Raises UsageError where the runs cannot be on one law.
    """
    names = unique_names(runs)
    for run, name in zip(runs, names, strict=True):
        if run.model is None:
            raise UsageError(f"{name}: its parameters do not say which model it trained")
    if len({kind_of(run.model) for run in runs if run.model}) > 1:
        raise UsageError(
            "the runs differ in family, image size or tokens of an image, and one law does not hold for all"
        )
    notes = []
    digests = {str(run.data.get("digest", ""))[:32] for run in runs}
    if len(digests - {""}) > 1:
        raise UsageError("the runs score different images, whose bits/dim are not on one law")
    if "" in digests:
        notes.append("Some runs do not say which images they score: make sure that they are the same.")
    kept = []
    for run, name in zip(runs, names, strict=True):
        if reason := _why_not(run):
            notes.append(f"{name} is left out: {reason}.")
        else:
            kept.append((run, name))
    metric = next((metric for metric in METRICS if all(metric in _at_the_end(run) for run, _ in kept)), None)
    if kept and metric is None:
        raise UsageError("the runs have no bits/dim in common: run trainer.evaluate on all of them")
    points = [_point(run, name, metric) for run, name in kept if metric]
    repeating = [name for run, name in kept if (run.last("progress/epoch") or 0) > MOST_EPOCHS]
    if repeating:
        notes.append(
            f"{counted(len(repeating), 'run')} saw the training images more than {MOST_EPOCHS:.0f} times (of them "
            f"{repeating[0]}), and the law takes each time for new images."
        )
    if len({run.last("val/images") for run, _ in kept} - {None}) > 1 and metric == "val/bits_per_dim":
        notes.append("The last evaluations scored different numbers of images.")
    if missing := what_is_missing(points):
        raise UsageError("; ".join([missing, *(note.rstrip(".") for note in notes if "left out" in note)]))
    return points, str(metric), notes


def kind_of(model: ModelConfig) -> tuple[str, int, int]:
    """What models on one law have in common: family, image size, tokens of an image."""
    return model.family, model.image_size, model.account().positions


def _at_the_end(run: RunHistory) -> list[str]:
    """The metrics that were measured after all planned steps: before, the learning rate has not come down."""
    end = count_in(run.params.get("train.steps")) or 0
    return [metric for metric in METRICS if metric in run.curves and run.curves[metric].steps[-1] >= end]


def _why_not(run: RunHistory) -> str | None:
    """Why a run's last bits/dim are not what its budget gives."""
    if not any(metric in run.curves for metric in METRICS):
        return "it has no bits/dim of validation images"
    found = _at_the_end(run)
    if not found:
        step = max(float(run.curves[metric].steps[-1]) for metric in METRICS if metric in run.curves)
        return f"its last evaluation is at step {step:,.0f} of {int(run.params['train.steps']):,}, before it was done"
    values = [run.curves[metric].values[-1] for metric in found]
    if not all(math.isfinite(value) and value > 0 for value in values):
        return "its bits/dim are not numbers above 0"
    return None


def _point(run: RunHistory, name: str, metric: str) -> Trained:
    assert run.model is not None, "checked before"
    account, curve = run.model.account(), run.curves[metric]
    images = run.images_seen(curve.steps[-1:])
    if images is None or not images[0] > 0:
        raise UsageError(f"{name}: it does not say how many images it was trained on")
    return Trained(
        name=name,
        parameters=account.parameters,
        tokens=float(images[0]) * account.positions,
        flops=float(images[0]) * account.flops.training,
        bits_per_dim=float(curve.values[-1]),
    )


def target_of(arguments: argparse.Namespace, model: ModelConfig) -> tuple[Target | None, list[tuple[float, float]]]:
    """The budget that is asked about, and what a token of its model costs. Raises UsageError for another family."""
    if arguments.flops is not None:
        if not (math.isfinite(arguments.flops) and arguments.flops > 0):
            raise UsageError(f"--flops: must be above 0, not {arguments.flops}")
        return Target("--flops", arguments.flops), []
    if arguments.config is None:
        return None, []
    config = load_config(arguments.config, arguments.overrides)
    if config.model.family != model.family:
        raise UsageError(
            f"--config {arguments.config}: its model is of the family {config.model.family}, not {model.family}"
        )
    account, images = config.model.account(), config.train.steps * config.train.global_batch_images
    target = Target(
        name=arguments.config,
        flops=float(images) * account.flops.training,
        parameters=account.parameters,
        tokens=float(images) * account.positions,
        same_images=kind_of(config.model) == kind_of(model),
    )
    return target, [(account.parameters, account.flops.training / account.positions)]


def doubts(found: Fit, target: Target | None) -> list[str]:
    """What speaks against the law and its forecasts: a sentence each."""
    law, sentences = found.law, []
    if law.floor < 1.1 * LEAST_FLOOR:
        sentences.append("The runs do not show a floor of bits/dim: no budget of theirs comes near it.")
    for what, exponent in (("size", law.size_exponent), ("tokens", law.token_exponent)):
        if not 2e-3 < exponent < 0.99 * LARGEST_EXPONENT:
            sentences.append(
                f"The runs do not determine the exponent of the {what}: the fit ends where it may not go on."
            )
    if found.cost.largest_error > LARGEST_COST_ERROR:
        sentences.append(
            f"What a token costs follows from the size within {found.cost.largest_error:.0%} only: models of one size "
            "differ in shape."
        )
    error = found.held_out_error()
    if error is not None:
        sentences.append(
            f"Checked on runs: without the largest budget, the law says {abs(error):.3f} bits/dim "
            f"{'more' if error > 0 else 'less'} than its runs need, on average."
        )
    if target:
        sentences.append(_distance(found, target))
        if not target.same_images:
            sentences.append(
                f"The images of {target.name} are not as large as those of the runs, or cut into other tokens: its "
                "bits/dim are not forecast, and its best size only if it grows with compute as that of the runs."
            )
    return sentences


def _distance(found: Fit, target: Target) -> str:
    """How far the budget is outside of what was measured."""
    least, most = found.measured
    span = math.log10(most / least)
    if least <= target.flops <= most:
        return f"The budget of {target.name}, {target.flops:.3g} FLOP, lies within the measured range."
    times = target.flops / most if target.flops > most else least / target.flops
    return (
        f"The budget of {target.name}, {target.flops:.3g} FLOP, is {number(times, 3)} times "
        f"{'above the largest' if target.flops > most else 'below the smallest'} measured one: {math.log10(times):.1f} "
        f"orders of magnitude beyond a range of {span:.1f}, and the interval says nothing of a law that bends there."
    )


def tables_of(found: Fit, target: Target | None) -> list[Table]:
    """What is printed."""
    parabolas = valleys(found.runs)
    interval = f"{CONFIDENCE:.0%} interval"
    runs = [
        (
            run.name,
            short(run.parameters),
            short(run.tokens),
            f"{run.flops:.3g}",
            f"{run.bits_per_dim:.4f}",
            f"{float(found.law.bits_per_dim(run.parameters, run.tokens)):.4f}",
        )
        for run in found.runs
    ]
    constants = [
        ("floor E, bits/dim", *_said(found.estimate(lambda law: law.floor), ".3f")),
        ("exponent a of the size N", *_said(found.estimate(lambda law: law.size_exponent), ".3f")),
        ("exponent b of the tokens D", *_said(found.estimate(lambda law: law.token_exponent), ".3f")),
        ("best size grows as compute to the power", *_said(found.estimate(lambda law: law.growth), ".3f")),
        ("what is above E falls as compute to the power", *_said(found.estimate(lambda law: -law.fall), ".3f")),
    ]
    growth = growth_of(parabolas)
    if growth is not None:
        constants.append((f"... the best size by parabolas of {len(parabolas)} budgets", f"{growth:.3f}", _NONE))
    by_flops = {valley.flops: valley for valley in parabolas}
    budgets = []
    for group in budgets_of(found.runs):
        flops = math.exp(sum(math.log(run.flops) for run in group) / len(group))
        valley = next((valley for at, valley in by_flops.items() if math.isclose(at, flops, rel_tol=1e-6)), None)
        if len(group) > 1:
            budgets.append(_budget_row(found, flops, True, short(valley.best_size) if valley else _NONE))
    if target:
        budgets.append(_budget_row(found, target.flops, target.same_images, _NONE))
    tables = [
        Table("Runs", ("", "parameters", "tokens", "FLOP", "bits/dim", "the law says"), runs),
        Table("Law: bits/dim = E + A / N^a + B / D^b", ("", "value", interval), constants),
        Table(
            "Compute-optimal size",
            ("FLOP", "parameters", interval, "tokens a parameter", "bits/dim", interval, "by a parabola"),
            budgets,
        ),
    ]
    if target and target.parameters is not None and target.tokens is not None:
        said = (
            _said(found.bits_per_dim(target.parameters, target.tokens), ".3f") if target.same_images else (_NONE, _NONE)
        )
        row = (
            target.name,
            short(target.parameters),
            number(target.tokens / target.parameters, 3),
            f"{target.flops:.3g}",
            *said,
        )
        head = ("", "parameters", "tokens a parameter", "FLOP", "bits/dim", interval)
        tables.append(Table("Forecast", head, [row]))
    return [*tables, _published_table(target.flops if target else found.measured[1])]


def _budget_row(found: Fit, flops: float, with_bits: bool, parabola: str) -> tuple[str, ...]:
    best = found.best_size(flops)
    bits = _said(found.best_bits_per_dim(flops), ".3f") if with_bits else (_NONE, _NONE)
    tokens = flops / float(found.cost.of(best.value))
    interval = f"{short(best.low)} to {short(best.high)}"
    return f"{flops:.3g}", short(best.value), interval, number(tokens / best.value, 3), *bits, parabola


def _published_table(flops: float) -> Table:
    """The sizes that published laws give the same budget."""
    rows = [
        (
            law.name,
            f"{law.growth:.2f}",
            _NONE if law.fall is None else f"{-law.fall:.2f}",
            short(law.best_size(flops)),
            law.source,
        )
        for law in PUBLISHED_LAWS
    ]
    head = ("", "best size grows as", "loss falls as", f"parameters at {flops:.3g} FLOP", "source")
    return Table("Published, of other images and without embeddings", head, rows)


def _said(estimate: Estimate, form: str) -> tuple[str, str]:
    return f"{estimate.value:{form}}", f"{estimate.low:{form}} to {estimate.high:{form}}"


def as_text(table: Table) -> str:
    """A table as the terminal shows it."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    lines = [
        "  ".join(
            text.ljust(width) if column in (0, len(row) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([table.title, *(f"  {line}" for line in lines)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--config", help="YAML file: which size suits its budget, and what its own size will reach")
    budget.add_argument("--flops", type=float, help="training FLOP: which size suits this budget")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--html", metavar="FILE", help="write one page with charts and tables to FILE")
    given = parser.parse_args(arguments)
    return run_tool(lambda: _scaling(given))


def _scaling(arguments: argparse.Namespace) -> None:
    runs = chosen_runs(arguments)
    points, metric, notes = points_of(runs)
    model = next(run.model for run in runs if run.model)
    target, costs = target_of(arguments, model)
    found = fit(points, costs)
    tables, sentences = tables_of(found, target), [*notes, *doubts(found, target)]
    differing = [name for name, _ in parameters_that_differ(runs)]
    print(f"{counted(len(points), 'run')}, {metric}; they differ in {', '.join(differing) or 'nothing'}\n")
    print("\n\n".join(as_text(table) for table in tables))
    print(f"\nThe law is {found.error:.4f} bits/dim off its runs (root mean square).")
    for sentence in sentences:
        print(sentence)
    if arguments.html:
        path = Path(arguments.html)
        try:
            path.write_text(scaling_page(found, target, tables, sentences), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--html {path}: cannot be written ({error.strerror})") from error
        print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
