"""Is what ranks tell each other theirs, and is what they say checked before it is believed?"""

import json
from datetime import timedelta

import pytest
import torch.distributed

from trainer.errors import HANG
from trainer.faults.signed_store import SIGNATURE_BYTES, SignedStore
from trainer.faults.watchdog import LARGEST_REASON_CHARACTERS, Verdict, verdict_from


@pytest.fixture
def stores() -> tuple[torch.distributed.TCPStore, torch.distributed.TCPStore]:
    """The store of a job, and a stranger's connection to it."""
    ours = torch.distributed.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    return ours, torch.distributed.TCPStore("127.0.0.1", ours.port, None, False, timedelta(seconds=5))


def test_only_messages_with_the_secret_of_the_job_are_there(
    stores: tuple[torch.distributed.TCPStore, torch.distributed.TCPStore],
) -> None:
    ours, stranger = stores
    store, other_rank = SignedStore(ours, b"secret"), SignedStore(ours, b"secret")
    assert store.get("verdict") is None
    store.set("verdict", "ends")
    assert other_rank.get("verdict") == "ends"
    for forged in (b"", b"0", json.dumps({"reason": "mine", "code": 0}).encode(), bytes(SIGNATURE_BYTES) + b"mine"):
        stranger.set("verdict", forged)
        assert other_rank.get("verdict") is None
    SignedStore(stranger, b"another").set("verdict", "ends")
    assert other_rank.get("verdict") is None
    store.set("beat/1", "7")
    stranger.set("verdict", stranger.get("beat/1"))  # signed, but for another name
    assert other_rank.get("verdict") is None


@pytest.mark.parametrize(
    "said",
    ["", "0", "null", "[]", "{}", "\ud800", '{"reason": 1, "code": 74}', '{"reason": "x"}']
    + [json.dumps({"reason": "x", "code": code}) for code in (0, -1, 256, True, 74.0, "74", None)],
)
def test_a_verdict_that_cannot_be_understood_is_a_lost_rank(said: str) -> None:
    assert verdict_from(said).code == HANG


def test_a_verdict_arrives_as_it_was_given() -> None:
    given = Verdict("rank 1 on \u00fcber: a checkpoint cannot be written", 74)
    assert verdict_from(given.as_text()) == given
    assert len(verdict_from(Verdict("x" * 100_000, 74).as_text()).reason) == LARGEST_REASON_CHARACTERS
