"""Which size suits a config's compute, and what will it reach, as far as anything says so before it is trained?

Runs of models of the same kind say it best (trainer/scaling.py). Without such runs the sizes are those of published
laws, and bits/dim those of published models: an anchor, which is not measured here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.wording import counted
from models.model import Account
from trainer.compare import number
from trainer.comparison.published import Published, likelihoods_of_size
from trainer.comparison.published_laws import laws_for
from trainer.comparison.run_history import RunHistory
from trainer.comparison.scaling_law import CONFIDENCE, Estimate, fit
from trainer.comparison.scaling_page import short
from trainer.config import ModelConfig, RunConfig
from trainer.errors import UsageError
from trainer.scaling import kind_of, points_of


@dataclass(frozen=True)
class Range:
    """The least and the most of something, and what says so."""

    low: float
    high: float
    rests_on: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is known of a training before it begins."""

    parameters: int
    tokens: float
    """That it is trained on, repeated images counted again."""
    flops: float
    """Of all its training."""
    sizes: Range
    """Parameters that suit so many FLOP."""
    bits_per_dim: tuple[Range, ...]
    """That it will need: of runs one range, of what is published one for each data set; empty where nothing says."""

    def lines(self) -> list[tuple[str, str]]:
        """What is asked, and what is known of it with what that rests on."""
        found = [
            (
                "spends",
                f"{self.flops:.2g} FLOP of training: {short(self.parameters)} parameters, "
                f"{number(self.tokens / self.parameters, 3)} tokens for each",
            ),
            (
                "size",
                f"{short(self.sizes.low)} to {short(self.sizes.high)} parameters suit so many FLOP, by "
                f"{self.sizes.rests_on}. {self._place()}",
            ),
        ]
        found += [("bits/dim", f"{bits.low:.2f} to {bits.high:.2f}: {bits.rests_on}") for bits in self.bits_per_dim]
        if not self.bits_per_dim:
            found.append(("bits/dim", "not known: nothing is measured here, and nothing is published of such images"))
        return found

    def _place(self) -> str:
        if self.parameters < self.sizes.low:
            return f"The config has {number(self.sizes.low / self.parameters, 2)} times fewer."
        if self.parameters > self.sizes.high:
            return f"The config has {number(self.parameters / self.sizes.high, 2)} times more."
        return "The config lies between."


def forecast_of(config: RunConfig, images: int, runs: Sequence[RunHistory] = ()) -> Forecast:
    """The forecast for a config that is trained on so many images, from runs of its kind or from what is published.

    Raises UsageError where the runs are of another kind than the config, or too few for a law.
    """
    account = config.model.account()
    flops, tokens = float(images) * account.flops.training, float(images) * account.positions
    if runs:
        sizes, *bits = _measured(config.model, account, flops, tokens, runs)
    else:
        sizes, bits = _published_sizes(config.model, flops), _published_bits(config.model, account.parameters)
    return Forecast(parameters=account.parameters, tokens=tokens, flops=flops, sizes=sizes, bits_per_dim=tuple(bits))


def _measured(
    model: ModelConfig, account: Account, flops: float, tokens: float, runs: Sequence[RunHistory]
) -> list[Range]:
    """Of the best size and of the bits/dim, by the law of the runs."""
    points, metric, _ = points_of(runs)
    theirs = next(run.model for run in runs if run.model)
    if kind_of(model) != kind_of(theirs) or model.output.kind != theirs.output.kind:
        raise UsageError(
            "--runs: their family, image size, number of tokens or output are not those of the config, for which their "
            "law does not hold; without --runs the plan says what is published"
        )
    law = fit(points, [(account.parameters, account.flops.training / account.positions)])
    least, most = law.measured
    images = runs[0].params.get("data.validation_url", "images that have no name")
    of_runs = (
        f"the law of {counted(len(points), 'run')} with {least:.2g} to {most:.2g} FLOP ({CONFIDENCE:.0%} interval; "
        f"{metric} of {images})"
    )
    bits = law.bits_per_dim(account.parameters, tokens)
    beyond = f" That is {number(flops / most, 2)} times more FLOP than any of them had." if flops > most else ""
    return [_range(law.best_size(flops), of_runs), _range(bits, f"the same law, which says {bits.value:.2f}.{beyond}")]


def _range(estimate: Estimate, rests_on: str) -> Range:
    return Range(estimate.low, estimate.high, rests_on)


def _published_sizes(model: ModelConfig, flops: float) -> Range:
    laws = laws_for(model.image_size)
    sizes, size = [law.best_size(flops) for law in laws], laws[0].image_size
    papers = " and ".join(dict.fromkeys(law.paper for law in laws))
    return Range(
        min(sizes), max(sizes), f"the laws that {papers} found for next-pixel prediction of other images, {size}x{size}"
    )


def _published_bits(model: ModelConfig, parameters: int) -> list[Range]:
    """What published models need that have a likelihood, too; for each data set whose images are as large."""
    if model.num_classes or model.small_size:  # figures are of models that are given nothing
        return []
    found = []
    for name, entries in likelihoods_of_size(model.image_size).items():
        bits = [entry.bits_per_dim for entry in entries]
        nearest = _nearest(entries, parameters)
        anchor = f"; nearest in size: {nearest.model}, {nearest.parameters}, {nearest}" if nearest else ""
        says = f"what the {len(entries)} published models of {name} need that have a likelihood, if this is its data"
        found.append(Range(min(bits), max(bits), f"{says}{anchor}. Not measured here."))
    return found


def _nearest(entries: Sequence[Published], parameters: int) -> Published | None:
    """Of those whose size is known, the one whose size is nearest by its ratio."""
    known = [entry for entry in entries if entry.millions is not None]
    return min(known, key=lambda entry: abs(math.log(1e6 * (entry.millions or 1) / parameters)), default=None)
