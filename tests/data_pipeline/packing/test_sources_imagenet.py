"""Does every form of ImageNet and CelebA give the same images under the right labels?"""

from pathlib import Path

import pytest

from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES, WNIDS_IN_DEVKIT_ORDER
from data_pipeline.packing.source import Source
from data_pipeline.packing.sources_imagenet import (
    celeba,
    imagenet_folder,
    imagenet_kaggle,
    imagenet_train_tar,
    imagenet_validation,
)
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import (
    WNIDS,
    image_bytes,
    put,
    random_pixels,
    tar_bytes,
    train_tar,
    training_files,
    zip_bytes,
)

# Three validation images with the devkit's numbers 1, 2 and 1000.
NUMBERS = (1, 2, 1000)
EXPECTED = [IMAGENET_CLASSES.index(WNIDS_IN_DEVKIT_ORDER[number - 1]) for number in NUMBERS]
VALIDATION = {f"ILSVRC2012_val_{i:08d}.JPEG": image_bytes(random_pixels(9, 9, i)) for i in (1, 2, 3)}


def contents(source: Source) -> dict[bytes, str]:
    """Class of each image by its bytes."""
    items = [item for group in source.groups for item in group.read()]
    assert all(isinstance(item.image, bytes) for item in items)
    return {item.image: source.classes[item.label] for item in items}  # type: ignore[misc]


def labels_in_order(source: Source) -> list[int]:
    return [item.label for group in source.groups for item in group.read()]


def test_train_tar_extracted_folders_and_kaggle_hold_the_same_images(tmp_path: Path) -> None:
    files = training_files()
    for wnid, images in files.items():
        for name, data in images.items():
            put(tmp_path / "extracted" / wnid / name, data)
            put(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train" / wnid / name, data)
    put(tmp_path / "kaggle/LOC_synset_mapping.txt", "\n".join(f"{wnid} words" for wnid in WNIDS).encode())
    expected = {data: wnid for wnid, images in files.items() for data in images.values()}
    sources = [
        imagenet_train_tar(str(train_tar(tmp_path / "ILSVRC2012_img_train.tar"))),
        imagenet_folder(str(tmp_path / "extracted")),
        imagenet_kaggle(str(tmp_path / "kaggle"), "train"),
    ]
    for source in sources:
        assert source.form == "imagenet" and source.classes == WNIDS, "sorted, whatever their order in the archive"
        assert contents(source) == expected


@pytest.mark.parametrize("labels", ["devkit.tar.gz", "ILSVRC2012_validation_ground_truth.txt", "LOC_val_solution.csv"])
@pytest.mark.parametrize("images", ["val.tar", "val"])
def test_validation_images_get_the_label_of_every_kind_of_table(tmp_path: Path, labels: str, images: str) -> None:
    numbers = "".join(f"{number}\n" for number in NUMBERS).encode()
    devkit = {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": numbers}
    rows = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n"
        for i, wnid in enumerate((WNIDS_IN_DEVKIT_ORDER[number - 1] for number in NUMBERS), 1)
    )
    put(tmp_path / "devkit.tar.gz", tar_bytes(devkit, "w:gz"))
    put(tmp_path / "ILSVRC2012_validation_ground_truth.txt", numbers)
    put(tmp_path / "LOC_val_solution.csv", rows.encode())
    put(tmp_path / "val.tar", tar_bytes(VALIDATION))
    for name, data in VALIDATION.items():
        put(tmp_path / "val" / name, data)
    source = imagenet_validation(str(tmp_path / images), str(tmp_path / labels))
    assert source.count == 3 and source.classes == IMAGENET_CLASSES
    assert labels_in_order(source) == EXPECTED
    assert [number - 1 for number in NUMBERS] != EXPECTED


def test_kaggle_validation_finds_its_own_table(tmp_path: Path) -> None:
    put(tmp_path / "LOC_synset_mapping.txt", b"")
    put(tmp_path / "LOC_val_solution.csv", b"ImageId,PredictionString\nILSVRC2012_val_00000001,n02119789 0 0 1 1\n")
    put(tmp_path / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG", VALIDATION["ILSVRC2012_val_00000001.JPEG"])
    source = imagenet_kaggle(str(tmp_path), "validation")
    assert [source.classes[label] for label in labels_in_order(source)] == ["n02119789"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("1\n2\n", "no label for ILSVRC2012_val_00000003.JPEG"),
        ("1\n2\n1001\n", "not a list of class numbers"),
        ("1\n2\nabc\n", "not a list of class numbers"),
        ("", "not a list of class numbers"),
    ],
)
def test_tables_that_do_not_fit_are_explained(tmp_path: Path, table: str, message: str) -> None:
    images = put(tmp_path / "val.tar", tar_bytes(VALIDATION))
    with pytest.raises(DataError, match=message) as caught:
        imagenet_validation(str(images), str(put(tmp_path / "truth.txt", table.encode())))
    assert caught.value.exit_code == 2


def test_validation_images_in_folders_of_classes_are_explained(tmp_path: Path) -> None:
    put(tmp_path / "val/n01440764/ILSVRC2012_val_00000001.JPEG", VALIDATION["ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(DataError, match="no label for n01440764/.*; .* use --source imagenet-folder"):
        imagenet_validation(str(tmp_path / "val"), str(put(tmp_path / "truth.txt", b"1\n")))


def test_the_wrong_archive_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds ILSVRC2012_val_00000001.JPEG where a tar file per class"):
        imagenet_train_tar(str(put(tmp_path / "val.tar", tar_bytes(VALIDATION))))
    with pytest.raises(DataError, match="holds no ILSVRC2012_validation_ground_truth.txt"):
        truth = put(tmp_path / "x.tar.gz", tar_bytes({"readme": b""}, "w:gz"))
        imagenet_validation(str(tmp_path / "val.tar"), str(truth))
    with pytest.raises(DataError, match="LOC_synset_mapping.txt"):
        imagenet_kaggle(str(tmp_path), "train")
    put(tmp_path / "tree" / "cats" / "a.png", VALIDATION["ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(DataError, match="has a folder cats; its folders must have the names of WordNet ids"):
        imagenet_folder(str(tmp_path / "tree"))


@pytest.mark.parametrize("form", ["img_align_celeba.zip", "img_align_celeba"])
def test_celeba_is_split_by_number(tmp_path: Path, form: str) -> None:
    numbers = {"train": [1, 162_770], "validation": [162_771, 182_637], "test": [182_638, 202_599]}
    files = {f"img_align_celeba/{n:06d}.jpg": b"%d" % n for split in numbers.values() for n in split}
    put(tmp_path / "img_align_celeba.zip", zip_bytes(files | {"img_align_celeba/readme.txt": b""}))
    for name, data in files.items():
        put(tmp_path / name, data)
    for split, expected in numbers.items():
        source = celeba(str(tmp_path / form), split)
        assert source.classes == ()
        assert [item.image for group in source.groups for item in group.read()] == [b"%d" % n for n in expected]
    with pytest.raises(DataError, match="CelebA is divided into"):
        celeba(str(tmp_path / form), "everything")
