"""Which family of models needs the fewest bits for unseen photographs, after equally many FLOPs of training?

    python -m benchmarks.rivals

Each family with the likelihood of its paper, at about the size of the quickstart's model; then those that can with its
likelihood and input. With AdamW, each at the best learning rate of short runs. Runs that were made before are not made
again (benchmarks/equal_compute.py).
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.equal_compute import (
    SCORED_IMAGES,
    Difference,
    Journal,
    Result,
    Settings,
    Wanted,
    account_of,
    difference,
    make_missing,
    settings_of,
    standard_error,
    unit_of_compute,
    wanted,
)
from benchmarks.report import table, write_section
from models.receptive_field import receptive_field
from trainer.config import RunConfig, load_config
from trainer.typed_values import plain

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "configs/quickstart.yaml"
SECTION = "families of models at equal compute"
COMMAND = "python -m benchmarks.rivals"
SEEDS = (0, 1, 2)
BATCH = 4
RATES = (3e-3, 9e-3, 2.7e-2)
"""Learning rates, tried upwards with the first seed as long as the larger one is better, at least the first two."""


@dataclass(frozen=True)
class Row:
    """A model of the table."""

    name: str
    model: Settings
    published: str
    """Bits/dim of CIFAR-10 in its paper."""
    budget: float
    """In units of the first quickstart's compute."""
    trial: float
    """What a trial of a learning rate gets of it."""
    like: RunConfig | None = None
    """Trained like this one, and its learning rate not tried."""

    def config(self, rate: float) -> RunConfig:
        if self.like:
            return settings_of(self.model, plain(self.like.optimizer), BATCH)
        optimizer = {
            "name": "adamw",
            "peak_lr": rate,
            "schedule": {"kind": "cosine", "warmup_steps": 20, "final_lr_fraction": 0.05},
            "weight_decay": 0.01,
            "ema_decay": 0.98,
        }
        return settings_of(self.model, optimizer, BATCH)

    def trials(self, journal: Journal) -> dict[float, Wanted]:
        """One for each learning rate that is to be tried, as far as those before it say."""
        if self.like:
            return {}
        found: dict[float, Wanted] = {}
        means: list[float] = []
        for rate in RATES:
            found[rate] = wanted(self.config(rate), self.trial, SEEDS[0])
            result = journal.find(found[rate])
            means.append(result.raw_mean if result else math.inf)
            if len(means) > 1 and means[-1] >= means[-2]:
                break
        return found

    def best_rate(self, journal: Journal) -> float | None:
        """None as long as trials are missing."""
        if self.like:
            return self.like.optimizer.peak_lr
        found = {rate: journal.find(run) for rate, run in self.trials(journal).items()}
        means = {rate: result.raw_mean for rate, result in found.items() if result}
        return min(means, key=lambda rate: means[rate]) if len(means) == len(found) else None

    def runs(self, journal: Journal) -> list[Wanted]:
        """One for each seed, at the best rate; none as long as that is not known."""
        rate = self.best_rate(journal)
        return [] if rate is None else [wanted(self.config(rate), self.budget, seed) for seed in SEEDS]


PLAIN_BUDGET, PLAIN_TRIAL = 1 / 8, 1 / 32
EQUAL_BUDGET, EQUAL_TRIAL = 1.0, 1 / 16

CATEGORICAL: Settings = {
    "family": "image_transformer",
    "image_size": 32,
    "input": "categorical",
    "output": {"kind": "categorical"},
    "heads": 2,
    "block": "paper",
    "position": "sine",
}
MIXTURE: Settings = {"kind": "mixture", "components": 10}
STRIDED = {"kind": "strided_1d", "stride": 96}
STRIDED_AND_NEAR = [{"kind": "strided_1d", "stride": 32}, *2 * [{"kind": "sliding_1d", "window": 32}]]
"""Three layers of pixels, the first one of which sees a row and a column."""
LOCAL = {"kind": "sliding_1d", "window": 96}


def _transformer(width: int, layers: int, ff_width: int, **changes: object) -> Settings:
    sizes = {"width": width, "attention_width": width, "layers": layers, "ff_width": ff_width}
    return CATEGORICAL | sizes | changes


PLAIN = (
    Row(
        "PixelCNN",
        {"family": "pixelcnn", "image_size": 32, "features": 33, "layers": 7, "head_features": 99},
        "3.14",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "Row LSTM",
        {"family": "row_lstm", "image_size": 32, "features": 25, "layers": 4, "head_features": 96},
        "3.07",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "Gated PixelCNN",
        {
            "family": "gated_pixelcnn",
            "image_size": 32,
            "features": 30,
            "layers": 4,
            "head_features": 96,
            "first_kernel": 7,
            "kernel": 3,
        },
        "3.03",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "Diagonal BiLSTM",
        {"family": "diagonal_bilstm", "image_size": 32, "features": 21, "layers": 4, "head_features": 96},
        "3.00",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "PixelCNN++",
        {
            "family": "pixelcnnpp",
            "image_size": 32,
            "output": MIXTURE,
            "features": 25,
            "blocks": 1,
            "nonlinearity": "concat_elu",
        },
        "2.92",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "Image Transformer, categorical",
        _transformer(24, 2, 96, norm="post", attention={"kind": "local_1d", "query_block": 256, "memory": 256}),
        "2.90",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "Image Transformer, mixture",
        _transformer(
            48,
            3,
            144,
            norm="post",
            position="learned",
            input="ordinal",
            output=MIXTURE,
            attention={"kind": "local_1d", "query_block": 256, "memory": 256},
        ),
        "2.90",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "PixelSNAIL",
        {
            "family": "pixelsnail",
            "image_size": 32,
            "output": MIXTURE,
            "features": 36,
            "blocks": 3,
            "convolutions": 1,
            "nonlinearity": "elu",
        },
        "2.85",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
    Row(
        "Sparse Transformer's strided pattern",
        _transformer(32, 3, 96, norm="pre", position="learned", attention=[STRIDED, LOCAL, LOCAL]),
        "2.80",
        PLAIN_BUDGET,
        PLAIN_TRIAL,
    ),
)


def recipe() -> RunConfig:
    """The quickstart of today, which has Muon."""
    return load_config(ROOT / RECIPE, [])


def equal_rows() -> tuple[Row, ...]:
    """Families with the likelihood and the stem of the quickstart."""
    ours = plain(recipe().model)
    same = {name: ours[name] for name in ("image_size", "output", "stem")}
    gated = {"features": 34, "layers": 4, "head_features": 96, "first_kernel": 7, "kernel": 3}
    plusplus = {"features": 24, "blocks": 1, "nonlinearity": "concat_elu"}
    snail = {"features": 34, "blocks": 3, "convolutions": 1, "nonlinearity": "elu"}
    return (
        Row("Gated PixelCNN", same | {"family": "gated_pixelcnn"} | gated, "3.03", EQUAL_BUDGET, EQUAL_TRIAL),
        Row("PixelCNN++", same | {"family": "pixelcnnpp"} | plusplus, "2.92", EQUAL_BUDGET, EQUAL_TRIAL),
        Row("PixelSNAIL", same | {"family": "pixelsnail"} | snail, "2.85", EQUAL_BUDGET, EQUAL_TRIAL),
        Row(
            "Sparse Transformer's strided pattern",
            ours | {"attention": STRIDED_AND_NEAR},
            "2.80",
            EQUAL_BUDGET,
            EQUAL_TRIAL,
            recipe(),
        ),
    )


def rows() -> tuple[Row, ...]:
    """Of both tables."""
    return PLAIN + equal_rows()


def wanted_runs(journal: Journal) -> Iterator[Wanted]:
    """Trials first, then the seeds one after the other, so that the table of one seed is soon complete."""
    for row in rows():
        yield from row.trials(journal).values()
    runs = [row.runs(journal) for row in rows()]
    for index, seed in enumerate(SEEDS):
        yield from (of_row[index] for of_row in runs if of_row)
        yield wanted(recipe(), EQUAL_BUDGET, seed)


def results_of(row: Row, journal: Journal) -> list[Result]:
    """The seeds that are there."""
    return [result for run in row.runs(journal) if (result := journal.find(run))]


def spread(values: list[float]) -> str:
    """Mean of the seeds and its standard error."""
    mean = sum(values) / len(values)
    return f"{mean:.3f} ± {standard_error(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def said(found: Difference | None) -> str:
    """A difference with its standard error."""
    return f"{found.mean:+.3f} ± {found.error:.3f}" if found else "–"


def table_of(rows: tuple[Row, ...], journal: Journal, ours: list[Result]) -> str:
    """Markdown, a line for each row that has a result; with how much more it needs than `ours`, if there are any."""
    header = [
        "model",
        "CIFAR-10, published",
        "pixels seen",
        "parameters",
        "MFLOP an image",
        "images",
        "rate (trials)",
        "seeds",
        "bits/dim",
        *(["more than the quickstart"] if ours else []),
        "CPU s",
    ]
    lines = []
    for row in rows:
        results = results_of(row, journal)
        if not results:
            continue
        first = results[0]
        model, train = first.config.model, first.config.train
        account, field = account_of(model), receptive_field(model)
        tried = {rate: journal.find(run) for rate, run in row.trials(journal).items()}
        trials = ", ".join(f"{rate:g}: {result.raw_mean:.2f}" for rate, result in tried.items() if result)
        lines.append(
            [
                row.name,
                row.published,
                f"{field.seen} of {field.past}" if field else "–",
                f"{account.parameters:,}",
                f"{account.flops.training / 1e6:,.0f}",
                f"{train.steps * train.global_batch_images:,}",
                f"{row.best_rate(journal):g} ({trials or 'with Muon'})",
                f"{len(results)}",
                spread([result.raw_mean for result in results]),
                *([said(difference(results, ours))] if ours else []),
                f"{sum(result.cpu_seconds for result in results) / len(results):.0f}",
            ]
        )
    absent = [row.name for row in rows if not results_of(row, journal)]
    return table(header, lines) + (f"\n\nNot made yet: {', '.join(absent)}." if absent else "")


def order_of(rows: tuple[Row, ...], journal: Journal) -> str:
    """Why the order of the papers does not show, as far as the runs say: how much further they fell."""
    falls, by_likelihood = [], dict[str, list[float]]()
    for row in rows:
        trials = [result.raw_mean for run in row.trials(journal).values() if (result := journal.find(run))]
        if trials and (results := results_of(row, journal)):
            mean = sum(result.raw_mean for result in results) / len(results)
            falls.append(min(trials) - mean)
            by_likelihood.setdefault(plain(results[0].config.model)["output"]["kind"], []).append(mean)
    if not falls:
        return ""
    likelihoods = "; ".join(f"{kind}: {min(means):.2f} to {max(means):.2f}" for kind, means in by_likelihood.items())
    return f"""The order of the papers, whose figures differ by 0.34 bits/dim, cannot show here: from the trials to the
full budget the rows still fall by {min(falls):.2f} to {max(falls):.2f}. What they differ in is how soon they leave
their first weights, for which the likelihood they begin with counts. By likelihood the rows are at ({likelihoods})
bits/dim."""


def write(journal: Journal) -> None:
    """The tables, as a section of RESULTS.md."""
    unit = unit_of_compute() / 1e12
    runs = [wanted(recipe(), EQUAL_BUDGET, seed) for seed in SEEDS]
    ours = [result for run in runs if (result := journal.find(run))]
    quickstart = spread([result.raw_mean for result in ours]) + " bits/dim" if ours else "not made yet"
    text = f"""Trained on {PLAIN_BUDGET * unit:.2f} TFLOP (an eighth of the first quickstart), {BATCH} images a step.
Scored on the first {SCORED_IMAGES} validation crops with raw weights. AdamW, at the best learning rate of trials on a
quarter of that: of {RATES[0]:g} and {RATES[1]:g}, and of {RATES[2]:g} where the second was better than the first.
±: standard error over seeds. Pixels seen: by gradients, of the pixel in the middle.

{table_of(PLAIN, journal, [])}

{order_of(PLAIN, journal)}

The same with the likelihood and the stem of the quickstart, on {EQUAL_BUDGET * unit:.2f} TFLOP, trials on a sixteenth
of that. The last column but one compares them with the quickstart's own config, which has Muon, as the strided pattern
does: {quickstart}. Differences are those of the same seeds and crops; ±: their standard error over seeds (where there
are two or more) and over crops, added in squares.

{table_of(equal_rows(), journal, ours)}"""
    write_section(SECTION, COMMAND, text)


def main() -> int:
    journal = Journal()
    make_missing(wanted_runs(journal), journal)  # the trials
    make_missing(wanted_runs(journal), journal)
    write(journal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
