"""How do plain values (of YAML or JSON) become checked, frozen dataclasses?

A dataclass is a mapping with the keys of its fields. A union of dataclasses is told apart by a *tag*: the one field
that all its members have as a Literal, such as `kind: local_1d`; a word alone stands for the member with that tag and
defaults for the rest. pydantic checks the types of single values; each dataclass checks its own ranges.
Every problem is found, and named by its path.
"""

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from data_pipeline.typed_records import adapter

INVALID = object()
"""In place of a value that has a problem."""
NOTHING: Mapping[str, Any] = types.MappingProxyType({})


def read(hint: Any, value: object, path: str, missing: Mapping[str, Any] = NOTHING) -> tuple[Any, list[str]]:
    """The value as an instance of `hint` (a dataclass, a union of them, or a plain type), and what is wrong with it.

    The instance is INVALID where there is a problem. `missing` has values by path that are read in place of the
    defaults where keys are missing.
    """
    reader = _Reader(hint, missing)
    return reader.read(hint, value, path), reader.problems


def plain(value: object) -> Any:
    """The inverse of `read`: dictionaries, lists and single values, as JSON has them."""
    assert dataclasses.is_dataclass(value) and not isinstance(value, type)
    return json.loads(json.dumps(dataclasses.asdict(value)))


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.layers": 3, ...}`: one entry for each value that is not a mapping; of lists of mappings, too."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(theirs: object, mine: object) -> dict[str, tuple[Any, Any]]:
    """The options, by path, in which two dataclasses differ, and their two values; None where one has none."""
    flat_theirs, flat_mine = flattened(plain(theirs)), flattened(plain(mine))
    return {
        path: (flat_theirs.get(path), flat_mine.get(path))
        for path in flat_theirs | flat_mine
        if flat_theirs.get(path) != flat_mine.get(path)
    }


def set_value(hint: Any, values: dict[str, Any], keys: list[str], value: object) -> None:
    """Write a value into nested mappings, those that are missing on the way included.

    A new tag keeps those fields that its member has, too. A path that leads through a single value replaces it: `read`
    finds out whether that makes sense.
    """
    key: Any
    key, *rest = keys
    inner = fields_of(hint).get(key) if _members(hint) else None
    if not rest:
        tag = _tag_of(hint)
        if tag == key:
            _retag(hint, values, value)
        elif isinstance(value, str) and isinstance(values.get(key), dict) and _tag_of(inner):
            _retag(inner, values[key], value)
        else:
            values[key] = value
        return
    container: Any = values
    below = values.get(key)
    if isinstance(below, list) and rest[0].isdigit() and int(rest[0]) < len(below):
        container, key, *rest = below, int(rest[0]), *rest[1:]
        if not rest:
            container[key] = value
            return
        below = container[key]
    if isinstance(below, str) and (tag := _tag_of(inner)):
        below = container[key] = {tag: below}
    if not isinstance(below, dict):
        below = container[key] = {}
    set_value(inner, below, rest, value)


def fields_of(hint: Any) -> dict[str, Any]:
    """The types of the fields of a dataclass, or of all members of a union of dataclasses."""
    found: dict[str, Any] = {}
    for member in _members(hint):
        for name, inner in _hints(member).items():
            found[name] = inner if name not in found or found[name] == inner else found[name] | inner
    return found


def paths(hint: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all values that a dataclass, or some member of a union, can hold."""
    for name, inner in fields_of(hint).items():
        if _members(inner):
            yield from paths(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def unknown(name: str, known: list[str], path: str, kind: str = "key") -> str:
    """The sentence about a name that does not exist, with the nearest one that does."""
    prefix = f"{path}." if path else ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{prefix}{name}: unknown {kind}; {hint}"


class _Reader:
    """What `read` carries along."""

    def __init__(self, root: Any, missing: Mapping[str, Any]) -> None:
        self.root, self.missing = root, missing
        self.problems: list[str] = []

    def read(self, hint: Any, value: object, path: str) -> Any:
        members = _members(hint)
        if not members:
            return self._read_single(hint, value, path)
        if value is None and type(None) in _alternatives(hint):
            return None
        if isinstance(value, list) and any(get_origin(a) is tuple for a in _alternatives(hint)):
            items = [self.read(_one_of(members), item, f"{path}.{index}") for index, item in enumerate(value)]
            return INVALID if INVALID in items else tuple(items)
        tag = _tag_of(hint)
        if isinstance(value, str) and tag:
            value = {tag: value}
        if not isinstance(value, dict):
            self.problems.append(f"{path}: must be a section with the keys {', '.join(fields_of(hint))}, not {value!r}")
            return INVALID
        member = members[0] if len(members) == 1 and not tag else self._member(members, tag, value, path)
        return INVALID if member is None else self._read_dataclass(member, hint, value, path)

    def _member(self, members: list[type], tag: str | None, value: dict[str, Any], path: str) -> type | None:
        """The member of a union that a mapping's tag names."""
        assert tag, "members of a union have a tag"
        known = {literal: member for member in members for literal in get_args(_hints(member)[tag])}
        if tag not in value and f"{path}.{tag}" in self.missing:
            return known[self.missing[f"{path}.{tag}"]]
        if tag not in value:
            self.problems.append(f"{path}.{tag}: is missing; one of {', '.join(known)}")
            return None
        if not isinstance(value[tag], str) or value[tag] not in known:
            near = difflib.get_close_matches(str(value[tag]), list(known), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(f"{path}.{tag}: must be one of {', '.join(known)}, not {value[tag]!r}{hint}")
            return None
        return known[value[tag]]

    def _read_dataclass(self, member: type, hint: Any, values: dict[str, Any], path: str) -> Any:
        hints, before = _hints(member), len(self.problems)
        prefix = f"{path}." if path else ""
        for key in sorted(values.keys() - hints.keys(), key=str):
            if key in fields_of(hint):
                tag = _tag_of(hint)
                self.problems.append(
                    f"{prefix}{key}: {values.get(tag or '')} has no such key; it has {', '.join(hints)}"
                )
            elif homes := [found for found in paths(self.root) if found.rpartition(".")[2] == key]:
                self.problems.append(f"{prefix}{key}: unknown key; it belongs under {homes[0].rpartition('.')[0]}")
            else:
                self.problems.append(unknown(str(key), list(hints), path))
        read_values = {}
        for field in dataclasses.fields(member):
            if field.name in values:
                read_values[field.name] = self.read(hints[field.name], values[field.name], f"{prefix}{field.name}")
            elif (known := re.sub(r"\.\d+\.", ".", f"{prefix}{field.name}")) in self.missing:
                read_values[field.name] = self.read(hints[field.name], self.missing[known], f"{prefix}{field.name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                what = "this section is missing" if _members(hints[field.name]) else "is missing"
                self.problems.append(f"{prefix}{field.name}: {what}")
        if len(self.problems) > before:
            return INVALID
        try:
            return member(**read_values)
        except ValueError as error:  # from its own checks: one problem a line
            self.problems += [f"{prefix}{line}" for line in str(error).splitlines()]
            return INVALID

    def _read_single(self, hint: Any, value: object, path: str) -> Any:
        try:
            # JSON, because only there does pydantic's strict mode take lists for tuples.
            return adapter(hint).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            texts = [f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}" for item in error.errors()]
            self.problems.append(f"{path}: {'; or '.join(texts)}")
        except (TypeError, ValueError):  # a YAML date or another value that JSON lacks
            self.problems.append(f"{path}: must be text, a number, true, false, a list or null, not {value!r}")
        return INVALID


def _retag(hint: Any, values: dict[str, Any], value: object) -> None:
    tag = _tag_of(hint)
    assert tag
    for member in _members(hint):
        if value in get_args(_hints(member)[tag]):
            for key in values.keys() - _hints(member).keys():
                del values[key]
    values[tag] = value


@cache
def _hints(member: type) -> dict[str, Any]:
    return get_type_hints(member)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _members(hint: Any) -> list[type]:
    """The dataclasses that a type is, chooses among, or is a tuple of."""
    found: list[type] = []
    for alternative in _alternatives(hint):
        if get_origin(alternative) is tuple:
            found += [member for member in _members(get_args(alternative)[0]) if member not in found]
        elif dataclasses.is_dataclass(alternative) and isinstance(alternative, type) and alternative not in found:
            found.append(alternative)
    return found


def _one_of(members: list[type]) -> Any:
    return Union[tuple(members)]  # noqa: UP007 (made of a list)


def _tag_of(hint: Any) -> str | None:
    """The field by which a mapping says which dataclass it is: a Literal of one value in all members."""
    members = _members(hint)
    for name in _hints(members[0]) if members else ():
        hints = [_hints(member).get(name) for member in members]
        if all(get_origin(inner) is Literal and len(get_args(inner)) == 1 for inner in hints):
            return name
    return None
