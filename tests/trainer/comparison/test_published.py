"""Do the published figures keep the versions of a data set apart, and say what they are?"""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from trainer.comparison.published import PUBLISHED, Published


def require_one_version_each(published: Mapping[str, tuple[Published, ...]]) -> None:
    for key, entries in published.items():
        expected = key.rpartition("-")[2] if "-" in key else "only one"
        for entry in entries:
            assert entry.version == expected, f"{entry.model} {entry} is of version {entry.version}, not of {key}"


def test_figures_of_two_versions_do_not_mix() -> None:
    require_one_version_each(PUBLISHED)
    of_b = next(entry for entry in PUBLISHED["imagenet32-B"] if entry.model == "i-DODE")
    mixed = {**PUBLISHED, "imagenet32-A": (*PUBLISHED["imagenet32-A"], of_b)}
    with pytest.raises(AssertionError, match="i-DODE ≤ 3.44 is of version B, not of imagenet32-A"):
        require_one_version_each(mixed)


def test_the_same_model_has_other_figures_on_another_version() -> None:
    """A figure that was copied to the wrong version, with its version changed, shows where both are known."""
    for size in (32, 64):
        a, b = (
            {(entry.model, entry.bits_per_dim) for entry in PUBLISHED[f"imagenet{size}-{version}"]} for version in "AB"
        )
        assert not a & b
    figures = {key: {entry.model: entry.bits_per_dim for entry in entries} for key, entries in PUBLISHED.items()}
    assert (figures["imagenet32-A"]["i-DODE"], figures["imagenet32-B"]["i-DODE"]) == (3.69, 3.44)


def test_each_figure_has_a_source_and_stands_once_and_only_likelihoods_are_exact() -> None:
    for entries in PUBLISHED.values():
        assert all(entry.source for entry in entries)
        assert len({entry.model for entry in entries}) == len(entries)
        for entry in entries:
            assert str(entry).startswith("≤") == (entry.measure != "likelihood")
    assert str(replace(PUBLISHED["cifar10"][0], measure="bound")) == "≤ 3.14"
