"""Do Hugging Face's parquet files give their images and labels, and say what is wrong with them?"""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES
from data_pipeline.packing.sources_parquet import imagenet_parquet
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import image_bytes, put, random_pixels

FILES = [image_bytes(random_pixels(9, 7, seed)) for seed in range(10)]
LABELS = [0, 999, 5, 5, 1, 2, 3, 4, 500, 10]


def put_parquet(path: Path, rows: slice, labels: list[int] = LABELS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": "x.JPEG"} for data in FILES[rows]]
    table = pyarrow.table({"image": images, "label": labels[rows]})
    pyarrow.parquet.write_table(table, path, row_group_size=3)


def test_rows_become_images_in_order(tmp_path: Path) -> None:
    put_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", slice(7, 10))
    put_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", slice(0, 7))
    put_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", slice(4, 6))
    source = imagenet_parquet(str(tmp_path), "train")
    assert source.count == 10 and source.classes == IMAGENET_CLASSES and len(source.groups) == 4
    items = [item for group in source.groups for item in group.read()]
    assert [item.image for item in items] == FILES and [item.label for item in items] == LABELS
    assert imagenet_parquet(str(tmp_path), "validation").count == 2
    (tmp_path / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="lacks file 00000-of-00002"):
        imagenet_parquet(str(tmp_path), "train")


def test_what_cannot_be_packed_is_explained(tmp_path: Path) -> None:
    put(tmp_path / "readme", b"")
    with pytest.raises(DataError, match=r"holds no files train-\*.parquet"):
        imagenet_parquet(str(tmp_path), "train")
    put_parquet(tmp_path / "test-0.parquet", slice(0, 1), labels=[-1] * 10)
    with pytest.raises(DataError, match="has the label -1"):
        list(imagenet_parquet(str(tmp_path), "test").groups[0].read())
    for row, message in (
        ({"image": {"bytes": None, "path": "a.JPEG"}, "label": 1}, "row 0 holds no image .its path is a.JPEG"),
        ({"image": None, "label": 1}, "row 0 holds no image"),
        ({"image": {"bytes": b"x", "path": "a"}, "label": None}, "row 0 has the label None"),
    ):
        good = {"image": {"bytes": b"x", "path": "a"}, "label": 1}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, good]), tmp_path / "train-0.parquet")
        with pytest.raises(DataError, match=message) as caught:
            list(imagenet_parquet(str(tmp_path), "train").groups[0].read())
        assert caught.value.exit_code == 65
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a"], "label": [1]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="has string in its column image"):
        imagenet_parquet(str(tmp_path), "train")
    put(tmp_path / "train-0.parquet", b"PAR1 cut")
    with pytest.raises(DataError, match="is not a parquet file") as caught:
        imagenet_parquet(str(tmp_path), "train")
    assert caught.value.exit_code == 65
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="has no column 'image', only text"):
        imagenet_parquet(str(tmp_path), "train")


def test_a_damaged_page_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    put_parquet(path, slice(0, 3))
    whole = path.read_bytes()
    failed = 0
    for place in range(4, 80, 5):
        put(path, whole[:place] + b"\xff" * 8 + whole[place + 8 :])
        try:
            list(imagenet_parquet(str(tmp_path), "train").groups[0].read())
        except DataError as error:
            assert error.exit_code == 65 and f"row group 0 of {path} is damaged" in str(error)
            failed += 1
    assert failed
