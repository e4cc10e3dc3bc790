"""Does each row of docs/faults.md name a test that exists, and codes and words that the program has?"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from trainer import errors

ROOT = Path(__file__).resolve().parents[1]
CODES = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
PLACEHOLDER = re.compile(r"\b(?:[A-Z][A-Z_]+|N|M|S)\b|\.\.\.")
"""What stands in a quoted sentence for a name, a number or a part that is left out."""


def rows_of(path: Path) -> list[list[str]]:
    """The cells of the rows of all tables, without heads."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
    return [row for row in rows if not row[0].startswith("what ")]


@cache
def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def texts_in(node: ast.AST) -> Iterator[str]:
    """The texts of a program, each in one piece. A line break stands for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[sd]|%\.\df", "\n", node.value)
        return
    for child in ast.iter_child_nodes(node):
        yield from texts_in(child)


@cache
def texts_of_the_program() -> tuple[str, ...]:
    paths = [path for package in ("trainer", "data_pipeline", "cluster") for path in (ROOT / package).rglob("*.py")]
    return tuple(text for path in paths for text in texts_in(ast.parse(path.read_text())))


def is_said(sentence: str) -> bool:
    """Whether the program has a text with these words in this order, and something else at each placeholder."""
    pieces = PLACEHOLDER.split(sentence)
    return any(in_order(pieces, text) for text in texts_of_the_program())


def in_order(pieces: list[str], text: str) -> bool:
    end = 0
    for piece in pieces:
        if (begin := text.find(piece, end)) < 0:
            return False
        end = begin + len(piece)
    return True


def test_every_row_names_a_test_that_exists() -> None:
    rows = rows_of(ROOT / "docs/faults.md")
    named = [re.fullmatch(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", row[-1]) for row in rows]
    assert len(rows) > 60 and all(named), [row for row, name in zip(rows, named, strict=True) if not name]
    lost = [
        found[0]
        for found in named
        if found and not ((ROOT / found[1]).exists() and (found[2] is None or found[2] in names_in(ROOT / found[1])))
    ]
    assert lost == []
    assert len({found[0] for found in named if found}) == len(rows), "a test stands in two rows"


def test_every_row_has_five_cells_and_codes_of_the_list() -> None:
    rows = rows_of(ROOT / "docs/faults.md")
    assert [row for row in rows if len(row) != 5] == []
    codes = {int(code) for row in rows if row[2] not in ("", "its own") for code in row[2].split(", ")}
    assert codes == CODES - {errors.FINISHED}


def test_sentences_in_quotes_are_the_programs() -> None:
    """Whoever looks for what stands on his terminal finds it on the page."""
    quoted = [sentence for row in rows_of(ROOT / "docs/faults.md") for sentence in re.findall(r'"(.*?)"', row[1])]
    assert len(quoted) > 50 and [sentence for sentence in quoted if not is_said(sentence)] == []


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("rank N on HOST made no progress for S s", True),
        ("rank N on HOST made no progress", True),
        ("rank N on HOST made little progress", False),
        ("another run: ...; choose another run.dir", True),
        ("gave no sign of life for 10 s", False),
    ],
)
def test_a_sentence_is_known_by_its_words(sentence: str, said: bool) -> None:
    assert is_said(sentence) == said


def test_the_codes_of_the_readmes_rows_are_those_of_the_list() -> None:
    rows = re.findall(r"^\| .* \| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {errors.HANG, errors.DIVERGED} <= {int(code) for code in rows} <= CODES
