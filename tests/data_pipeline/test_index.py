"""Can other people's shards be indexed and streamed with the same exactness as packed ones?"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.index import main
from data_pipeline.loader import evaluation_batches, open_shards, train_batches
from data_pipeline.storage import DataError, Store
from data_pipeline.verify import main as verify_main
from data_pipeline.verify import verify
from tests.support.imagenet_forms import image_bytes, put, random_pixels, tar_bytes


def foreign(folder: Path, count: int = 1300, labelled: bool = True) -> list[tuple[bytes, int]]:
    """Shards as people make them with webdataset; returns pixels and labels in order."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    with webdataset.ShardWriter(f"{folder}/part-%03d.tar", maxcount=700, verbose=0) as writer:
        for number in range(count):
            pixels, label = random_pixels(8, 8, number), number % 5
            samples.append((pixels.tobytes(), label if labelled else 0))
            fields = {"__key__": f"image{number}", "png": pixels} | ({"cls": label} if labelled else {})
            writer.write(fields)
    return samples


@pytest.mark.parametrize("labelled", [True, False])
def test_foreign_shards_are_indexed_and_evaluated_exactly(
    tmp_path: Path, labelled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = foreign(tmp_path / "d", labelled=labelled)
    assert main([str(tmp_path / "d"), "--workers", "1"]) == 0
    assert "indexed 1,300 images of d-8, 2 shards" in capsys.readouterr().out
    shards = open_shards(str(tmp_path / "d"))
    assert shards.classes == (("0", "1", "2", "3", "4") if labelled else ())
    assert [block.count for block in shards.manifest.blocks] == [512, 188, 512, 88]
    got = []
    for rank in range(3):
        for batch in evaluation_batches(shards, rank=rank, world_size=3, batch_images=100, limit=None):
            assert batch.valid is not None and (batch.labels is not None) == labelled
            labels = batch.labels.tolist() if batch.labels is not None else [0] * 100
            for image, label, valid in zip(batch.images.numpy(), labels, batch.valid.tolist(), strict=True):
                if valid:
                    got.append((image.tobytes(), label))
    assert got == expected
    pixels = np.stack([np.frombuffer(image, np.uint8) for image, _ in expected]).reshape(-1, 3)
    assert np.allclose(shards.manifest.pixel_mean, pixels.mean(0))
    assert np.allclose(shards.manifest.pixel_std, pixels.std(0))


def test_training_sees_every_foreign_image_once_an_epoch(tmp_path: Path) -> None:
    expected = foreign(tmp_path / "d")
    assert main([str(tmp_path / "d"), "--workers", "1"]) == 0
    shards = open_shards(str(tmp_path / "d"))
    batches = train_batches(
        shards,
        seed=0,
        lanes=4,
        consumed_samples=0,
        rank=0,
        world_size=1,
        global_batch_images=100,
        micro_batch_images=100,
        fetch_threads=2,
        prefetch_batches=2,
    )
    got: Counter[tuple[bytes, int]] = Counter()
    for _ in range(13):
        batch = next(batches)
        assert batch.labels is not None
        got.update(zip((image.tobytes() for image in batch.images.numpy()), batch.labels.tolist(), strict=True))
    assert got == Counter(expected)


def test_foreign_shards_on_s3_are_indexed(tmp_path: Path, s3_bucket: str) -> None:
    expected = foreign(tmp_path / "d", count=20)
    Store(f"s3://{s3_bucket}/d", 30.0).write("part-000.tar", (tmp_path / "d" / "part-000.tar").read_bytes())
    assert main([f"s3://{s3_bucket}/d", "--workers", "1"]) == 0
    shards = open_shards(f"s3://{s3_bucket}/d")
    (batch,) = evaluation_batches(shards, rank=0, world_size=1, batch_images=20, limit=None)
    assert [image.tobytes() for image in batch.images.numpy()] == [image for image, _ in expected]


def test_damage_after_indexing_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "d", count=600)
    assert main([str(tmp_path / "d"), "--workers", "1"]) == 0
    assert verify(open_shards(str(tmp_path / "d"))) == []
    shard = tmp_path / "d" / "part-000.tar"
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[3000] ^= 1
    shard.write_bytes(data)
    shards = open_shards(str(tmp_path / "d"), read_deadline_seconds=0.2)
    with pytest.raises(DataError, match="checksum") as caught:
        list(evaluation_batches(shards, rank=0, world_size=1, batch_images=100, limit=None))
    assert caught.value.exit_code == 65
    capsys.readouterr()
    assert verify_main([str(tmp_path / "d")]) == 65
    found, advice = capsys.readouterr().out.splitlines()
    assert "part-000.tar: cannot read" in found and "the checksum is" in found
    assert "Get part-000.tar once more" in advice and f"python -m data_pipeline.index {tmp_path}/d" in advice
    shard.write_bytes(whole)
    assert verify_main([str(tmp_path / "d")]) == 0


def test_indexing_again_says_the_same_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "d", count=3)
    assert main([str(tmp_path / "d")]) == 0
    first = capsys.readouterr().out
    stamp = (tmp_path / "d" / "manifest.json").stat().st_mtime_ns
    assert main([str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out == first and (tmp_path / "d" / "manifest.json").stat().st_mtime_ns == stamp


def test_a_shard_that_is_left_out_between_others_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 2):
        image = image_bytes(random_pixels(8, 8, number))
        put(tmp_path / f"data-000{number}.tar", tar_bytes({f"{number}.png": image}))
    assert main([str(tmp_path), "--workers", "1"]) == 0
    assert f"{tmp_path} has no data-0001.tar, between data-0000.tar and data-0002.tar" in caplog.text


@pytest.mark.parametrize(
    ("files", "message", "code"),
    [
        ({}, "no tar files at", 2),
        ({"shard (1).tar": tar_bytes({})}, "shard (1).tar: a manifest cannot name this shard; rename it", 2),
        ({"part=0.tar": tar_bytes({})}, "part=0.tar: a manifest cannot name this shard; rename it", 2),
        ({"x-00000-of-00002.tar": tar_bytes({})}, "lacks file 00001-of-00002", 2),
        ({"a.tar": tar_bytes({})}, "hold no samples", 2),
        (
            {"a.tar": tar_bytes({"0.png": image_bytes(random_pixels(8, 8, 0)), "0.cls": b"99999999"})},
            "has the label 99999999: more than 100,000 classes",
            65,
        ),
        ({"a.tar": b"<html>502</html>" * 100}, "is not an uncompressed tar file", 65),
        ({"a.tar": b""}, "is not an uncompressed tar file", 65),
        ({"a.tar": tar_bytes({"0.png": image_bytes(random_pixels(8, 9, 0))})}, "0.png is 9 x 8; only square", 65),
        (
            {
                "a.tar": tar_bytes({"0.png": image_bytes(random_pixels(8, 8, 0))}),
                "b.tar": tar_bytes({"1.png": image_bytes(random_pixels(9, 9, 0))}),
            },
            "b.tar: 1.png is 9 x 9, not 8 x 8",
            65,
        ),
        (
            {"a.tar": tar_bytes({"0.png": image_bytes(random_pixels(8, 8, 0)), "1.png": b"", "1.cls": b"1"})},
            "1.png is not an image",
            65,
        ),
        (
            {
                "a.tar": tar_bytes(
                    {
                        "0.png": image_bytes(random_pixels(8, 8, 0)),
                        "0.cls": b"1",
                        "1.png": image_bytes(random_pixels(8, 8, 1)),
                    }
                )
            },
            "sample '1' has no .cls, unlike others",
            65,
        ),
    ],
)
def test_what_cannot_be_indexed_is_one_sentence(
    tmp_path: Path, files: dict[str, bytes], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    for name, data in files.items():
        put(tmp_path / "d" / name, data)
    assert main([str(tmp_path / "d"), "--workers", "1"]) == code
    *progress, error = capsys.readouterr().err.splitlines()
    assert message in error and all(line.startswith("indexing: ") for line in progress)
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_blocks_never_have_more_bytes_than_a_manifest_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = foreign(tmp_path / "d", count=10)
    monkeypatch.setattr("data_pipeline.index.LARGEST_BLOCK_BYTES", 13_000)
    monkeypatch.setattr("data_pipeline.manifest.LARGEST_BLOCK_BYTES", 13_000)
    assert main([str(tmp_path / "d"), "--workers", "1"]) == 0
    shards = open_shards(str(tmp_path / "d"))
    assert [block.count for block in shards.manifest.blocks] == [3, 3, 3, 1]
    (batch,) = evaluation_batches(shards, rank=0, world_size=1, batch_images=10, limit=None)
    assert [image.tobytes() for image in batch.images.numpy()] == [image for image, _ in expected]
    (tmp_path / "d" / "manifest.json").unlink()
    monkeypatch.setattr("data_pipeline.index.LARGEST_BLOCK_BYTES", 4000)
    monkeypatch.setattr("data_pipeline.manifest.LARGEST_BLOCK_BYTES", 4000)
    assert main([str(tmp_path / "d"), "--workers", "1"]) == 65, "what no program reads is not written"
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_what_macos_leaves_beside_a_shard_is_passed_over(tmp_path: Path) -> None:
    foreign(tmp_path / "d", count=3)
    put(tmp_path / "d" / "._part-000.tar", b"\0\5\x16\7")
    assert main([str(tmp_path / "d"), "--workers", "1"]) == 0
    assert open_shards(str(tmp_path / "d")).count == 3


def test_a_shard_instead_of_the_folder_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "d", count=3)
    assert main([str(tmp_path / "d" / "part-000.tar")]) == 2
    assert "part-000.tar names a shard: give the folder of the shards" in capsys.readouterr().err


def test_other_members_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"0.png": image_bytes(random_pixels(8, 8, 0)), "0.json": b"{}", "0.pkl": b"never read"}
    put(tmp_path / "a.tar", tar_bytes(files))
    assert main([str(tmp_path)]) == 0
    assert "ignored .json: 1\n  ignored .pkl: 1" in capsys.readouterr().out
