"""Are the images inside tar and zip archives read in place, and damaged archives recognised?"""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.archives import Member, open_range, tar_members
from data_pipeline.packing.archive_groups import InnerTar, ZipMembers, open_zip, tar_groups
from data_pipeline.packing.source import Group
from data_pipeline.storage import DataError, Store
from tests.support.imagenet_forms import put, tar_bytes, zip_bytes

FILES = {f"folder/{i:04d}.bin": np.random.default_rng(i).bytes(i * 37 % 1500) for i in range(40)}


def read_all(groups: list[Group]) -> dict[str, object]:
    return {item.name.rpartition(":")[2]: item.image for group in groups for item in group.read()}


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


def test_a_broken_zip_is_recognised(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.bin": bytes(range(256))}))
    with pytest.raises(DataError, match="is not a zip file, or is cut off"):
        open_zip(str(put(tmp_path / "cut.zip", bytes(data[:-30]))))
    data[60] ^= 1
    with pytest.raises(DataError, match="a.bin is damaged"):
        list(ZipMembers(str(put(tmp_path / "bad.zip", bytes(data))), ("a.bin",), (0,)).read())


def test_damage_inside_of_compressed_data_is_damage(tmp_path: Path) -> None:
    """Of which zlib and LZMA say so by errors of their own."""
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("a.bin", FILES["folder/0030.bin"])
        data = stream.getvalue()
        for place in range(48, len(data) - 100, 97):
            bad = bytearray(data)
            bad[place : place + 4] = bytes(byte ^ 0xFF for byte in bad[place : place + 4])
            with pytest.raises(DataError, match="a.bin is damaged") as caught:
                list(ZipMembers(str(put(tmp_path / "bad.zip", bytes(bad))), ("a.bin",), (0,)).read())
            assert caught.value.exit_code == 65


def test_a_member_that_is_too_large_for_an_image_is_refused_before_reading(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tar", bytes(10_240))
    with pytest.raises(DataError, match="too many for an image"):
        list(tar_groups(str(path), [Member("bomb.png", 512, 10 << 30)], [0])[0].read())
