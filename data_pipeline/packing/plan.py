"""Which data set is to be packed, and is it, or a part of it, at the destination already?

What decides the bytes of the result is the plan. Its digest is the identity of the data set.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.manifest import MANIFEST_NAME, Manifest, read_manifest
from data_pipeline.packing.resize import IMAGENET_VERSIONS, PROTOCOLS, describe
from data_pipeline.packing.source import Source
from data_pipeline.storage import DataError, Store

LARGEST_IMAGE_SIZE = 1024


@dataclass(frozen=True)
class Settings:
    """Everything besides the source that decides the bytes of the result."""

    split: str
    size: int
    protocol: str
    seed: int
    shard_images: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_IMAGE_SIZE:
            raise ValueError(f"--size {self.size}: the edge in pixels must be 1 to {LARGEST_IMAGE_SIZE}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")
        if self.shard_images < 1:
            raise ValueError(f"--shard-images {self.shard_images}: must be at least 1")
        if not self.split.isidentifier():
            raise ValueError(f"--split {self.split!r}: use a word like train or validation")


def plan_of(source: Source, settings: Settings) -> dict[str, Any]:
    """What decides the bytes of the result, as JSON; its digest is the identity of the data set."""
    return {
        "source": {"form": source.form, **source.origin},
        "classes": list(source.classes),
        "protocol": protocol_of(source, settings),
        **{key: value for key, value in asdict(settings).items() if key != "protocol"},
    }


def protocol_of(source: Source, settings: Settings) -> dict[str, Any]:
    """How the images come to their size; raises DataError for a protocol that the source does not have."""
    name = source.protocol or settings.protocol
    imagenet = source.form == "imagenet"
    known = IMAGENET_VERSIONS if imagenet else PROTOCOLS
    if source.protocol is None and name not in known:
        raise DataError(f"--protocol {name}: images of {source.form} are resized by {' or '.join(sorted(known))}")
    return describe(name, resized_here=source.protocol is None, imagenet=imagenet)


def find_finished(store: Store, digest: str) -> Manifest | None:
    """The manifest at the destination if it was packed by the same plan; DataError if by another one."""
    if not store.exists(MANIFEST_NAME):
        return None
    manifest, _ = read_manifest(store)
    if manifest.source.get("plan_sha256") != digest:
        raise DataError(
            f"{store.url} already holds another data set: {manifest.count} images of {manifest.name}, split "
            f"{manifest.split}, seed {manifest.seed}; choose another --dest or remove it"
        )
    return manifest


def damaged_shards(store: Store, manifest: Manifest, named: Sequence[str]) -> list[int]:
    """Numbers of the shards that are missing, have a wrong size, or are named because ``verify`` found them damaged."""
    shards = manifest.shards
    if strange := set(named) - {shard.name for shard in shards}:
        known = f"{shards[0].name} to {shards[-1].name}"
        raise DataError(f"--rewrite {min(strange)}: {store.url} has no such shard, it has {known}")
    sizes = store.walk()
    return [n for n, shard in enumerate(shards) if shard.name in named or sizes.get(shard.name) != shard.bytes]
