"""Whose is the destination of a packing, and what has been done there?

The first command writes its plan to the destination, and only if there is none: that claims it. Everything that others
could mix up is checked against the claim: each record of a finished shard names the plan, and before each shard and
before the manifest the claim is looked at again, because a store may let two commands claim at the same time. A record
counts if it is what this packing would have written, but for the checksums, whoever wrote it.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.manifest import HEX_64, HEX_256, MANIFEST_NAME, digest_of
from data_pipeline.shard_format import block_bounds, end_of_shard
from data_pipeline.storage import EXIT_CORRUPT, EXIT_REFUSED, DataError, Store, read_json
from data_pipeline.typed_records import Count, parse_record

log = logging.getLogger(__name__)
JOURNAL = "_packing"
PLAN_NAME = f"{JOURNAL}/plan.json"
LARGEST_PLAN_BYTES = 1 << 26
LARGEST_RECORD_BYTES = 1 << 24


@dataclass(frozen=True)
class ShardRecord:
    """The journal entry of a shard that is written: what the manifest says about it."""

    name: str
    bytes: Count
    count: Count
    sha256: str
    blocks: list[tuple[Count, Count, Count, str]]
    """begin, end, count and XXH3 of each."""
    plan: str
    """Digest of the plan that the shard was written for."""


@dataclass(frozen=True)
class Outline:
    """What the plan alone says about a shard."""

    number: int
    name: str
    count: int
    stride: int
    """Bytes of a sample."""
    plan: str
    """Digest of it."""

    def check(self, record: ShardRecord) -> None:
        """ValueError unless the record is of this shard."""
        end = self.count * self.stride
        if (record.name, record.count, record.bytes) != (self.name, self.count, end + len(end_of_shard(end))):
            raise ValueError("it is of another shard")
        if [block[:3] for block in record.blocks] != block_bounds(self.count, self.stride):
            raise ValueError("its blocks are not those of the shard")
        if not HEX_256.fullmatch(record.sha256) or not all(HEX_64.fullmatch(block[3]) for block in record.blocks):
            raise ValueError("it has no checksums")


def claim(store: Store, plan: Mapping[str, Any]) -> None:
    """Make the destination this plan's; DataError if another plan, or something else, is there.

    A finished data set may turn up in the meantime; the caller looks for its manifest afterwards.
    """
    if not store.exists(PLAN_NAME):
        refuse_others(store)
        if store.create(PLAN_NAME, json.dumps(plan, indent=1).encode()):
            try:
                refuse_others(store)  # a whole packing may have begun and ended between the look and the claim
            except DataError:
                store.remove(PLAN_NAME)
                if not store.names(JOURNAL):
                    store.remove(JOURNAL)
                if not store.exists(MANIFEST_NAME):
                    raise
                return
    check_claim(store, digest_of(plan))


def refuse_others(store: Store) -> None:
    """DataError if the destination holds anything but a journal."""
    if others := [name for name in store.names() if name != JOURNAL]:
        raise DataError(f"{store.url} is not empty (it holds {others[0]}); choose another --dest or remove it")


def check_claim(store: Store, digest: str) -> None:
    """DataError unless the destination is claimed by the plan with this digest."""
    if not store.exists(PLAN_NAME):
        raise DataError(f"{store.url}: the unfinished packing was removed by somebody else; run the same command again")
    plan = read_json(store, PLAN_NAME, LARGEST_PLAN_BYTES)
    if not isinstance(plan, dict) or digest_of(plan) != digest:
        raise DataError(
            f"{store.url} holds the unfinished packing of another data set or of other settings; "
            "finish that one, choose another --dest, or remove it"
        )


def record_name(number: int) -> str:
    return f"{JOURNAL}/shard-{number:06d}.json"


def write_record(store: Store, number: int, record: ShardRecord) -> None:
    store.write(record_name(number), json.dumps(asdict(record)).encode())


def read_record(store: Store, shard: Outline) -> ShardRecord | None:
    """The record of a shard that is written; None if there is none of this plan: the shard is then written (again).

    A record that this packing cannot have written is warned of.
    """
    name = record_name(shard.number)
    try:
        record = parse_record(ShardRecord, store.read_whole(name, LARGEST_RECORD_BYTES))
        if record.plan != shard.plan:  # of a packing that was removed
            return None
        shard.check(record)
        if size_of(store, shard.name) != record.bytes:
            raise ValueError(f"{shard.name} is not there, or has another size")
        return record
    except KeyError as error:  # an older version of this program wrote no plan
        odd = f"it has no {error}"
    except DataError as error:
        if error.exit_code != EXIT_CORRUPT:
            raise
        odd = str(error)
    except ValueError as error:
        odd = str(error)
    log.warning("%s is passed over, and its shard is written again: %s", store.url_of(name), odd)
    return None


def size_of(store: Store, name: str) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return store.size(name)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def refuse_links(store: Store) -> None:
    """DataError (exit code 77) if a part of a local journal is a link: what it leads to would be read and written."""
    if not store.is_local:
        return
    for name in (JOURNAL, *(f"{JOURNAL}/{name}" for name in store.names(JOURNAL))):
        if os.path.islink(os.path.join(store.local_path, name)):
            raise DataError(
                f"{store.url_of(name)} is a link, and links are not followed in the journal of a packing; remove it",
                EXIT_REFUSED,
            )
