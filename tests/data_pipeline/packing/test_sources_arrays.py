"""Do the published arrays of small images give the right pixels and labels, and run no code on the way?"""

import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES, WNIDS_IN_DEVKIT_ORDER
from data_pipeline.packing.source import Item, Source
from data_pipeline.packing.sources_arrays import chrabaszcz, cifar10, oord
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import image_bytes, put, random_pixels, tar_bytes

IMAGES = np.stack([random_pixels(8, 8, seed) for seed in range(6)])
PLANAR = IMAGES.transpose(0, 3, 1, 2).reshape(6, -1)  # all red, all green, all blue
LABELS = [1, 2, 1000, 1, 500, 999]


def items_of(source: Source) -> list[Item]:
    return [item for group in source.groups for item in group.read()]


def put_batch(folder: Path, name: str, rows: np.ndarray, labels: list[int], protocol: int = 2) -> None:
    if name.endswith(".npz"):
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / name, data=rows, labels=np.array(labels), mean=rows.mean(0))
    else:
        put(folder / name, pickle.dumps({"data": rows, "labels": labels, "mean": rows.mean(0)}, protocol))


@pytest.mark.parametrize(("suffix", "protocol"), [("", 2), ("", 3), ("", 4), (".npz", 0)])
def test_batches_become_images_with_the_sorted_class_index(tmp_path: Path, suffix: str, protocol: int) -> None:
    parts = {1: slice(0, 2), 2: slice(2, 5), 10: slice(5, 6)} | {number: slice(4, 5) for number in range(3, 10)}
    for number, part in parts.items():
        put_batch(tmp_path, f"train_data_batch_{number}{suffix}", PLANAR[part], LABELS[part], protocol)
    put_batch(tmp_path, f"val_data{suffix}", PLANAR[3:4], LABELS[3:4], protocol)
    source = chrabaszcz(str(tmp_path), "train", 8)
    items = items_of(source)
    order = [0, 1, 2, 3, 4, *7 * [4], 5]
    assert (np.stack([item.image for item in items]) == IMAGES[order]).all(), "batch 10 comes after batch 9"
    labels = [LABELS[row] for row in order]
    assert [source.classes[item.label] for item in items] == [WNIDS_IN_DEVKIT_ORDER[label - 1] for label in labels]
    assert source.classes == IMAGENET_CLASSES and source.protocol == "chrabaszcz"
    (only,) = items_of(chrabaszcz(str(tmp_path), "validation", 8))
    assert (only.image == IMAGES[3]).all()


@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize(
    ("rows", "labels", "size", "message"),
    [
        (PLANAR, LABELS, 16, "not images of --size 16"),
        (PLANAR, LABELS[:-1], 8, "labels"),
        (PLANAR[:-1], LABELS, 8, "5 images and 6 labels"),
        (PLANAR, [0, *LABELS[1:]], 8, "the label 0, not one of 1 to 1000"),
        (PLANAR, [1001, *LABELS[1:]], 8, "the label 1001"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    tmp_path: Path, suffix: str, rows: np.ndarray, labels: list[int], size: int, message: str
) -> None:
    put_batch(tmp_path, f"val_data{suffix}", rows, labels)
    with pytest.raises(DataError, match=message):
        items_of(chrabaszcz(str(tmp_path), "validation", size))


@pytest.mark.parametrize(
    ("missing", "message"),
    [((7,), "lacks train_data_batch_7: the training set has 10"), ((9, 10), "9 and train_data_batch_10:")],
)
def test_a_batch_that_is_missing_is_named(tmp_path: Path, missing: tuple[int, ...], message: str) -> None:
    for number in set(range(1, 11)) - set(missing):
        put(tmp_path / f"train_data_batch_{number}", b"")
    with pytest.raises(DataError, match=message) as caught:
        chrabaszcz(str(tmp_path), "train", 8)
    assert caught.value.exit_code == 2


class Attack:
    def __init__(self, action: Any, argument: Any) -> None:
        self.action, self.argument = action, argument

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return self.action, (self.argument,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_in_a_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "made by the attack"
    for attack in (Attack(os.mkdir, str(victim)), Attack(np.load, str(victim)), Attack(eval, "1")):
        put(tmp_path / "in" / "val_data", pickle.dumps({"data": attack, "labels": []}, protocol))
        with pytest.raises(DataError, match="which no batch of images needs") as caught:
            items_of(chrabaszcz(str(tmp_path / "in"), "validation", 8))
        assert caught.value.exit_code == 65
    assert not victim.exists()


def test_an_array_in_a_pickle_cannot_claim_memory_it_does_not_bring(tmp_path: Path) -> None:
    class Huge:
        def __reduce__(self) -> tuple[Any, ...]:
            return np._core.multiarray._reconstruct, (np.ndarray, (1 << 44,), b"b")  # type: ignore[attr-defined]

    put(tmp_path / "val_data", pickle.dumps({"data": Huge(), "labels": []}, 2))
    with pytest.raises(DataError, match="not an array as numpy pickles it"):
        items_of(chrabaszcz(str(tmp_path), "validation", 8))


def test_a_pickle_cannot_claim_memory_by_numbering_its_objects(tmp_path: Path) -> None:
    put(tmp_path / "val_data", b"\x80\x02}r" + (50_000_000).to_bytes(4, "little") + b".")
    tracemalloc.start()
    with pytest.raises(DataError, match="does not hold the array data"):
        items_of(chrabaszcz(str(tmp_path), "validation", 8))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["val_data", "cifar.tar.gz"])
def test_a_file_too_large_for_a_batch_is_refused_before_reading(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(5 << 30)  # takes no room on the disk
    with pytest.raises(DataError, match=f"{name} has 5368709120 bytes, more than 4294967296") as caught:
        source = chrabaszcz(str(tmp_path), "validation", 8) if name == "val_data" else None
        items_of(source or cifar10(str(tmp_path / name), "train", 32))
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut", b"\x80\x02}q\x00.", b"\x80\x02]q\x00."])
def test_damaged_batches_are_named(tmp_path: Path, data: bytes) -> None:
    for name in ("val_data", "val_data.npz"):
        folder = tmp_path / name.replace(".", "_")
        put(folder / name, data)
        with pytest.raises(DataError, match=f"{name} (is|does|holds) ?not"):
            items_of(chrabaszcz(str(folder), "validation", 8))


def test_a_hole_in_compressed_batches_is_named(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 4, (400, 192), dtype=np.uint8)
    np.savez_compressed(tmp_path / "val_data.npz", data=rows, labels=np.arange(1, 401))
    packed = pickle.dumps({b"data": rows, b"labels": [0] * 400}, 2)
    put(tmp_path / "cifar.tar.gz", tar_bytes({"test_batch": packed}, "w:gz"))
    for name in ("val_data.npz", "cifar.tar.gz"):
        whole = (tmp_path / name).read_bytes()
        for place in range(1000, len(whole) - 3000, 1500):
            put(tmp_path / name, whole[:place] + bytes(512) + whole[place + 512 :])
            with pytest.raises(DataError, match=name) as caught:
                npz = name.endswith(".npz")
                items_of(
                    chrabaszcz(str(tmp_path), "validation", 8)
                    if npz
                    else cifar10(str(tmp_path / name), "validation", 32)
                )
            assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("name", "reader"), [("val_data", "BatchUnpickler.load"), ("val_data.npz", "np.lib.format.read_array")]
)
def test_memory_that_runs_out_is_damage_only_where_there_is_enough(
    name: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    put_batch(tmp_path, name, PLANAR, LABELS)
    monkeypatch.setattr(f"data_pipeline.packing.sources_arrays.{reader}", full)
    with pytest.raises(DataError, match="Unable to allocate 9 TiB") as caught:
        items_of(chrabaszcz(str(tmp_path), "validation", 8))
    assert caught.value.exit_code == 65
    monkeypatch.setattr("data_pipeline.storage.bytearray", full, raising=False)
    with pytest.raises(MemoryError):
        items_of(chrabaszcz(str(tmp_path), "validation", 8))


def test_a_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "val_data.npz", data=PLANAR, labels=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(DataError, match="is not a batch"):
        items_of(chrabaszcz(str(tmp_path), "validation", 8))


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_labels_may_be_whole_numbers_of_any_type_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    good: tuple[list[Any], ...] = ([5], [5.0])
    for labels in good:
        put_batch(tmp_path, f"val_data{suffix}", PLANAR[:1], labels, 2)
        assert [item.label for item in items_of(chrabaszcz(str(tmp_path), "validation", 8))] == [
            IMAGENET_CLASSES.index(WNIDS_IN_DEVKIT_ORDER[4])
        ]
    odd: tuple[list[Any], ...] = ([5.5], [float("nan")], [float("inf")], ["cat"], [True], [[5], [5, 6]])
    for labels in odd[: 5 if suffix else None]:  # numpy makes no array of the last one
        put_batch(tmp_path, f"val_data{suffix}", PLANAR[:1], labels, 2)
        with pytest.raises(DataError, match="has labels that are no whole numbers") as caught:
            items_of(chrabaszcz(str(tmp_path), "validation", 8))
        assert caught.value.exit_code == 65


@pytest.mark.parametrize("form", ["cifar-10-python.tar.gz", "cifar-10-batches-py"])
def test_cifar_batches_of_python_2_are_read(tmp_path: Path, form: str) -> None:
    images = np.stack([random_pixels(32, 32, seed) for seed in range(12)])
    rows = images.transpose(0, 3, 1, 2).reshape(12, -1)
    files = {}
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        part = slice(2 * number, 2 * number + 2)
        # Keys of Python 2 are bytes to Python 3.
        batch = {b"data": rows[part], b"labels": [number, 9], b"filenames": [b"a.png", b"b.png"]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, 2)
    put(tmp_path / "cifar-10-python.tar.gz", tar_bytes(files, "w:gz"))
    for name, data in files.items():
        put(tmp_path / name, data)
    train = cifar10(str(tmp_path / form), "train", 32)
    assert (np.stack([item.image for item in items_of(train)]) == images[:10]).all()
    assert [item.label for item in items_of(train)] == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert (train.classes[0], train.classes[9], train.protocol) == ("airplane", "truck", "cifar10")
    test = cifar10(str(tmp_path / form), "validation", 32)
    assert (np.stack([item.image for item in items_of(test)]) == images[10:]).all()


def test_cifar_without_its_files_is_explained(tmp_path: Path) -> None:
    put(tmp_path / "readme", b"")
    with pytest.raises(DataError, match="holds no data_batch_1"):
        cifar10(str(tmp_path), "train", 32)
    with pytest.raises(DataError, match="--size 64: the images of CIFAR-10 have 32 x 32 pixels") as caught:
        cifar10(str(tmp_path), "train", 64)
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match="CIFAR-10 has train and validation"):
        cifar10(str(tmp_path), "test", 32)
    archive = put(tmp_path / "x.tar.gz", tar_bytes({"readme": b""}, "w:gz"))
    with pytest.raises(DataError, match="holds no test_batch"):
        items_of(cifar10(str(archive), "validation", 32))


@pytest.mark.parametrize("planar", [False, True])
def test_npy_mirrors_are_read_in_both_layouts(tmp_path: Path, planar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.packing.sources_arrays.GROUP_IMAGES", 4)
    np.save(tmp_path / "imagenet8-train.npy", IMAGES.transpose(0, 3, 1, 2) if planar else IMAGES)
    source = oord(str(tmp_path / "imagenet8-train.npy"), 8)
    assert len(source.groups) == 2 and source.count == 6 and source.classes == ()
    assert (np.stack([item.image for item in items_of(source)]) == IMAGES).all()


def test_the_tar_of_png_files_is_read_and_other_files_ignored(tmp_path: Path) -> None:
    files = {f"train_8x8/{i}.png": image_bytes(image) for i, image in enumerate(IMAGES)}
    path = put(tmp_path / "train_8x8.tar", tar_bytes({"train_8x8/readme": b"x", **files}))
    source = oord(str(path), 8)
    assert [item.image for item in items_of(source)] == list(files.values()) and source.protocol == "oord"
    with pytest.raises(DataError, match="train_8x8/0.png has 8 x 8 pixels, not --size 16") as caught:
        oord(str(path), 16)
    assert caught.value.exit_code == 2
    put(path, tar_bytes({**files, "train_8x8/0.png": b"cut"}))
    assert oord(str(path), 8).count == len(files), "the packing reports damaged files"


def test_npy_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    with pytest.raises(DataError, match="not images of --size 16"):
        oord(str(tmp_path / "a.npy"), 16)
    put(tmp_path / "cut.npy", (tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match="is cut off"):
        oord(str(tmp_path / "cut.npy"), 8)
    np.save(tmp_path / "f.npy", IMAGES.astype(np.float32))
    with pytest.raises(DataError, match="not rows of uint8"):
        oord(str(tmp_path / "f.npy"), 8)
    with pytest.raises(DataError, match="is not a npy array"):
        oord(str(put(tmp_path / "html.npy", b"<html>")), 8)
    with pytest.raises(DataError, match="holds no PNG files"):
        oord(str(put(tmp_path / "x.tar", tar_bytes({"readme": b""}))), 8)
