"""Does each token of a plan find exactly the keys that its pattern lets it see, in memory that does not grow?"""

import math

import pytest
import torch

from models.attention.pattern import Pattern, dilated_1d, fixed_1d, full, local_1d, local_2d, sliding_1d, strided_1d
from models.image_transformer.decode_plan import DecodePlan, decode_plan, decode_plans
from models.image_transformer.pixel_order import Shift, source_positions
from models.image_transformer.shape import make_patterns
from tests.support.tiny_model import PATTERNS, tiny_config

MODELS = {name: tiny_config(**changes) for name, changes in PATTERNS.items()}
CASES: dict[str, tuple[Pattern, Shift]] = {
    **{
        name: (make_patterns(c := tiny_config(**changes), c.attentions[0])[-1], c.shift)
        for name, changes in PATTERNS.items()
    },
    "1d ragged": (local_1d(50, 8, 11), "generation"),
    "2d cells": (local_2d(8, 24, (4, 6), (2, 9)), "block"),
    "2d without flange": (local_2d(8, 12, (4, 4), (0, 0)), "block"),
    "2d left flange only": (local_2d(8, 12, (4, 4), (0, 4)), "block"),
    "dilated": (dilated_1d(60, 6, 3, 4, 3), "generation"),
    "sliding, ragged": (sliding_1d(50, 12), "generation"),
    "strided, ragged": (strided_1d(50, 12), "generation"),
    "fixed": (fixed_1d(60, 12, 3, group=1), "generation"),
}


def seen_by_each(pattern: Pattern, plan: DecodePlan) -> dict[int, list[int]]:
    """Carry the plan out with storage slots for keys: which keys the query of each storage slot sees."""
    windows = torch.full((plan.num_windows, plan.window_slots), -1)
    kept = torch.full((plan.kept_slots,), -1)
    seen: dict[int, list[int]] = {}
    for wave in plan.waves:
        for row, copy in enumerate(wave.loads):
            windows[row, copy.window_slots] = kept[copy.kept_slots]
        for step in range(wave.num_steps):
            rows = range(len(wave.blocks)) if wave.own_windows is None else [int(wave.own_windows[step])]
            windows[rows, wave.own_window_slots[step]] = wave.slots[:, step]
            for row, slot in zip(rows, wave.slots[:, step].tolist(), strict=True):
                assert slot not in seen
                seen[slot] = windows[row][(wave.order[row] <= step) & (wave.until[row] > step)].tolist()
        for row, copy in enumerate(wave.stores):
            kept[copy.kept_slots] = windows[row, copy.window_slots]
    return seen


@pytest.mark.parametrize("in_waves", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_each_query_sees_the_keys_of_the_mask_once(case: str, in_waves: bool) -> None:
    pattern, shift = CASES[case]
    plan = decode_plan(pattern, shift, in_waves)
    mask = pattern.mask_in_storage_order()
    seen = seen_by_each(pattern, plan)
    assert len(seen) == pattern.length
    for slot, keys in seen.items():
        assert sorted(keys) == mask[slot].nonzero().flatten().tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_wave_needs_no_value_of_its_own_or_later_waves(case: str) -> None:
    pattern, shift = CASES[case]
    sources = source_positions(pattern, shift)
    drawn: set[int] = set()
    for wave in decode_plan(pattern, shift).waves:
        for step in range(wave.num_steps):
            slots = wave.slots[:, step]
            assert {source for source in sources[slots].tolist() if source >= 0} <= drawn
            drawn |= set(pattern.storage_order[slots].tolist())


def test_the_window_of_1d_attention_is_a_ring_of_block_and_memory_at_any_length() -> None:
    for length in (1024, 4096):
        plan = decode_plan(local_1d(length, 128, 96), "generation")
        assert (plan.window_slots, plan.kept_slots, plan.num_windows) == (224, 0, 1)
    assert decode_plan(full(100), "generation").num_keys == 100
    for length in (1024, 4096):
        assert decode_plan(sliding_1d(length, 96), "generation").num_keys == 95 + 96


def test_strided_attention_keeps_each_key_once_and_a_step_looks_at_those_that_it_sees() -> None:
    plan = decode_plan(strided_1d(1024, 32), "generation")
    assert (plan.num_windows, plan.window_slots, plan.num_keys) == (32, 32, 1024)


def test_what_2d_attention_keeps_grows_with_the_width_of_the_image_not_with_its_height() -> None:
    def kept(height: int, width: int) -> int:
        plan = decode_plan(local_2d(height, width, (8, 16), (8, 16)), "generation")
        assert plan.window_slots == 8 * (16 + 2 * 16) + 8 * 16 + 8 * 16  # above, to the left, and the block
        return plan.kept_slots

    assert kept(32, 96) == kept(128, 96)
    # The flange's rows over the whole width, and what the block to the right sees of the present one.
    assert kept(32, 192) <= 8 * 192 + 8 * 16
    assert kept(32, 96) < kept(32, 192)


@pytest.mark.parametrize(
    ("block", "flange", "fewer"), [((8, 32), (8, 16), 2.4), ((8, 16), (8, 16), 3.6), ((8, 48), (8, 16), 1.7)]
)
def test_waves_need_fewer_steps_for_64x64_sub_pixels(
    block: tuple[int, int], flange: tuple[int, int], fewer: float
) -> None:
    """Block (i, j) is in wave j + (1 + ceil(flange / block width)) i."""
    pattern = local_2d(64, 192, block, flange)
    rows, columns = 64 // block[0], 192 // block[1]
    plan = decode_plan(pattern, "block")
    lead = 1 + math.ceil(flange[1] / block[1])
    assert len(plan.waves) == columns - 1 + lead * (rows - 1) + 1
    sequential = decode_plan(pattern, "block", in_waves=False)
    assert sequential.num_steps == pattern.length
    assert sequential.num_steps / plan.num_steps >= fewer


def test_a_shift_along_the_generation_order_leaves_one_block_a_wave() -> None:
    pattern = local_2d(64, 192, (8, 32), (8, 16))
    assert decode_plan(pattern, "generation").num_steps == pattern.length


TOGETHER: dict[str, tuple[tuple[Pattern, ...], Shift]] = {
    "blocks that end in different places": ((local_1d(48, 8, 8), full(48), dilated_1d(48, 4, 2, 1, 2)), "generation"),
    "sparse": ((strided_1d(48, 12), sliding_1d(48, 10), fixed_1d(48, 12, 3), fixed_1d(48, 12, 3, 1)), "generation"),
    "blocks of no common length": ((local_1d(48, 12, 5), local_1d(48, 16, 16)), "generation"),
    "2d of one block": ((local_2d(8, 12, (4, 4), (4, 4), cell=(2, 2)), local_2d(8, 12, (4, 4), (2, 6))), "block"),
}


@pytest.mark.parametrize("in_waves", [True, False])
@pytest.mark.parametrize("case", TOGETHER)
def test_patterns_keep_step_and_each_query_sees_the_keys_of_each_mask_once(case: str, in_waves: bool) -> None:
    patterns, shift = TOGETHER[case]
    plans, stretches = decode_plans(patterns, shift, in_waves)
    course = [slot for stretch in stretches for step in stretch.slots.T.tolist() for slot in step]
    assert sorted(course) == list(range(patterns[0].length))
    for index, (pattern, plan) in enumerate(zip(patterns, plans, strict=True)):
        mask, seen = pattern.mask_in_storage_order(), seen_by_each(pattern, plan)
        assert all(sorted(keys) == mask[slot].nonzero().flatten().tolist() for slot, keys in seen.items())
        # The steps of the stretches are those of the pattern's waves, one after the other.
        steps = [(number, step) for number, wave in enumerate(plan.waves) for step in range(wave.num_steps)]
        assert steps == [
            (stretch.waves[index], stretch.first_steps[index] + step)
            for stretch in stretches
            for step in range(stretch.num_steps)
        ]
        for stretch in stretches:
            first = stretch.first_steps[index]
            of_wave = plan.waves[stretch.waves[index]].slots[:, first : first + stretch.num_steps]
            assert torch.equal(of_wave, stretch.slots)


def test_waves_are_those_that_the_pattern_with_the_widest_memory_allows() -> None:
    wide, narrow = local_2d(8, 12, (4, 4), (4, 4), cell=(2, 2)), local_2d(8, 12, (4, 4), (4, 2))
    together = decode_plans((narrow, wide), "block")[0]
    assert [len(wave.blocks) for wave in together[0].waves] == [len(w.blocks) for w in decode_plan(wide, "block").waves]
    assert len(decode_plan(narrow, "block").waves) <= len(together[0].waves) < len(wide.blocks)
