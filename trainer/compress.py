"""How small does a model make a picture, without losing anything? A file of it, and the picture back out of the file.

    python -m trainer.compress --run runs/quickstart --weights ema photo.png --out photo.bin
    python -m trainer.compress --run runs/quickstart --weights ema --decompress photo.bin --out photo-again.png

The same weights must read the file that wrote it: keep an export of them (`python -m trainer.export`). Pixels come back
as they are shown, gray ones as gray; what else an image file holds (colour profile, EXIF) is not kept.
"""

import argparse
import sys
import time
from pathlib import Path

from PIL import ImageOps
from torch import Tensor

from trainer.command_line import run_tool
from trainer.compressed_file import CompressedPicture, pixels_digest, read_compressed, to_bytes, weights_digest
from trainer.errors import DamagedPicture, Irreproducible, UsageError
from trainer.picture_coder import decode, encode, in_fp64
from trainer.pictures import open_file, save_picture, to_picture, to_tensor
from trainer.progress import ProgressBar
from trainer.safe_files import write_file
from trainer.trained_model import TrainedModel, add_run_arguments, load_trained_model

DEFAULT_BATCH_TILES = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("picture", metavar="PICTURE", nargs="?", type=Path, help="image file to compress")
    work.add_argument("--decompress", metavar="FILE", type=Path, help="compressed picture to bring back")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write; a PNG of --decompress")
    parser.add_argument("--class", metavar="NUMBER", type=int, dest="label", help="class of the picture, by number")
    parser.add_argument(
        "--batch-tiles",
        type=int,
        default=DEFAULT_BATCH_TILES,
        help=f"tiles computed at once; the bytes are the same whatever it is (default {DEFAULT_BATCH_TILES})",
    )
    arguments = parser.parse_args()
    return run_tool(
        lambda: _decompress(arguments) if arguments.decompress else _compress(arguments), "a smaller --batch-tiles"
    )


def _compress(arguments: argparse.Namespace) -> None:
    pixels, is_gray = read_pixels(arguments.picture)
    trained = _load(arguments)
    label = _label(trained, arguments.label)
    started = time.monotonic()
    content = compressed(trained, pixels, is_gray=is_gray, label=label, batch_tiles=arguments.batch_tiles)
    seconds = time.monotonic() - started
    _write(arguments.out, content)
    height, width, _ = pixels.shape
    num_values = height * width * (1 if is_gray else 3)
    print(
        f"{arguments.out}: {len(content):,} bytes, {8 * len(content) / num_values:.3f} bits for each value of "
        f"{width} x {height} pixels, in {seconds:.1f} s"
    )


def _decompress(arguments: argparse.Namespace) -> None:
    path: Path = arguments.decompress
    if arguments.label is not None:
        raise UsageError("--class: stands in the compressed file; leave it out")
    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out: {arguments.out} must end in .png")
    picture = read_compressed(path)
    trained = _load(arguments)
    started = time.monotonic()
    pixels = decompressed(trained, picture, path=path, batch_tiles=arguments.batch_tiles)
    seconds = time.monotonic() - started
    restored = to_picture(pixels)
    save_picture(restored.convert("L") if picture.is_gray else restored, arguments.out)
    print(f"{arguments.out}: {picture.width} x {picture.height} pixels, in {seconds:.1f} s")


def compressed(trained: TrainedModel, pixels: Tensor, *, is_gray: bool, label: int | None, batch_tiles: int) -> bytes:
    """The file of a picture, uint8 [H, W, 3] on the CPU, whose channels are equal if it is gray."""
    model = trained.model
    bar = ProgressBar(pixels.numel() // (3 if is_gray else 1), "values")
    with in_fp64(model):
        streams = encode(model, pixels, is_gray=is_gray, label=label, batch_tiles=batch_tiles, progress=bar.show)
    return to_bytes(
        CompressedPicture(
            height=pixels.shape[0],
            width=pixels.shape[1],
            is_gray=is_gray,
            label=label,
            model=weights_digest(model.state_dict()),
            pixels=pixels_digest(pixels),
            streams=streams,
        )
    )


def decompressed(trained: TrainedModel, picture: CompressedPicture, *, path: Path, batch_tiles: int) -> Tensor:
    """The pixels of the file at `path`, uint8 [H, W, 3].

    Raises UsageError for a file of other weights, Irreproducible where other pixels come out than were put in,
    DamagedPicture for a file that nobody writes.
    """
    model, label = trained.model, picture.label
    if (digest := weights_digest(model.state_dict())) != picture.model:
        raise UsageError(
            f"{path}: was written with another model or other weights of it (digest {picture.model.hex()}; "
            f"the {trained.weights} weights of step {trained.step} have {digest.hex()}); name those"
        )
    bar = ProgressBar(picture.height * picture.width * (1 if picture.is_gray else 3), "values")
    try:
        largest = model.config.num_classes - (not model.config.label_dropout)  # with dropout there is "no class", too
        if (label is None) != (not model.config.num_classes) or (label or 0) > max(largest, 0):
            raise ValueError("a class")
        with in_fp64(model):
            pixels = decode(
                model,
                picture.streams,
                height=picture.height,
                width=picture.width,
                is_gray=picture.is_gray,
                label=label,
                batch_tiles=batch_tiles,
                progress=bar.show,
            )
    except ValueError:
        raise DamagedPicture(f"{path}: has the checksum of a whole file, but contradicts itself") from None
    if pixels_digest(pixels) != picture.pixels:
        raise Irreproducible(
            f"{path}: other pixels come out than were put in, because this computer, or its torch, computes otherwise "
            "than the one that wrote the file; decompress it there"
        )
    return pixels


def read_pixels(path: Path) -> tuple[Tensor, bool]:
    """The pixels of an image file as it is shown, uint8 [H, W, 3], and whether it is gray; UsageError for one of which
    that would not be all there is to see."""
    picture = open_file(path, exactly=True)
    if picture.has_transparency_data:
        raise UsageError(f"{path}: is transparent in places (alpha), which the model does not know; flatten it first")
    picture = ImageOps.exif_transpose(picture)
    is_gray = picture.mode in ("1", "L")
    if picture.mode not in ("1", "L", "P", "RGB"):
        raise UsageError(f"{path}: mode {picture.mode}; the model reads RGB, convert it")
    return to_tensor(picture.convert("RGB")), is_gray


def _load(arguments: argparse.Namespace) -> TrainedModel:
    if arguments.batch_tiles < 1:
        raise UsageError(f"--batch-tiles: must be at least 1, not {arguments.batch_tiles}")
    trained = load_trained_model(arguments.run, arguments.weights, arguments.last, arguments.checkpoint_url)
    if trained.card.model.small_size:
        raise UsageError(
            f"--run: the model of {arguments.run} super-resolves small images, and knows no others; choose another run"
        )
    return trained


def _label(trained: TrainedModel, wanted: int | None) -> int | None:
    """The class to tell the model; UsageError for one that it does not have."""
    model = trained.card.model
    if wanted is None:
        if model.num_classes and not model.label_dropout:
            raise UsageError(f"--class: the model wants to know one of its classes, 0 to {model.num_classes - 1}")
        return model.num_classes or None  # the number of no class
    if not model.num_classes:
        raise UsageError(f"--class: the model of {trained.files.folder} was trained without classes; leave it out")
    if not 0 <= wanted < model.num_classes:
        raise UsageError(f"--class: {wanted} is not between 0 and {model.num_classes - 1}, the classes of the model")
    return wanted


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    sys.exit(main())
