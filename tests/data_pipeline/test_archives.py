"""Are tar archives read in place as the standard library reads them, and damaged ones recognised?"""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.archives import open_range, tar_members
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import put, tar_bytes

FILES = {f"folder/{i:04d}.bin": np.random.default_rng(i).bytes(i * 37 % 1500) for i in range(40)}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path: Path, tar_format: int) -> None:
    files = FILES | {"x" * 150 + ".bin": b"long name"} if tar_format == tarfile.GNU_FORMAT else FILES
    path = put(tmp_path / "a.tar", tar_bytes(files, tar_format=tar_format))
    with open_range(str(path), buffer_bytes=700) as file:
        members = list(tar_members(file, "a.tar"))
    data = path.read_bytes()
    assert {member.name: data[member.offset : member.offset + member.size] for member in members} == files


@pytest.mark.parametrize("length", [0, 100, 512, 700, 5000, 9999])
def test_a_tar_that_is_cut_off_is_recognised(tmp_path: Path, length: int) -> None:
    path = put(tmp_path / "a.tar", tar_bytes(FILES)[:length])
    with pytest.raises(DataError, match="cut off or damaged|is not an uncompressed tar") as caught:
        list(tar_members(open_range(str(path)), "a.tar"))
    assert caught.value.exit_code == 65


def test_what_is_no_tar_is_said_so(tmp_path: Path) -> None:
    for data in (b"<html>" * 200, tar_bytes(FILES, "w:gz")):
        path = put(tmp_path / "x", data)
        with pytest.raises(DataError, match="is not an uncompressed tar file"):
            list(tar_members(open_range(str(path)), "x"))


def test_a_member_that_claims_more_than_there_is_is_refused_before_reading(tmp_path: Path) -> None:
    info = tarfile.TarInfo("bomb.png")
    info.size = 10 << 30
    path = put(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match="claims 10737418240 bytes"), open_range(str(path)) as file:
        list(tar_members(file, "a.tar"))


def test_a_range_reads_like_a_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(5000)
    path = put(tmp_path / "x", data)
    part, oracle = open_range(str(path), 1000, 4000, buffer_bytes=64), io.BytesIO(data[1000:4000])
    for place, count in [(0, 10), (2990, 50), (5, 0), (100, 1000), (3000, 1), (0, 3000)]:
        assert part.seek(place) == oracle.seek(place) and part.read(count) == oracle.read(count)
    assert part.seek(-10, io.SEEK_END) == oracle.seek(-10, io.SEEK_END) and part.read() == oracle.read()
