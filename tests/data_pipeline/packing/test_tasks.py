"""Are staged groups and shards functions of their task alone, with exact statistics?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import digest_of
from data_pipeline.packing.claim import claim
from data_pipeline.packing.source import Item
from data_pipeline.packing.tasks import CHUNK_IMAGES, ShardTask, StageTask, read_staged
from data_pipeline.shard_format import decode_samples
from data_pipeline.storage import DataError, Store
from tests.support.imagenet_forms import random_pixels


@dataclass(frozen=True)
class Pixels:
    """A group of random images of the right size."""

    first: int
    count: int

    @property
    def name(self) -> str:
        return "pixels"

    def read(self) -> Iterator[Item]:
        for number in range(self.first, self.first + self.count):
            yield Item(str(number), number % 7, random_pixels(8, 8, number))


@pytest.mark.parametrize("count", [0, 1, CHUNK_IMAGES - 1, CHUNK_IMAGES, CHUNK_IMAGES + 1, 200])
def test_a_staged_group_holds_its_pixels_and_their_sums(tmp_path: Path, count: int) -> None:
    staged = StageTask(str(tmp_path), 3, Pixels(5, count), 8, "cifar10", False).run()
    pixels = np.fromfile(tmp_path / "group-000003.raw", np.uint8).reshape(-1, 8, 8, 3)
    expected = [random_pixels(8, 8, number) for number in range(5, 5 + count)]
    assert len(pixels) == count and all((a == b).all() for a, b in zip(pixels, expected, strict=True))
    wide = pixels.astype(np.int64)
    assert staged.sums == wide.sum((0, 1, 2)).tolist() and staged.squares == (wide**2).sum((0, 1, 2)).tolist()
    assert staged.labels == [number % 7 for number in range(5, 5 + count)]
    assert read_staged(str(tmp_path), 3, 8) == staged


def test_a_group_without_all_its_pixels_counts_as_not_staged(tmp_path: Path) -> None:
    StageTask(str(tmp_path), 0, Pixels(0, 10), 8, "cifar10", False).run()
    assert read_staged(str(tmp_path), 1, 8) is None
    raw = tmp_path / "group-000000.raw"
    raw.write_bytes(raw.read_bytes()[:-1])
    assert read_staged(str(tmp_path), 0, 8) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"labels": [1]', '{"labels": [1]}'])
def test_a_group_with_a_damaged_record_counts_as_not_staged(tmp_path: Path, content: str) -> None:
    StageTask(str(tmp_path), 0, Pixels(0, 10), 8, "cifar10", False).run()
    (tmp_path / "group-000000.json").write_text(content)
    assert read_staged(str(tmp_path), 0, 8) is None


def test_a_shard_holds_the_samples_it_was_told_to_in_order(tmp_path: Path) -> None:
    counts = [100, 0, 600, 3]
    starts = np.concatenate([[0], np.cumsum(counts)])
    for number, count in enumerate(counts):
        StageTask(str(tmp_path), number, Pixels(int(starts[number]), count), 8, "cifar10", False).run()
    samples = np.random.default_rng(0).permutation(703)[:650]
    labels = samples % 7
    store, plan = Store(str(tmp_path / "d"), 0.0), {"seed": 1}
    claim(store, plan)
    task = ShardTask(str(tmp_path), store.url, 0.0, 0, "x.tar", 8, samples, labels, starts, None, digest_of(plan))
    record = task.run()
    data = (tmp_path / "d" / "x.tar").read_bytes()
    images, got_labels = decode_samples(data[: record.blocks[-1][1]], 8)
    assert (got_labels == labels).all()
    for image, sample in zip(images, samples.tolist(), strict=True):
        assert image.tobytes() == random_pixels(8, 8, sample).tobytes()
    assert [count for _, _, count, _ in record.blocks] == [512, 138] and record.bytes == len(data)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 does not fit: it is uint8 of shape") as caught:
        StageTask(str(tmp_path), 0, Pixels(5, 1), 16, "cifar10", False).run()
    assert caught.value.exit_code == 65
