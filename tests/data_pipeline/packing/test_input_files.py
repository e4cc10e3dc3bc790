"""Is every file below a folder found, or the reason said, and what programs leave there left out?"""

import logging
import os
import re
from pathlib import Path

import pytest

from data_pipeline.packing import input_files as module
from data_pipeline.packing.input_files import input_files, refuse_gaps, warn_of_gaps
from data_pipeline.storage import DataError, Store
from tests.support.imagenet_forms import put


def test_names_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    for name, size in (("a.png", 3), ("cats/b.png", 4), ("cats/deep/c d.png", 0), (".hidden.png", 1)):
        put(tmp_path / name, bytes(size))
    (tmp_path / "empty").mkdir()
    assert input_files(str(tmp_path)) == Store(str(tmp_path), 1.0).walk()
    assert input_files(str(tmp_path))["cats/deep/c d.png"] == 0


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "full/cats/1.png", b"cat")
    put(tmp_path / "full/dogs/1.png", b"dogs")
    (tmp_path / "part").mkdir()
    (tmp_path / "part/cats").symlink_to(tmp_path / "full/cats")
    (tmp_path / "part/dogs").symlink_to("../full/dogs")
    (tmp_path / "part/again.png").symlink_to("cats/1.png")
    (tmp_path / "way").symlink_to("part")
    assert input_files(str(tmp_path / "way")) == {"again.png": 3, "cats/1.png": 3, "dogs/1.png": 4}


@pytest.mark.parametrize("target", [".", "..", "../..", "../../in", "../dogs"])
def test_links_in_a_circle_are_not_followed_for_ever(tmp_path: Path, target: str) -> None:
    put(tmp_path / "in/cats/1.png", b"cat")
    (tmp_path / "in/dogs").mkdir()
    (tmp_path / "in/dogs/cats").symlink_to("../cats")
    (tmp_path / "in/cats/up").symlink_to(target)
    found = input_files(str(tmp_path / "in"))
    assert found == {"cats/1.png": 3, "dogs/cats/1.png": 3}


def test_folders_that_link_to_each_other_are_read_once_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [f"part{number}" for number in range(7)]
    for part in parts:
        put(tmp_path / f"in/cats/{part}/1.png", b"cat")
        for other in parts:
            (tmp_path / f"in/cats/{part}/to_{other}").symlink_to(f"../{other}")
    (tmp_path / "in/all").symlink_to("cats")  # another class
    (tmp_path / "in/dogs").mkdir()
    (tmp_path / "in/dogs/some").symlink_to("../cats/part1/to_part2")
    scandir, opened = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scandir(path))
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        found = input_files(str(tmp_path / "in"))
    names = [f"{name}/{part}/1.png" for name in ("all", "cats") for part in parts]
    names += ["dogs/some/1.png", *(f"dogs/some/to_{part}/1.png" for part in parts if part != "part2")]
    assert sorted(found) == sorted(names)
    assert len(opened) == 1 + 2 * 8 + 1 + 7
    assert "passed over 141 folders that links lead to, as they are read already or hold the link: all/" in caplog.text


def test_a_folder_is_named_by_where_it_is_and_not_by_a_link_to_it(tmp_path: Path) -> None:
    put(tmp_path / "in/cats/z/deep/1.png", b"cat")
    (tmp_path / "in/cats/a").mkdir()
    for name, target in (("b", "z"), ("a/z", "../z/deep"), ("z/c", "deep"), ("y", "../../in/cats/z")):
        (tmp_path / "in/cats" / name).symlink_to(target)
    assert input_files(str(tmp_path / "in")) == {"cats/z/deep/1.png": 3}


@pytest.mark.parametrize("name", ["2.png", "dogs"])
@pytest.mark.parametrize("target", ["/nowhere/2.png", "1.png/2", "2.png", "dogs"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str, target: str) -> None:
    put(tmp_path / "1.png", b"")
    (tmp_path / name).symlink_to(target)
    with pytest.raises(DataError, match=f"{name} is a link to {target}, which is not there") as caught:
        input_files(str(tmp_path))
    assert caught.value.exit_code == 65


def test_a_folder_that_cannot_be_listed_ends_the_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "cats/1.png", b"")
    put(tmp_path / "dogs/1.png", b"")
    scandir = os.scandir

    def denied(path: str) -> object:
        if path.endswith("dogs"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # root may list every folder
    with pytest.raises(DataError, match="access is denied .*/dogs'") as caught:
        input_files(str(tmp_path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("url", ["file", "memory"])
def test_what_programs_leave_between_images_is_left_out(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = str(tmp_path / "in") if url == "file" else f"memory://{tmp_path.name}"
    store = Store(url, 1.0)
    names = ["cats/1.png", "dogs/1.png", "cats/.odd.png"]
    left = [".ipynb_checkpoints/1-checkpoint.png", ".Trash-1000/files/old.png", "cats/@eaDir/1.png/THUMB_M.png"]
    left += ["__MACOSX/cats/._1.png", "cats/._1.png", "lost+found/1.png"]
    for name in names + left:
        store.write(name, b"x")
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert sorted(input_files(url)) == sorted(names)
    assert "left out 6 hidden files or folders" in caplog.text and ".Trash-1000/" in caplog.text


def test_a_link_of_a_program_that_leads_nowhere_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "1.png", b"")
    (tmp_path / ".#1.png").symlink_to("user@host.4711")  # Emacs locks a file that it edits
    assert input_files(str(tmp_path)) == {"1.png": 0}


def test_an_input_below_a_hidden_folder_is_an_input(tmp_path: Path) -> None:
    put(tmp_path / ".cache/set/1.png", b"")
    assert input_files(str(tmp_path / ".cache/set")) == {"1.png": 0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/train-00000-of-00003.parquet", "a/train-00002-of-00003.parquet"], "lacks file 00001-of-00003, as"),
        (["train-00001-of-00004-0a1b.parquet"], "lacks file 00000-of-00004 and 2 more, as"),
        (["x-0-of-2.tar"], "lacks file 1-of-2"),
        (["x-0-of-2.tar", "x-1-of-2.tar", "x-0-of-3.tar"], "files of two sets, x-0-of-2.tar and x-0-of-3.tar"),
        (["a/x-0-of-1.tar", "b/x-0-of-1.tar"], "a file twice: a/x-0-of-1.tar and b/x-0-of-1.tar"),
    ],
)
def test_a_numbered_set_with_a_gap_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        refuse_gaps(names, "s3://b")
    assert caught.value.exit_code == 2


def test_a_numbered_set_without_gaps_is_taken() -> None:
    for names in ([], ["train-0.parquet", "train-7.parquet"], [f"x-{number:05d}-of-00012.tar" for number in range(12)]):
        refuse_gaps(names, "s3://b")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data-0000.tar", "data-0002.tar"], "has no data-0001.tar, between data-0000.tar and data-0002.tar"),
        (["a/8.tar", "a/9.tar", "a/13.tar", "b-1.tar", "b-4.tar"], "has no a/10.tar, .* and lacks 4 more"),
        (["x-1-000.tar", "x-2-000.tar", "x-2-000000009.tar"], "has no x-2-001.tar, .* and lacks 7 more"),
        (["train-0.tar", "validation-2.tar", "train-2.png"], None),
        (["x-0-of-9.tar", "x-7-of-9.tar"], None),  # refused
        (["data-1.tar", "data-2.tar", "data.tar"], None),
        ([], None),
    ],
)
def test_numbers_that_are_left_out_are_a_warning(
    names: list[str], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        warn_of_gaps(names, "s3://b")
    assert len(caplog.records) == (message is not None)
    assert message is None or re.search(f"s3://b {message}$", caplog.records[0].getMessage())
