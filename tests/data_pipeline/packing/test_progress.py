"""Does the progress line say how much, how fast and how long?"""

import io
import time

import pytest

from data_pipeline.packing.progress import PackingProgress, progress_line


def test_the_line_has_rate_and_time_left() -> None:
    assert progress_line("writing", 512, 2048, 2.0) == "writing: 512 of 2,048 images, 256/s, 6 s left"
    assert progress_line("writing", 2048, 2048, 4.0) == "writing: 2,048 of 2,048 images, 512/s"
    assert progress_line("reading", 1000, None, 4.0) == "reading: 1,000 images, 250/s"
    assert progress_line("reading", 0, 10, 0.0) == "reading: 0 of 10 images, 0/s"


class ClosedTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_work_goes_on_when_nobody_reads_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", ClosedTerminal())
    with PackingProgress("counting", 10) as progress:
        progress.counter.value = 10


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_one_live_line_and_a_file_whole_lines(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with PackingProgress("counting", 10) as progress:
        progress.counter.value = 10
        time.sleep(0.5)
    written = stream.getvalue()
    assert "counting: 10 of 10 images" in written and written.endswith("\n")
    assert written.count("\n") == 1 and ("\r" in written) == terminal
