"""Does every error of trainer/ carry its exit code, and do all copies of the codes say what trainer/errors.py says?"""

import ast
import inspect
import re
from pathlib import Path

import pytest

from cluster import attempts
from data_pipeline.storage import DataError
from trainer import errors

ROOT = Path(__file__).resolve().parents[2]
CODES = {name: value for name, value in vars(errors).items() if name.isupper()}
# Names under which data_pipeline and cluster hold a copy, beside those of trainer/errors.py itself.
OTHER_NAMES = {
    "EXIT_USAGE": errors.USAGE,
    "EXIT_CORRUPT": errors.CORRUPT,
    "EXIT_UNREACHABLE": errors.UNAVAILABLE,
    "EXIT_CANNOT_WRITE": errors.CANNOT_WRITE,
    "EXIT_COME_AGAIN": errors.STOPPED,
    "EXIT_REFUSED": errors.REFUSED,
    "FIT": errors.FINISHED,
    "UNFIT": errors.UNAVAILABLE,
    "USABLE": errors.FINISHED,
    "UNUSABLE": errors.USAGE,
}
COPYING = sorted([*(ROOT / "data_pipeline").rglob("*.py"), *(ROOT / "cluster").rglob("*.py")])
# Caught where they are raised for: they end no command.
CAUGHT = {
    *("trainer.loop.Interrupted", "trainer.demo.BadRequest", "trainer.pictures.Unsuitable"),
    "trainer.record.mlflow_mirror.MirrorInUse",
}


def constants(path: Path) -> dict[str, int]:
    """The integers that a module names at its top level."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant) and type(value.value) is int:
                    found[name.id] = value.value
    return found


def test_the_table_lists_every_code_once() -> None:
    listed = [int(code) for code in re.findall(r"^ *(\d+)  \w", errors.__doc__ or "", re.MULTILINE)]
    assert listed == sorted(CODES.values()) and len(set(listed)) == len(listed)


def test_every_error_carries_one_of_the_codes() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]
    assert len(classes) >= 11
    for cls in classes:
        error = cls("why", errors.HANG) if cls is errors.LostRank else cls("why")
        assert errors.is_foreseen(error) and errors.code_of(error) in CODES.values() and str(error) == "why"
    assert errors.code_of(DataError("why", errors.CORRUPT)) == errors.CORRUPT
    assert errors.code_of(KeyError("why")) == errors.BUG and not errors.is_foreseen(KeyError("why"))


def test_all_error_classes_of_the_trainer_are_in_one_file() -> None:
    elsewhere = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(re.search("Error|Exception", ast.unparse(b)) for b in node.bases):
                elsewhere.add(f"{module}.{node.name}")
    in_errors = {name for name in elsewhere if name.startswith("trainer.errors.")}
    assert len(in_errors) >= 11 and elsewhere - in_errors == CAUGHT


@pytest.mark.parametrize("path", COPYING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_copy_of_a_code_is_the_same(path: Path) -> None:
    known = CODES | OTHER_NAMES
    for name, value in constants(path).items():
        assert not name.startswith("EXIT_") or name in known, f"{name} is not in the list of this test"
        assert known.get(name, value) == value, name


def test_every_name_that_the_copies_are_looked_up_by_exists() -> None:
    assert set().union(*(constants(path) for path in COPYING)) >= OTHER_NAMES.keys()


@pytest.mark.parametrize("path", COPYING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts_and_returns_hold_only_codes_of_the_table(path: Path) -> None:
    text = path.read_text()
    documented = re.findall(r"^exit codes?: (.*(?:\n  .*)*)", text, re.MULTILINE)
    codes = [int(code) for line in documented for code in re.findall(r"(?:^|·|  )\s*(\d+) [a-z]", line)]
    assert bool(codes) == bool(documented)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            returned = [r.value for r in ast.walk(node) if isinstance(r, ast.Return)]
            codes += [v.value for v in returned if isinstance(v, ast.Constant) and type(v.value) is int]
    assert set(codes) <= set(CODES.values())


def test_what_is_not_tried_again_is_named_by_its_code() -> None:
    assert {"USAGE", "CORRUPT", "DIVERGED", "REFUSED", "SUPERSEDED"} == {
        name for name, code in CODES.items() if code in attempts.HOPELESS
    }
    script = (ROOT / "cluster/pack.sbatch").read_text()
    cases = re.findall(r"^ *([\d |]+)\) (waiting|hopeless)\+=", script, re.MULTILINE)
    codes = {what: {int(code) for code in pattern.split("|")} for pattern, what in cases}
    assert codes == {
        "waiting": {errors.STOPPED},
        "hopeless": {errors.USAGE, errors.CORRUPT, errors.CANNOT_WRITE, errors.REFUSED},
    }
