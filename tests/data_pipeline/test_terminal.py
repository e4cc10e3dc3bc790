"""Does text of others only appear on a terminal?"""

import io
import sys

import pytest

from data_pipeline.terminal import guard_terminal, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, 中文 and \t tabs\n", "plain text, 中文 and \t tabs\n"),
        ("\x1b[31mred\x1b[0m\r\n", "\x1b[31mred\x1b[0m\r\n"),
        ("\r\x1b[Kstep 1/8", "\r\x1b[Kstep 1/8"),
        ("\r\x1b[Kstep \r\x1b[K", "\r\x1b[Kstep \\r\\x1b[K"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b]52;c;cm0gLXJm\x1b\\", "\\x1b]52;c;cm0gLXJm\\x1b\\"),
        ("half \ud800", "half \\ud800"),
        ("a\x08\x9b2J\u202e", "a\\x08\\x9b2J\\u202e"),
    ],
)
def test_text_of_others_does_not_steer_the_terminal(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_what_the_commands_print_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    guard_terminal()
    guard_terminal()
    print("\x1b[2J")
    sys.stderr.writelines(["\x07"])
    assert [stream.getvalue() for stream in streams] == ["\\x1b[2J\n", "\\x07"]
