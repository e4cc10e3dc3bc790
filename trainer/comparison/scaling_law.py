"""How do bits/dim fall with the size of a model and with what it was trained on, and which size suits a budget?

The law is that of Hoffmann et al. 2022 (Training Compute-Optimal Large Language Models, section 3.3): what no model
can learn, and a part each for too small a model and for too few tokens. It is fitted as they did, with the Huber loss
of logarithms. Their second approach (section 3.2), a parabola through the runs of each budget, needs no law and stands
beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

LEAST_SIZES, LEAST_BUDGETS, LEAST_RUNS = 4, 3, 8
"""Fewer do not determine the five constants of the law."""
SAME = 1.1
"""Sizes and budgets that differ by less than this factor count as one."""
HUBER_DELTA = 1e-3
"""Errors of log(bits/dim) beyond this count by their size and no longer by their square (Hoffmann et al.)."""
RESAMPLES = 400
CONFIDENCE = 0.9
LARGEST_EXPONENT, LEAST_FLOOR = 2.0, 1e-2
"""Published exponents lie between 0.03 and 0.5. A floor of so few bits/dim is none."""
ITERATIONS = 150
SIZES_LOOKED_AT = np.geomspace(1e3, 1e15, 2401)
"""Parameters of the models among which the best one for a budget is found; neighbours are 1.2 % apart."""


@dataclass(frozen=True)
class Trained:
    """One run: what it cost, and what came of it."""

    name: str
    parameters: float
    tokens: float
    """Positions of the sequences that it was trained on; those of repeated images count again."""
    flops: float
    """Of all its training."""
    bits_per_dim: float


@dataclass(frozen=True)
class Law:
    """bits/dim = floor + size_part (N / N0)^-size_exponent + token_part (D / D0)^-token_exponent.

    N are parameters and D tokens; N0 and D0 are the geometric means over the runs that the law was fitted to.
    """

    floor: float
    size_part: float
    token_part: float
    size_exponent: float
    token_exponent: float
    middle: tuple[float, float]
    """N0 and D0."""

    def bits_per_dim(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """What the law says of models of these sizes after so many tokens."""
        size, past = np.asarray(parameters) / self.middle[0], np.asarray(tokens) / self.middle[1]
        return np.asarray(
            self.floor + self.size_part * size**-self.size_exponent + self.token_part * past**-self.token_exponent
        )

    @property
    def growth(self) -> float:
        """Exponent with which the compute-optimal size grows with compute, where a token costs in proportion to N."""
        return self.token_exponent / (self.size_exponent + self.token_exponent)

    @property
    def fall(self) -> float:
        """Exponent with which what is above the floor falls with compute, at the compute-optimal size."""
        return self.size_exponent * self.growth


@dataclass(frozen=True)
class TokenCost:
    """Training FLOP of a token by the size of the model: by_size N + by_width sqrt(N).

    A parameter of a matrix costs 6. Attention and output grow with the width, and N with its square: they are what
    small models cost more.
    """

    by_size: float
    by_width: float
    largest_error: float
    """Of the models that it was fitted to, as a share."""

    def of(self, parameters: np.ndarray | float) -> np.ndarray:
        return np.asarray(self.by_size * np.asarray(parameters) + self.by_width * np.sqrt(parameters))


@dataclass(frozen=True)
class Estimate:
    """A value, and the interval that holds it with CONFIDENCE where the law is right."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """A budget that is asked about, and the model that a config would spend it on; None where no config is meant."""

    name: str
    flops: float
    parameters: float | None = None
    tokens: float | None = None
    same_images: bool = True
    """Whether its images are as large as those of the runs: bits/dim of others are not forecast."""


@dataclass(frozen=True)
class Valley:
    """The lowest point of a parabola through the runs of one budget: bits/dim over log N."""

    flops: float
    best_size: float
    bits_per_dim: float


@dataclass(frozen=True)
class Fit:
    """The law of some runs, and the laws of resamplings of them, which its intervals come from."""

    runs: Sequence[Trained]
    law: Law
    resampled: Sequence[Law]
    cost: TokenCost

    def estimate(self, value_of: Callable[[Law], float]) -> Estimate:
        """A value that follows from the law."""
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile([value_of(law) for law in self.resampled], [tail, 100 - tail])
        return Estimate(float(value_of(self.law)), float(low), float(high))

    def best_size(self, flops: float) -> Estimate:
        """Parameters of the model that needs the fewest bits/dim after so many FLOP of training."""
        return self.estimate(lambda law: best_size(law, self.cost, flops))

    def best_bits_per_dim(self, flops: float) -> Estimate:
        """What that model needs."""
        return self.estimate(lambda law: best_bits_per_dim(law, self.cost, flops))

    def bits_per_dim(self, parameters: float, tokens: float) -> Estimate:
        return self.estimate(lambda law: float(law.bits_per_dim(parameters, tokens)))

    @property
    def error(self) -> float:
        """Root mean square of what the law says of its runs minus what they need, in bits/dim."""
        return float(np.sqrt(np.mean(np.square(_errors(self.law, self.runs)))))

    def held_out_error(self) -> float | None:
        """What the law of all other runs says of those of the largest budget, minus what they need: the mean, in
        bits/dim. Below 0 the forecast was too good. None where the others are too few for a law."""
        largest = budgets_of(self.runs)[-1]
        others = [run for run in self.runs if run not in largest]
        if len(others) < LEAST_RUNS or len(levels([run.parameters for run in others])) < LEAST_SIZES:
            return None
        return float(np.mean(_errors(fit_law(others), largest)))

    @property
    def measured(self) -> tuple[float, float]:
        """The smallest and the largest budget, in FLOP."""
        return min(run.flops for run in self.runs), max(run.flops for run in self.runs)


def fit(
    runs: Sequence[Trained], costs: Sequence[tuple[float, float]] = (), *, seed: int = 0, resamples: int = RESAMPLES
) -> Fit:
    """The law of some runs with its intervals; the same seed gives the same.

    `costs` are size and FLOP for a token of models that are not among the runs. Raises ValueError with a sentence where
    the runs are too few.
    """
    if missing := what_is_missing(runs):
        raise ValueError(missing)
    # In an order of their own, so that it does not matter for what is drawn in which they were named.
    runs = sorted(runs, key=lambda run: (run.flops, run.parameters, run.bits_per_dim))
    law = fit_law(runs)
    resampled = _fitted(runs, _drawn(runs, resamples, np.random.default_rng(seed)), _starts(runs, few=True))
    return Fit(runs, law, resampled, token_cost([*((run.parameters, run.flops / run.tokens) for run in runs), *costs]))


def fit_law(runs: Sequence[Trained]) -> Law:
    """The law with the smallest Huber loss."""
    return _fitted(runs, np.ones((1, len(runs))), _starts(runs))[0]


def what_is_missing(runs: Sequence[Trained]) -> str | None:
    """Why these runs determine no law; None where they do."""
    sizes, budgets = len(levels([run.parameters for run in runs])), len(budgets_of(runs))
    if sizes >= LEAST_SIZES and budgets >= LEAST_BUDGETS and len(runs) >= LEAST_RUNS:
        return None
    return (
        f"a law takes at least {LEAST_RUNS} runs of {LEAST_SIZES} sizes and {LEAST_BUDGETS} budgets of FLOP, and these "
        f"are {len(runs)} of {sizes} and {budgets}"
    )


def levels(values: Sequence[float]) -> list[list[int]]:
    """The places of values that count as one, group by group from the smallest on."""
    groups: list[list[int]] = []
    for place in sorted(range(len(values)), key=lambda place: values[place]):
        if not groups or values[place] > SAME * values[groups[-1][-1]]:
            groups.append([])
        groups[-1].append(place)
    return groups


def budgets_of(runs: Sequence[Trained]) -> list[list[Trained]]:
    """Runs of the same training FLOP together, from the smallest budget on."""
    return [[runs[place] for place in group] for group in levels([run.flops for run in runs])]


def best_size(law: Law, cost: TokenCost, flops: float) -> float:
    """Parameters of the model that needs the fewest bits/dim after so many FLOP of training."""
    return float(SIZES_LOOKED_AT[_at_budget(law, cost, flops).argmin()])


def best_bits_per_dim(law: Law, cost: TokenCost, flops: float) -> float:
    """What the model of the best size needs."""
    return float(_at_budget(law, cost, flops).min())


def token_cost(costs: Sequence[tuple[float, float]]) -> TokenCost:
    """The curve through sizes and their FLOP for a token that has the smallest relative errors; neither of its parts is
    below zero."""
    sizes, flops = (np.array(column, dtype=float) for column in zip(*costs, strict=True))
    parts = np.stack([sizes, np.sqrt(sizes)], axis=1) / flops[:, None]
    both = np.linalg.lstsq(parts, np.ones(len(flops)), rcond=None)[0]
    if both.min() < 0:
        both = np.array([1 / parts[:, 0].mean(), 0.0])
    return TokenCost(float(both[0]), float(both[1]), float(np.abs(parts @ both - 1).max()))


def valleys(runs: Sequence[Trained]) -> list[Valley]:
    """The best size of each budget with at least three sizes on both sides of it; the other budgets have none."""
    found = []
    for budget in budgets_of(runs):
        sizes = np.log([run.parameters for run in budget])
        if len(levels([run.parameters for run in budget])) < 3:
            continue
        curve = np.polynomial.Polynomial.fit(sizes, [run.bits_per_dim for run in budget], 2)
        bend = curve.deriv(2)(0.0)
        (lowest,) = curve.deriv().roots() if bend > 0 else (np.inf,)
        if sizes.min() < lowest < sizes.max():
            flops = float(np.exp(np.mean(np.log([run.flops for run in budget]))))
            found.append(Valley(flops, float(np.exp(lowest)), float(curve(lowest))))
    return found


def growth_of(found: Sequence[Valley]) -> float | None:
    """The exponent with which the best size grows with compute, by a line through the valleys; None below two."""
    if len(found) < 2:
        return None
    flops, sizes = (np.log(column) for column in zip(*((v.flops, v.best_size) for v in found), strict=True))
    return float(np.polynomial.Polynomial.fit(flops, sizes, 1).convert().coef[1])


def _at_budget(law: Law, cost: TokenCost, flops: float) -> np.ndarray:
    return law.bits_per_dim(SIZES_LOOKED_AT, flops / cost.of(SIZES_LOOKED_AT))


def _errors(law: Law, runs: Sequence[Trained]) -> np.ndarray:
    sizes, tokens, bits = _columns(runs)
    return np.asarray(law.bits_per_dim(sizes, tokens) - bits)


def _columns(runs: Sequence[Trained]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens and bits/dim."""
    columns = zip(*((run.parameters, run.tokens, run.bits_per_dim) for run in runs), strict=True)
    sizes, tokens, bits = (np.array(column, dtype=float) for column in columns)
    return sizes, tokens, bits


def _drawn(runs: Sequence[Trained], count: int, random: np.random.Generator) -> np.ndarray:
    """How often each run is in each sample, drawn with replacement: [count, runs].

    Samples with fewer than three sizes or three different amounts of tokens are drawn again: no curve bends in them.
    """
    sizes, tokens, _ = _columns(runs)
    samples: list[np.ndarray] = []
    while len(samples) < count:
        places = random.integers(0, len(runs), len(runs))
        if len(levels(list(sizes[places]))) >= 3 and len(levels(list(tokens[places]))) >= 3:
            samples.append(np.bincount(places, minlength=len(runs)).astype(float))
    return np.stack(samples)


def _starts(runs: Sequence[Trained], few: bool = False) -> np.ndarray:
    """Logarithms of the five constants from which the search begins: [starts, 5]."""
    lowest = min(run.bits_per_dim for run in runs)
    floors, parts, exponents = (
        ((0.6, 0.9), (0.1,), (0.2, 0.6)) if few else ((0.3, 0.7, 0.95), (0.03, 0.2), (0.1, 0.3, 0.9))
    )
    grid = product(floors, parts, parts, exponents, exponents)
    return np.log([(a * lowest, b * lowest, c * lowest, d, e) for a, b, c, d, e in grid])


def _fitted(runs: Sequence[Trained], counts: np.ndarray, starts: np.ndarray) -> list[Law]:
    """The law of each sample, in which the runs are so often: counts [samples, runs].

    Levenberg and Marquardt's method from all starts of all samples at once, on the logarithms of the constants; the
    Huber loss by weights that follow the errors.
    """
    sizes, tokens, bits = _columns(runs)
    middle = float(np.exp(np.log(sizes).mean())), float(np.exp(np.log(tokens).mean()))
    x, y, target = np.log(sizes / middle[0]), np.log(tokens / middle[1]), np.log(bits)
    lowest = np.log([LEAST_FLOOR, 1e-6, 1e-6, 1e-3, 1e-3])
    highest = np.log([bits.min(), 10 * bits.max(), 10 * bits.max(), LARGEST_EXPONENT, LARGEST_EXPONENT])
    weights = np.repeat(counts, len(starts), axis=0)
    found = np.clip(np.tile(starts, (len(counts), 1)), lowest, highest)

    def errors(constants: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Errors [problems, runs], their gradients [problems, runs, 5], the losses [problems]."""
        floor, size_part, token_part, a, b = (column[:, None] for column in np.exp(constants).T)
        too_small, too_few = size_part * np.exp(-a * x), token_part * np.exp(-b * y)
        total = floor + too_small + too_few
        gradients = np.stack([floor + 0 * total, too_small, too_few, -a * x * too_small, -b * y * too_few], axis=-1)
        error = np.log(total) - target
        size = np.abs(error)
        huber = np.where(size < HUBER_DELTA, error**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
        return error, gradients / total[..., None], (weights * huber).sum(axis=1)

    error, gradient, loss = errors(found)
    damping = np.full(len(found), 1e-2)
    for _ in range(ITERATIONS):
        weighted = (weights * np.minimum(1, HUBER_DELTA / np.maximum(np.abs(error), 1e-12)))[..., None] * gradient
        curvature = np.einsum("mri,mrj->mij", weighted, gradient)
        slope = np.einsum("mri,mr->mi", weighted, error)
        diagonal = np.einsum("mii->mi", curvature)
        ridge = damping[:, None] * diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True)
        step = np.linalg.solve(curvature + ridge[:, :, None] * np.eye(5), slope[..., None])[..., 0]
        tried = np.clip(found - np.clip(step, -1, 1), lowest, highest)
        new_error, new_gradient, new_loss = errors(tried)
        better = new_loss < loss
        found = np.where(better[:, None], tried, found)
        error = np.where(better[:, None], new_error, error)
        gradient = np.where(better[:, None, None], new_gradient, gradient)
        loss = np.where(better, new_loss, loss)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    best = loss.reshape(len(counts), len(starts)).argmin(axis=1)
    constants = np.exp(found.reshape(len(counts), len(starts), 5)[np.arange(len(counts)), best])
    return [Law(floor, size, token, a, b, middle) for floor, size, token, a, b in constants.tolist()]
