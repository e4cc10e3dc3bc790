"""Are archives read in place as the standard tools read them, and damaged ones recognised?"""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.archives import Member, open_range, tar_members
from data_pipeline.packing.archive_groups import InnerTar, ZipMembers, open_zip, tar_groups
from data_pipeline.packing.source import Group
from data_pipeline.storage import DataError, Store
from tests.imagenet_forms import put, tar_bytes, zip_bytes

FILES = {f"folder/{i:04d}.bin": np.random.default_rng(i).bytes(i * 37 % 1500) for i in range(40)}


def read_all(groups: list[Group]) -> dict[str, object]:
    return {item.name.rpartition(":")[2]: item.image for group in groups for item in group.read()}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path: Path, tar_format: int) -> None:
    files = FILES | {"x" * 150 + ".bin": b"long name"} if tar_format == tarfile.GNU_FORMAT else FILES
    path = put(tmp_path / "a.tar", tar_bytes(files, tar_format=tar_format))
    with open_range(str(path), buffer_bytes=700) as file:
        members = list(tar_members(file, "a.tar"))
    data = path.read_bytes()
    assert {member.name: data[member.offset : member.offset + member.size] for member in members} == files


@pytest.mark.parametrize("buffer_bytes", [1, 513, 1 << 20])
def test_groups_read_every_file_of_a_tar_once(
    tmp_path: Path, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.archives.STREAM_BYTES", buffer_bytes)
    monkeypatch.setattr("data_pipeline.packing.archive_groups.GROUP_IMAGES", 7)
    path = put(tmp_path / "a.tar", tar_bytes(FILES))
    with open_range(str(path)) as file:
        members = list(tar_members(file, "a.tar"))
    groups = tar_groups(str(path), members, [0] * len(members))
    assert len(groups) == 6
    assert read_all(list(groups)) == FILES


def test_a_tar_inside_a_tar_and_a_zip_are_read_in_place(tmp_path: Path) -> None:
    inner = tar_bytes(FILES)
    path = put(tmp_path / "outer.tar", tar_bytes({"first.tar": b"x" * 700, "inner.tar": inner}))
    with open_range(str(path)) as file:
        found = {member.name: member for member in tar_members(file, "outer")}["inner.tar"]
    group = InnerTar(str(path), found.offset, found.offset + found.size, "inner.tar", 5)
    assert read_all([group]) == FILES
    zipped = put(tmp_path / "a.zip", zip_bytes(FILES))
    assert read_all([ZipMembers(str(zipped), tuple(FILES), (0,) * len(FILES))]) == FILES


def test_archives_are_read_from_s3(tmp_path: Path, s3_bucket: str) -> None:
    Store(f"s3://{s3_bucket}", 30.0).write("a.tar", tar_bytes(FILES))
    url = f"s3://{s3_bucket}/a.tar"
    with open_range(url) as file:
        members = list(tar_members(file, url))
    assert read_all(list(tar_groups(url, members, [0] * len(members)))) == FILES


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
    with pytest.raises(DataError, match="too many for an image"):
        list(tar_groups(str(path), [Member("bomb.png", 512, 10 << 30)], [0])[0].read())


def test_a_broken_zip_is_recognised(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.bin": bytes(range(256))}))
    with pytest.raises(DataError, match="is not a zip file, or is cut off"):
        open_zip(str(put(tmp_path / "cut.zip", bytes(data[:-30]))))
    data[60] ^= 1
    with pytest.raises(DataError, match="a.bin is damaged"):
        list(ZipMembers(str(put(tmp_path / "bad.zip", bytes(data))), ("a.bin",), (0,)).read())


def test_a_range_reads_like_a_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(5000)
    path = put(tmp_path / "x", data)
    part, oracle = open_range(str(path), 1000, 4000, buffer_bytes=64), io.BytesIO(data[1000:4000])
    for place, count in [(0, 10), (2990, 50), (5, 0), (100, 1000), (3000, 1), (0, 3000)]:
        assert part.seek(place) == oracle.seek(place) and part.read(count) == oracle.read(count)
    assert part.seek(-10, io.SEEK_END) == oracle.seek(-10, io.SEEK_END) and part.read() == oracle.read()
