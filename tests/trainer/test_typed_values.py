"""Do plain values become dataclasses, with every problem named by its path?"""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from trainer.typed_values import differences, flattened, paths, plain, read, set_value


@dataclass(frozen=True, kw_only=True)
class Near:
    kind: Literal["near"] = "near"
    reach: int
    label: str = "n"

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ValueError(f"reach: {self.reach} is not positive\nlabel: is wrong, too")


@dataclass(frozen=True, kw_only=True)
class Far:
    kind: Literal["far"] = "far"
    label: str = "f"


@dataclass(frozen=True, kw_only=True)
class Part:
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Whole:
    sight: Near | Far | tuple[Near | Far, ...]
    part: Part | None = None
    rate: float = 1.0


def value(given: dict[str, Any]) -> Any:
    found, problems = read(Whole, given, "")
    assert not problems
    return found


def complaints(given: Any) -> list[str]:
    _, problems = read(Whole, given, "")
    assert problems
    return problems


def test_mappings_words_and_lists_become_members_of_a_union() -> None:
    assert value({"sight": {"kind": "near", "reach": 3}}).sight == Near(reach=3)
    assert value({"sight": "far"}).sight == Far()
    assert value({"sight": ["far", {"kind": "near", "reach": 1}]}).sight == (Far(), Near(reach=1))
    assert value({"sight": "far", "part": {"size": [1, 2]}}).part == Part(size=(1, 2))
    assert value({"sight": "far", "part": None}).part is None


def test_what_was_read_is_written_back() -> None:
    whole = Whole(sight=(Far(), Near(reach=2)), part=Part(size=(1, 2)))
    assert value(plain(whole)) == whole
    assert flattened(plain(whole)) == {
        "sight.0.kind": "far",
        "sight.0.label": "f",
        "sight.1.kind": "near",
        "sight.1.reach": 2,
        "sight.1.label": "n",
        "part.size": [1, 2],
        "rate": 1.0,
    }
    assert differences(whole, Whole(sight="far", part=whole.part)) == {  # type: ignore[arg-type]
        "sight.0.kind": ("far", None),
        "sight.0.label": ("f", None),
        "sight.1.kind": ("near", None),
        "sight.1.reach": (2, None),
        "sight.1.label": ("n", None),
        "sight": (None, "far"),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sight": {"reach": 3}}, ["sight.kind: is missing; one of near, far"]),
        ({"sight": {"kind": "nera"}}, ["sight.kind: must be one of near, far, not 'nera'; did you mean near?"]),
        ({"sight": {"kind": ["near"]}}, ["sight.kind: must be one of near, far, not ['near']; did you mean near?"]),
        ({"sight": {"kind": "far", "reach": 3}}, ["sight.reach: far has no such key; it has kind, label"]),
        ({"sight": {"kind": "near"}}, ["sight.reach: is missing"]),
        ({"sight": {"kind": "near", "reach": 0}}, ["sight.reach: 0 is not positive", "sight.label: is wrong, too"]),
        ({"sight": ["far", {"kind": "near", "reach": "x"}]},
         ["sight.1.reach: input should be a valid integer, not 'x'"]),
        ({"sight": 3}, ["sight: must be a section with the keys kind, reach, label, not 3"]),
        ({"sight": "far", "part": {"size": [1]}}, ["part.size: field required, not [1]"]),
        ({"sight": "far", "part": {"sise": [1, 2]}},
         ["part.sise: unknown key; did you mean part.size?", "part.size: is missing"]),
        ({"sight": "far", "reach": 3}, ["reach: unknown key; it belongs under sight"]),
        ({"sight": "far", "rate": {"a": {1, 2}}},
         ["rate: must be text, a number, true, false, a list or null, not {'a': {1, 2}}"]),
        ({}, ["sight: this section is missing"]),
        ([], [": must be a section with the keys sight, part, rate, not []"]),
    ],
)  # fmt: skip
def test_every_problem_is_named_by_its_path(given: Any, expected: list[str]) -> None:
    assert complaints(given) == expected


def test_keys_that_are_missing_take_the_values_given_for_them() -> None:
    missing = {"sight.reach": 7, "sight.kind": "near", "rate": 2.0}
    assert read(Whole, {"sight": {}}, "", missing)[0] == Whole(sight=Near(reach=7), rate=2.0)
    assert read(Whole, {"sight": [{}]}, "", missing | {"sight.0.kind": "near"})[0].sight == (Near(reach=7),)


def test_setting_a_value_by_its_path_keeps_what_the_new_kind_has_too() -> None:
    values: dict[str, Any] = {"sight": {"kind": "near", "reach": 3, "label": "mine"}}
    set_value(Whole, values, ["sight", "reach"], 4)
    assert values["sight"]["reach"] == 4
    set_value(Whole, values, ["sight"], "far")
    assert values == {"sight": {"kind": "far", "label": "mine"}}
    set_value(Whole, values, ["sight", "kind"], "near")
    set_value(Whole, values, ["part", "size"], [1, 2])
    assert values == {"sight": {"kind": "near", "label": "mine"}, "part": {"size": [1, 2]}}
    values = {"sight": "far"}
    set_value(Whole, values, ["sight", "label"], "x")
    assert values == {"sight": {"kind": "far", "label": "x"}}
    values = {"sight": ["far", {"kind": "near", "reach": 1}]}
    set_value(Whole, values, ["sight", "1", "reach"], 2)
    set_value(Whole, values, ["sight", "0", "label"], "x")
    assert values == {"sight": [{"kind": "far", "label": "x"}, {"kind": "near", "reach": 2}]}


def test_paths_are_those_of_all_members() -> None:
    assert list(paths(Whole)) == ["sight.kind", "sight.reach", "sight.label", "part.size", "rate"]
