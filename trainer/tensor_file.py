"""How do tensors get into a safetensors file and out of it, in one pass over its bytes, with their checksum?

The safetensors library builds the content of a file in memory before it is written. When it reads, it copies each
tensor out of the content. A rank's share of a checkpoint is too large for such copies. Here tensors are written from
where they are, and tensors that were read are views of what was read. The bytes of a file are the same as the
library's, so other programs can read it, and nothing in it can execute.

A file has three parts: the length of the header (8 bytes, little-endian), the header, and the tensors in the order of
their names. The header is JSON, with spaces up to a multiple of 8 bytes. For each name it has the type, the shape, and
where the tensor begins and ends, in bytes after the header.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.storage import PIECE_BYTES, Store
from trainer.errors import CheckpointError

REQUEST_BYTES = 16 * PIECE_BYTES
"""How much is read at once. A reader holds this much memory beside the tensors."""


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    name: str
    bytes: int
    sha256: str


def write_tensors(store: Store, path: str, tensors: dict[str, Tensor]) -> FileEntry:
    """Write contiguous fp32 tensors of the host as one file of the store, without copying them. Raises DataError."""
    checksum = hashlib.sha256()

    def pieces() -> Iterator[memoryview]:
        nonlocal checksum
        checksum = hashlib.sha256()  # after a failure the store asks for all pieces again
        for piece in _pieces(tensors):
            checksum.update(piece)
            yield piece

    size = store.write_pieces(path, pieces)
    return {"name": path.rpartition("/")[2], "bytes": size, "sha256": checksum.hexdigest()}


def read_tensors(store: Store, path: str, entry: FileEntry) -> dict[str, Tensor] | None:
    """The fp32 tensors of a file by name, in the file's order; None if the file is missing or differs from its entry.

    They are views of one buffer, which is as large as the file. Raises DataError if the store cannot be read, and
    CheckpointError if the file matches its entry and holds something other than fp32 tensors.
    """
    size = entry["bytes"]
    if not store.exists(path) or store.size(path) != size:
        return None
    content, checksum = bytearray(size), hashlib.sha256()
    for begin in range(0, size, REQUEST_BYTES):
        end = min(begin + REQUEST_BYTES, size)
        content[begin:end] = store.read(path, begin, end)
        checksum.update(memoryview(content)[begin:end])
    if checksum.hexdigest() != entry["sha256"]:
        return None
    try:
        return dict(_views(content))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{store.url_of(path)}: is not a safetensors file of fp32 tensors ({error})") from error


def is_as_written(store: Store, path: str, entry: FileEntry) -> bool:
    """Whether the store gives the bytes of that entry back. Raises DataError.

    On this machine's disks the system is asked to read them from the disk, and not from memory.
    """
    store.forget(path)
    if store.size(path) != entry["bytes"]:
        return False
    checksum = hashlib.sha256()
    for begin in range(0, entry["bytes"], REQUEST_BYTES):
        checksum.update(store.read(path, begin, min(begin + REQUEST_BYTES, entry["bytes"])))
    return checksum.hexdigest() == entry["sha256"]


def write_small_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors of any type, outside of checkpoints. Raises OSError."""
    path.write_bytes(safetensors.torch.save(tensors))


def _pieces(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The content of a file, in pieces that fit into the processor's cache: the checksum reads each of them, too."""
    header: dict[str, Any] = {}
    begin = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu", name
        end = begin + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in sorted(tensors):
        raw = tensors[name].detach().view(-1).view(torch.uint8).numpy()
        for offset in range(0, len(raw), PIECE_BYTES):
            yield raw[offset : offset + PIECE_BYTES].data


def _views(content: bytearray) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the content of a file, as a view. Raises ValueError, TypeError, KeyError or RecursionError."""
    if len(content) < 8:
        raise ValueError("it is too short")
    data = 8 + int.from_bytes(content[:8], "little")
    if data > len(content):
        raise ValueError("its header is longer than the file")
    header = json.loads(content[8:data])
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    expected = 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), shape = about["data_offsets"], about["shape"]
        sizes = [begin, end, *shape]
        if about["dtype"] != "F32" or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"{name} is not an fp32 tensor")
        count = math.prod(shape)
        # Tensors follow one another without gaps and overlaps, so that each byte belongs to exactly one.
        if begin != expected or end != begin + 4 * count or data + end > len(content):
            raise ValueError(f"{name} is not where it should be")
        expected = end
        flat = torch.empty(0)  # frombuffer makes no empty tensors
        if count:
            flat = torch.frombuffer(content, dtype=torch.float32, count=count, offset=data + begin)
        yield name, flat.view(shape)
    if data + expected != len(content):
        raise ValueError("it holds more than its tensors")
