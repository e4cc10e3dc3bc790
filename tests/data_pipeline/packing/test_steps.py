"""Do sources of every kind become verified shards, shared, restarted, limited and refused as documented?"""

import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.decode import decode_image
from data_pipeline.loader import Shards, evaluation_batches, open_shards
from data_pipeline.pack import main
from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES
from data_pipeline.packing.resize import to_pixels
from data_pipeline.packing.sources_arrays import CIFAR10_FILES
from data_pipeline.packing.steps import Workforce, shard_bounds, workspace_of
from data_pipeline.storage import Store
from data_pipeline.verify import main as verify_main
from data_pipeline.verify import verify
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
from tests.support.s3_server import S3Server
from tests.support.small_disk import on_small_disk

PHOTOGRAPHS = ["--source", "photographs", "--size", "8", "--split", "train", "--images", "3000", "--workers", "1"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def all_samples(shards: Shards) -> list[tuple[bytes, int]]:
    found = []
    for batch in evaluation_batches(shards, rank=0, world_size=1, batch_images=shards.count, limit=None):
        labels = [0] * shards.count if batch.labels is None else batch.labels.tolist()
        found += [(image.tobytes(), label) for image, label in zip(batch.images.numpy(), labels, strict=True)]
    return found


@pytest.mark.parametrize("protocol", ["chrabaszcz", "adm"])
def test_imagenet_becomes_verified_shards_that_say_what_they_are(tmp_path: Path, protocol: str) -> None:
    archive = train_tar(tmp_path / "ILSVRC2012_img_train.tar")
    arguments = ["--source", "imagenet-train", "--input", str(archive), "--size", "8", "--split", "train"]
    assert main([*arguments, "--protocol", protocol, "--dest", str(tmp_path / "d")]) == 0
    shards = open_shards(str(tmp_path / "d"))
    assert verify(shards) == []
    expected = [
        (to_pixels(decode_image(data, name)[0], protocol, 8).tobytes(), WNIDS.index(wnid))
        for wnid, files in training_files().items()
        for name, data in files.items()
    ]
    assert sorted(all_samples(shards)) == sorted(expected)
    assert all_samples(shards) != expected, "shuffled"
    manifest = shards.manifest
    assert manifest.name == f"imagenet-8-{protocol}"
    assert manifest.protocol["imagenet_version"] == {"chrabaszcz": "B", "adm": "C"}[protocol]
    assert manifest.source["oddities"] == {"png_named_jpeg": 12}


def test_published_pixels_arrive_unchanged(tmp_path: Path) -> None:
    images = np.stack([random_pixels(8, 8, seed) for seed in range(700)])
    np.save(tmp_path / "imagenet8-train.npy", images)
    arguments = ["--source", "imagenet-oord", "--input", str(tmp_path / "imagenet8-train.npy"), "--size", "8"]
    assert main([*arguments, "--split", "train", "--dest", str(tmp_path / "d")]) == 0
    shards = open_shards(str(tmp_path / "d"))
    assert sorted(all_samples(shards)) == sorted((image.tobytes(), 0) for image in images)
    assert shards.manifest.protocol["imagenet_version"] == "A" and shards.classes == ()
    first = next(evaluation_batches(shards, rank=0, world_size=1, batch_images=4, limit=None))
    assert first.labels is None


def test_tasks_that_share_the_work_give_the_bytes_of_one(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--dest", str(tmp_path / "d"), "--scratch", str(tmp_path / "scratch"), "--task-count", "3"]
    codes = [main([*PHOTOGRAPHS, *shared, "--task-index", str(task)]) for task in (0, 1, 2)]
    assert codes[0] == 75 and "groups of others not yet: run this again later" in capsys.readouterr().err
    codes = [main([*PHOTOGRAPHS, *shared, "--task-index", str(task)]) for task in (0, 1, 2)]
    assert codes == [0, 0, 0]
    assert contents(tmp_path / "d") == contents(packed)


def test_tasks_at_the_same_time_do_not_disturb_each_other(packed: Path, tmp_path: Path) -> None:
    shared = ["--dest", str(tmp_path / "d"), "--scratch", str(tmp_path / "scratch"), "--shard-images", "512"]
    codes: dict[int, int] = {}

    def task(index: int) -> None:
        while (code := main([*PHOTOGRAPHS, *shared, "--task-count", "3", "--task-index", str(index)])) == 75:
            pass
        codes[index] = code

    threads = [threading.Thread(target=task, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever comes while the last one cleans up may have to be started again; the result is whole in any case.
    assert 0 in codes.values()
    assert main([*PHOTOGRAPHS, *shared]) == 0
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "alone"), "--shard-images", "512"]) == 0
    assert contents(tmp_path / "d") == contents(tmp_path / "alone")


def test_a_scratch_folder_may_hold_other_files_and_other_packings(packed: Path, tmp_path: Path) -> None:
    scratch = ["--scratch", str(tmp_path / "scratch")]
    put(tmp_path / "scratch" / "thesis.tex", b"x")
    other = [*PHOTOGRAPHS, "--seed", "1", "--dest", str(tmp_path / "other"), *scratch]
    assert main([*other, "--task-count", "2"]) == 75  # leaves staged groups of other images, of the same size
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "d"), *scratch]) == 0
    assert contents(tmp_path / "d") == contents(packed)
    assert (tmp_path / "scratch" / "thesis.tex").exists()
    assert main(other) == 0


def folder_with_a_bad_file(tmp_path: Path) -> list[str]:
    for i in range(5):
        put(tmp_path / "in" / f"{i}.png", image_bytes(random_pixels(8, 8, i)))
    put(tmp_path / "in" / "bad.png", image_bytes(random_pixels(8, 8, 9))[:-50])
    return ["--source", "folder", "--input", str(tmp_path / "in"), "--size", "8", "--split", "train"]


def test_an_image_that_cannot_be_decoded_ends_packing_unless_it_may_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*folder_with_a_bad_file(tmp_path), "--dest", str(tmp_path / "d")]
    assert main(arguments) == 65
    assert "bad.png is damaged" in capsys.readouterr().err
    assert main([*arguments, "--max-skipped", "1"]) == 0
    assert f"skipped: {tmp_path}/in/bad.png" in capsys.readouterr().out
    shards = open_shards(str(tmp_path / "d"))
    assert shards.count == 5 and shards.manifest.source["skipped"] == [f"{tmp_path}/in/bad.png"]


def test_more_skipped_images_than_allowed_end_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = folder_with_a_bad_file(tmp_path)
    put(tmp_path / "in" / "worse.png", b"")
    assert main([*arguments, "--dest", str(tmp_path / "d"), "--max-skipped", "1"]) == 65
    assert "more images than --max-skipped 1 cannot be decoded" in capsys.readouterr().err


def test_a_full_disk_ends_packing_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "d")]) == 73
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and error.startswith("pack: cannot write")
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "d")]) == 0, "it goes on when there is room again"


@pytest.mark.parametrize("scratch", ["beside the shards", "elsewhere"])
def test_a_disk_that_is_full_ends_packing_and_with_more_room_it_goes_on(
    packed: Path, tmp_path: Path, scratch: str
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    arguments = [sys.executable, "-m", "data_pipeline.pack", *PHOTOGRAPHS, "--dest", f"{disk}/d"]
    arguments += ["--scratch", f"{tmp_path}/scratch"] if scratch == "elsewhere" else []
    script = f'"$@"; echo "code $?" >&2; grow 40000; "$@" || exit; cp -r "{disk}/d" "{kept}"'
    done = on_small_disk(disk, 400, script, *arguments)
    assert done.returncode == 0, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("pack: ")]
    assert "No space left on device" in error and f"{disk}/d" in error and "code 73\n" in done.stderr
    assert contents(kept) == contents(packed)


def test_storage_that_is_away_for_longer_than_the_deadline_ends_packing(
    s3_bucket: str, s3_server: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.packing.steps.WRITE_DEADLINE_SECONDS", 2.0)
    s3_server.kill()
    try:
        assert main([*PHOTOGRAPHS, "--dest", f"s3://{s3_bucket}/train"]) == 69
    finally:
        s3_server.start()
    error = capsys.readouterr().err
    where = rf"s3://{s3_bucket}/train/manifest.json"
    assert re.fullmatch(rf"pack: cannot look for {where}: gave up after \d+ s and \d+ tr(y|ies); last: .*\n", error)


def put_forms(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Every kind of source in ``folder``/raw: how many images the packer finds, and what to tell it."""
    raw, train, validation = (
        folder / "raw",
        ["--size", "8", "--split", "train"],
        ["--size", "8", "--split", "validation"],
    )
    kaggle = raw / "kaggle/ILSVRC/Data/CLS-LOC"
    files, pixels = training_files(), [random_pixels(8, 8, seed) for seed in range(20)]
    train_tar(raw / "train.tar")
    for wnid, images in files.items():
        for name, data in images.items():
            put(raw / "extracted" / wnid / name, data)
            put(kaggle / "train" / wnid / name, data)
    flat = {f"ILSVRC2012_val_{i:08d}.JPEG": image_bytes(random_pixels(9, 11, i)) for i in range(1, 6)}
    for name, data in flat.items():
        put(kaggle / "val" / name, data)
    put(raw / "val.tar", tar_bytes(flat))
    truth = "".join(f"{500 + i}\n" for i in range(5)).encode()
    put(raw / "devkit.tar.gz", tar_bytes({"x/ILSVRC2012_validation_ground_truth.txt": truth}, "w:gz"))
    table = "".join(f"{name.removesuffix('.JPEG')},{WNIDS[0]} 1 2 3 4 {WNIDS[0]} 5 6 7 8 \n" for name in flat)
    put(raw / "kaggle" / "LOC_val_solution.csv", f"ImageId,PredictionString\n{table}".encode())
    put(raw / "kaggle" / "LOC_synset_mapping.txt", b"n01440764 tench")
    rows = [(data, IMAGENET_CLASSES.index(wnid)) for wnid, images in files.items() for data in images.values()]
    images_column = [{"bytes": data, "path": "x.JPEG"} for data, _ in rows]
    hugging = pyarrow.table({"image": images_column, "label": [label for _, label in rows]})
    put(raw / "hugging" / "train-00000-of-00001.parquet", b"")
    pyarrow.parquet.write_table(hugging, raw / "hugging" / "train-00000-of-00001.parquet", row_group_size=5)
    planar = np.stack(pixels).transpose(0, 3, 1, 2).reshape(20, -1)
    for number in range(1, 11):
        part = slice(2 * number - 2, 2 * number)
        batch = {"data": planar[part], "labels": list(range(981, 1001))[part], "mean": np.zeros(192)}
        put(raw / "batches" / f"train_data_batch_{number}", pickle.dumps(batch, 2))
    put(raw / "npz" / "val_data.npz", b"")
    np.savez(raw / "npz" / "val_data.npz", data=planar, labels=np.arange(1, 21))
    put(raw / "train_8x8.tar", tar_bytes({f"train_8x8/{i}.png": image_bytes(image) for i, image in enumerate(pixels)}))
    np.save(raw / "train_8x8.npy", np.stack(pixels))
    cifar = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 9]}, 2)
    put(raw / "cifar.tar.gz", tar_bytes({f"c/{name}": cifar for name in CIFAR10_FILES["train"]}, "w:gz"))
    put(raw / "cifar" / "test_batch", cifar)
    faces = {f"faces/{i:06d}.jpg": image_bytes(random_pixels(218, 178, i), "JPEG") for i in (1, 2, 162_771)}
    put(raw / "faces.zip", zip_bytes(faces))
    for name, data in faces.items():
        put(raw / name, data)
    put(raw / "photos" / "deep" / "a.png", image_bytes(pixels[0]))
    return {
        "tar of tars": (12, ["--source", "imagenet-train", "--input", "raw/train.tar", *train]),
        "extracted": (12, ["--source", "imagenet-folder", "--input", "raw/extracted", *train]),
        "Kaggle": (12, ["--source", "imagenet-kaggle", "--input", "raw/kaggle", *train]),
        "Kaggle's validation": (5, ["--source", "imagenet-kaggle", "--input", "raw/kaggle", *validation]),
        "validation": (
            5,
            ["--source", "imagenet-validation", "--input", "raw/val.tar", "--labels", "raw/devkit.tar.gz", *validation],
        ),
        "parquet": (12, ["--source", "imagenet-parquet", "--input", "raw/hugging", *train]),
        "pickles": (20, ["--source", "imagenet-chrabaszcz", "--input", "raw/batches", *train]),
        "npz": (20, ["--source", "imagenet-chrabaszcz", "--input", "raw/npz", *validation]),
        "PNG files in a tar": (20, ["--source", "imagenet-oord", "--input", "raw/train_8x8.tar", *train]),
        "npy": (20, ["--source", "imagenet-oord", "--input", "raw/train_8x8.npy", *train]),
        "CIFAR-10": (10, ["--source", "cifar10", "--input", "raw/cifar.tar.gz", "--size", "32", "--split", "train"]),
        "its folder": (2, ["--source", "cifar10", "--input", "raw/cifar", "--size", "32", "--split", "validation"]),
        "faces": (2, ["--source", "celeba", "--input", "raw/faces.zip", *train]),
        "a folder of faces": (1, ["--source", "celeba", "--input", "raw/faces", *validation]),
        "any folder": (1, ["--source", "folder", "--input", "raw/photos", *train]),
    }


def test_every_source_on_s3_gives_the_same_bytes_as_on_the_disk(tmp_path: Path, s3_bucket: str) -> None:
    forms = put_forms(tmp_path)
    for path in (tmp_path / "raw").rglob("*"):
        if path.is_file():
            Store(f"s3://{s3_bucket}", 60.0).write(str(path.relative_to(tmp_path)), path.read_bytes())
    for form, (count, arguments) in forms.items():
        for root, dest in ((f"{tmp_path}", "disk"), (f"s3://{s3_bucket}", "s3")):
            placed = [f"{root}/{text}" if text.startswith("raw/") else text for text in arguments]
            assert main([*placed, "--workers", "1", "--dest", f"{tmp_path}/{dest}/{form}"]) == 0
        assert contents(tmp_path / "disk" / form) == contents(tmp_path / "s3" / form)
        assert open_shards(f"{tmp_path}/disk/{form}").count == count
        assert verify(open_shards(f"{tmp_path}/disk/{form}")) == []


def test_oddities_are_counted_in_the_report_and_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = random_pixels(9, 7, 0)
    files = {
        "plain.jpg": image_bytes(pixels, "JPEG"),
        "cmyk.jpg": image_bytes(pixels, "JPEG", "CMYK"),
        "gray.jpg": image_bytes(pixels, "JPEG", "L"),
        "gray2.jpg": image_bytes(pixels, "JPEG", "L"),
        "n02105855_2933.JPEG": image_bytes(pixels, "PNG"),
        "rotated.jpg": image_bytes(pixels, "JPEG", exif=exif),
        "truncated.jpg": image_bytes(pixels, "JPEG")[:-40],
    }
    for name, data in files.items():
        put(tmp_path / "in" / name, data)
    arguments = ["--source", "folder", "--input", str(tmp_path / "in"), "--size", "8", "--split", "train"]
    assert main([*arguments, "--dest", str(tmp_path / "d"), "--max-skipped", "1"]) == 0
    expected = {"cmyk": 1, "exif_rotation_ignored": 1, "gray": 2, "png_named_jpeg": 1}
    shards = open_shards(str(tmp_path / "d"))
    assert shards.manifest.source["oddities"] == expected and shards.count == 6
    report = "".join(f"  {oddity}: {count}\n" for oddity, count in expected.items())
    assert f"{report}  skipped: {tmp_path}/in/truncated.jpg\n" in capsys.readouterr().out


def test_tasks_killed_at_any_moment_are_run_again_with_the_bytes_of_one(packed: Path, tmp_path: Path) -> None:
    shared = [*PHOTOGRAPHS, "--dest", str(tmp_path / "d"), "--scratch", str(tmp_path / "scratch"), "--task-count", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for wanted in ("scratch/*/group-000001.json", "d/_packing/plan.json"):
        command = [sys.executable, "-m", "data_pipeline.pack", *shared, "--task-index", "1"]
        process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        while process.poll() is None and not list(tmp_path.glob(wanted)):
            time.sleep(0.001)
        process.kill()
        process.wait()
    codes = []
    while 0 not in codes[-2:]:
        codes += [main([*shared, "--task-index", str(task)]) for task in (0, 1)]
        assert set(codes) <= {0, 75} and len(codes) <= 6
    assert contents(tmp_path / "d") == contents(packed)


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "cmd:cat x.tar", "filecache::s3://a/b", "s3://user:secret@bucket/x"])
def test_urls_that_run_programs_or_hold_secrets_end_with_code_77(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "0.png", image_bytes(random_pixels(8, 8, 0)))
    arguments = ["--source", "folder", "--size", "8", "--split", "train"]
    assert main([*arguments, "--input", url, "--dest", str(tmp_path / "d")]) == 77
    assert main([*arguments, "--input", str(tmp_path), "--dest", url]) == 77
    assert verify_main([url]) == 77
    error = capsys.readouterr().err
    assert error.count("\n") == 3 and "secret@" not in error


def test_a_protocol_that_does_not_belong_to_the_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = train_tar(tmp_path / "ILSVRC2012_img_train.tar")
    arguments = ["--source", "imagenet-train", "--input", str(archive), "--size", "8", "--split", "train"]
    assert main([*arguments, "--protocol", "celeba", "--dest", str(tmp_path / "d")]) == 2
    assert "images of imagenet are resized by adm or chrabaszcz or oord" in capsys.readouterr().err


def test_a_changed_source_is_not_mixed_into_an_unfinished_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*folder_with_a_bad_file(tmp_path), "--dest", str(tmp_path / "d")]
    assert main(arguments) == 65  # leaves the beginnings
    (tmp_path / "in" / "bad.png").unlink()
    assert main(arguments) == 2
    assert "unfinished packing of another data set or of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0"),
        (["--task-index", "2", "--task-count", "2"], "--task-index 2: must be 0 to 1"),
        (["--max-skipped", "-1"], "--max-skipped -1"),
        (["--dest", "s3://bucket/x", "--task-count", "2"], "needs? a --scratch folder"),
    ],
)
def test_a_workforce_that_makes_no_sense_is_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], s3_bucket: str
) -> None:
    arguments = [argument.replace("bucket", s3_bucket) for argument in arguments]
    assert main([*PHOTOGRAPHS, "--dest", str(tmp_path / "d"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("count", "limit"), [(1, 8192), (512, 1), (513, 512), (12000, 8192), (100_000, 8192)])
def test_shards_are_whole_blocks_of_about_equal_number(count: int, limit: int) -> None:
    bounds = shard_bounds(count, limit)
    assert bounds[0][0] == 0 and bounds[-1][1] == count
    assert all(end == begin for (_, end), (begin, _) in zip(bounds, bounds[1:], strict=False))
    assert all(begin % 512 == 0 for begin, _ in bounds)
    assert all(0 < end - begin <= max(limit, 512) for begin, end in bounds)


def test_classes_of_all_of_imagenet_are_its_thousand() -> None:
    assert set(WNIDS) <= set(IMAGENET_CLASSES)


def test_a_container_s_user_without_a_name_can_pack_to_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_000_930_000)
    workforce = Workforce(workers=1, scratch=None, task_index=0, task_count=1, max_skipped=0)
    folder = workspace_of(Store("memory://bucket/set", 1.0), "0" * 64, workforce)
    assert folder.name == "pack-1000930000-0000000000000000"
