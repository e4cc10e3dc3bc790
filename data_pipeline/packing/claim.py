"""Whose is the destination of a packing, and what has been done there?

The first command writes its plan to the destination, and only if there is none: that claims it. Everything that others
could mix up is checked against the claim: each record of a finished shard names the plan, and before each shard and
before the manifest the claim is looked at again, because a store may let two commands claim at the same time.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.manifest import MANIFEST_NAME, digest_of
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, read_json

JOURNAL = "_packing"
PLAN_NAME = f"{JOURNAL}/plan.json"
LARGEST_PLAN_BYTES = 1 << 26
LARGEST_RECORD_BYTES = 1 << 24


@dataclass(frozen=True)
class ShardRecord:
    """The journal entry of a shard that is written: what the manifest says about it."""

    name: str
    bytes: int
    count: int
    sha256: str
    blocks: list[tuple[int, int, int, str]]
    """begin, end, count and XXH3 of each."""
    plan: str
    """Digest of the plan that the shard was written for."""


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


def read_record(store: Store, number: int, plan: str) -> ShardRecord | None:
    """The record of a shard; None if it is none of this plan: the shard is then written (again)."""
    try:
        record = ShardRecord(**read_json(store, record_name(number), LARGEST_RECORD_BYTES))
    except TypeError:
        return None
    except DataError as error:
        if error.exit_code != EXIT_CORRUPT:
            raise
        return None
    return record if record.plan == plan else None
