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
    odd = {"folder/" + "x" * 150 + ".bin": b"long name", "猫/ä = ö\n.bin": b"characters", "y" * 120 + "/z.bin": b"last"}
    files = FILES if tar_format == tarfile.USTAR_FORMAT else FILES | odd
    path = put(tmp_path / "a.tar", tar_bytes(files, tar_format=tar_format))
    with open_range(str(path), buffer_bytes=700) as file:
        members = list(tar_members(file, "a.tar"))
    data = path.read_bytes()
    assert {member.name: data[member.offset : member.offset + member.size] for member in members} == files


def members_in(data: bytes, **options: bool) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.offset : m.offset + m.size]) for m in tar_members(io.BytesIO(data), "a.tar", **options)]


def test_archives_joined_one_behind_the_other_are_read_as_one() -> None:
    parts = [{"0.png": b"a" * 700}, {}, {"1.png": b"b", "n" * 130: b"c"}, {"2.png": b""}]
    data = b"".join(tar_bytes(files) for files in parts)
    expected = [pair for files in parts for pair in files.items()]
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as archive:
        assert archive.getnames() == [name for name, _ in expected]
    assert members_in(data) == expected
    assert members_in(data[: 512 - 10_240], complete=False) == expected
    assert members_in(data + bytes(300)) == members_in(data + b"no header") == expected, "what follows is of others"
    with pytest.raises(DataError, match="cut off"):
        members_in(data[: 512 - 10_240])


def test_a_long_name_of_a_folder_is_not_that_of_the_next_file() -> None:
    folder = tarfile.TarInfo("long" * 40)
    folder.type = tarfile.DIRTYPE
    data = folder.tobuf(tarfile.GNU_FORMAT) + tar_bytes({"short.png": b"x"})
    assert members_in(data) == [("short.png", b"x")]


def test_records_for_all_files_and_sizes_in_records_are_taken() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "猫"}) as archive:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = 3, {"size": "3", "path": "b/猫.png", "mtime": "1.5"}
        archive.addfile(info, io.BytesIO(b"xyz"))
    assert members_in(stream.getvalue()) == [("b/猫.png", b"xyz")]


def entry(kind: bytes, content: bytes, name: str = "0.png", size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (entry(tarfile.GNUTYPE_SPARSE, b""), "0.png as a sparse file"),
        (entry(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n") + entry(b"0", b"1"), "0.png as a sparse file"),
        (entry(tarfile.LNKTYPE, b""), "0.png as a link"),
        (entry(tarfile.SYMTYPE, b"", "0.CLS"), "0.CLS as a link"),
        (entry(tarfile.XHDTYPE, b"10 path=x"), "a header at byte 0 holds no records"),
        (entry(tarfile.XHDTYPE, b"99999999999 path=x\n"), "a header at byte 0 holds no records"),
        (entry(tarfile.XHDTYPE, b"0 path=x\n"), "a header at byte 0 holds no records"),
        (entry(tarfile.XHDTYPE, b"x"), "a header at byte 0 holds no records"),
        (entry(tarfile.XHDTYPE, b"10 size=x\n") + entry(b"0", b"1"), "'0.png' has b'x' bytes"),
        (entry(tarfile.XHDTYPE, b"11 size=-1\n") + entry(b"0", b"1"), "'0.png' claims -1 bytes"),
        (entry(tarfile.XHDTYPE, b"14 size=99999\n") + entry(b"0", b"1"), "'0.png' claims 99999 bytes"),
        (entry(tarfile.XHDTYPE, bytes(2 << 20)), "a header at byte 0 has 2097152 bytes"),
        (entry(tarfile.GNUTYPE_LONGNAME, b"x" * (2 << 20)), "a header at byte 0 has 2097152 bytes"),
    ],
)
def test_what_cannot_be_read_in_place_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^a.tar .*{message}") as caught:
        members_in(data + bytes(1024))
    assert caught.value.exit_code == 65


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
