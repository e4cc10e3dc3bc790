"""Does nothing in a folder of a stranger lead a read or a write out of it, or hold it up?"""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from trainer.comparison.run_history import history_of_folder
from trainer.config import load_written
from trainer.errors import ConfigError, UnsafeFile, UsageError
from trainer.faults.run_lock import RunLock
from trainer.pictures import save_picture
from trainer.record.run_folder import Journal, RunFiles
from trainer.safe_files import (
    file_inside,
    files_inside,
    read_file,
    refuse_links,
    remove_torn_files,
    tried_twice,
    write_file,
)

MINE = "what only I may read and write"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file outside of the folder `run`."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "mine.json"
    path.write_text(MINE)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_file(tmp_path / "a" / "b" / "x", content, within=tmp_path)
        assert read_file(tmp_path / "a" / "b" / "x", within=tmp_path) == content
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def test_a_link_is_neither_read_nor_written_through(mine: Path) -> None:
    link = mine.parent / "run" / "x"
    link.symlink_to(mine)
    with pytest.raises(UnsafeFile, match="is a link or another special file"):
        read_file(link)
    write_file(link, b"new")
    assert (mine.read_text(), link.read_bytes(), link.is_symlink()) == (MINE, b"new", False)


def test_a_folder_behind_a_link_is_not_entered(mine: Path) -> None:
    run = mine.parent / "run"
    (run / "samples").symlink_to(mine.parent)
    for use in (
        lambda: read_file(run / "samples" / "mine.json", within=run),
        lambda: write_file(run / "samples" / "mine.json", b"", within=run),
        lambda: write_file(run / "samples" / "new" / "x", b"", within=run),
        lambda: file_inside(run, "samples/mine.json"),
        lambda: files_inside(run / "samples", run),
        lambda: refuse_links(run),
        lambda: refuse_links(run / "samples"),
    ):
        with pytest.raises(UnsafeFile):
            use()
    assert mine.read_text() == MINE
    assert not (mine.parent / "new").exists()


def test_the_folder_that_the_user_names_may_be_a_link(mine: Path) -> None:
    run, link = mine.parent / "run", mine.parent / "link"
    link.symlink_to(run)
    write_file(link / "samples" / "x", b"1", within=link)
    assert read_file(run / "samples" / "x") == b"1"


def test_there_is_nothing_below_a_file(mine: Path) -> None:
    for path in (mine / "x", mine / "run" / "x", mine.parent / "nowhere" / "x"):
        with pytest.raises(FileNotFoundError):
            read_file(path)
    assert RunFiles(mine / "run").read_state() == {}


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../mine.json", "a/../../mine.json", "./x", "a//b", "x\0"])
def test_only_names_inside_are_files_of_a_folder(mine: Path, name: str) -> None:
    with pytest.raises(UnsafeFile, match="is no name of a file in this folder"):
        file_inside(mine.parent / "run", name)


def test_pipes_devices_sockets_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(UnsafeFile, match="special file"):
            read_file(path)
    with pytest.raises(UnsafeFile):
        refuse_links(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnsafeFile, match="more than the 1,000 bytes"):
        read_file(tmp_path / "x", largest=1000)


def test_what_killed_writers_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    torn, written, young, other = (
        tmp_path / name
        for name in (
            "run_state.json.unfinished-0123456789abcdef",
            "config.yaml.unfinished-0123456789abcdef",
            "mlflow_sent.json.unfinished-0123456789abcdef",
            "my.unfinished-work",
        )
    )
    for path in (torn, written, young, other):
        path.write_text("x")
    for path in (torn, written, other):
        os.utime(path, (1.0, 1.0))
    (tmp_path / "linked.unfinished-0123456789abcdef").symlink_to(other)
    with written.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_torn_files(tmp_path, tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {written.name, young.name, other.name, "linked.unfinished-0123456789abcdef"}
    remove_torn_files(tmp_path, tmp_path)
    assert not written.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "run_state.json", "run.lock", "config.yaml"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_the_files_of_a_run_do_not_lead_out_of_it(mine: Path, name: str, kind: str) -> None:
    files = RunFiles(mine.parent / "run")
    path = files.folder / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(mine if kind == "link" else "/dev/zero")
    uses = {
        "metrics.jsonl": lambda: files.last_steps(),
        "events.jsonl": lambda: Journal(files.events).repair(),
        "run_state.json": lambda: files.write_state(step=1),
        "run.lock": lambda: RunLock(files),
        "config.yaml": lambda: load_written(files.config),
    }
    with pytest.raises((UnsafeFile, ConfigError), match="special file"):
        uses[name]()
    Journal(path).append({"step": 1})
    assert mine.read_text() == MINE


def test_a_picture_replaces_a_link(mine: Path) -> None:
    path = mine.parent / "run" / "samples" / "x.png"
    path.parent.mkdir()
    path.symlink_to(mine)
    save_picture(Image.new("RGB", (2, 2)), path, within=mine.parent / "run")
    assert mine.read_text() == MINE
    assert Image.open(path).size == (2, 2)


@pytest.mark.parametrize("linked", ["file", "folder", "content"])
def test_a_comparison_shows_pictures_and_nothing_else(mine: Path, linked: str) -> None:
    run = mine.parent / "run"
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "metrics": {"train/bits_per_dim": 1.0}}\n')
    private = mine.parent / "private" / "key-step-1.png"
    private.parent.mkdir()
    private.write_text(MINE)
    if linked == "folder":
        (run / "samples").symlink_to(private.parent)
    else:
        (run / "samples").mkdir()
        if linked == "file":
            (run / "samples" / private.name).symlink_to(private)
        else:
            (run / "samples" / private.name).write_text(MINE)
    with pytest.raises((UnsafeFile, UsageError)):
        history_of_folder(run).pictures["key"][1]()


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=f"{tmp_path}/x"):
        write_file(tmp_path / "x", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_call_is_tried_twice_and_no_more() -> None:
    errors: list[Exception] = [OSError("of a moment")]

    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert tried_twice(call) == "done"
    errors += [OSError("once"), OSError("twice"), OSError("and again")]
    with pytest.raises(OSError, match="^twice$"):
        tried_twice(call)
    errors[:] = [ValueError("of the content"), OSError("not reached")]
    with pytest.raises(ValueError, match="of the content"):
        tried_twice(call)
