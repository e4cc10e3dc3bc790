"""Do the rivals compute what their authors' code computed, and does the command that says so notice what is wrong?

The arrays in tests/reference/rivals/ come from the authors' own code; `meta` in each file names its source and commit.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.rivals.case import load_case
from tests.support.rivals.pixelrnn import seen
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


def changed(path: Path, case: str, **arrays: np.ndarray | str) -> None:
    """A case with other arrays."""
    with np.load(REFERENCE / f"{case}.npz") as archive:
        np.savez(path, **{name: archive[name] for name in archive.files} | arrays)


def test_what_does_not_fit_ours_is_refused_in_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(tmp_path / "kernels.npz", "pixelrnn_rowlstm", w_ss=np.zeros((5, 6, 24)))
    changed(tmp_path / "meta.npz", "pixelrnn_rowlstm", meta="[1, 2]")
    changed(tmp_path / "nothing.npz", "pixelrnn_rowlstm", meta='{"kind": "row_lstm"}')
    changed(tmp_path / "shapes.npz", "pixelrnn_conv_B_k3_blocks", x=np.zeros((2, 2, 2)))
    assert main([str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not checked: ")]
    assert [line.split(":")[1].strip() for line in lines] == ["kernels.npz", "meta.npz", "nothing.npz", "shapes.npz"]
    assert lines[0].endswith("kernels of 3 and 5 columns, but ours has one size for both")


@pytest.mark.parametrize("first", ["pixelcnn_k5A_then_0_k3B", "rowlstm_k5A_then_0", "diag_k5A_then_0"])
def test_a_model_of_its_first_convolution_alone_sees_what_its_kernel_does(first: str) -> None:
    row, column = (torch.arange(30) // 6, torch.arange(30) % 6)
    up, right = row[:, None] - row, column - column[:, None]
    kernel = (right.abs() <= 2) & (((up > 0) & (up <= 2)) | ((up == 0) & (right < 0)))
    assert torch.equal(seen(first, 5, 6), kernel)


@pytest.mark.parametrize("layers", ["rowlstm_only_0", "diag_only_0"])
def test_no_layers_see_the_pixel_itself(layers: str) -> None:
    assert torch.equal(seen(layers, 3, 4), torch.eye(12, dtype=torch.bool))


def test_gated_pixelcnn_has_a_layer_at_least() -> None:
    assert seen("gated_k3_1_layers", 3, 4).any()
    with pytest.raises(ValueError, match="-1 layers after the first one"):
        seen("gated_k3_0_layers", 3, 4)


def test_an_empty_folder_has_shown_nothing(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1
