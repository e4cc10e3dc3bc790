"""What does a compressed picture's file hold, and is a file such a one, complete and undamaged?

A header of fixed length, the lengths of the streams (4 bytes each), the streams. All numbers are little-endian.
"""

import hashlib
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from trainer.errors import DamagedPicture, UsageError
from trainer.safe_files import open_to_read

MAGIC = b"\x89ITP\r\n"
"""Its first byte is no text, and its last ones change where line ends are converted."""
FORMAT_VERSION = 1
LARGEST_PICTURE = 1 << 26
"""Pixels that are coded: decoding takes memory for as many as the header says."""
LARGEST_PIXEL = 12
"""Bytes: three values of at least 2^-24."""
STREAM_END = 16
"""Bytes that a stream may have beyond those of its values."""
IS_GRAY, HAS_CLASS = 1, 2
_HEADER = struct.Struct("<6sBBIIII16s8s8s")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class CompressedPicture:
    """What a file holds."""

    height: int
    width: int
    is_gray: bool
    label: int | None
    """The class that the model is told."""
    model: bytes
    """Digest of the weights (`weights_digest`), 16 bytes."""
    pixels: bytes
    """Digest of the pixels (`pixels_digest`), 8 bytes."""
    streams: list[bytes]


def weights_digest(state: dict[str, Tensor]) -> bytes:
    """16 bytes that tell models apart: of names, shapes and fp32 values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def pixels_digest(pixels: Tensor) -> bytes:
    """8 bytes of the pixels uint8 [H, W, 3]."""
    return _checksum(pixels.contiguous().numpy().tobytes())


def to_bytes(picture: CompressedPicture) -> bytes:
    """The content of the file."""
    body = b"".join([*(_LENGTH.pack(len(stream)) for stream in picture.streams), *picture.streams])
    flags = IS_GRAY * picture.is_gray | HAS_CLASS * (picture.label is not None)
    sizes = (picture.width, picture.height, picture.label or 0, len(picture.streams))

    def header(checksum: bytes) -> bytes:
        return _HEADER.pack(MAGIC, FORMAT_VERSION, flags, *sizes, picture.model, picture.pixels, checksum)

    return header(_checksum(header(bytes(8)) + body)) + body


def read_compressed(path: Path) -> CompressedPicture:
    """Raises UsageError for a file that cannot be read, is no such file or of another version, DamagedPicture for one
    that is incomplete or changed."""
    try:
        with open_to_read(path.resolve(), largest=LARGEST_PICTURE * LARGEST_PIXEL) as file:
            start = file.read(_HEADER.size)
            if not start.startswith(MAGIC):
                raise UsageError(f"{path}: is not a picture that python -m trainer.compress wrote")
            if len(start) < _HEADER.size:
                raise _damaged(path)
            _, version, flags, width, height, label, num_streams, model, pixels, checksum = _HEADER.unpack(start)
            if version != FORMAT_VERSION:
                raise UsageError(
                    f"{path}: has format {version}, and this version of the trainer reads {FORMAT_VERSION}; "
                    "use the version that wrote it"
                )
            num_pixels = width * height
            if not 0 < num_pixels <= LARGEST_PICTURE or num_streams > num_pixels:
                raise _damaged(path)
            longest = LARGEST_PIXEL * num_pixels + (_LENGTH.size + STREAM_END) * num_streams
            body = file.read(longest + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    ends = [_LENGTH.size * num_streams]
    if checksum != _checksum(start[: -len(checksum)] + bytes(len(checksum)) + body) or len(body) < ends[0]:
        raise _damaged(path)
    for (length,) in _LENGTH.iter_unpack(body[: ends[0]]):
        ends.append(ends[-1] + length)
    if ends[-1] != len(body) or any(end % 4 for end in ends):
        raise _damaged(path)
    return CompressedPicture(
        height=height,
        width=width,
        is_gray=bool(flags & IS_GRAY),
        label=label if flags & HAS_CLASS else None,
        model=model,
        pixels=pixels,
        streams=[body[begin:end] for begin, end in pairwise(ends)],
    )


def _damaged(path: Path) -> DamagedPicture:
    return DamagedPicture(f"{path}: is damaged or incomplete; copy the file again")


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
