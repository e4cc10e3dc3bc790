"""Which images and labels are in the forms that full-size ImageNet (ILSVRC2012) and CelebA come in?

Classes are WordNet ids; the label is the id's rank in sorted order.
"""

import csv
import io
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import replace

from data_pipeline.archives import open_range, tar_members
from data_pipeline.packing.archive_groups import DAMAGE_OF_TARS, InnerTar, ZipMembers, open_zip, tar_groups
from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES, WNIDS_IN_DEVKIT_ORDER
from data_pipeline.packing.source import GROUP_IMAGES, Group, Source, listing_digest
from data_pipeline.packing.sources_folder import file_groups, folder, image_names
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, normalised, split_url

CLASS_INDEX = {wnid: index for index, wnid in enumerate(IMAGENET_CLASSES)}
WNID = re.compile(r"n\d{8}")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
LARGEST_TABLE_BYTES = 256 << 20
TABLE_DEADLINE_SECONDS = 60.0

# Images 1 to 162770 of CelebA are for training, the next 19867 for validation, the rest for testing.
CELEBA_SPLITS = {"train": (1, 162_770), "validation": (162_771, 182_637), "test": (182_638, 202_599)}


def imagenet_train_tar(url: str) -> Source:
    """``ILSVRC2012_img_train.tar``: a tar archive of one tar archive per class, read in place."""
    url = normalised(url)
    with open_range(url, buffer_bytes=4096) as file:
        members = list(tar_members(file, url))
    wnids = [member.name.removesuffix(".tar") for member in members]
    strange = [member.name for member, wnid in zip(members, wnids, strict=True) if not WNID.fullmatch(wnid)]
    if strange or not members:
        raise DataError(
            f"{url} holds {strange[0] if strange else 'nothing'} where a tar file per class like n01440764.tar was "
            "expected; for images in a plain tar use --source imagenet-validation"
        )
    classes = classes_of(wnids, url)
    groups = [
        InnerTar(url, member.offset, member.offset + member.size, member.name, classes.index(wnid))
        for member, wnid in sorted(zip(members, wnids, strict=True), key=lambda pair: pair[1])
    ]
    origin = {"archive": split_url(url)[1], "listing_sha256": listing_digest((m.name, m.size) for m in members)}
    return Source("imagenet", classes, groups, None, origin)


def imagenet_validation(url: str, labels_url: str) -> Source:
    """The flat validation images, as ``ILSVRC2012_img_val.tar`` or a folder, with labels from another file.

    labels_url: the devkit's tar.gz, its ``ILSVRC2012_validation_ground_truth.txt``, or Kaggle's
    ``LOC_val_solution.csv``.
    """
    url = normalised(url)
    wnids = validation_wnids(labels_url)
    if url.endswith(".tar"):
        with open_range(url, buffer_bytes=1 << 20) as file:
            members = list(tar_members(file, url))
        found = {member.name.rpartition("/")[2]: member.size for member in members}
        labels = [validation_label(member.name.rpartition("/")[2], wnids, labels_url) for member in members]
        groups: list[Group] = list(tar_groups(url, members, labels))
    else:
        found = image_names(url)
        names = sorted(found)
        labels = [validation_label(name, wnids, labels_url) for name in names]
        groups = file_groups(url, names, labels)
    if not found:
        raise DataError(f"{url} holds no images")
    origin = {"archive": split_url(url)[1], "listing_sha256": listing_digest(sorted(found.items()))}
    origin |= {"labels_sha256": listing_digest(sorted(wnids.items()))}
    return Source("imagenet", IMAGENET_CLASSES, groups, len(found), origin)


def imagenet_kaggle(url: str, split: str) -> Source:
    """The layout of Kaggle's localisation challenge: ``ILSVRC/Data/CLS-LOC/{train,val}`` and tables beside it."""
    url = normalised(url)
    store = Store(url, TABLE_DEADLINE_SECONDS)
    images = "ILSVRC/Data/CLS-LOC"
    if not store.exists("LOC_synset_mapping.txt"):
        raise DataError(
            f"{url} holds no LOC_synset_mapping.txt: give the folder into which Kaggle's files were unpacked"
        )
    if split == "validation":
        return imagenet_validation(f"{url}/{images}/val", f"{url}/LOC_val_solution.csv")
    if split != "train":
        raise DataError(f"--split {split}: the Kaggle layout has labels for train and validation")
    return imagenet_folder(f"{url}/{images}/train")


def imagenet_folder(url: str) -> Source:
    """Extracted images, one folder per WordNet id."""
    source = folder(url)
    return replace(source, form="imagenet", classes=classes_of(source.classes, url))


def celeba(url: str, split: str) -> Source:
    """CelebA's aligned images, as ``img_align_celeba.zip`` or a folder; the official split by number."""
    url = normalised(url)
    if split not in CELEBA_SPLITS:
        raise DataError(f"--split {split}: CelebA is divided into {', '.join(CELEBA_SPLITS)}")
    first, last = CELEBA_SPLITS[split]
    if url.endswith(".zip"):
        with open_zip(url) as archive:
            found = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    else:
        found = image_names(url)
    numbers = {name: name.rpartition("/")[2].removesuffix(".jpg") for name in found}
    names = sorted(name for name, number in numbers.items() if number.isdecimal() and first <= int(number) <= last)
    if not names:
        raise DataError(f"{url} holds no images {first:06d}.jpg to {last:06d}.jpg")
    labels = [0] * len(names)
    if url.endswith(".zip"):
        runs = range(0, len(names), GROUP_IMAGES)
        groups: list[Group] = [
            ZipMembers(url, tuple(names[i : i + GROUP_IMAGES]), tuple(labels[i : i + GROUP_IMAGES])) for i in runs
        ]
    else:
        groups = file_groups(url, names, labels)
    origin = {"archive": split_url(url)[1], "listing_sha256": listing_digest((name, found[name]) for name in names)}
    return Source("celeba", (), groups, len(names), origin)


def validation_wnids(url: str) -> dict[str, str]:
    """WordNet id of each validation image by its file name, from any of the files that hold the labels."""
    folder_url, name = split_url(url)
    data = Store(folder_url, TABLE_DEADLINE_SECONDS).read_whole(name, LARGEST_TABLE_BYTES)
    if name.endswith(".csv"):
        rows = csv.DictReader(io.StringIO(data.decode()))
        # The prediction string repeats "wnid x y width height" for every box; all boxes are of one class.
        return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
    if name.endswith((".tar.gz", ".tgz")):
        data = ground_truth_in_devkit(data, url)
    numbers = data.decode("ascii", "replace").split()
    if not numbers or not all(number.isdecimal() and 1 <= int(number) <= 1000 for number in numbers):
        raise DataError(f"{url} is not a list of class numbers 1 to 1000, one per validation image")
    return {
        f"ILSVRC2012_val_{image:08d}.JPEG": WNIDS_IN_DEVKIT_ORDER[int(number) - 1]
        for image, number in enumerate(numbers, 1)
    }


def ground_truth_in_devkit(data: bytes, url: str) -> bytes:
    """The list of class numbers inside ``ILSVRC2012_devkit_t12.tar.gz``."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                if member.name.endswith("/ILSVRC2012_validation_ground_truth.txt") and member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    return file.read(LARGEST_TABLE_BYTES)
    except DAMAGE_OF_TARS as error:
        raise DataError(f"{url} is not a tar.gz file, or is cut off: {error}", EXIT_CORRUPT) from error
    raise DataError(f"{url} holds no ILSVRC2012_validation_ground_truth.txt; give ILSVRC2012_devkit_t12.tar.gz")


def validation_label(name: str, wnids: Mapping[str, str], labels_url: str) -> int:
    """The class index of a validation image."""
    if name not in wnids:
        expected = "" if VALIDATION_NAME.fullmatch(name) else "; names like ILSVRC2012_val_00000001.JPEG are expected"
        if WNID.fullmatch(name.partition("/")[0]):
            expected = "; for images in a folder per class use --source imagenet-folder"
        raise DataError(f"{labels_url} has no label for {name}{expected}")
    if wnids[name] not in CLASS_INDEX:
        raise DataError(f"{labels_url} gives {name} the class {wnids[name]!r}, which is none of ILSVRC2012")
    return CLASS_INDEX[wnids[name]]


def classes_of(wnids: Iterable[str], url: str) -> tuple[str, ...]:
    """Sorted WordNet ids; all 1000 of ILSVRC2012 or, for a chosen part of ImageNet, those that are there."""
    classes = tuple(sorted(wnids))
    strange = [wnid for wnid in classes if not WNID.fullmatch(wnid)]
    if strange or not classes:
        found = f"a folder {strange[0]}" if strange else "no folders"
        raise DataError(f"{url} has {found}; its folders must have the names of WordNet ids like n01440764")
    if len(set(classes)) != len(classes):
        raise DataError(f"{url} holds a class twice", EXIT_CORRUPT)
    return classes
