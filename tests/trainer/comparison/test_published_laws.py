"""Are the published laws those of their papers?"""

import pytest

from trainer.comparison.published_laws import PETAFLOP_DAY, PUBLISHED_LAWS


def test_henighans_sizes_are_those_of_table_1() -> None:
    """N = (C / C0)^x with C in petaflop-days: 5.3e-14 and 0.64, 4.8e-12 and 0.75, 1.6e-13 and 0.65."""
    for law, unit, growth in zip(PUBLISHED_LAWS, (5.3e-14, 4.8e-12, 1.6e-13), (0.64, 0.75, 0.65), strict=False):
        assert law.best_size(PETAFLOP_DAY) == pytest.approx((1 / unit) ** growth)
        assert law.best_size(100 * PETAFLOP_DAY) == pytest.approx((100 / unit) ** growth)


def test_yans_ratio_of_tokens_gives_the_sizes_that_spend_the_budget() -> None:
    for law, ratio in zip(PUBLISHED_LAWS[-2:], (200, 400), strict=True):
        size = law.best_size(1.1e21)
        assert 6 * size * (ratio * size) == pytest.approx(1.1e21)
    assert [round(law.best_size(1.1e21) / 1e9, 1) for law in PUBLISHED_LAWS[-2:]] == [1.0, 0.7]


def test_each_law_says_where_it_was_read() -> None:
    assert all(law.source for law in PUBLISHED_LAWS)
    assert len({law.name for law in PUBLISHED_LAWS}) == len(PUBLISHED_LAWS)
