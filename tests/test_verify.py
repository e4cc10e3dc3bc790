"""Does verification find every kind of damage, name the shard, and lead to a repair that restores the bytes?"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipeline.loader import open_shards
from data_pipeline.manifest import digest_of
from data_pipeline.pack import main as pack_main
from data_pipeline.shard_format import SampleLayout, encode
from data_pipeline.verify import main, verify

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
        (flip, r"bytes 0-\d+ have the checksum"),
        (cut, "bytes instead of"),
        (lengthen, "bytes instead of"),
        (Path.unlink, "there is no such bucket, folder or object"),
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
    problems = verify(open_shards(str(dest), read_deadline_seconds=0.2))
    assert any(re.search(message, problem) for problem in problems)
    (dest / "train-000001.tar").unlink(missing_ok=True)
    whole = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    assert pack_main([*PACK, "--dest", str(dest), "--workers", "1"]) == 0
    assert contents(dest) == before
    assert all(path.stat().st_mtime_ns == time for path, time in whole.items()), "only the damaged shard is written"
    assert main([str(dest)]) == 0


def test_a_strange_file_is_reported(dest: Path) -> None:
    (dest / "train-000009.tar").write_bytes(b"")
    assert verify(open_shards(str(dest))) == ["train-000009.tar: does not belong to the data set"]


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
    rewrite_first_block(dest, encode(keys, labels + 12, images))
    assert any("hold the label 12, but there are 12 classes" in p for p in verify(open_shards(str(dest))))
    rewrite_first_block(dest, encode(keys, labels, images))
    assert "some samples have the same key" in verify(open_shards(str(dest)))
    broken = encode(keys, labels, images)
    broken[3, SampleLayout(8).pixels_offset - 100] ^= 1  # in the header of the npy file
    rewrite_first_block(dest, broken)
    assert any("are not samples as webdataset writes them" in p for p in verify(open_shards(str(dest))))
