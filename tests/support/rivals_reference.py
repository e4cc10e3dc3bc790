"""Do our rivals of the Image Transformer compute what their authors' own code computed?

    python -m tests.support.rivals_reference FOLDER

Runs every .npz file of the folder, prints the worst error by kind, and exits with 1 if one is past its tolerance or a
file is of no kind that is known here. A kind is a module in tests/support/rivals/: it joins by a line in CHECKERS.
"""

import argparse
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from tests.support.rivals import adam, dmol, pixelcnnpp, pixelrnn, pixelsnail, sparse
from tests.support.rivals.case import TOLERANCE, Case, Check, load_case

CHECKERS = (adam, dmol, pixelcnnpp, pixelrnn, pixelsnail, sparse)
"""Each says whether it `knows` a case, and yields what it finds when it `check`s it."""


def check_case(case: Case) -> list[Check]:
    """Raises ValueError where no checker knows the case."""
    for checker in CHECKERS:
        if checker.knows(case):
            return list(checker.check(case))
    raise ValueError(f"{case.name}: kind {case.kind!r} is not known")


def check_folder(folder: Path) -> tuple[dict[str, list[Check]], list[str]]:
    """What was found in each file, and a sentence for each that could not be checked."""
    found, problems = {}, []
    for path in sorted(folder.glob("*.npz")):
        try:
            found[path.stem] = check_case(load_case(path))
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            problems.append(f"{path.name}: {in_a_line(error)}")
        except (LookupError, TypeError, AttributeError, AssertionError, RuntimeError, ArithmeticError) as error:
            # What a file lacks, or has too much of, shows anywhere in the checks.
            problems.append(f"{path.name}: is not as its kind should be: {type(error).__name__}: {in_a_line(error)}")
    if not found and not problems:
        problems.append(f"{folder}: holds no .npz file")
    return found, problems


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def report(found: dict[str, list[Check]]) -> str:
    """The worst error of each kind, precision and quantity, with the file that has it, and then all that fail."""
    worst: dict[tuple[str, str, str], tuple[Check, str]] = {}
    for name, checks in found.items():
        for check in checks:
            key = (check.kind, check.precision, check.quantity)
            if key not in worst or not check.error <= worst[key][0].error:
                worst[key] = (check, name)
    lines = [f"{'kind':<24}{'precision':<11}{'what':<16}{'worst error':>12}{'allowed':>10}  file"]
    for check, name in worst.values():
        allowed = TOLERANCE[check.precision, check.quantity]
        lines.append(
            f"{check.kind:<24}{check.precision:<11}{check.quantity:<16}{check.error:>12.1e}{allowed:>10.0e}  {name}"
        )
    for name, checks in found.items():
        for check in checks:
            if not check.passes:
                lines.append(
                    f"past the tolerance: {name}: {check.precision} {check.quantity} {check.detail}: {check.error:.2e}"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    found, problems = check_folder(parser.parse_args(arguments).folder)
    print(report(found))
    for problem in problems:
        print(f"not checked: {problem}")
    failed = sum(not check.passes for checks in found.values() for check in checks)
    print(f"{len(found)} files checked, {len(problems)} not, {failed} errors past their tolerance")
    return 1 if failed or problems else 0


if __name__ == "__main__":
    sys.exit(main())
