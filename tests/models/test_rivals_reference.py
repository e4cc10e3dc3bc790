"""Do the rivals compute what their authors' code computed, and does the command that says so notice what is wrong?

The arrays in tests/reference/rivals/ come from the authors' own code; `meta` in each file names its source and commit.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.support.rivals.case import load_case
from tests.support.rivals_reference import check_case, main

REFERENCE = Path(__file__).parents[1] / "reference/rivals"
CASES = sorted(REFERENCE.glob("*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_ours_is_within_the_tolerances_of_the_original(path: Path) -> None:
    checks = check_case(load_case(path))
    assert checks
    assert [check for check in checks if not check.passes] == []


def test_the_command_fails_on_a_changed_array_and_on_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = REFERENCE / "dmol_loss_wide_m5.npz"
    (tmp_path / "kept_back.npz").write_bytes(path.read_bytes())  # its name does not decide what it is
    assert main([str(tmp_path)]) == 0
    assert "1 files checked, 0 not, 0 errors" in capsys.readouterr().out
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for truth in ("exact", "orig_fp64"):
        arrays[f"nll_{truth}"] = arrays[f"nll_{truth}"] * (1 + 1e-4)
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path)]) == 1
    assert "past the tolerance: changed: float32 output" in capsys.readouterr().out
    (tmp_path / "changed.npz").unlink()
    np.savez(tmp_path / "strange.npz", meta='{"kind": "strange"}', x=np.zeros(3))
    assert main([str(tmp_path)]) == 1
    assert "not checked: strange.npz: strange: kind 'strange' is not known" in capsys.readouterr().out


def test_an_empty_folder_has_shown_nothing(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1
