"""Does a picture come back as it was, is its file as small as the model is sure, and is any other file refused?"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.packing.sources_photographs import PHOTOGRAPHS, locate, photograph_at
from models.likelihood import nats
from tests.support.tiny_model import random_images
from tests.support.tiny_run import CLASSES, SUPER_RESOLUTION, tiny_run
from trainer import compress
from trainer.compressed_file import LARGEST_PICTURE, pixels_digest, read_compressed, to_bytes
from trainer.picture_coder import Picture
from trainer.pictures import to_tensor
from trainer.trained_model import TrainedModel

SIZES = [(1, 1), (333, 5), (1, 19), (23, 1), (8, 8), (7, 9), (16, 16), (17, 15), (40, 3), (31, 33)]
HEADER_BYTES = 56

Command = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return tiny_run(tmp_path_factory.mktemp("run"), Path("data"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, trained: TrainedModel) -> Command:
    """Runs the command with a model, that of `trained` unless another is named."""

    def run(*arguments: object, model: TrainedModel = trained) -> int:
        monkeypatch.setattr(compress, "load_trained_model", lambda *_: model)
        monkeypatch.setattr(sys, "argv", ["compress", "--run", "some/run", *map(str, arguments)])
        return compress.main()

    return run


def photograph(index: int, size: tuple[int, int]) -> Image.Image:
    """A piece of a photograph, of a size (width, height)."""
    names = sorted(PHOTOGRAPHS)
    source = photograph_at(str(locate(*PHOTOGRAPHS[names[index % len(names)]][:2])))
    reduced = source.reduce(2)
    left, top = (17 * index) % (reduced.width - size[0]), (29 * index) % (reduced.height - size[1])
    return reduced.crop((left, top, left + size[0], top + size[1]))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def test_photographs_of_any_size_come_back_gray_ones_as_gray(command: Command, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("in.png", "file.bin", "out.png")]
    for index, size in enumerate(2 * SIZES):
        picture = photograph(index, size)
        picture = picture.convert("L") if index % 7 == 5 else picture
        picture.save(files[0])
        assert command(files[0], "--out", files[1]) == 0
        assert command("--decompress", files[1], "--out", files[2]) == 0
        assert same(Image.open(files[2]), picture), (index, size)
        assert not list(tmp_path.glob("*.unfinished*"))


def test_the_file_is_as_large_as_the_evaluated_bits(command: Command, tmp_path: Path, trained: TrainedModel) -> None:
    photograph(0, (96, 96)).save(tmp_path / "in.png")
    assert command(tmp_path / "in.png", "--out", tmp_path / "file.bin") == 0
    pixels = to_tensor(Image.open(tmp_path / "in.png"))
    tiles = Picture(96, 96, False, 8).cut(pixels)
    with torch.no_grad():
        bits = nats(trained.model.config.output, trained.model(tiles), tiles).sum().item() / math.log(2)
    (stream,) = read_compressed(tmp_path / "file.bin").streams
    assert abs(8 * len(stream) / bits - 1) < 0.002
    assert (tmp_path / "file.bin").stat().st_size == HEADER_BYTES + 4 + len(stream)


@pytest.mark.parametrize("mode", ["1", "P", "GIF", "JPEG", "turned"])
def test_every_kind_of_picture_comes_back_as_it_is_shown(mode: str, command: Command, tmp_path: Path) -> None:
    picture, path = photograph(3, (9, 12)), tmp_path / "in.png"
    shown = picture
    match mode:
        case "1":
            picture.convert("1").save(path)
            shown = picture.convert("1").convert("L")
        case "P":
            picture.quantize(8).save(path)
            shown = picture.quantize(8).convert("RGB")
        case "GIF" | "JPEG":
            path = path.with_suffix("." + mode.lower())
            picture.save(path)
            shown = Image.open(path).convert("RGB")
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(path, exif=exif)
            shown = picture.transpose(Image.Transpose.ROTATE_270)
    assert command(path, "--out", tmp_path / "file.bin") == 0
    assert command("--decompress", tmp_path / "file.bin", "--out", tmp_path / "out.png") == 0
    assert same(Image.open(tmp_path / "out.png"), shown)


def deep_png(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)


def deep_colours(path: Path) -> None:
    path.write_bytes(b"P6 2 2 65535\n" + bytes(24))


def far_too_large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def two_frames(path: Path) -> None:
    picture = photograph(0, (8, 8))
    picture.save(path, "GIF", save_all=True, append_images=[photograph(1, (8, 8))])


REFUSED = {
    "is transparent in places (alpha), which the model does not know": lambda path: Image.new("RGBA", (3, 3)).save(
        path
    ),
    "is transparent in places (alpha), which the model does not know; flatten it first": (
        lambda path: Image.new("P", (3, 3)).save(path, transparency=0)
    ),
    "has more than 8 bits for each value": deep_png,
    "has more than 8 bits for each value, and the model reads 8; convert it": deep_colours,
    "holds several pictures": two_frames,
    "mode CMYK; the model reads RGB": lambda path: Image.new("CMYK", (3, 3)).save(path, "JPEG"),
    "is not an image": lambda path: path.write_bytes(b"text"),
    "is a folder": lambda path: path.mkdir(),
    "cannot be read (": os.mkfifo,
    "has more than the 1,073,741,824 bytes": far_too_large,
    "is a link or another special file": lambda path: path.symlink_to("/dev/zero"),
    "cannot be read": lambda path: None,
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_picture_that_would_not_come_back_whole_is_refused(
    words: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.png"
    REFUSED[words](path)
    assert command(path, "--out", tmp_path / "file.bin") == 2
    refused_in_one_sentence(words, capsys)
    assert not (tmp_path / "file.bin").exists()


def refused_in_one_sentence(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = capsys.readouterr().err
    assert words in text and len(text.splitlines()) == 1, text


@pytest.fixture
def file(command: Command, tmp_path: Path) -> Path:
    """A compressed picture."""
    photograph(0, (13, 11)).save(tmp_path / "in.png")
    assert command(tmp_path / "in.png", "--out", tmp_path / "file.bin") == 0
    return tmp_path / "file.bin"


def test_a_damaged_file_is_refused_wherever_a_bit_has_changed(
    command: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = file.read_bytes()
    capsys.readouterr()
    for place in [*range(HEADER_BYTES + 4), HEADER_BYTES + 4, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        code = command("--decompress", file, "--out", tmp_path / "out.png")
        if place < 7:  # what kind of file it is, and its format
            assert code == 2
            refused_in_one_sentence("is not a picture that" if place < 6 else "has format 0", capsys)
        else:
            assert code == 65, place
            refused_in_one_sentence("is damaged or incomplete; copy the file again", capsys)
    for length in range(0, len(content), 9):
        file.write_bytes(content[:length])
        assert command("--decompress", file, "--out", tmp_path / "out.png") == (65 if length >= 6 else 2)
        refused_in_one_sentence("file.bin: is ", capsys)
    file.write_bytes(content + b"\0")
    assert command("--decompress", file, "--out", tmp_path / "out.png") == 65
    assert not (tmp_path / "out.png").exists()


def test_a_file_that_somebody_made_up_is_refused(
    command: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_compressed(file)
    capsys.readouterr()
    for changes, code, words in (
        ({"width": 1 << 16, "height": 1 << 16}, 65, "is damaged"),
        ({"width": 0}, 65, "is damaged"),
        ({"width": LARGEST_PICTURE, "height": 1}, 65, "contradicts itself"),
        ({"streams": []}, 65, "contradicts itself"),
        ({"streams": 2 * whole.streams}, 65, "contradicts itself"),
        ({"label": 3}, 65, "contradicts itself"),
        ({"streams": [b"\0" * 4]}, 81, "other pixels come out than were put in"),
        ({"pixels": bytes(8)}, 81, "other pixels come out than were put in"),
    ):
        file.write_bytes(to_bytes(dataclasses.replace(whole, **changes)))  # type: ignore[arg-type]
        assert command("--decompress", file, "--out", tmp_path / "out.png") == code, changes
        refused_in_one_sentence(words, capsys)
    assert not (tmp_path / "out.png").exists()


def test_a_file_of_other_weights_is_refused(
    command: Command, file: Path, trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_run(tmp_path / "other", Path("data"))
    capsys.readouterr()
    assert command("--decompress", file, "--out", tmp_path / "out.png", model=other) == 0  # the same ones
    with torch.no_grad():
        other.model.head.bias[0] += 1e-6
    capsys.readouterr()
    assert command("--decompress", file, "--out", tmp_path / "out.png", model=other) == 2
    refused_in_one_sentence("was written with another model or other weights of it", capsys)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_one_sentence(
    value: float, command: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny_run(tmp_path / "broken", Path("data"))
    with torch.no_grad():
        broken.model.head.bias.fill_(value)
    capsys.readouterr()
    assert command(tmp_path / "in.png", "--out", tmp_path / "new.bin", model=broken) == 74
    refused_in_one_sentence("the model gives no probabilities", capsys)
    assert not (tmp_path / "new.bin").exists()


def test_memory_that_runs_out_is_one_sentence_with_the_option(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(compress, "compressed", full)
    photograph(0, (8, 8)).save(tmp_path / "a.png")
    assert command(tmp_path / "a.png", "--out", tmp_path / "a.itp") == 70
    assert capsys.readouterr().err.endswith("ran out (MemoryError); a smaller --batch-tiles needs less\n")


def test_a_class_belongs_to_the_file(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_run(tmp_path / "classes", Path("data"), **CLASSES)
    with torch.no_grad():
        model.model.embed_class.weight.mul_(20)
    photograph(0, (16, 16)).save(tmp_path / "in.png")
    files = {}
    for label in ([], ["--class", 0], ["--class", 4]):
        assert command(tmp_path / "in.png", "--out", tmp_path / "file.bin", *label, model=model) == 0
        assert command("--decompress", tmp_path / "file.bin", "--out", tmp_path / "out.png", model=model) == 0
        assert same(Image.open(tmp_path / "out.png"), Image.open(tmp_path / "in.png"))
        files[read_compressed(tmp_path / "file.bin").label] = (tmp_path / "file.bin").read_bytes()
    assert set(files) == {5, 0, 4} and len(set(files.values())) == 3  # 5 is no class
    capsys.readouterr()
    whole = read_compressed(tmp_path / "file.bin")
    for label in (None, 6, 2**32 - 1):
        (tmp_path / "made.bin").write_bytes(to_bytes(dataclasses.replace(whole, label=label)))
        assert command("--decompress", tmp_path / "made.bin", "--out", tmp_path / "out.png", model=model) == 65
        refused_in_one_sentence("contradicts itself", capsys)
    always = tiny_run(tmp_path / "always", Path("data"), **CLASSES | {"model__label_dropout": 0.0})
    for arguments, chosen, words in (
        (["--class", 5], model, "--class: 5 is not between 0 and 4"),
        ([], always, "--class: the model wants to know one of its classes, 0 to 4"),
    ):
        assert command(tmp_path / "in.png", "--out", tmp_path / "new.bin", *arguments, model=chosen) == 2
        refused_in_one_sentence(words, capsys)


def test_what_cannot_be_done_is_one_sentence(
    command: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_run(tmp_path / "small", Path("data"), **SUPER_RESOLUTION)
    picture, out = tmp_path / "in.png", tmp_path / "out.png"
    capsys.readouterr()
    for arguments, words in (
        ([picture, "--out", file / "below"], "cannot be written"),
        ([picture, "--out", file, "--class", 1], "was trained without classes"),
        ([picture, "--out", file, "--batch-tiles", 0], "--batch-tiles: must be at least 1"),
        (["--decompress", file, "--out", out, "--class", 1], "--class: stands in the compressed file"),
        (["--decompress", file, "--out", tmp_path / "out.jpg"], "must end in .png"),
        (["--decompress", tmp_path / "none", "--out", out], "cannot be read (No such file or directory)"),
        (["--decompress", tmp_path, "--out", out], "cannot be read"),
        (["--decompress", picture, "--out", out], "is not a picture that python -m trainer.compress wrote"),
    ):
        assert command(*arguments) == 2, arguments
        refused_in_one_sentence(words, capsys)
    assert command(picture, "--out", file, model=small) == 2
    refused_in_one_sentence("super-resolves small images", capsys)


def test_the_digest_of_pixels_is_of_their_values() -> None:
    image = random_images(1, 4)[0]
    assert pixels_digest(image) == pixels_digest(image.transpose(0, 1).contiguous().transpose(0, 1))
    assert pixels_digest(image) != pixels_digest(image + 1)
