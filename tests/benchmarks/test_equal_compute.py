"""Do runs cost what they say, are finished ones not made again, and do the tables hold what was found?"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from benchmarks import equal_compute, recipe, rivals, scaling_runs
from benchmarks.equal_compute import OLD_BATCH, OLD_MODEL, OLD_OPTIMIZER, Journal, Result, Wanted, wanted
from trainer import scaling
from trainer.comparison.run_history import history_of_folder
from trainer.config import RunConfig

OLD = equal_compute.settings_of(OLD_MODEL, OLD_OPTIMIZER, OLD_BATCH)


def result_of(run: Wanted, bits: float, step: float = 0.0) -> Result:
    """As if the run had been made; the bits of its images rise by `step` each."""
    values = tuple(bits + step * image for image in range(run.validation_images))
    raw = values[: equal_compute.SCORED_IMAGES]
    train = run.config.train
    flops = float(train.steps * train.global_batch_images * run.config.model.account().flops.training)
    return Result(run.config, flops, values, raw, sum(raw) / len(raw), 1.5, "abc")


def test_the_first_quickstart_is_the_unit() -> None:
    train = wanted(OLD, 1.0, 0).config.train
    assert train.steps * train.global_batch_images == 1760
    assert equal_compute.unit_of_compute() == pytest.approx(4.2e12, rel=0.01)


@pytest.mark.parametrize("row", rivals.PLAIN, ids=lambda row: row.name)
def test_every_family_gets_the_same_flops(row: rivals.Row) -> None:
    run = wanted(row.config(1e-3), 1.0, 0)
    assert result_of(run, 4.0).flops == pytest.approx(equal_compute.unit_of_compute(), rel=0.005)


def test_what_is_finished_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [wanted(OLD, budget, seed) for budget in (1 / 4, 1.0) for seed in (0, 1)]
    made: list[RunConfig] = []

    def measure(config: RunConfig, validation_images: int) -> Result:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(config)
        return result_of(Wanted(config, validation_images), 4.0 + config.run.seed)

    monkeypatch.setattr(equal_compute, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        equal_compute.make_missing(runs, Journal(tmp_path / "made.jsonl"))
    made.clear()
    journal = Journal(tmp_path / "made.jsonl")  # of another process
    equal_compute.make_missing(runs, journal)
    assert made == [runs[3].config]
    found = journal.find(runs[1])
    assert found and found.mean == pytest.approx(5.0) and found.cpu_seconds == 1.5
    other = dataclasses.replace(runs[1].config.optimizer, peak_lr=1e-4)
    assert journal.find(Wanted(dataclasses.replace(runs[1].config, optimizer=other), 128)) is None
    assert journal.find(Wanted(runs[1].config, 512)) is None  # it scored 128 images


def test_differences_are_those_of_the_same_seeds_and_images() -> None:
    these = [result_of(wanted(OLD, 1 / 4, seed), 4.0 + seed, 0.001) for seed in (0, 1, 2)]
    those = [result_of(wanted(OLD, 1 / 4, seed), 3.9 + seed, 0.001) for seed in (0, 1)]
    found = equal_compute.difference(these, those)
    assert found and found.seeds == 2
    assert found.mean == pytest.approx(0.1) and found.error == pytest.approx(0.0, abs=1e-9)
    assert equal_compute.difference(these[2:], those) is None


def test_a_run_trains_and_scores_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"layers": 1, "width": 8, "heads": 2, "attention_width": 8, "ff_width": 8}
    model = OLD_MODEL | sizes | {"output": {"kind": "mixture", "components": 2}}
    config = equal_compute.settings_of(model, OLD_OPTIMIZER | {"ema_decay": 0.5}, 4, steps=6)
    monkeypatch.setattr(equal_compute, "DATA", tmp_path)
    monkeypatch.setattr(equal_compute, "PHOTOGRAPHS", {"train": 40, "validation": 6})
    monkeypatch.setattr(equal_compute, "SCORED_IMAGES", 4)
    generator_state = torch.get_rng_state()
    first = equal_compute.measure(config, 6)
    torch.set_rng_state(generator_state)
    assert len(set(first.bits)) == 6 and len(set(first.raw)) == 4
    assert first.bits[:4] != first.raw and 4 < first.raw_mean < 9  # averages of the weights, and the weights
    assert first.bits == equal_compute.measure(config, 6).bits


def test_tables_are_written_from_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(rivals, "receptive_field", lambda model: None)  # takes seconds
    journal = Journal(tmp_path / "made.jsonl")
    row = rivals.PLAIN[0]
    for rate, run in row.trials(journal).items():
        journal.add(result_of(run, 5.0 + abs(rate - 3e-3)))
    assert row.best_rate(journal) == 3e-3 and rivals.PLAIN[1].best_rate(journal) is None
    for run, bits in zip(row.runs(journal), (4.0, 4.2), strict=False):
        journal.add(result_of(run, bits))
    rivals.write(journal)
    assert "| 2 | 4.100 ± 0.100 |" in (tmp_path / "RESULTS.md").read_text()

    comparison = recipe.comparisons()[0]
    journal.add(result_of(wanted(comparison.base, comparison.budget, 0), 4.0))
    changed = comparison.changes[0].applied_to(comparison.base)
    journal.add(result_of(wanted(changed, comparison.budget, 0), 3.5))
    recipe.write(journal)
    written = (tmp_path / "RESULTS.md").read_text()
    assert re.search(r"\| predictors \| [\d,]+ \| \d+ \| 1 \| 3.500 \| -0.500 ± 0.000 \|", written)
    assert written.count("<!-- end of") == 2


def test_learning_rates_are_tried_upwards_as_long_as_they_are_better(tmp_path: Path) -> None:
    row, journal = rivals.PLAIN[0], Journal(tmp_path / "made.jsonl")
    low, high, highest = rivals.RATES
    for rate, bits, asked in ((low, 5.0, {low, high}), (high, 4.9, set(rivals.RATES)), (highest, 4.95, None)):
        assert row.best_rate(journal) is None
        journal.add(result_of(wanted(row.config(rate), row.trial, rivals.SEEDS[0]), bits))
        assert set(row.trials(journal)) == (asked or set(rivals.RATES))
    assert row.best_rate(journal) == high


def test_trainer_scaling_reads_the_folders(tmp_path: Path) -> None:
    names, results = [], []
    for name, run in scaling_runs.wanted_runs().items():
        results.append(result_of(run, 4.0 + 1 / run.config.train.steps))
        scaling_runs.write_folder(tmp_path / name, results[-1])
        names.append(name)
    points, metric, notes = scaling.points_of([history_of_folder(tmp_path / name) for name in names])
    assert metric == "final/raw_bits_per_dim" and not [note for note in notes if "left out" in note]
    assert [point.name for point in points] == names
    assert [point.flops for point in points] == pytest.approx([result.flops for result in results])
    assert [point.bits_per_dim for point in points] == pytest.approx([r.raw_mean for r in results], abs=1e-4)
