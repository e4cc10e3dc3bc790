"""Are packed shards ordinary, reproducible, restartable, and refused where something else lies?"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.loader import open_shards
from data_pipeline.pack import main
from data_pipeline.storage import Store
from tests.conftest import pack_photographs
from tests.support.s3_server import S3Server

PHOTOGRAPHS = ["--source", "photographs", "--size", "8", "--split", "train", "--images", "3000", "--workers", "1"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_packing_twice_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    pack_photographs(str(tmp_path / "again"), images=3000)
    assert contents(tmp_path / "again") == contents(packed)
    assert "manifest.json" in contents(packed) and len(contents(packed)) == 2


def test_more_processes_give_the_same_bytes(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.packing.steps.GROUPS_PER_WORKER", 1)
    assert main([*PHOTOGRAPHS[:-1], "2", "--dest", str(tmp_path / "two")]) == 0
    assert contents(tmp_path / "two") == contents(packed)


def test_stock_webdataset_reads_the_same_images(packed: Path) -> None:
    manifest = open_shards(str(packed)).manifest
    urls = [str(packed / shard.name) for shard in manifest.shards]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "cls", "__key__")
    read = list(data)
    assert len(read) == manifest.count == len({key for _, _, key in read})
    images = np.stack([image for image, _, _ in read])
    assert images.shape == (3000, 8, 8, 3) and images.dtype == np.uint8
    assert np.allclose(manifest.pixel_mean, images.mean((0, 1, 2)))
    assert np.allclose(manifest.pixel_std, images.std((0, 1, 2)))
    assert {manifest.classes[label] for _, label, _ in read}.isdisjoint({"cat", "pagoda"})


def test_running_again_says_so_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "d"
    assert main([*PHOTOGRAPHS, "--dest", str(dest)]) == 0
    before = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    capsys.readouterr()
    assert main([*PHOTOGRAPHS, "--dest", str(dest)]) == 0
    assert "already packed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in dest.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--seed", "1"], "already holds another data set"), (["--size", "16"], "already holds another data set")],
)
def test_a_destination_with_another_data_set_is_refused(
    packed: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PHOTOGRAPHS, "--dest", str(packed), *change]) == 2
    assert message in capsys.readouterr().err


TOO_LARGE = """
import resource, sys
from pathlib import Path

from PIL import Image
from data_pipeline.pack import main

Image.new("L", (9999, 9999)).save(sys.argv[1] + "/a.png", compress_level=1)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20),) * 2)
options = ["--size", "8", "--split", "train", "--workers", "1", "--max-skipped", "1"]
sys.exit(main(["--source", "folder", "--input", sys.argv[1], "--dest", sys.argv[1] + "/packed", *options]))
"""


def test_memory_that_runs_out_is_not_called_damage(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TOO_LARGE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 69 and "Traceback" not in done.stderr, done.stderr
    assert "pack: the memory ran out: use fewer --workers" in done.stderr and "damaged" not in done.stderr


def test_a_folder_with_other_files_or_an_unfinished_packing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path)]) == 2
    assert "is not empty (it holds thesis.tex)" in capsys.readouterr().err
    other = tmp_path / "other" / "_packing"
    other.mkdir(parents=True)
    (other / "plan.json").write_text(json.dumps({"seed": 9}))
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "other")]) == 2
    assert "unfinished packing of another data set" in capsys.readouterr().err


def test_killed_at_any_moment_and_started_again_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    dest = tmp_path / "d"
    command = [sys.executable, "-m", "data_pipeline.pack", *PHOTOGRAPHS, "--dest", str(dest)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for wanted in ("plan.json", "group-000001.json", "group-000004.raw", "train-000000.tar?*"):
        process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and not list(dest.rglob(wanted)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, **quiet).returncode == 0  # type: ignore[call-overload]
    assert contents(dest) == contents(packed)


def test_a_folder_of_images_is_packed_with_its_subfolders_as_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "a/x.PNG", "a/y.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "a" / "readme.txt").write_text("no image")
    arguments = ["--source", "folder", "--input", str(tmp_path / "in"), "--size", "8", "--split", "train"]
    assert main([*arguments, "--dest", str(tmp_path / "out")]) == 0
    shards = open_shards(str(tmp_path / "out"))
    assert shards.classes == ("a", "b") and shards.count == 3
    read = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False).decode()
    by_key = {sample["__key__"]: (sample["npy"], sample["cls"]) for sample in read}
    for key, (name, label) in enumerate([("a/x.PNG", 0), ("a/y.png", 0), ("b/1.png", 1)]):
        pixels, got = by_key[f"{key:09d}"]
        assert got == label and (pixels == np.asarray(Image.open(tmp_path / "in" / name))).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0"], "--size 0"),
        (["--images", "0"], "--images 0"),
        (["--split", "test"], "divided into train and validation"),
        (["--input", "x"], "takes no --input"),
        (["--size", "500"], "is smaller"),
        (["--source", "folder"], "needs --input"),
    ],
)
def test_wrong_arguments_end_in_one_sentence_and_code_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "d"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_permission_to_write_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "file" / "d")]) in (2, 73)
    assert capsys.readouterr().err.count("\n") == 1


def test_s3_holds_the_same_bytes_as_the_local_disk(packed: Path, s3_bucket: str, s3_server: S3Server) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    filesystem = s3_server.filesystem()
    objects = {path.rpartition("/")[2]: filesystem.cat_file(path) for path in filesystem.find(s3_bucket)}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in objects.items()} == contents(packed)


def test_stock_webdataset_reads_from_s3(packed: Path, s3_bucket: str, s3_server: S3Server) -> None:
    pack_photographs(f"s3://{s3_bucket}/train", images=3000)
    filesystem = s3_server.filesystem()
    webdataset.gopen_schemes["s3"] = lambda url, mode="rb", bufsize=8192, **_: filesystem.open(url, mode)
    try:
        read = [
            [
                (s["__key__"], s["cls"], s["npy"].tobytes())
                for s in webdataset.WebDataset(url, shardshuffle=False).decode()
            ]
            for url in (f"s3://{s3_bucket}/train/train-000000.tar", str(packed / "train-000000.tar"))
        ]
    finally:
        del webdataset.gopen_schemes["s3"]
    assert len(read[0]) == 3000 and read[0] == read[1]


def test_a_server_killed_while_shards_are_uploaded_changes_nothing(
    s3_bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    arguments = [*PHOTOGRAPHS, "--shard-images", "512"]  # six shards
    assert main([*arguments, "--dest", str(tmp_path / "local")]) == 0
    written: list[str] = []
    write = Store.write

    def write_and_kill(self: Store, name: str, data: bytes) -> None:
        written.append(name)
        if name == "train-000002.tar":
            threading.Timer(0.02, s3_server.kill).start()
            threading.Timer(3.0, s3_server.start).start()
        write(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", write_and_kill)
        assert main([*arguments, "--dest", f"s3://{s3_bucket}/train"]) == 0
    filesystem = s3_server.filesystem()
    objects = {path.rpartition("/")[2]: filesystem.cat_file(path) for path in filesystem.find(s3_bucket)}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in objects.items()} == contents(tmp_path / "local")
    assert len([name for name in written if name.endswith(".tar")]) == 6, "no shard was packed twice"


def test_packing_to_a_bucket_that_does_not_exist_is_one_sentence(
    s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PHOTOGRAPHS, "--dest", "s3://no-such-bucket/train"]) == 2
    error = capsys.readouterr().err
    assert "s3://no-such-bucket" in error and "no such bucket" in error and error.count("\n") == 1


def test_packing_processes_end_with_their_parent(tmp_path: Path) -> None:
    """kill -9 of the command leaves no process behind that holds memory and writes."""
    code = (
        "import sys, data_pipeline.packing as q, data_pipeline.pack as p; q.GROUPS_PER_WORKER = 1;"
        "sys.exit(p.main(sys.argv[1:])) if __name__ == '__main__' else None"
    )
    arguments = [*PHOTOGRAPHS[:-1], "2", "--dest", str(tmp_path / "d"), "--images", "40000"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "d").rglob("group-*.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline and session_members(process.pid):
        time.sleep(0.05)
    assert not session_members(process.pid)


def session_members(session: int) -> list[int]:
    """Processes of a session, by the sixth field of /proc/PID/stat."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members
