"""Do machines meet in pairs once each, and is it the slow machine that is named, not its partners?"""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.links import MAX_ROUNDS, Clock, address_towards, clock_offset, rounds_of_pairs, slow_nodes


@given(st.integers(2, MAX_ROUNDS))
def test_everybody_meets_everybody_once_and_one_at_a_time(count: int) -> None:
    members = list(range(0, 3 * count, 3))
    rounds = rounds_of_pairs(members)
    for pairs in rounds:
        busy = [member for pair in pairs for member in pair]
        assert len(busy) == len(set(busy))
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == sorted((a, b) for a in members for b in members if a < b)


@given(st.integers(MAX_ROUNDS + 1, 60))
def test_with_many_machines_everybody_still_has_many_partners(count: int) -> None:
    met = [pair for pairs in rounds_of_pairs(list(range(count))) for pair in pairs]
    assert len(met) == len(set(met))
    for member in range(count):
        assert sum(member in pair for pair in met) >= MAX_ROUNDS - 1


@given(st.integers(3, 12), st.data())
@settings(deadline=None)
def test_the_slow_machine_is_named_and_not_its_partners(count: int, data: st.DataObject) -> None:
    names = [f"n{number}" for number in range(count)]
    slow = data.draw(st.sampled_from(names))
    links = {
        (a, b): data.draw(st.floats(8, 12)) * (0.05 if slow in (a, b) else 1.0) for a in names for b in names if a < b
    }
    assert list(slow_nodes(links, 0.25)) == [slow]


def test_one_slow_pair_of_good_machines_names_nobody() -> None:
    assert slow_nodes({("a", "b"): 0.1, ("a", "c"): 10.0, ("b", "c"): 10.0}, 0.25) == {}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")),
    ],
)
def test_the_clock_of_this_machine_agrees_with_itself(address: str) -> None:
    clock = Clock()
    assert address_towards(address, clock.port) == address
    assert abs(clock_offset(address, clock.port)) < 5
    clock.close()
    with pytest.raises(OSError, match="refused"):
        clock_offset(address, clock.port)
