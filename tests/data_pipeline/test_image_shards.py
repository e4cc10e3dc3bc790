"""Are the samples of other people's shards those that webdataset sees, and everything doubtful refused by name?"""

import io
import pickle

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data_pipeline.image_shards import images_in, samples_in
from data_pipeline.storage import DataError
from tests.support.imagenet_forms import image_bytes, random_pixels, tar_bytes

PNG = [image_bytes(random_pixels(8, 8, seed)) for seed in range(4)]


def test_samples_are_grouped_as_webdataset_groups_them() -> None:
    files = {
        "a/b.c/0.png": PNG[0],
        "a/b.c/0.cls": b"3",
        "deep.png": PNG[1],
        "deep.json": b"{}",
        "deep.CLS": b"7\n",
        "readme": b"no extension",
    }
    data = tar_bytes(files)
    members = ({"__url__": "x", **member} for member in tar_file_iterator(io.BytesIO(data)))
    stock = [sample["__key__"] for sample in group_by_keys(members)]
    found = list(samples_in(io.BytesIO(data), "x"))
    assert [sample.key for sample in found] == stock == ["a/b.c/0", "deep"]
    assert found[1].ignored == ("json",)
    images, labels = images_in(data, 8, "x")
    assert (images == np.stack([random_pixels(8, 8, 0), random_pixels(8, 8, 1)])).all() and labels.tolist() == [3, 7]


def test_shards_written_by_webdataset_are_read() -> None:
    stream = io.BytesIO()
    with webdataset.TarWriter(stream) as writer:
        for number in range(4):
            writer.write({"__key__": f"{number:03d}", "png": random_pixels(8, 8, number), "cls": number})
    images, labels = images_in(stream.getvalue(), 8, "x")
    assert (images == np.stack([random_pixels(8, 8, number) for number in range(4)])).all()
    assert labels.tolist() == [0, 1, 2, 3]


def test_long_names_other_alphabets_and_joined_shards_lose_no_sample() -> None:
    shards = []
    for first in (0, 2):
        stream = io.BytesIO()
        with webdataset.TarWriter(stream) as writer:
            for number, key in ((first, f"{'long' * 30}/{first}"), (first + 1, "猫犬"[first // 2])):
                writer.write({"__key__": key, "png": random_pixels(8, 8, number), "cls": number})
        shards.append(stream.getvalue())
    images, labels = images_in(b"".join(shards), 8, "x")
    assert (images == np.stack([random_pixels(8, 8, number) for number in range(4)])).all()
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.cls": b"1"}, "sample '0' has 0 images"),
        ({"0.png": PNG[0], "0.jpg": PNG[0]}, "sample '0' has 2 images"),
        ({"0.png": PNG[0], "1.png": PNG[1], "0.cls": b"1"}, "the key '0' comes twice, or between members of another"),
        ({"0.png": PNG[0], "1.png": PNG[1], "2.cls": b"1"}, "sample '2' has 0 images"),
        ({"0.png": PNG[0], "0.cls": b"abc"}, "0.cls is 'abc', not a class number"),
        ({"0.png": PNG[0], "0.cls": b"-1"}, "0.cls is '-1', not a class number"),
        ({"0.png": PNG[0], "0.cls": b""}, "0.cls is '', not a class number"),
        ({"0.png": PNG[0], "0.cls": b"9" * 60}, "not a class number"),
        ({"0.png": PNG[0][:-40]}, "0.png is damaged"),
        ({"0.png": PNG[0], **{f"0.x{i}": b"" for i in range(100)}}, "sample '0' has more than 64 members"),
        ({"0.png": b""}, "0.png is not an image"),
        ({"0.png": image_bytes(random_pixels(63, 65, 0))}, "0.png is 65 x 63, not 8 x 8"),
        ({"0.png": image_bytes(np.zeros((9000, 9000, 3), np.uint8))}, "0.png is 9000 x 9000, not 8 x 8"),
    ],
)
def test_what_is_doubtful_is_refused_with_shard_and_name(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match="^s3://b/x.tar: ") as caught:
        images_in(tar_bytes(files), 8, "s3://b/x.tar")
    assert message in str(caught.value) and caught.value.exit_code == 65


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pth", "pickle", "py"])
def test_members_that_could_run_code_are_never_decoded(extension: str) -> None:
    data = tar_bytes({"0.png": PNG[0], f"0.{extension}": pickle.dumps(len)})
    (sample,) = samples_in(io.BytesIO(data), "x")
    assert sample.ignored == (extension,)
    images, _ = images_in(data, 8, "x")
    assert (images[0] == random_pixels(8, 8, 0)).all()


def test_keys_that_climb_out_of_the_folder_are_only_names() -> None:
    (sample,) = samples_in(io.BytesIO(tar_bytes({"../../etc/passwd.png": PNG[0]})), "x")
    assert sample.key == "../../etc/passwd"
