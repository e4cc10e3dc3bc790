"""Does verification find every kind of damage, name the shard, and lead to a repair that restores the bytes?"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from data_pipeline import storage
from data_pipeline.loader import open_shards
from data_pipeline.manifest import digest_of
from data_pipeline.pack import main as pack_main
from data_pipeline.shard_format import SampleLayout, encode_samples
from data_pipeline.storage import DataError
from data_pipeline.verify import main, verify
from tests.support.faulty_filesystem import FAULTS, FaultyFilesystem
from tests.support.imagenet_forms import image_bytes, put, random_pixels
from tests.support.s3_server import S3Server

PACK = ["--source", "photographs", "--size", "8", "--split", "train", "--images", "1500", "--shard-images", "512"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    assert pack_main([*PACK, "--dest", str(tmp_path / "d"), "--workers", "1"]) == 0
    return tmp_path / "d"


def test_a_whole_data_set_is_well(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed)]) == 0
    assert "all is well with 3,000 images" in capsys.readouterr().out


def test_a_data_set_on_s3_is_verified(s3_bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_main([*PACK, "--dest", f"s3://{s3_bucket}/d", "--workers", "1"]) == 0
    assert main([f"s3://{s3_bucket}/d"]) == 0


def test_a_link_out_of_the_data_set_is_not_followed(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(packed, tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    for name in ("manifest.json", "train-000000.tar"):
        path = tmp_path / "data" / name
        path.rename(tmp_path / "elsewhere" / name)
        path.symlink_to(tmp_path / "elsewhere" / name)
        assert main([str(tmp_path / "data")]) == 77
        assert f"{name} is a link that leads out of the folder" in capsys.readouterr().err
        path.unlink()
        (tmp_path / "elsewhere" / name).rename(tmp_path / "data" / f".{name}")
        (tmp_path / "data" / f".{name}").rename(path)


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[2000] ^= 4
    shard.write_bytes(data)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-20_000])


def lengthen(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(512))


def flip_in_the_end(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 4
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"cannot read .*train-000001.tar \(bytes 0-\d+\): the checksum is"),
        (cut, "bytes instead of"),
        (lengthen, "bytes instead of"),
        (Path.unlink, "is missing"),
        (flip_in_the_end, "does not end as a tar file does"),
    ],
)
def test_damage_is_named_and_packing_again_repairs_it(
    dest: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(dest)
    damage(dest / "train-000001.tar")
    assert main([str(dest)]) == 65
    printed = capsys.readouterr().out
    assert "train-000001.tar: " in printed and "train-000000" not in printed and "train-000002" not in printed
    problems = verify(open_shards(str(dest)))
    assert any(re.search(message, str(problem)) for problem in problems)
    whole = {path: path.stat().st_mtime_ns for path in dest.iterdir() if path.name != "train-000001.tar"}
    (command,) = [line for line in printed.splitlines() if line.startswith("  python -m data_pipeline.pack ")]
    assert pack_main(shlex.split(command)[3:]) == 0, "as printed, without a change"
    assert contents(dest) == before
    assert all(path.stat().st_mtime_ns == time for path, time in whole.items()), "only the damaged shard is written"
    assert main([str(dest)]) == 0


def test_the_printed_command_repairs_on_s3_what_was_packed_from_files_with_one_left_out(
    tmp_path: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(600):
        put(tmp_path / "in" / f"{number:03d}.png", image_bytes(random_pixels(8, 8, number)))
    put(tmp_path / "in" / "bad.png", b"\x89PNG cut")
    url = f"s3://{s3_bucket}/d"
    arguments = ["--source", "folder", "--input", f"{tmp_path}/in", "--size", "8", "--split", "train"]
    arguments += ["--dest", url, "--max-skipped", "1", "--shard-images", "512", "--protocol", "adm", "--seed", "5"]
    assert pack_main(arguments) == 0
    store = open_shards(url).store
    data = store.read("train-000001.tar")
    store.write("train-000001.tar", data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    capsys.readouterr()
    assert main([url]) == 65
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "data_pipeline.pack" in line]
    assert command.endswith(f"--input INPUT --dest {url} --max-skipped 1 --rewrite train-000001.tar")
    assert pack_main(shlex.split(command.replace("INPUT", f"{tmp_path}/in"))[3:]) == 0
    assert store.read("train-000001.tar") == data and main([url]) == 0


def test_a_shard_that_would_come_out_different_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Image.fromarray(random_pixels(8, 8, number)).save(tmp_path / f"{number}.bmp")
    arguments = ["--source", "folder", "--input", str(tmp_path), "--size", "8", "--split", "train"]
    arguments += ["--dest", str(tmp_path / "d")]
    assert pack_main(arguments) == 0
    before = contents(tmp_path / "d")
    Image.fromarray(random_pixels(8, 8, 9)).save(tmp_path / "1.bmp")  # as many bytes, so the listing is the same
    assert pack_main([*arguments, "--rewrite", "train-000000.tar"]) == 65
    assert "would come out different from what the manifest says, and was not written" in capsys.readouterr().err
    assert contents(tmp_path / "d") == before
    Image.fromarray(random_pixels(8, 8, 1)).save(tmp_path / "1.bmp")
    assert pack_main([*arguments, "--rewrite", "train-000000.tar"]) == 0, "nothing of the changed source is left"
    assert contents(tmp_path / "d") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewrite", "train-000009.tar"], "has no such shard, it has train-000000.tar to train-000002.tar"),
        (["--rewrite", "train-000000.tar", "--task-count", "2"], "--rewrite is for a single task"),
        (["--rewrite", "train-000000.tar", "--dest", "elsewhere"], "holds no finished data set"),
    ],
)
def test_rewriting_what_is_not_there_is_refused(
    dest: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(dest / "elsewhere") if argument == "elsewhere" else argument for argument in arguments]
    assert pack_main([*PACK, "--dest", str(dest), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_reads_that_fail_for_a_while_are_not_reported_as_damage(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = FaultyFilesystem(share=0.4, seed=0)
    monkeypatch.setattr(storage, "open_filesystem", lambda url: faulty)
    monkeypatch.setattr(storage, "LONGEST_DELAY_SECONDS", 0.001)
    for _ in range(5):
        assert verify(open_shards(str(dest))) == []
    assert all(faulty.counts[fault] for fault in FAULTS)


def test_storage_that_is_away_is_not_reported_as_damage(
    s3_bucket: str, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack_main([*PACK, "--dest", f"s3://{s3_bucket}/d", "--workers", "1"]) == 0
    shards = open_shards(f"s3://{s3_bucket}/d", read_deadline_seconds=1.0)
    s3_server.kill()
    try:
        with pytest.raises(DataError, match=f"s3://{s3_bucket}/d/train-00000.*gave up after") as caught:
            verify(shards)
    finally:
        s3_server.start()
    assert caught.value.exit_code == 69


def test_a_strange_file_is_reported(dest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dest / "train-000009.tar").write_bytes(b"")
    assert main([str(dest)]) == 65
    assert capsys.readouterr().out.splitlines() == [
        "train-000009.tar: does not belong to the data set",
        f"{dest}: 1 problem. Remove {dest}/train-000009.tar.",
    ]


def rewrite_first_block(dest: Path, samples: np.ndarray) -> None:
    """Put other samples into the first block, with checksums that are right."""
    data = bytearray((dest / "train-000000.tar").read_bytes())
    data[: samples.nbytes] = samples.tobytes()
    (dest / "train-000000.tar").write_bytes(data)
    document = json.loads((dest / "manifest.json").read_text())
    document["blocks"][0][4] = xxhash.xxh3_64_hexdigest(samples.tobytes())
    document["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    document["digest"] = digest_of(document)
    (dest / "manifest.json").write_text(json.dumps(document))


def test_samples_that_are_not_ordinary_are_found_behind_right_checksums(dest: Path) -> None:
    count = open_shards(str(dest)).manifest.blocks[0].count
    keys = np.arange(count)
    images, labels = np.zeros((count, 8, 8, 3), np.uint8), np.zeros(count, np.int64)
    rewrite_first_block(dest, encode_samples(keys, labels + 12, images))
    assert any("hold the label 12, but there are 12 classes" in str(p) for p in verify(open_shards(str(dest))))
    rewrite_first_block(dest, encode_samples(keys, labels, images))
    (problem,) = verify(open_shards(str(dest)))
    assert str(problem) == "manifest.json: some samples have the same key"
    broken = encode_samples(keys, labels, images)
    broken[3, SampleLayout(8).pixels_offset - 100] ^= 1  # in the header of the npy file
    rewrite_first_block(dest, broken)
    assert any("are not samples as webdataset writes them" in str(p) for p in verify(open_shards(str(dest))))
