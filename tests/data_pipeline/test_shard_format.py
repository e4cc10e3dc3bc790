"""Are shards byte for byte what webdataset writes, and does reading give back what went in?"""

import io

import numpy as np
import pytest
import webdataset

from data_pipeline.shard_format import (
    KEY_DIGITS,
    SampleLayout,
    decode_samples,
    encode_samples,
    end_of_shard,
    npy_header,
)


@pytest.mark.parametrize("size", [1, 7, 8, 32, 64, 100])
def test_encoding_equals_webdatasets_own_writer(size: int) -> None:
    rng = np.random.default_rng(size)
    labels = np.array([0, 9, 10, 99, 100, 999, 1000, 99_999_999, *rng.integers(0, 1000, 20)])
    keys = np.array([0, 10**9 - 1, *rng.integers(0, 10**9, len(labels) - 2)])
    images = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, user="root", group="root", mtime=0) as writer:
        for key, label, image in zip(keys.tolist(), labels.tolist(), images, strict=True):
            writer.write({"__key__": f"{key:0{KEY_DIGITS}d}", "npy": image, "cls": label})
    samples = encode_samples(keys, labels, images)
    assert samples.shape == (len(labels), SampleLayout(size).stride)
    assert samples.tobytes() + end_of_shard(samples.nbytes) == stream.getvalue()
    got_images, got_labels = decode_samples(samples.tobytes(), size)
    assert (got_images.reshape(images.shape) == images).all() and (got_labels == labels).all()


def test_decoding_copies_no_pixels() -> None:
    data = encode_samples(np.arange(2), np.arange(2), np.zeros((2, 8, 8, 3), np.uint8)).tobytes()
    images, _ = decode_samples(data, 8)
    assert np.shares_memory(images, np.frombuffer(data, np.uint8))


def test_the_pixels_of_a_member_are_an_ordinary_npy_file() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    stored = npy_header(4) + image.tobytes()
    assert (np.load(io.BytesIO(stored), allow_pickle=False) == image).all()


def test_sample_sizes_are_those_of_the_design() -> None:
    assert SampleLayout(64).stride == 14336 and SampleLayout(32).stride == 5120
