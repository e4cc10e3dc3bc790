"""How does JSON that anybody may have written become a record with values of the right types?

pydantic reads it: nothing is converted, numbers that cannot be and nesting without end are refused.
"""

import json
from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=0, le=2**53)]
"""Of steps, images and the like."""
Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""A random number in hexadecimal digits."""
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
"""Seconds since 1970."""
Level = Annotated[float, Field(ge=0, le=255)]
"""Of a pixel, or a deviation of such."""
Label = Annotated[int, Field(ge=0, lt=10**8)]
"""Of an image."""
Sum = Annotated[int, Field(ge=0, le=2**63)]
"""Of levels, or of their squares, over very many pixels."""
Record = TypeVar("Record")
MOST_CHARACTERS = 300
"""Of a sentence about what is wrong: names in it are somebody else's."""


def parse_record(kind: type[Record], text: bytes) -> Record:
    """An instance of a dataclass from a JSON object; entries without a field are left out.

    Raises KeyError with the name of an entry that is missing, or ValueError with a sentence about others.
    """
    try:
        record: Record = adapter(cast(Hashable, kind)).validate_json(text, strict=True)
        return record
    except ValidationError as error:
        first, *more = error.errors(include_input=False, include_url=False)
        name = ".".join(str(part) for part in first["loc"])[:MOST_CHARACTERS]
        if first["type"] == "missing":
            raise KeyError(str(first["loc"][-1])[:MOST_CHARACTERS]) from error
        sentence = f"{name}: {first['msg']}" if name else first["msg"]
        others = f", and {len(more)} more" if more else ""
        raise ValueError(f"{sentence[:MOST_CHARACTERS]}{others}") from error


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object with entries of any type. Raises ValueError with a sentence."""
    parse_record(dict[str, Any], text)  # knows a bound for nesting, which the following does not
    value: dict[str, Any] = json.loads(text)
    return value


def misfits(record: type, text: bytes) -> list[str]:
    """The entries of a JSON object that are missing or of another type than the fields of a dataclass.

    Entries without a field are not looked at. What is not a JSON object gives one empty name.
    """
    try:
        adapter(record).validate_json(text, strict=True)
    except ValidationError as error:
        return sorted({str(item["loc"][0]) if item["loc"] else "" for item in error.errors(include_input=False)})
    return []


@cache
def adapter(hint: Any) -> TypeAdapter[Any]:
    """What reads values of a type."""
    return TypeAdapter(hint)
