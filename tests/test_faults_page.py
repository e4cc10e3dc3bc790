"""Does each row of docs/faults.md name a test that exists, and an exit code of the list?"""

import ast
import re
from functools import cache
from pathlib import Path

from trainer import errors

ROOT = Path(__file__).resolve().parents[1]
CODES = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}


def rows_of(path: Path) -> list[list[str]]:
    """The cells of the rows of all tables, without heads."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
    return [row for row in rows if not row[0].startswith("what ")]


@cache
def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


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


def test_every_row_has_five_cells_and_a_code_of_the_list() -> None:
    rows = rows_of(ROOT / "docs/faults.md")
    assert [row for row in rows if len(row) != 5] == []
    codes = [row[2] for row in rows if row[2] not in ("", "its own")]
    assert {errors.HANG, errors.SUPERSEDED, errors.CHECKPOINT} <= set(map(int, codes)) <= CODES


def test_the_codes_of_the_readmes_rows_are_those_of_the_list() -> None:
    rows = re.findall(r"^\| .* \| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {errors.HANG, errors.DIVERGED} <= {int(code) for code in rows} <= CODES
