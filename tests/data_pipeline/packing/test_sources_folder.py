"""Does a folder deliver its images, and say why it cannot be packed?"""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.packing.sources_folder import folder
from data_pipeline.storage import DataError, Store


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    return path


def test_a_flat_folder_has_no_classes(picture: Path) -> None:
    source = folder(str(picture.parent))
    assert source.classes == () and source.count == 1
    (item,) = [item for group in source.groups for item in group.read()]
    assert item.label == 0 and item.image == picture.read_bytes()


def test_the_origin_changes_with_names_and_sizes(picture: Path) -> None:
    before = folder(str(picture.parent)).origin
    (picture.parent / "second.png").write_bytes(picture.read_bytes())
    both = folder(str(picture.parent)).origin
    assert before != both
    (picture.parent / "second.png").write_bytes(picture.read_bytes() + b"\0")
    assert folder(str(picture.parent)).origin != both


@pytest.mark.parametrize("url", ["file", "memory"])
def test_a_folder_without_an_image_is_no_class_and_is_named(
    picture: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder_url = str(picture.parent / "in") if url == "file" else f"memory://{picture.parent.name}"
    store = Store(folder_url, 1.0)
    for name in ("ant/1.png", "bee/1.png", "texts/a.txt", "about.txt", "@eaDir/1.png"):
        store.write(name, picture.read_bytes())
    if url == "file":
        (picture.parent / "in/cat/deep").mkdir(parents=True)
        (picture.parent / "in/dog").mkdir()
    with caplog.at_level(logging.WARNING):
        assert folder(folder_url).classes == ("ant", "bee")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # the other one is of @eaDir
    left_out = "3 folders without an image, as classes have some: cat, dog, texts"
    assert (left_out if url == "file" else "1 folder without an image, as classes have some: texts") in caplog.text
    caplog.clear()
    store.remove("ant")
    store.remove("bee")
    store.write("1.png", picture.read_bytes())
    assert folder(folder_url).classes == () and "without an image" not in caplog.text


def test_folders_that_cannot_be_packed_are_explained(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match="nothing at .*/text: there is no file in it"):
        folder(str(tmp_path / "text"))
    (tmp_path / "text" / "readme").write_text("x")
    with pytest.raises(DataError, match="no images at .*: none of its files ends in .jpg"):
        folder(str(tmp_path / "text"))
    with pytest.raises(DataError, match="nothing at .*/nowhere: there is no such folder"):
        folder(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="readme is a file, and a folder is expected"):
        folder(str(tmp_path / "text" / "readme"))
    (tmp_path / "huge").mkdir()
    with (tmp_path / "huge" / "a.png").open("wb") as file:
        file.truncate(2 << 30)  # takes no room on the disk
    with pytest.raises(DataError, match="huge/a.png has 2147483648 bytes, too many for an image") as caught:
        folder(str(tmp_path / "huge"))
    assert caught.value.exit_code == 65
    (tmp_path / "huge" / "a.png").unlink()
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_bytes(picture.read_bytes())
    with pytest.raises(DataError, match="both in subfolders"):
        folder(str(tmp_path))
