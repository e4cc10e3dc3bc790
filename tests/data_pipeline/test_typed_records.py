"""Is JSON of others taken only where it has the right types, and refused in a sentence elsewhere?"""

from dataclasses import dataclass, field

import pytest

from data_pipeline.typed_records import MOST_CHARACTERS, Count, misfits, parse_object, parse_record


@dataclass(frozen=True)
class Inner:
    size: Count


@dataclass(frozen=True)
class Outer:
    name: str
    inner: list[Inner] = field(default_factory=list)


def test_a_record_is_read_with_what_it_holds() -> None:
    assert parse_record(Outer, b'{"name": "x", "inner": [{"size": 2}], "other": 1}') == Outer("x", [Inner(2)])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "Invalid JSON: EOF"),
        (b"[]", "Input should be an object"),
        (b'{"name": 5}', "name: Input should be a valid string"),
        (b'{"name": "x", "inner": [{"size": 2.0}]}', "inner.0.size: Input should be a valid integer"),
        (b'{"name": "x", "inner": [{"size": true}]}', "inner.0.size: Input should be a valid integer"),
        (b'{"name": "x", "inner": [{"size": 1%s}]}' % (b"0" * 400), "inner.0.size: Input should be less than"),
        (b'{"name": "x", "inner": [{"size": 1%s}]}' % (b"0" * 9999), "Invalid JSON: number out of range"),
        (b'{"name": "x", "inner": %s%s}' % (b"[" * 9999, b"]" * 9999), "Invalid JSON: recursion limit exceeded"),
        (b'{"name": "\xff"}', "Invalid JSON: invalid unicode"),
        (b'{"name": "\\ud800"}', "Invalid JSON: "),
        (b'{"name": 5, "inner": 6}', "name: Input should be a valid string, and 1 more"),
    ],
)
def test_anything_else_is_refused_in_a_short_sentence(text: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_record(Outer, text)
    assert len(str(caught.value)) < MOST_CHARACTERS + 30 and misfits(Outer, text)


def test_what_is_missing_is_named() -> None:
    for text, name in ((b"{}", "name"), (b'{"name": "x", "inner": [{}]}', "size")):
        with pytest.raises(KeyError) as caught:
            parse_record(Outer, text)
        assert caught.value.args == (name,)


def test_an_object_of_any_entries_is_no_deeper_than_others_can_read() -> None:
    assert parse_object(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text in (b"[1]", b'{"a": %s%s}' % (b"[" * 300, b"]" * 300)):
        with pytest.raises(ValueError, match="recursion|object"):
            parse_object(text)
