"""Do the patterns show each query exactly the keys that their definitions name?"""

import pytest
import torch

from models.attention.local_attention import _plan
from models.attention.pattern import Pattern, dilated_1d, fixed_1d, full, local_1d, local_2d, sliding_1d, strided_1d


def mask_of(length: int, sees) -> torch.Tensor:
    return torch.tensor([[bool(sees(i, j)) for j in range(length)] for i in range(length)])


@pytest.mark.parametrize(
    "length, block, memory", [(64, 16, 16), (64, 16, 8), (64, 16, 24), (100, 32, 32), (24, 16, 16), (20, 1, 3)]
)
def test_a_1d_query_sees_its_own_block_causally_and_the_memory_before_it(length: int, block: int, memory: int) -> None:
    expected = mask_of(length, lambda i, j: i // block * block - memory <= j <= i)
    assert torch.equal(local_1d(length, block, memory).mask(), expected)


@pytest.mark.parametrize("length, block, memory", [(96, 32, 24), (40, 16, 5)])
def test_an_encoders_1d_query_sees_memory_on_both_sides(length: int, block: int, memory: int) -> None:
    expected = mask_of(length, lambda i, j: i // block * block - memory <= j < (i // block + 1) * block + memory)
    assert torch.equal(local_1d(length, block, memory, causal=False).mask(), expected)


def test_number_of_visible_keys_at_block_borders() -> None:
    visible = local_1d(1024, 256, 256).mask().sum(1)
    assert [int(visible[i]) for i in (0, 255, 256, 511, 512, 767)] == [1, 256, 257, 512, 257, 512]


SHAPES_2D = [
    (12, 20, (4, 4), (2, 4)),
    (16, 24, (4, 8), (4, 8)),
    (8, 12, (4, 4), (4, 0)),
    (8, 12, (4, 6), (3, 5)),
    (8, 12, (2, 3), (6, 9)),
    (8, 12, (4, 4), (0, 4)),
    (8, 12, (8, 12), (0, 0)),
]


@pytest.mark.parametrize("height, width, query, flange", SHAPES_2D)
def test_a_2d_query_sees_its_block_causally_and_the_flange_above_and_to_the_left(height, width, query, flange) -> None:
    def sees(i: int, j: int) -> bool:
        (row, column), (key_row, key_column) = divmod(i, width), divmod(j, width)
        top, left = row // query[0] * query[0], column // query[1] * query[1]
        inside = top <= key_row < top + query[0] and left <= key_column < left + query[1]
        above = top - flange[0] <= key_row < top and left - flange[1] <= key_column < left + query[1] + flange[1]
        beside = top <= key_row < top + query[0] and left - flange[1] <= key_column < left
        return (inside and j <= i) or above or beside

    assert torch.equal(local_2d(height, width, query, flange).mask(), mask_of(height * width, sees))


@pytest.mark.parametrize("height, width, query, flange", SHAPES_2D)
def test_an_encoders_2d_query_sees_the_flange_on_all_sides(height, width, query, flange) -> None:
    def sees(i: int, j: int) -> bool:
        (row, column), (key_row, key_column) = divmod(i, width), divmod(j, width)
        top, left = row // query[0] * query[0], column // query[1] * query[1]
        rows = range(top - flange[0], top + query[0] + flange[0])
        return key_row in rows and left - flange[1] <= key_column < left + query[1] + flange[1]

    expected = mask_of(height * width, sees)
    assert torch.equal(local_2d(height, width, query, flange, causal=False).mask(), expected)


@pytest.mark.parametrize(
    "length, block, memory, gap, chunks", [(64, 16, 16, 0, 1), (96, 16, 8, 8, 2), (50, 8, 3, 2, 4)]
)
def test_a_dilated_query_sees_its_own_block_causally_and_separated_chunks(length, block, memory, gap, chunks) -> None:
    def sees(i: int, j: int) -> bool:
        start = i // block * block
        firsts = [start - (gap + memory) * (t + 1) for t in range(chunks)]
        return start <= j <= i or any(first <= j < first + memory for first in firsts)

    assert torch.equal(dilated_1d(length, block, memory, gap, chunks).mask(), mask_of(length, sees))


def test_full_attention_is_everything_or_everything_before() -> None:
    assert torch.equal(full(9).mask(), torch.ones(9, 9, dtype=torch.bool).tril())
    assert full(9, causal=False).mask().all()


@pytest.mark.parametrize("length, window", [(20, 4), (21, 4), (5, 16), (9, 1), (9, 9)])
def test_a_sliding_query_sees_the_window_that_ends_with_itself(length: int, window: int) -> None:
    assert torch.equal(sliding_1d(length, window).mask(), mask_of(length, lambda i, j: i - window < j <= i))


@pytest.mark.parametrize("length, stride", [(24, 4), (30, 7), (5, 8), (6, 1)])
def test_a_strided_query_sees_every_stride_th_position_back_from_itself(length: int, stride: int) -> None:
    expected = mask_of(length, lambda i, j: j <= i and (i - j) % stride == 0)
    assert torch.equal(strided_1d(length, stride).mask(), expected)


@pytest.mark.parametrize("length, block, summary, group", [(32, 8, 2, 0), (32, 8, 2, 3), (30, 8, 3, 1), (16, 4, 4, 0)])
def test_a_fixed_query_sees_its_block_and_summaries_of_those_before(length, block, summary, group) -> None:
    def sees(i: int, j: int) -> bool:
        last = block - group * summary
        is_summary = last - summary <= j % block < last and j // block < i // block
        return j <= i and (j // block == i // block or is_summary)

    assert torch.equal(fixed_1d(length, block, summary, group).mask(), mask_of(length, sees))


PATTERNS = [
    sliding_1d(100, 32),
    strided_1d(96, 12),
    strided_1d(100, 7),
    fixed_1d(96, 16, 4),
    fixed_1d(100, 16, 4, group=1),
    local_1d(100, 32, 32),
    local_1d(64, 16, 24),
    dilated_1d(96, 16, 8, 8, 2),
    full(20),
    *(local_2d(*shape) for shape in SHAPES_2D),
    *(local_2d(*shape, causal=False) for shape in SHAPES_2D),
    local_1d(96, 32, 24, causal=False),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_orders_are_permutations_that_agree_with_each_other(pattern: Pattern) -> None:
    everything = torch.arange(pattern.length)
    for order in (pattern.storage_order, pattern.rank, pattern.generation_order):
        assert torch.equal(order.sort().values, everything)
    assert torch.equal(pattern.generation_order[pattern.rank], pattern.storage_order)
    assert torch.equal(pattern.storage_order[pattern.slot_of_position], everything)
    assert sorted(slot for block in pattern.blocks for slot in block.slots) == everything.tolist()
    assert [block.start for block in pattern.blocks] == sorted(block.start for block in pattern.blocks)
    for block in pattern.blocks:
        assert pattern.rank[list(block.slots)].sort().values.tolist() == list(block.slots)
        assert block.step == pattern.step and (block.step == 1 or not block.memory)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_query_sees_itself_and_if_causal_nothing_generated_later(pattern: Pattern) -> None:
    mask = pattern.mask()
    assert mask.diagonal().all()
    in_generation_order = mask[pattern.generation_order][:, pattern.generation_order]
    assert not pattern.causal or not in_generation_order.triu(1).any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_are_counted_exactly(pattern: Pattern) -> None:
    assert pattern.num_pairs == int(pattern.mask().sum())


def test_2d_blocks_are_generated_in_raster_order_and_so_are_positions_inside() -> None:
    order = local_2d(4, 6, (2, 3), (1, 1)).generation_order
    assert order.tolist()[:12] == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]


def test_2d_memory_is_few_runs_of_whole_cells() -> None:
    pattern = local_2d(64, 192, (8, 32), (8, 16))
    cell = 8 * 16
    for block in pattern.blocks:
        assert all(start % cell == 0 and stop % cell == 0 for start, stop in block.memory)
        assert len(block.memory) <= 4


def test_a_block_that_does_not_tile_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="5 x 4 does not tile a grid of 8 x 8"):
        local_2d(8, 8, (5, 4), (0, 0))


def test_senseless_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="query_block: 0 is not positive"):
        local_1d(8, 0, 4)
    with pytest.raises(ValueError, match="memory: -1 is negative"):
        local_1d(8, 4, -1)
    with pytest.raises(ValueError, match="stride: 0 is not positive"):
        strided_1d(8, 0)
    with pytest.raises(ValueError, match="group: 2 of 2 positions lies outside of a block of 4"):
        fixed_1d(8, 4, 2, group=2)


def test_patterns_of_the_same_content_are_equal_and_share_what_is_made_of_one() -> None:
    one, same = local_2d(4, 8, (2, 2), (2, 2)), local_2d(4, 8, (2, 2), (2, 2))
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    others = (local_2d(4, 8, (2, 2), (1, 2)), local_2d(4, 8, (2, 2), (2, 2), causal=False), full(32), full(31))
    assert all(one != other for other in others) and len({one, *others}) == 5
    device = torch.device("cpu")
    assert _plan(one, device) is _plan(same, device)


def test_smaller_cells_store_the_same_pattern_in_another_order() -> None:
    large, small = (local_2d(8, 12, (4, 4), (4, 4), cell=cell) for cell in (None, (2, 1)))
    assert torch.equal(large.mask(), small.mask()) and torch.equal(large.generation_order, small.generation_order)
    assert torch.equal(small.storage_order, local_2d(8, 12, (4, 4), (2, 1)).storage_order)
    assert not torch.equal(large.storage_order, small.storage_order)
