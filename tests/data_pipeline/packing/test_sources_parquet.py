"""Do Hugging Face's parquet files give their images and labels, and say what is wrong with them?"""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline import storage
from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES
from data_pipeline.packing.sources_parquet import imagenet_parquet
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import image_bytes, put, random_pixels

FILES = [image_bytes(random_pixels(9, 7, seed)) for seed in range(10)]
LABELS = [0, 999, 5, 5, 1, 2, 3, 4, 500, 10]


def put_parquet(path: Path, rows: slice, labels: list[int] = LABELS, metadata: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": "x.JPEG"} for data in FILES[rows]]
    table = pyarrow.table({"image": images, "label": labels[rows]})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
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


def test_a_file_that_is_left_out_between_others_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (3, 5):
        put_parquet(tmp_path / f"train-{number}.parquet", slice(0, 2))
    assert imagenet_parquet(str(tmp_path), "train").count == 4
    assert "has no train-4.parquet, between" in caplog.text


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


def labels_called(names: object) -> str:
    """What the library of Hugging Face writes into the schema of a parquet file."""
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    return json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})


WORDS = [f"thing {number}" for number in range(1000)]
IMAGENET_WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", *WORDS[2:999], "toilet tissue, toilet paper"]


@pytest.mark.parametrize(
    ("metadata", "form", "classes"),
    [
        (labels_called(["cat", "dog", "\u72d0"]), "parquet", ("cat", "dog", "\u72d0")),
        (labels_called(["n01443537", "n01629819", "n01641577"]), "imagenet", ("n01443537", "n01629819", "n01641577")),
        (labels_called(WORDS), "parquet", tuple(WORDS)),
        (labels_called(IMAGENET_WORDS), "imagenet", IMAGENET_CLASSES),
        (labels_called(None), "imagenet", IMAGENET_CLASSES),
        ("{}", "imagenet", IMAGENET_CLASSES),
    ],
)
def test_classes_are_what_the_file_calls_its_labels(
    metadata: str, form: str, classes: tuple[str, ...], tmp_path: Path
) -> None:
    put_parquet(tmp_path / "train-0.parquet", slice(0, 3), [0, 2, 3], metadata)
    source = imagenet_parquet(str(tmp_path), "train")
    assert (source.form, source.classes) == (form, classes)
    items = source.groups[0].read()
    assert [next(items).label, next(items).label] == [0, 2]
    if len(classes) == 3:
        with pytest.raises(DataError, match="row 2 has the label 3"):
            next(items)


@pytest.mark.parametrize("other", [labels_called(["dog", "cat"]), labels_called(["cat", "dog", "fox"]), None])
def test_files_whose_labels_have_other_names_are_refused(other: str | None, tmp_path: Path) -> None:
    put_parquet(tmp_path / "train-0.parquet", slice(0, 2), [0, 1], labels_called(["cat", "dog"]))
    put_parquet(tmp_path / "train-1.parquet", slice(2, 4), [0, 0, 0, 1], other)
    with pytest.raises(
        DataError, match="of two sets, train-0.parquet and train-1.parquet, whose labels have"
    ) as caught:
        imagenet_parquet(str(tmp_path), "train")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "metadata", ["{", "[]", "[" * 100_000, '{"info": 1}', *map(labels_called, (["a", "a"], ["a", 1], {"0": "a"}, "ab"))]
)
def test_odd_names_of_labels_are_damage(metadata: str, tmp_path: Path) -> None:
    put_parquet(tmp_path / "train-0.parquet", slice(0, 2), [0, 1], metadata)
    with pytest.raises(DataError, match="train-0.parquet is damaged: .*labels") as caught:
        imagenet_parquet(str(tmp_path), "train")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("place", ["__init__", "read_row_group"])
def test_memory_that_runs_out_is_damage_only_where_there_is_enough(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise pyarrow.ArrowMemoryError("malloc of size 64 failed")

    put_parquet(tmp_path / "train-0.parquet", slice(0, 3))
    group = imagenet_parquet(str(tmp_path), "train").groups[0]
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, place, full)
    with pytest.raises(DataError, match="malloc of size 64 failed") as caught:  # it asked for far too much
        list(group.read())
    assert caught.value.exit_code == 65
    monkeypatch.setattr(storage, "bytearray", full, raising=False)
    with pytest.raises(MemoryError, match="malloc of size 64 failed"):
        list(group.read())


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
