"""Are the digits those of scikit-learn, each with its class, in inks that depend on seed and number alone?"""

import importlib.util

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.packing.source import Item, Source
from data_pipeline.packing.sources_digits import INKS, NUM_TRAINING, digits
from data_pipeline.storage import DataError


def all_items(source: Source) -> list[Item]:
    return [item for group in source.groups for item in group.read()]


def colours_of(item: Item) -> set[tuple[int, ...]]:
    assert isinstance(item.image, Image.Image)
    return {colour for _, colour in item.image.getcolors()}


@pytest.mark.parametrize(("split", "first", "last"), [("train", 0, 1499), ("validation", 1500, 1796)])
def test_each_digit_of_a_split_comes_in_turn_with_its_class_and_its_shape(split: str, first: int, last: int) -> None:
    known = load_digits()
    items = all_items(digits(split=split, size=16, images=last - first + 2, seed=3))
    labels = [int(known.target[number]) for number in range(first, last + 1)]
    assert [item.label for item in items] == [*labels, labels[0]]
    for number in (0, 1, 2, last - first):
        picture = np.asarray(items[number].image)
        assert picture.shape == (16, 16, 3)
        is_ink = picture.any(-1)
        assert not is_ink[[0, -1]].any() and not is_ink[:, [0, -1]].any()
        # The middles of the 8 x 8 values among the 14 pixels of a row.
        middles = 1 + ((np.arange(8) + 0.5) * 14 / 8).astype(int)
        strengths = known.images[first + number]
        clear = (strengths <= 3) | (strengths >= 13)
        assert clear.sum() > 30
        assert (is_ink[np.ix_(middles, middles)] == (strengths >= 13))[clear].mean() > 0.9


def test_an_ink_depends_on_seed_and_number_alone() -> None:
    def pictures(seed: int, images: int) -> list[bytes]:
        items = all_items(digits(split="train", size=16, images=images, seed=seed))
        return [item.image.tobytes() for item in items if isinstance(item.image, Image.Image)]

    few, many = pictures(1, 600), pictures(1, 1100)
    assert few == many[:600] and few != pictures(2, 600)


def test_a_digit_is_of_one_ink_on_black_and_all_inks_come_often() -> None:
    items = all_items(digits(split="train", size=16, images=700, seed=0))
    counts: dict[tuple[int, ...], int] = {}
    for item in items:
        colours = colours_of(item)
        assert len(colours) == 2
        (ink,) = colours - {(0, 0, 0)}
        assert set(ink) <= {0, 255}
        counts[ink] = counts.get(ink, 0) + 1
    assert len(counts) == len(INKS)
    assert min(counts.values()) > 60


def test_digits_come_in_other_sizes() -> None:
    (item,) = all_items(digits(split="train", size=32, images=1, seed=0))
    assert isinstance(item.image, Image.Image) and item.image.size == (32, 32)


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="--split test: the digits are divided into train and validation"):
        digits(split="test", size=16, images=1, seed=0)
    with pytest.raises(DataError, match="--images 0: say how many"):
        digits(split="train", size=16, images=0, seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits(split="train", size=16, images=NUM_TRAINING, seed=0)
