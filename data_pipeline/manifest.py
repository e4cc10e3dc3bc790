"""What is in a set of shards: names, sizes, checksums, classes, and how the pixels came about.

The manifest is written last, so its presence means that the set is complete. Everything in it is checked when
it is read, because it decides how many bytes are fetched and how they are cut.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from data_pipeline.shard_format import SampleLayout
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, normalised, parse_json
from data_pipeline.typed_records import MOST_CHARACTERS, Count, Level, parse_record
from data_pipeline.wording import counted

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LARGEST_MANIFEST_BYTES = 256 << 20
MOST_READS = 10  # of a manifest that comes out different each time
LARGEST_IMAGE_SIZE = 4096
LARGEST_BLOCK_BYTES = 1 << 30
SMALLEST_SAMPLE_BYTES = 1024  # of a tar file: the header of an image file, and one unit of content
ENCODINGS = ("npy", "files")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}\.tar")
HEX_64, HEX_256 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    bytes: Count
    count: Count
    sha256: str


@dataclass(frozen=True)
class Block:
    """A run of samples inside a shard: what is fetched and checked in one piece."""

    shard: int
    """Index into the manifest's shards."""
    begin: int
    """First byte in the shard."""
    end: int
    """One past the last byte."""
    count: int
    xxh3: str
    """XXH3-64 of these bytes, in hexadecimal."""


@dataclass(frozen=True)
class StoredImage:
    """What of `image` in a stored manifest is read back; the rest is for other readers."""

    size: Count
    encoding: str


@dataclass(frozen=True)
class StoredSource:
    """The entries of `source` in a stored manifest that are read back; others are handed on as they are."""

    form: str = ""
    plan_sha256: str = ""
    packed_with: list[str] = field(default_factory=list)
    oddities: dict[str, Count] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    ignored_members: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredManifest:
    """The JSON document that is stored, as `to_json` makes it."""

    name: str
    split: str
    count: Count
    image: StoredImage
    protocol: dict[str, Any]
    source: dict[str, Any]
    classes: list[str]
    seed: int
    pixel_mean: list[Level]
    pixel_std: list[Level]
    shards: list[Shard]
    blocks: list[tuple[int, int, int, int, str]]


@dataclass(frozen=True)
class Manifest:
    """The description of one packed split."""

    name: str
    """Data set, resolution and protocol. A bits/dim figure should be quoted with these words."""
    split: str
    count: int
    image_size: int
    """Edge of the square RGB images in pixels."""
    encoding: str
    """What a sample is: ``npy`` for this project's raw members of one size, ``files`` for image files of others."""
    protocol: Mapping[str, Any]
    """How images were brought to that size, and by which version of which library."""
    source: Mapping[str, Any]
    """What was packed: form, digests and counts of oddities."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ...; empty when there are none."""
    seed: int
    """Seed of the global shuffle at packing time."""
    pixel_mean: tuple[float, ...]
    """Per channel R, G, B, in levels 0 to 255."""
    pixel_std: tuple[float, ...]
    shards: tuple[Shard, ...]
    blocks: tuple[Block, ...]

    @property
    def layout(self) -> SampleLayout:
        return SampleLayout(self.image_size)

    @property
    def block_counts(self) -> list[int]:
        return [block.count for block in self.blocks]


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as the JSON document that is stored, with its digest."""
    layout = manifest.layout
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": manifest.name,
        "split": manifest.split,
        "count": manifest.count,
        "image": {
            "size": manifest.image_size,
            "encoding": manifest.encoding,
            "channels": 3,
            "dtype": "uint8",
            "layout": "HWC",
            **(offsets_of(layout) if manifest.encoding == "npy" else {}),
        },
        "protocol": dict(manifest.protocol),
        "source": dict(manifest.source),
        "classes": list(manifest.classes),
        "seed": manifest.seed,
        "pixel_mean": list(manifest.pixel_mean),
        "pixel_std": list(manifest.pixel_std),
        "shards": [{"name": s.name, "bytes": s.bytes, "count": s.count, "sha256": s.sha256} for s in manifest.shards],
        "blocks": [[b.shard, b.begin, b.end, b.count, b.xxh3] for b in manifest.blocks],
    }
    return document | {"digest": digest_of(document)}


def offsets_of(layout: SampleLayout) -> dict[str, int]:
    """Where things are in a sample, for readers other than this program."""
    return {
        "sample_bytes": layout.stride,
        "label_offset": layout.label_offset,
        "pixels_offset": layout.pixels_offset,
    }


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document in its one canonical spelling, ``digest`` itself left out."""
    content = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Publish a complete set of shards. One object, so another reader sees all of it or nothing."""
    document = to_json(manifest)
    blocks = ",\n  ".join(json.dumps(block) for block in document.pop("blocks"))  # one line each
    text = json.dumps(document, indent=1).removesuffix("\n}")
    store.write(MANIFEST_NAME, f'{text},\n "blocks": [\n  {blocks}\n ]\n}}\n'.encode())


def read_manifest(store: Store) -> tuple[Manifest, str]:
    """The manifest below a URL and its digest; ``DataError`` says what is missing or wrong."""
    url = store.url_of(MANIFEST_NAME)
    if not store.exists(MANIFEST_NAME):
        pattern = any(character in store.url for character in "{}*?[]") or store.url.endswith(".tar")
        shards = [name for name in store.names() if name.endswith(".tar")]
        if shards and not store.url.endswith(".tar"):
            raise DataError(
                f"{store.url} holds {counted(len(shards), 'shard')} but no {MANIFEST_NAME}, so it is not complete: "
                "let the packing command that makes it finish"
            )
        missing = store.missing_part() or f"there is no {MANIFEST_NAME}"
        missing += " (give the folder of the shards, not their names or a pattern)" if pattern else ""
        raise DataError(f"no shards at {store.url}: {missing}; pack them first or correct the URL")
    document, right = read_document(store)
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{url} has format version {repr(version)[:40]} and this program reads version {FORMAT_VERSION}; "
            "remove the data set and pack it again, or use the version of the program that wrote it"
        )
    if not right:
        raise DataError(
            f"{url} does not match its own digest: it was edited or damaged; put back the one that was packed, "
            "or remove the data set and pack it again",
            EXIT_CORRUPT,
        )
    try:
        manifest = from_json(document)
        check(manifest)
    except KeyError as error:
        raise DataError(
            f"{url} has no {error}: another version of this program wrote it; remove the data set and pack it again",
            EXIT_CORRUPT,
        ) from error
    except ValueError as error:
        raise DataError(f"{url} is not a valid manifest: {str(error)[:MOST_CHARACTERS]}", EXIT_CORRUPT) from error
    if manifest.count == 0:
        raise DataError(f"{store.url} holds no images (count 0)")
    return manifest, str(document["digest"])


def read_document(store: Store) -> tuple[dict[str, Any], bool]:
    """The stored document, and whether it matches its digest. A wrong one is read again until it comes twice.

    Raises DataError when what is stored is not JSON.
    """
    before = None
    for attempt in range(MOST_READS):
        data = store.read_whole(MANIFEST_NAME, LARGEST_MANIFEST_BYTES)
        final = data == before or attempt == MOST_READS - 1
        before = data
        try:
            document = parse_json(data, store.url_of(MANIFEST_NAME))
        except DataError:
            if final:
                raise
            continue
        right = document.get("digest") == digest_of(document)
        if right or final:
            return document, right
    raise AssertionError("the last read is final")


def from_json(document: Mapping[str, Any]) -> Manifest:
    """The inverse of ``to_json``; raises KeyError for an entry that is missing, ValueError for one of another type."""
    stored = parse_record(StoredManifest, json.dumps(document).encode())
    parse_record(StoredSource, json.dumps(stored.source).encode())
    return Manifest(
        name=stored.name,
        split=stored.split,
        count=stored.count,
        image_size=stored.image.size,
        encoding=stored.image.encoding,
        protocol=stored.protocol,
        source=stored.source,
        classes=tuple(stored.classes),
        seed=stored.seed,
        pixel_mean=tuple(stored.pixel_mean),
        pixel_std=tuple(stored.pixel_std),
        shards=tuple(stored.shards),
        blocks=tuple(Block(*block) for block in stored.blocks),
    )


def check(manifest: Manifest) -> None:
    """Raise ValueError unless shards and blocks fit together and stay inside their bounds."""
    if not 1 <= manifest.image_size <= LARGEST_IMAGE_SIZE:
        raise ValueError(f"image size {manifest.image_size} is not in 1..{LARGEST_IMAGE_SIZE}")
    for shard in manifest.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} is not a name for a shard")
        if not HEX_256.fullmatch(shard.sha256):
            raise ValueError(f"shard {shard.name} has no SHA-256")
        if shard.count == 0:
            raise ValueError(f"shard {shard.name} has no samples")
    if manifest.encoding not in ENCODINGS:
        raise ValueError(f"encoding {manifest.encoding!r} is none of {', '.join(ENCODINGS)}")
    stride = manifest.layout.stride
    counted = [0] * len(manifest.shards)
    for number, block in enumerate(manifest.blocks):
        if not 0 <= block.shard < len(manifest.shards):
            raise ValueError(f"block {number} refers to shard {block.shard} of {len(manifest.shards)}")
        shard = manifest.shards[block.shard]
        if not (block.count >= 1 and block.begin >= 0 and block.end <= shard.bytes):
            raise ValueError(f"block {number} is outside its shard {shard.name}")
        size, strided = block.end - block.begin, manifest.encoding == "npy"
        fits = size == block.count * stride if strided else size >= block.count * SMALLEST_SAMPLE_BYTES
        if not fits or not 0 < size <= LARGEST_BLOCK_BYTES:
            raise ValueError(
                f"block {number} has {block.end - block.begin} bytes for {block.count} samples of {stride}"
            )
        if not HEX_64.fullmatch(block.xxh3):
            raise ValueError(f"block {number} has no checksum")
        counted[block.shard] += block.count
    for before, after in pairwise(manifest.blocks):
        if (before.shard, before.end) != (after.shard, after.begin) and (before.shard + 1, 0) != (
            after.shard,
            after.begin,
        ):
            raise ValueError("the blocks do not follow each other")
    if counted != [shard.count for shard in manifest.shards] or sum(counted) != manifest.count:
        raise ValueError(f"the blocks hold {sum(counted)} samples, the manifest says {manifest.count}")


def open_store(url: str, deadline_seconds: float) -> Store:
    """The folder of a data set at a URL."""
    return Store(normalised(url), deadline_seconds)
