"""How does a run of images become the bytes of a WebDataset shard, and back?

One image is one WebDataset sample of two members, ``KEY.cls`` (the label in decimal) and ``KEY.npy`` (uint8,
uncompressed). All images of a shard have one size and all keys one length, so every sample takes the same
number of bytes and a run of samples is a strided array: no tar header is parsed on the way to training.
"""

import io
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

BLOCK_IMAGES = 512
KEY_DIGITS = 9
LABEL_DIGITS = 8
TAR_BLOCK = tarfile.BLOCKSIZE
CHECKSUM = slice(148, 156)


@dataclass(frozen=True)
class SampleLayout:
    """Where things are inside one sample of square RGB images; all in bytes."""

    image_size: int
    """Edge in pixels."""

    @property
    def pixel_bytes(self) -> int:
        return self.image_size * self.image_size * 3

    @property
    def label_offset(self) -> int:
        """The decimal digits of the label, ended by a zero byte."""
        return TAR_BLOCK

    @property
    def pixels_offset(self) -> int:
        """Behind two tar headers, the label's block and the header of the npy file."""
        return 3 * TAR_BLOCK + len(npy_header(self.image_size))

    @property
    def stride(self) -> int:
        """From one sample to the next."""
        return -(-(self.pixels_offset + self.pixel_bytes) // TAR_BLOCK) * TAR_BLOCK

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """uint8 [n, S * S * 3], a view of samples uint8 [n, stride]."""
        return samples[:, self.pixels_offset : self.pixels_offset + self.pixel_bytes]

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """int64 [n] of samples uint8 [n, stride]."""
        text = np.ascontiguousarray(samples[:, self.label_offset : self.label_offset + LABEL_DIGITS].T)
        labels = np.zeros(len(samples), np.int64)
        for column in text:
            if not column.any():
                break
            labels = np.where(column == 0, labels, labels * 10 + (column - ord("0")))
        return labels


def encode_samples(
    keys: np.ndarray, labels: np.ndarray, images: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """The bytes of samples, uint8 [n, stride], exactly as ``webdataset.TarWriter`` writes them.

    keys, labels: int64 [n]; images: uint8 [n, S, S, 3]. ``out`` takes the result, if given. Python's tarfile makes the
    headers of one sample. Their keys, labels and checksums are then replaced for all samples at once. So writing costs
    a hundredth of decoding, and no process needs to import webdataset, which would import torch.
    """
    layout = SampleLayout(images.shape[1])
    samples = np.empty((len(images), layout.stride), np.uint8) if out is None else out
    headers, pixels_end = samples[:, : layout.pixels_offset], layout.pixels_offset + layout.pixel_bytes
    digits = decimal_digits(labels)
    for length in np.unique(digits).tolist():
        here = np.flatnonzero(digits == length)
        headers[here] = template(images.shape[1], 10 ** (length - 1))
        headers[here[:, None], layout.label_offset + np.arange(length)] = decimals(labels[here], length)
    for start in (0, 2 * TAR_BLOCK):
        header = headers[:, start : start + TAR_BLOCK]
        header[:, :KEY_DIGITS] = decimals(keys, KEY_DIGITS)
        header[:, CHECKSUM] = ord(" ")
        header[:, CHECKSUM.start : CHECKSUM.start + 6] = octals(header.sum(axis=1, dtype=np.int64), 6)
        header[:, CHECKSUM.start + 6] = 0
    samples[:, layout.pixels_offset : pixels_end] = images.reshape(len(images), -1)
    samples[:, pixels_end:] = 0
    return samples


def decode_samples(data: bytes | memoryview, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, S * S * 3] and labels int64 [n] of a run of samples; the images are a view of ``data``."""
    layout = SampleLayout(image_size)
    samples = np.frombuffer(data, np.uint8).reshape(-1, layout.stride)
    return layout.pixels(samples), layout.labels(samples)


def end_of_shard(sample_bytes: int) -> bytes:
    """What follows the samples of a tar file: two empty blocks, filled up to a whole record."""
    total = -(-(sample_bytes + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    return bytes(total - sample_bytes)


def block_bounds(count: int, stride: int) -> list[tuple[int, int, int]]:
    """First byte, end and number of samples of each block of a shard with so many samples."""
    edges = [*range(0, count, BLOCK_IMAGES), count]
    return [(first * stride, last * stride, last - first) for first, last in pairwise(edges)]


@lru_cache(maxsize=32)
def template(image_size: int, label: int) -> np.ndarray:
    """What comes before the pixels in a sample with key 0 and the given label."""
    text, layout = str(label).encode(), SampleLayout(image_size)
    members = {"cls": len(text), "npy": len(npy_header(image_size)) + layout.pixel_bytes}
    headers = []
    for suffix, size in members.items():
        info = tarfile.TarInfo(f"{'0' * KEY_DIGITS}.{suffix}")
        info.size, info.mtime, info.mode, info.uname, info.gname = size, 0, 0o444, "root", "root"
        headers.append(info.tobuf(tarfile.USTAR_FORMAT))
    data = headers[0] + text.ljust(TAR_BLOCK, b"\0") + headers[1] + npy_header(image_size)
    return np.frombuffer(data, np.uint8)


@lru_cache(maxsize=32)
def npy_header(image_size: int) -> bytes:
    """The header numpy puts before the pixels of one image."""
    stream = io.BytesIO()
    np.save(stream, np.zeros((image_size, image_size, 3), np.uint8), allow_pickle=False)
    return stream.getvalue()[: -image_size * image_size * 3]


def decimal_digits(values: np.ndarray) -> np.ndarray:
    """How many decimal digits each value has."""
    digits = np.ones(len(values), np.int64)
    for power in range(1, LABEL_DIGITS):
        digits += values >= 10**power
    return digits


def decimals(values: np.ndarray, length: int) -> np.ndarray:
    """ASCII decimals with leading zeros, uint8 [n, length]."""
    powers = 10 ** np.arange(length - 1, -1, -1, dtype=np.int64)
    return (values[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def octals(values: np.ndarray, length: int) -> np.ndarray:
    """ASCII octals with leading zeros, uint8 [n, length]."""
    shifts = 3 * np.arange(length - 1, -1, -1, dtype=np.int64)
    return (((values[:, None] >> shifts) & 7) + ord("0")).astype(np.uint8)
