"""Do crops come from the right photographs, the same ones for the same seed?"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.packing.source import Item, Source
from data_pipeline.packing.sources_photographs import PHOTOGRAPHS, photographs
from data_pipeline.storage import DataError


def all_items(source: Source) -> list[Item]:
    return [item for group in source.groups for item in group.read()]


def is_part_of(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a square of pixels occurs somewhere in a picture."""
    height, width = part.shape[:2]
    corners = np.argwhere((whole[: len(whole) - height + 1, : whole.shape[1] - width + 1] == part[0, 0]).all(-1))
    return any((whole[y : y + height, x : x + width] == part).all() for y, x in corners)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_crops_come_from_the_photograph_that_labels_them(split: str) -> None:
    source = photographs(split=split, size=8, images=60, seed=5)
    items = all_items(source)
    assert len(items) == source.count == 60
    for item in items:
        package, path, where = PHOTOGRAPHS[source.classes[item.label]]
        assert where == split
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        with Image.open(Path(spec.origin).parent / path) as photograph:
            assert is_part_of(np.asarray(item.image), np.asarray(photograph.convert("RGB")))
    assert {item.image.width for item in items} == {8, 12, 16, 24, 32}
    assert all(item.image.width == item.image.height for item in items)


def test_no_photograph_is_in_both_splits_and_stereo_views_stay_together() -> None:
    assert PHOTOGRAPHS["motorcycle-left"][2] == PHOTOGRAPHS["motorcycle-right"][2] == "train"
    train = {item.label for item in all_items(photographs(split="train", size=8, images=500, seed=0))}
    validation = {item.label for item in all_items(photographs(split="validation", size=8, images=500, seed=0))}
    assert train.isdisjoint(validation)
    assert len(train | validation) == len(PHOTOGRAPHS), "500 crops touch every photograph"


def test_a_crop_depends_on_seed_and_number_alone() -> None:
    def crops(seed: int, images: int) -> list[bytes]:
        source = photographs(split="train", size=8, images=images, seed=seed)
        return [item.image.tobytes() for item in all_items(source)]

    few, many = crops(1, 600), crops(1, 1100)
    assert few == many[:600] and few != crops(2, 600)
    assert many[:512] == [
        item.image.tobytes() for item in photographs(split="train", size=8, images=1100, seed=1).groups[0].read()
    ]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-image") as caught:
        photographs(split="train", size=8, images=1, seed=0)
    assert caught.value.exit_code == 2
