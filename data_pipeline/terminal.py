"""What may text of others do to the terminal that it is printed on? Nothing but appear there.

Names and messages come from archives, manifests and servers, too.
"""

import re
import sys
from typing import Any, TextIO, cast

LIVE_LINE = "\r\x1b[K"
"""Begins a line that takes the place of the one before."""
_STEERING = re.compile(
    r"(?!\x1b\[[0-9;]{0,16}m|\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but for line feeds, tabs and colours, characters that turn the direction of what follows, and
halves of characters, which cannot be printed."""


def shown(text: str) -> str:
    """The text with what would steer a terminal written out: an escape sequence as `\\x1b`.

    Colours are let through, and at the beginning the sequence by which a live line of ours replaces the one before.
    """
    live = text.startswith(LIVE_LINE)
    rest = text[len(LIVE_LINE) :] if live else text
    return (LIVE_LINE if live else "") + _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), rest)


def guard_terminal() -> None:
    """Let whatever this process prints go through `shown` from now on."""
    if not isinstance(sys.stdout, GuardedStream):
        sys.stdout, sys.stderr = (cast(TextIO, GuardedStream(stream)) for stream in (sys.stdout, sys.stderr))


class GuardedStream:
    """A text stream on which nothing steers a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(shown(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
