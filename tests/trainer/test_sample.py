"""Does each option of `python -m trainer.sample` draw what it says, and does bad input get one clear sentence?"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.decoding import generate
from models.drawing.draw import Sampling
from models.given import Given
from tests.conftest import pack_photographs
from tests.support.tiny_model import random_images
from tests.support.tiny_run import CLASSES, SUPER_RESOLUTION, tiny_run
from trainer import sample
from trainer.pictures import GAP, UNKNOWN, enlarged, to_picture
from trainer.progress import ProgressBar
from trainer.trained_model import TrainedModel


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight packed validation images, whose labels are those of photographs."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        pack_photographs(str(folder / split), images=8, split=split)
    return folder


def draw(
    monkeypatch: pytest.MonkeyPatch, trained: TrainedModel, *arguments: str, recorded: list[Path] | None = None
) -> int:
    """Run the command on a model; what it records goes to a list instead of MLflow."""
    record = [] if recorded is None else recorded
    monkeypatch.setattr(sample, "load_trained_model", lambda *_: trained)
    monkeypatch.setattr(sample, "record_results", lambda files, step, metrics, paths: record.extend(paths))
    monkeypatch.setattr(sys, "argv", ["sample", "--run", "some/run", *arguments])
    return sample.main()


def write_png(path: Path, size: int, seed: int, mode: str = "RGB") -> torch.Tensor:
    image = random_images(1, size, seed=seed)[0]
    to_picture(image).convert(mode).save(path)
    return image


def singles(folder: Path) -> torch.Tensor:
    """uint8 [N, H, W, 3]: the PNGs of a folder, by name."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.glob("*.png"))])


def from_grid(path: Path, size: int, columns: int, enlarge: int) -> torch.Tensor:
    """The images of a grid, with the empty places at its end."""
    pixels = np.asarray(Image.open(path))[::enlarge, ::enlarge]
    pitch = size + GAP
    rows = (pixels.shape[0] - GAP) // pitch
    return torch.stack(
        [
            torch.from_numpy(pixels[GAP + r * pitch : (r + 1) * pitch, GAP + c * pitch : (c + 1) * pitch].copy())
            for r in range(rows)
            for c in range(columns)
        ]
    )


def test_memory_that_runs_out_is_one_sentence_with_the_option(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(sample, "generate", full)
    assert draw(monkeypatch, tiny_run(tmp_path / "run", data), "--n", "2") == 70
    assert capsys.readouterr().err.splitlines()[-1].endswith("; a smaller --batch-images needs less")


def test_new_images_go_to_the_grid_the_singles_and_the_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tiny_run(tmp_path / "run", data)
    recorded: list[Path] = []
    options = ["--n", "5", "--seed", "3", "--temperature", "0.9", "--top-k", "200", "--top-p", "0.95"]
    arguments = [*options, "--batch-images", "2", "--singles", str(tmp_path / "singles")]
    assert draw(monkeypatch, trained, *arguments, recorded=recorded) == 0
    expected = generate(trained.model, 5, seed=3, sampling=Sampling(temperature=0.9, top_k=200, top_p=0.95))
    assert torch.equal(singles(tmp_path / "singles"), expected)
    path = tmp_path / "run/samples/samples-step-000000007.png"
    assert torch.equal(from_grid(path, 8, columns=3, enlarge=16)[:5], expected)
    assert recorded == [path]


def test_a_grid_elsewhere_is_recorded_only_on_request(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tiny_run(tmp_path / "run", data)
    recorded: list[Path] = []
    out = tmp_path / "new/grid.png"
    assert draw(monkeypatch, trained, "--n", "1", "--out", str(out), recorded=recorded) == 0
    assert out.exists() and not recorded
    assert draw(monkeypatch, trained, "--n", "1", "--out", str(out), "--log-to-mlflow", recorded=recorded) == 0
    assert recorded == [tmp_path / "run/samples/samples-step-000000007.png"]
    assert recorded[0].read_bytes() == out.read_bytes()


def test_classes_are_drawn_in_turn(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = tiny_run(tmp_path / "run", data, **CLASSES)
    with torch.no_grad():
        trained.model.embed_class.weight.mul_(20)
    drawn = []
    for classes, labels in ((["--classes", "3,1"], [3, 1, 3]), ([], [0, 1, 2])):
        folder = tmp_path / f"singles{len(drawn)}"
        arguments = [*classes, "--n", "3", "--guidance", "2", "--out", str(tmp_path / "grid.png")]
        assert draw(monkeypatch, trained, *arguments, "--singles", str(folder)) == 0
        drawn.append(singles(folder))
        given = Given(labels=torch.tensor(labels))
        expected = generate(trained.model, 3, seed=0, given=given, sampling=Sampling(guidance=2.0))
        assert torch.equal(drawn[-1], expected)
    assert not torch.equal(*drawn)


def test_classes_can_be_named_as_in_the_data(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sample.open_shards(str(data / "train")).classes
    trained = tiny_run(tmp_path / "run", data, model__num_classes=len(names))
    wanted = Namespace(classes=f"{names[2]}, 0,{names[1]}", data_url=None)
    labels = sample._labels(trained, wanted, 4)
    assert labels is not None and labels.tolist() == [2, 0, 1, 2]
    assert draw(monkeypatch, trained, "--classes", names[2][:-1] + "?") == 2
    error = capsys.readouterr().err
    assert "is not a class of the training data" in error and names[2] in error


def test_the_data_of_a_strangers_model_is_opened_where_the_user_names_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    trained = tiny_run(tmp_path / "run", data)
    classes = tiny_run(tmp_path / "classes", data, model__num_classes=2)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of somebody else"))
    out = ["--n", "1", "--out", str(tmp_path / "grid.png")]
    for model, arguments in ((trained, ["--complete-half"]), (classes, ["--classes", "cat"])):
        assert draw(monkeypatch, model, *arguments, *out) == 2
        assert "it is not opened unless you name it, or another one, with --data-url" in capsys.readouterr().err
    assert draw(monkeypatch, trained, "--complete-half", *out, "--data-url", str(data / "validation")) == 0


def test_files_are_completed_in_turn(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = tiny_run(tmp_path / "run", data)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    originals = [write_png(path, 8, seed) for seed, path in enumerate(paths)]
    out, folder = tmp_path / "grid.png", tmp_path / "singles"
    files = [str(path) for path in paths]
    arguments = ["--complete", *files, "--keep", "0.25", "--n", "3", "--out", str(out), "--singles", str(folder)]
    assert draw(monkeypatch, trained, *arguments) == 0
    given = torch.stack([originals[0], originals[1], originals[0]])
    expected = generate(trained.model, 3, seed=0, images=given, known=torch.arange(64) < 16)
    assert torch.equal(singles(folder), expected)
    shown = from_grid(out, 8, columns=6, enlarge=16)
    for index in range(3):
        assert torch.equal(shown[3 * index], given[index])
        assert torch.equal(shown[3 * index + 1, :2], given[index, :2])
        assert (shown[3 * index + 1, 2:] == UNKNOWN).all()
        assert torch.equal(shown[3 * index + 2], expected[index])
        assert torch.equal(expected[index, :2], given[index, :2])


def test_small_images_of_a_folder_are_super_resolved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tiny_run(tmp_path / "run", data, **SUPER_RESOLUTION)
    (tmp_path / "small").mkdir()
    small = torch.stack([write_png(tmp_path / f"small/{name}.png", 4, seed) for seed, name in enumerate("ba")]).flip(0)
    out = tmp_path / "grid.png"
    assert draw(monkeypatch, trained, "--super-resolve", str(tmp_path / "small"), "--out", str(out)) == 0
    shown = from_grid(out, 8, columns=6, enlarge=16)[:4]
    assert torch.equal(shown[::2], enlarged(small, 8))
    assert torch.equal(shown[1::2], generate(trained.model, 2, seed=0, given=Given(small_images=small)))
    assert "consistency" in capsys.readouterr().out


def test_bad_input_gets_one_sentence_and_exit_code_2(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_run(tmp_path / "plain", data)
    classes = tiny_run(tmp_path / "classes", data, model__num_classes=5)
    small = tiny_run(tmp_path / "small", data, **SUPER_RESOLUTION)
    write_png(tmp_path / "big.png", 9, 0)
    write_png(tmp_path / "grey.png", 8, 0, mode="L")
    (tmp_path / "text.png").write_text("not an image")
    whole = (tmp_path / "big.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none").mkdir()
    for trained, arguments, words in (
        (plain, ["--complete", str(tmp_path / "big.png")], "big.png: 9 x 9 pixels; the model reads 8 x 8"),
        (plain, ["--complete", str(tmp_path / "grey.png")], "grey.png: mode L; the model reads RGB"),
        (plain, ["--complete", str(tmp_path / "text.png")], "text.png: is not an image"),
        (plain, ["--complete", str(tmp_path / "cut.png")], "cut.png: is not an image that can be read"),
        (plain, ["--complete", str(tmp_path / "missing.png")], "missing.png: cannot be read (No such file"),
        (plain, ["--complete", str(tmp_path)], "is a folder; name an image file"),
        (plain, ["--complete", str(tmp_path / "grey.png"), "--keep", "1.5"], "--keep: must be between 0 and 1"),
        (plain, ["--keep", "0.5"], "--keep: says how much of an image is given"),
        (plain, ["--n", "0"], "--n: must be at least 1, not 0"),
        (plain, ["--batch-images", "0"], "--batch-images: must be at least 1, not 0"),
        (plain, ["--temperature", "-1"], "--temperature: must be above 0 and finite, not -1.0"),
        (plain, ["--temperature", "inf"], "--temperature: must be above 0 and finite, not inf"),
        (plain, ["--top-k", "-1"], "--top-k: must be at least 1, or 0"),
        (plain, ["--top-p", "2"], "--top-p: must be above 0 and at most 1, not 2.0"),
        (plain, ["--out", "grid.jpg"], "--out: grid.jpg must end in .png"),
        (plain, ["--out", str(tmp_path / "text.png/grid.png"), "--n", "1"], "grid.png: cannot be written"),
        (plain, ["--classes", "1"], "was trained without classes"),
        (plain, ["--super-resolve", str(tmp_path)], "was not trained for it (model.super_resolution is null)"),
        (classes, ["--classes", "1,5"], "--classes: 5 is not between 0 and 4"),
        (classes, ["--classes=-1"], "--classes: -1 is not between 0 and 4"),
        (classes, ["--classes=--1"], "--classes: '--1' is not a class of the training data"),
        (classes, ["--classes", "²"], "--classes: '²' is not a class of the training data"),
        (classes, ["--guidance", "2"], "--guidance: 2 needs a model that knows images without a class"),
        (small, ["--super-resolve", str(tmp_path / "none")], "the folder holds no files"),
        (small, ["--super-resolve", str(tmp_path / "grey.png")], "grey.png: 8 x 8 pixels; the model reads 4 x 4"),
    ):
        assert draw(monkeypatch, trained, *arguments) == 2, arguments
        text = capsys.readouterr().err
        assert words in text
        assert len(text.splitlines()) == 1


def test_the_progress_bar_fills(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(4, "positions")
    bar.show(1)
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar.show(2)
    assert " 50 % " in capsys.readouterr().err
    bar.show(4)
    text = capsys.readouterr().err
    assert "100 %" in text and text.endswith("\n") and "░" not in text
