"""What of the environment is recorded, and what of the code where that is not wanted?"""

import pytest

from trainer.record.provenance import environment
from trainer.record.redaction import one_line


def test_values_of_variables_that_are_not_well_known_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_MY_PLUGIN_COOKIE", "sesame")
    monkeypatch.setenv("HOME_OF_SOMEONE", "elsewhere")
    lines = environment().splitlines()
    assert "NCCL_DEBUG=INFO" in lines
    assert "NCCL_MY_PLUGIN_COOKIE=***" in lines
    assert "elsewhere" not in environment()


@pytest.mark.parametrize("text", ["", "\n\n", "  \n"])
def test_an_error_without_words_is_named_by_its_kind(text: str) -> None:
    assert one_line(KeyError(text) if not text else ValueError(text)) in ("KeyError", "ValueError", "''")


def test_of_a_long_page_one_line_is_left() -> None:
    assert one_line(RuntimeError("<html>" + 100_000 * "x")) == f"<html>{294 * 'x'}..."
