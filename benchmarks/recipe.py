"""What does each part of the quickstart's recipe give, after equally many FLOPs of training?

    python -m benchmarks.recipe

The recipe and the first quickstart on the full budget; each part alone in the first quickstart, each taken out of the
recipe, and what was tried beside them, on a part of the budget, paired with the run of the same seed that lacks only
that change. Then the paper's ablation of the block size. Runs that were made before are not made again
(benchmarks/equal_compute.py).
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.equal_compute import (
    OLD_BATCH,
    OLD_MODEL,
    OLD_OPTIMIZER,
    SCORED_IMAGES,
    Journal,
    Result,
    Settings,
    Wanted,
    account_of,
    difference,
    make_missing,
    settings_of,
    wanted,
)
from benchmarks.report import table, write_section
from benchmarks.rivals import STRIDED_AND_NEAR, recipe, said, spread
from models.receptive_field import receptive_field
from trainer.config import RunConfig
from trainer.typed_values import plain

SECTION = "parts of the quickstart's recipe"
COMMAND = "python -m benchmarks.recipe"
SEEDS = (0, 1, 2)
FULL, OLD_PART, PART = 1.0, 1 / 4, 1 / 8
"""In units of the first quickstart's compute. Of changes to it, and to the recipe, which needs fewer FLOPs a step."""

BLOCKS, BLOCKS_STEPS = (8, 16, 64, 256), 1000
LONGER_BLOCKS, LONGER_STEPS = (64, 256), 4000
"""Trained for longer too: what reaches farther may take more images to learn where to look."""

NARROW: Settings = {"width": 48, "heads": 2, "attention_width": 48, "ff_width": 144}
WIDE: Settings = {name: OLD_MODEL[name] for name in NARROW}
MUON: Settings = {"name": "muon", "muon_peak_lr": 0.02}


@dataclass(frozen=True)
class Change:
    """A line of the tables: what differs from the config that it is compared with."""

    name: str
    model: Mapping[str, object]
    optimizer: Mapping[str, object]
    batch: int | None = None

    def applied_to(self, config: RunConfig) -> RunConfig:
        optimizer = plain(config.optimizer) | self.optimizer
        if optimizer["name"] != "muon":
            optimizer.pop("muon_peak_lr", None)
        batch = self.batch or config.train.global_batch_images
        return settings_of(plain(config.model) | self.model, optimizer, batch)


def _model(name: str, **changes: object) -> Change:
    return Change(name, changes, {})


ALONE = (
    _model("predictors", output={"kind": "predictor_mixture", "scales": 2}),
    _model("stem of neighbours", stem="neighbourhood"),
    Change("Muon", {}, MUON),
    Change("4 images a step", {}, {}, batch=4),
    Change("width 48", NARROW, {}),
)
"""Added to the first quickstart."""

WITHOUT = (
    _model("without predictors", output=OLD_MODEL["output"]),
    _model("one predictor, the median", output={"kind": "predictor_mixture", "predictors": ["median"], "scales": 20}),
    _model("without the stem", stem="previous"),
    Change("AdamW for Muon", {}, {"name": "adamw"}),
    Change("8 images a step", {}, {}, batch=8),
    Change("width 96", WIDE, {}),
    _model("attention sees 8 pixels", attention={"kind": "local_1d", "query_block": 8, "memory": 8}),
)
"""Taken out of the recipe, or undone in it."""

BESIDE = (
    _model("2D blocks of 4 x 16, flange 8", attention={"kind": "local_2d", "query_block": [4, 16], "memory": [8, 8]}),
    _model(
        "windows of 64, 128 and 256 by layer",
        attention=[{"kind": "sliding_1d", "window": window} for window in (64, 128, 256)],
    ),
    _model("one head of keys for two of queries", key_heads=1),
    _model("a strided layer and two of 32 pixels", attention=STRIDED_AND_NEAR),
)
"""Added to the recipe."""

RETESTED = (*BESIDE[1:], WITHOUT[-1])
"""The best ones of these, on the full budget: what an early lead is worth differs from part to part. A fifth one stands
in benchmarks/tried_options.py."""

CATEGORICAL = (
    _model("stem of neighbours", stem="neighbourhood"),
    _model("logits around guesses", output={"kind": "predictor_categorical"}),
    _model("both", stem="neighbourhood", output={"kind": "predictor_categorical"}),
    _model(
        "both, a token for each pixel",
        input="ordinal",
        stem="neighbourhood",
        output={"kind": "predictor_categorical"},
        attention={"kind": "local_1d", "query_block": 32, "memory": 32},
    ),
)
"""Added to a small model of 256 logits a sub-pixel; configs/imagenet64_big.yaml takes both."""


def old() -> RunConfig:
    """The first quickstart."""
    return settings_of(OLD_MODEL, OLD_OPTIMIZER, OLD_BATCH)


def categorical() -> RunConfig:
    """A small model of sub-pixels with the recipe's optimizer."""
    model = plain(recipe().model) | {
        "input": "categorical",
        "output": {"kind": "categorical"},
        "stem": "previous",
        "attention": {"kind": "local_1d", "query_block": 96, "memory": 96},
        "layers": 2,
        "width": 32,
        "attention_width": 32,
        "ff_width": 64,
    }
    return settings_of(model, plain(recipe().optimizer), recipe().train.global_batch_images)


def blocks(seed: int, steps: int = BLOCKS_STEPS) -> dict[int, Wanted]:
    """The paper's ablation (configs/cifar10_block8.yaml and its like) at a small size, by block size in pixels. Without
    predictors and neighbours, so that attention alone brings what it reaches. On equally many images, as in the paper.
    """
    model = OLD_MODEL | NARROW | {"heads": 2, "layers": 2, "ff_width": 96}
    attention = {size: {"kind": "local_1d", "query_block": size, "memory": size} for size in BLOCKS}
    return {
        size: Wanted(
            settings_of(
                model | {"attention": attention[size]},
                plain(recipe().optimizer),
                recipe().train.global_batch_images,
                steps=steps,
                seed=seed,
            ),
            SCORED_IMAGES,
        )
        for size in BLOCKS
    }


@dataclass(frozen=True)
class Comparison:
    """Changes to one config on one budget."""

    title: str
    base: RunConfig
    budget: float
    changes: tuple[Change, ...]


def comparisons() -> list[Comparison]:
    """The tables of changes."""
    return [
        Comparison("added to the first quickstart", old(), OLD_PART, ALONE),
        Comparison("taken out of the recipe", recipe(), PART, WITHOUT),
        Comparison("added to the recipe", recipe(), PART, BESIDE),
        Comparison("added to the categorical head", categorical(), PART, CATEGORICAL),
    ]


def wanted_runs() -> Iterator[Wanted]:
    """All, seed after seed, so that the tables of one seed are soon complete."""
    for seed in SEEDS:
        yield wanted(recipe(), FULL, seed)
        yield from (wanted(change.applied_to(recipe()), FULL, seed) for change in RETESTED)
        for comparison in comparisons():
            yield wanted(comparison.base, comparison.budget, seed)
            for change in comparison.changes:
                yield wanted(change.applied_to(comparison.base), comparison.budget, seed)
        yield from blocks(seed).values()
        if seed == SEEDS[0]:
            longer = blocks(seed, LONGER_STEPS)
            yield from (longer[size] for size in LONGER_BLOCKS)
        yield wanted(old(), FULL, seed)
        yield wanted(recipe(), 1 / 4, seed)


def results_of(config: RunConfig, budget: float, journal: Journal) -> list[Result]:
    """The seeds that are there."""
    return [result for seed in SEEDS if (result := journal.find(wanted(config, budget, seed)))]


def table_of_budgets(journal: Journal) -> str:
    """The recipe and the first quickstart, on all validation images where the budget is the full one."""
    header = ["", "TFLOP", "parameters", "images", "seeds", "bits/dim of the crops", "of the first 128", "CPU s"]
    lines = []
    for name, config, budget in (
        ("the first quickstart", old(), FULL),
        ("the recipe", recipe(), FULL),
        *((f"the recipe, {change.name}", change.applied_to(recipe()), FULL) for change in RETESTED),
        ("the recipe", recipe(), 1 / 4),
        ("the recipe", recipe(), PART),
    ):
        if results := results_of(config, budget, journal):
            first = results[0]
            lines.append(
                [
                    name,
                    f"{first.flops / 1e12:.2f}",
                    f"{account_of(config.model).parameters:,}",
                    f"{first.config.train.steps * first.config.train.global_batch_images:,}",
                    f"{len(results)}",
                    spread([result.mean for result in results]) if budget >= FULL else "–",
                    spread([result.raw_mean for result in results]),
                    f"{sum(result.cpu_seconds for result in results) / len(results):.0f}",
                ]
            )
    return table(header, lines)


def table_of_changes(comparison: Comparison, journal: Journal) -> str:
    """Each change beside what it was made to."""
    base = results_of(comparison.base, comparison.budget, journal)
    header = [comparison.title, "parameters", "images", "seeds", "bits/dim", "difference", "CPU s"]
    lines = []
    for name, config in [
        ("nothing", comparison.base),
        *((change.name, change.applied_to(comparison.base)) for change in comparison.changes),
    ]:
        if not (results := results_of(config, comparison.budget, journal)):
            continue
        found, train = difference(results, base), results[0].config.train
        lines.append(
            [
                name,
                f"{account_of(config.model).parameters:,}",
                f"{train.steps * train.global_batch_images:,}",
                f"{len(results)}",
                spread([result.raw_mean for result in results]),
                "" if name == "nothing" else said(found),
                f"{sum(result.cpu_seconds for result in results) / len(results):.0f}",
            ]
        )
    return table(header, lines)


def table_of_blocks(journal: Journal) -> str:
    """The paper's ablation."""
    published = {8: "4.06", 16: "3.47", 64: "3.13", 256: "2.99"}
    lines, means = [], {}
    for size in BLOCKS:
        found = [result for seed in SEEDS if (result := journal.find(blocks(seed)[size]))]
        if found:
            means[size] = sum(result.raw_mean for result in found) / len(found)
            field = receptive_field(found[0].config.model)
            tflop = f"{found[0].flops / 1e12:.2f}"
            seen = f"{field.seen} of {field.past}" if field else "–"
            lines.append(
                [f"{size}", seen, published[size], tflop, f"{len(found)}", spread([r.raw_mean for r in found])]
            )
    header = ["block and memory", "pixels seen", "CIFAR-10, table 4 of the paper", "TFLOP", "seeds", "bits/dim"]
    rising = [f"from {less} to {more}" for less, more in pairwise(means) if means[more] >= means[less]]
    order = "Bits/dim fall with the block, as in the paper."
    if rising:
        order = f"Bits/dim fall with the block as in the paper, but not {' and '.join(rising)}."
    longer = [
        f"{result.raw_mean:.3f} with {size}"
        for size in LONGER_BLOCKS
        if (result := journal.find(blocks(SEEDS[0], LONGER_STEPS)[size]))
    ]
    if longer:
        order += f" After {LONGER_STEPS} steps (one seed): {', '.join(longer)}."
    return table(header, lines) + (f"\n\n{order}" if len(means) > 1 else "")


def write(journal: Journal) -> None:
    """The tables, as a section of RESULTS.md."""
    changes = "\n\n".join(table_of_changes(comparison, journal) for comparison in comparisons())
    missing = sum(journal.find(run) is None for run in dict.fromkeys(wanted_runs()))
    left = (
        f"Of the runs of this section {missing} are not made yet; the same command makes them.\n\n" if missing else ""
    )
    text = f"""{left}On all 512 validation crops with averages of the weights, and on the first {SCORED_IMAGES} with raw
ones. ±: standard error over seeds.

{table_of_budgets(journal)}

Variants are tried on the full budget again because what costs less an image sees more images, and on few FLOPs that
alone may be a lead.

Changes, each on the same FLOPs as what it is compared with: a quarter of the first quickstart's for changes to it, an
eighth for changes to the recipe. The first {SCORED_IMAGES} crops, raw weights. Differences are those of the same seeds
and crops; ±: their standard error over seeds (where there are two or more) and over crops, added in squares.

{changes}

An untrained head of 256 logits needs 8 bits/dim, so that few FLOPs flatter guesses. A token for each pixel sees twice
as many images for its FLOPs; its likelihood alone takes most of the CPU time of so small a net.

The paper's ablation of the receptive field: 2 layers of width 48, a mixture without predictors, the stem of the
previous pixel, {BLOCKS_STEPS} steps of {recipe().train.global_batch_images} images each.

{table_of_blocks(journal)}"""
    write_section(SECTION, COMMAND, text)


def main() -> int:
    journal = Journal()
    make_missing(wanted_runs(), journal)
    write(journal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
