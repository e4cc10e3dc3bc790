"""Does the fit find a law that is known, do its intervals hold it, and does it ask for enough runs?"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from trainer.comparison import scaling_law
from trainer.comparison.scaling_law import (
    HUBER_DELTA,
    Law,
    TokenCost,
    Trained,
    best_bits_per_dim,
    best_size,
    fit,
    fit_law,
    growth_of,
    levels,
    token_cost,
    valleys,
    what_is_missing,
)

TRUE = Law(3.0, 0.3, 0.3, 0.35, 0.3, (1e6, 1.6e7))
COST = TokenCost(6.0, 400.0, 0.0)
SIZES, BUDGETS = np.geomspace(1e5, 1e7, 5), np.geomspace(1e13, 1e15, 4)


def made_runs(
    noise: float, seed: int = 0, *, sizes: np.ndarray = SIZES, budgets: np.ndarray = BUDGETS
) -> list[Trained]:
    """A run of each size and budget, whose bits/dim are those of the law but for a relative error."""
    random, runs = np.random.default_rng(seed), []
    for size in sizes:
        for flops in budgets:
            tokens = flops / float(COST.of(size))
            bits = float(TRUE.bits_per_dim(size, tokens) * np.exp(noise * random.standard_normal()))
            runs.append(Trained(f"{size:.0f} {flops:.0f}", float(size), tokens, float(flops), bits))
    return runs


def test_the_law_behind_runs_without_errors_is_found() -> None:
    found = fit_law(made_runs(0.0))
    assert (found.floor, found.size_exponent, found.token_exponent) == pytest.approx((3.0, 0.35, 0.3), rel=1e-3)
    sizes, tokens = np.array([1e4, 1e6, 1e9]), np.array([1e7, 1e9, 1e12])
    assert found.bits_per_dim(sizes, tokens) == pytest.approx(TRUE.bits_per_dim(sizes, tokens), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_search_finds_a_smaller_loss(seed: int) -> None:
    """All starts at once find what scipy's simplex finds, one start after the other."""
    runs = made_runs(0.004, seed)
    sizes, tokens, bits = (
        np.array([getattr(r, name) for r in runs]) for name in ("parameters", "tokens", "bits_per_dim")
    )
    x, y = (np.log(values) - np.log(values).mean() for values in (sizes, tokens))

    def loss(constants: np.ndarray) -> float:
        floor, size, token, a, b = constants
        error = np.abs(np.logaddexp.reduce([np.full_like(x, floor), size - a * x, token - b * y]) - np.log(bits))
        huber = np.where(error < HUBER_DELTA, error**2 / 2, HUBER_DELTA * (error - HUBER_DELTA / 2))
        return float(huber.sum() * 1e6)

    options = {"maxiter": 8000, "xatol": 1e-7, "fatol": 1e-7, "adaptive": True}
    starts = [np.log([floor, 0.2, 0.2]).tolist() + [0.4, 0.4] for floor in (2.0, 2.8)]
    slow = min(minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts)
    found = fit_law(runs)
    logs = np.log([found.floor, found.size_part, found.token_part])
    assert loss(np.array([*logs, found.size_exponent, found.token_exponent])) <= slow * (1 + 1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 16 sets of runs; by chance alone, 90 % intervals would hold fewer than 11 of 16 once in a hundred times."""
    asked: list[Callable[[Law], float]] = [
        lambda law: law.size_exponent,
        lambda law: law.token_exponent,
        lambda law: law.growth,
        lambda law: law.floor,
        lambda law: best_size(law, COST, 1e20),
        lambda law: best_bits_per_dim(law, COST, 1e20),
    ]
    held = np.zeros(len(asked))
    for seed in range(16):
        found = fit(made_runs(0.003, seed), resamples=100)
        estimates = [found.estimate(value_of) for value_of in asked]
        held += [e.low <= value_of(TRUE) <= e.high for e, value_of in zip(estimates, asked, strict=True)]
        assert all(e.low < e.high for e in estimates)
    assert min(held) >= 11


def test_intervals_are_wider_for_noisier_runs_and_farther_budgets_and_the_seed_decides_them() -> None:
    quiet, noisy = (fit(made_runs(noise), resamples=100) for noise in (0.001, 0.01))

    def width(found: scaling_law.Fit, flops: float) -> float:
        best = found.best_size(flops)
        return best.high / best.low

    assert width(quiet, 1e14) < width(noisy, 1e14) < width(noisy, 1e20)
    assert fit(made_runs(0.01), resamples=100).best_size(1e18) == noisy.best_size(1e18)
    assert fit(made_runs(0.01), seed=1, resamples=100).best_size(1e18) != noisy.best_size(1e18)


def test_one_run_that_went_wrong_does_not_move_the_law() -> None:
    runs = made_runs(0.0005)
    wrong = [replace(runs[0], bits_per_dim=1.2 * runs[0].bits_per_dim), *runs[1:]]
    assert fit_law(wrong).growth == pytest.approx(TRUE.growth, abs=0.03)


def test_the_best_size_is_the_one_of_the_closed_form() -> None:
    """Hoffmann et al., equation 4, where a token costs 6 N."""
    a, b, flops = TRUE.size_exponent, TRUE.token_exponent, 1e19
    size_part, token_part = TRUE.size_part * TRUE.middle[0] ** a, TRUE.token_part * TRUE.middle[1] ** b
    expected = (a * size_part / (b * token_part)) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))
    found = best_size(TRUE, TokenCost(6.0, 0.0, 0.0), flops)
    assert found == pytest.approx(expected, rel=0.012)
    assert best_bits_per_dim(TRUE, COST, 1e14) <= float(TRUE.bits_per_dim(1e6, 1e14 / float(COST.of(1e6))))


def test_what_a_token_costs_follows_from_sizes() -> None:
    sizes = np.geomspace(1e5, 1e8, 6)
    found = token_cost([(size, float(COST.of(size))) for size in sizes])
    assert (found.by_size, found.by_width, found.largest_error) == pytest.approx((6.0, 400.0, 0.0), abs=1e-6)
    falling = token_cost([(size, 6 * size - 400 * np.sqrt(size)) for size in sizes])
    assert falling.by_width == 0 and falling.by_size > 0


def test_parabolas_find_the_best_size_of_each_budget_within_the_runs() -> None:
    runs = made_runs(0.0, sizes=np.geomspace(2e5, 2e7, 7))
    found = valleys(runs)
    assert [valley.flops for valley in found] == pytest.approx(BUDGETS)
    for valley in found:
        assert valley.best_size == pytest.approx(best_size(TRUE, COST, valley.flops), rel=0.5)
    assert growth_of(found) == pytest.approx(TRUE.growth, abs=0.08)
    low = [run for run in runs if run.flops > 5e14 and run.parameters < 1e6]  # all of them too small
    assert valleys(low) == [] and growth_of(found[:1]) is None


def test_a_law_that_bends_shows_where_the_largest_budget_is_forecast() -> None:
    runs = made_runs(0.0)
    good = fit(runs, resamples=10).held_out_error()
    assert good is not None and abs(good) < 1e-3
    bent = [replace(run, bits_per_dim=run.bits_per_dim + 0.1 * (run.flops > 5e14)) for run in runs]
    assert fit(bent, resamples=10).held_out_error() == pytest.approx(-0.1, abs=0.01)
    small = made_runs(0.0, sizes=SIZES[:4], budgets=BUDGETS[:3])
    assert fit(small, resamples=10).held_out_error() is not None
    assert fit(small[1:], resamples=10).held_out_error() is None  # seven runs are left


@pytest.mark.parametrize(
    ("sizes", "budgets", "words"),
    [(3, 4, "these are 12 of 3 and 4"), (5, 2, "these are 10 of 5 and 2"), (4, 3, None)],
)
def test_too_few_sizes_or_budgets_are_refused(sizes: int, budgets: int, words: str | None) -> None:
    runs = made_runs(0.0, sizes=SIZES[:sizes], budgets=BUDGETS[:budgets])
    if words is None:
        assert what_is_missing(runs) is None
    else:
        with pytest.raises(ValueError, match=words):
            fit(runs)
    assert "these are 4 of 4 and 4" in str(what_is_missing(made_runs(0.0)[::5][:4]))


def test_sizes_and_budgets_that_nearly_agree_count_as_one() -> None:
    assert levels([100, 1, 104, 1.05, 10]) == [[1, 3], [4], [0, 2]]
