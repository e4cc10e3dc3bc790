"""Does a forecast say what it rests on, and is it kept to what that can say?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT, SMALL_JOB, TINY_MODEL
from tests.support.recorded_runs import LAW, make_scaling_runs
from trainer import forecast
from trainer.comparison import scaling_law
from trainer.comparison.published import PUBLISHED, likelihoods_of_size
from trainer.comparison.published_laws import PUBLISHED_LAWS, laws_for
from trainer.comparison.run_history import RunHistory, history_of_folder
from trainer.config import load_config
from trainer.errors import UsageError
from trainer.forecast import Forecast, Range, forecast_of

WIDER = ["model.width=128", "model.attention_width=128"]


def tiny(*overrides: str) -> Any:
    return load_config(SMALL_JOB, [*(f"{name}={value}" for name, value in TINY_MODEL.items()), *overrides])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Sequence[RunHistory]:
    return [history_of_folder(folder) for folder in make_scaling_runs(tmp_path_factory.mktemp("runs"), noise=0.001)]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "fit", lambda points, costs: scaling_law.fit(points, costs, resamples=60))


def test_runs_of_its_kind_say_what_a_config_will_reach(runs: Sequence[RunHistory]) -> None:
    config, images = tiny(*WIDER), 3_200_000
    found = forecast_of(config, images, runs)
    account = config.model.account()
    assert (found.parameters, found.tokens) == (account.parameters, images * account.positions)
    assert found.flops == images * account.flops.training
    (bits,) = found.bits_per_dim
    assert bits.low <= float(LAW.bits_per_dim(found.parameters, found.tokens)) <= bits.high < bits.low + 0.2
    assert found.sizes.low < found.sizes.high
    text = " ".join(line for _, line in found.lines())
    assert "the law of 12 runs with 1e+10 to 1e+12 FLOP (90% interval; val/bits_per_dim of" in text
    assert "times more FLOP than any of them had" in text and "published" not in text


@pytest.mark.parametrize("override", ["model.image_size=16", "model.output={kind: predictor_mixture}"])
def test_runs_of_another_kind_say_nothing(runs: Sequence[RunHistory], override: str) -> None:
    with pytest.raises(UsageError, match="are not those of the config, for which their law does not hold"):
        forecast_of(tiny(override), 1000, runs)


def test_without_runs_it_is_the_published_laws_and_models_of_the_nearest_images() -> None:
    config = load_config(ROOT / "configs/imagenet64_152m.yaml", [])
    found = forecast_of(config, 10_000_000)
    sizes = [law.best_size(found.flops) for law in PUBLISHED_LAWS if law.image_size == 32]
    assert (found.sizes.low, found.sizes.high) == (min(sizes), max(sizes))
    assert "Henighan et al. 2020 and Yan et al. 2025" in found.sizes.rests_on and "32x32" in found.sizes.rests_on
    (bits,) = found.bits_per_dim
    figures = [x.bits_per_dim for x in PUBLISHED["imagenet64-A"] if x.measure == "likelihood"]
    assert (bits.low, bits.high) == (min(figures), max(figures))
    assert f"the {len(figures)} published models of imagenet64-A" in bits.rests_on
    assert "nearest in size: Sparse Transformer, 152 M, 3.44. Not measured here." in bits.rests_on


def test_a_bound_is_no_anchor_and_each_data_set_has_its_own() -> None:
    assert likelihoods_of_size(32).keys() == {"cifar10", "imagenet32-A"}  # of version B there are bounds alone
    assert likelihoods_of_size(64).keys() == {"imagenet64-A"} and likelihoods_of_size(48) == {}
    assert {law.image_size for law in laws_for(64)} == {law.image_size for law in laws_for(32)} == {32}
    assert {law.image_size for law in laws_for(9)} == {8} and {law.image_size for law in laws_for(16)} == {16}


@pytest.mark.parametrize("name", ["cifar10_class", "celeba_sr_1d"])
def test_models_that_are_given_something_are_not_compared_with_those_that_are_not(name: str) -> None:
    found = forecast_of(load_config(ROOT / f"configs/{name}.yaml", []), 1000)
    assert found.bits_per_dim == ()
    assert "not known: nothing is measured here, and nothing is published of such images" in found.lines()[-1][1]


@pytest.mark.parametrize(
    ("sizes", "place"),
    [
        ((4e6, 8e6), "The config has 2 times fewer."),
        ((1e6, 3e6), "The config lies between."),
        ((1e5, 4e5), "The config has 5 times more."),
    ],
)
def test_it_says_how_far_the_config_is_from_the_size(sizes: tuple[float, float], place: str) -> None:
    found = Forecast(parameters=2_000_000, tokens=5e8, flops=6e15, sizes=Range(*sizes, "x"), bits_per_dim=())
    spends, size, _ = found.lines()
    assert spends == ("spends", "6e+15 FLOP of training: 2 M parameters, 250 tokens for each")
    assert size[1].endswith(place)


def test_the_committed_runs_say_what_the_quickstart_reaches() -> None:
    folders = sorted(Path(ROOT / "benchmarks/results/scaling").iterdir())
    config = load_config(ROOT / "configs/quickstart.yaml", [])
    images = config.train.steps * config.train.global_batch_images
    (bits,) = forecast_of(config, images, [history_of_folder(folder) for folder in folders]).bits_per_dim
    assert 3.3 < bits.low < bits.high < 3.6
