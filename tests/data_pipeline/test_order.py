"""Is every sample seen exactly once an epoch, in one order, whatever the ranks, batches and interruptions?"""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import StoredOrder, TrainingOrder, Window, permutation, rank_share, usable_lanes

BLOCKS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def samples_at(order: TrainingOrder | StoredOrder, windows: list[Window], positions: range) -> list[tuple[int, int]]:
    """(block, row) at each position, from the windows that say they come there; a position may come only once."""
    found: dict[int, tuple[int, int]] = {}
    for window in windows:
        places, rows = window.positions.tolist(), order.rows(window).tolist()
        assert places[0] == window.first and places[-1] == window.last and found.keys().isdisjoint(places)
        found |= {place: (window.block, row) for place, row in zip(places, rows, strict=True)}
    return [found[position] for position in positions]


def windows_until(order: TrainingOrder, start: int, stride: int, stop: int) -> list[Window]:
    windows = []
    for window in order.windows(start, stride):
        if window.first >= stop:
            break
        windows.append(window)
    return windows


def slow_sequence(counts: list[int], seed: int, lanes: int, epochs: int) -> list[tuple[int, int]]:
    """The order written down naively: list the line, cut it into lanes, shuffle windows, deal out lane by lane."""
    sequence = []
    count = sum(counts)
    lanes = usable_lanes(lanes, count, max(counts))
    for epoch in range(epochs):
        line = [(block, row) for block in permutation(len(counts), seed, epoch, 1) for row in range(counts[block])]
        cuts = [0]
        for lane in range(lanes):
            cuts.append(cuts[-1] + count // lanes + (lane < count % lanes))
        shuffled, window = [], 0
        for lane in range(lanes):
            stretch = line[cuts[lane] : cuts[lane + 1]]
            out = []
            while stretch:
                run = [item for item in stretch if item[0] == stretch[0][0]]
                out += [run[i] for i in permutation(len(run), seed, epoch, 2, window)]
                stretch, window = stretch[len(run) :], window + 1
            shuffled.append(out)
        sequence += [shuffled[i % lanes][i // lanes] for i in range(count)]
    return [(int(block), row) for block, row in sequence]


@settings(max_examples=100, deadline=None)
@given(counts=BLOCKS, seed=st.integers(0, 2**40), lanes=st.integers(1, 30))
def test_order_is_the_naive_one_and_each_epoch_a_permutation(counts: list[int], seed: int, lanes: int) -> None:
    order, count = TrainingOrder(counts, seed=seed, lanes=lanes), sum(counts)
    fast = samples_at(order, windows_until(order, 0, 1, 3 * count), range(3 * count))
    assert fast == slow_sequence(counts, seed, lanes, 3)
    everything = [(block, row) for block, rows in enumerate(counts) for row in range(rows)]
    for epoch in range(3):
        assert sorted(fast[epoch * count : (epoch + 1) * count]) == everything


@settings(max_examples=100, deadline=None)
@given(
    counts=BLOCKS,
    lanes=st.integers(1, 30),
    micro_batch=st.integers(1, 9),
    kills=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=6),
)
def test_interrupted_runs_on_changing_ranks_continue_the_single_rank_sequence(
    counts: list[int], lanes: int, micro_batch: int, kills: list[tuple[int, int]]
) -> None:
    """kills: (ranks, steps) of each life of the run."""
    seed = 7
    total = sum(ranks * steps for ranks, steps in kills) * micro_batch
    expected = slow_sequence(counts, seed, lanes, total // sum(counts) + 1)
    consumed = 0
    for ranks, steps in kills:
        order = TrainingOrder(counts, seed=seed, lanes=lanes)  # a new process
        stop = consumed + ranks * micro_batch * steps
        for rank in range(ranks):
            positions = range(consumed + rank, stop, ranks)
            windows = windows_until(order, consumed + rank, ranks, stop)
            assert [w.first for w in windows] == sorted(w.first for w in windows)
            assert len({w.key for w in windows}) == len(windows), "a rank reads what it needs and nothing twice"
            assert samples_at(order, windows, positions) == expected[consumed + rank : stop : ranks]
        consumed = stop


@given(count=st.integers(1, 300), ranks=st.integers(1, 40))
def test_shares_of_ranks_cover_everything_once(count: int, ranks: int) -> None:
    shares = [range(*rank_share(count, rank, ranks)) for rank in range(ranks)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(counts=BLOCKS, data=st.data())
def test_stored_order_reads_the_blocks_in_a_row(counts: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, sum(counts) - 1))
    stop = data.draw(st.integers(start + 1, sum(counts)))
    order = StoredOrder(counts)
    everything = [(block, row) for block, rows in enumerate(counts) for row in range(rows)]
    found = samples_at(order, list(order.windows(start, stop)), range(start, stop))
    assert found == everything[start:stop]


def test_few_lanes_are_kept_whole_blocks_long() -> None:
    assert usable_lanes(240, 1_281_167, 512) == 240
    assert usable_lanes(240, 12_000, 512) == 20  # 23 would fit; 20 is the next divisor
    assert usable_lanes(240, 100, 512) == 1
    assert usable_lanes(7, 512 * 6, 512) == 1


def test_ranks_that_divide_the_lanes_share_no_lane() -> None:
    order = TrainingOrder([64] * 64, seed=0, lanes=8)
    blocks_read = [len(windows_until(order, rank, 4, order.count)) for rank in range(4)]
    assert sum(blocks_read) == len(order.layout(0).block)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_permutes(n: int) -> None:
    assert sorted(permutation(n, 1, 2)) == list(range(n))


def test_order_has_not_changed_since_it_was_published() -> None:
    """Golden digest: runs resume with this order, so a new numpy or an edit must not change it unnoticed."""
    order = TrainingOrder([512] * 40 + [100], seed=20180615, lanes=16)
    positions = range(0, 3 * order.count, 7)
    samples = samples_at(order, windows_until(order, 0, 7, 3 * order.count), positions)
    digest = hashlib.sha256(np.array(samples, dtype="<i8").tobytes()).hexdigest()
    assert digest == "6cb54b554636d308c8dcbd20936014c6e85fa29bca209cbd4c1e9c70e5e69108"
