"""Do the published figures keep the versions of a data set apart?"""

from trainer.comparison.published import PUBLISHED


def test_the_published_figures_of_two_versions_do_not_mix() -> None:
    a, b = ({entry.bits_per_dim for entry in PUBLISHED[f"imagenet32-{version}"]} for version in "AB")
    assert (3.77 in a, 3.69 in a, 3.43 in a) == (True, True, False)
    assert (3.43 in b, 3.77 in b) == (True, False)
    assert all(entry.source for entries in PUBLISHED.values() for entry in entries)
