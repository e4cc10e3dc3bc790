"""Do counts read well, one as well as many?"""

import pytest

from data_pipeline.wording import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 points"), (1, "1 point"), (2, "2 points"), (12000, "12,000 points")]
)
def test_a_count_has_the_noun_in_its_form(number: int, text: str) -> None:
    assert counted(number, "point") == text


def test_an_irregular_plural_is_given() -> None:
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
