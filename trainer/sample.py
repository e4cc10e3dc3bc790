"""What does a trained model draw? New images, and images that it completes or super-resolves.

    python -m trainer.sample --run runs/quickstart --n 64
    python -m trainer.sample --run runs/cifar10_class --classes 3,7 --temperature 0.9 --guidance 2
    python -m trainer.sample --run runs/quickstart --complete photo.png --keep 0.3 --n 8
    python -m trainer.sample --run runs/quickstart --complete-half
    python -m trainer.sample --run runs/celeba_sr_2d --super-resolve small/ --out faces.png --singles faces/

Without --out, the grid goes into the run's folder `samples` and, for a run that was trained here, into its MLflow run.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.loader import evaluation_batches, open_shards
from data_pipeline.wording import counted
from models.decoding import consistency, generate
from models.drawing.draw import Sampling
from models.given import NOTHING, Given
from trainer.command_line import run_tool
from trainer.errors import UsageError
from trainer.model_inputs import Inputs, area_downsample, model_inputs
from trainer.pictures import UNKNOWN, enlarged, grid, interleave, read_picture, read_pictures, save_picture, to_picture
from trainer.progress import ProgressBar
from trainer.record.tool_results import record_results
from trainer.trained_model import TrainedModel, add_data_argument, add_run_arguments, load_trained_model, own_data

DEFAULT_NUM_IMAGES = 16


class Drawn(NamedTuple):
    """What there is to look at."""

    name: str
    images: Tensor
    """uint8 [N, H, W, 3]."""
    shown: Tensor
    """uint8 [any, H, W, 3]: what the grid shows, in rows of `columns`."""
    columns: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    add_data_argument(parser)
    parser.add_argument(
        "--n", type=int, help="number of images (default 16; with --complete or --super-resolve each once)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default 0)")
    parser.add_argument("--classes", help="classes to draw in turn, by number or name, such as 3,7 (default: all)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is calmer, 1 is the model (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="draw values among the K likeliest (default 0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the likeliest of this probability (default 1)"
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="above 1 follows the class closer, 1 is the model (default 1)"
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--complete", metavar="FILE", nargs="+", type=Path, help="images to complete, in turn")
    given.add_argument("--complete-half", action="store_true", help="complete the first validation images")
    given.add_argument(
        "--super-resolve", metavar="PATH", type=Path, help="small image, or folder of them, to super-resolve"
    )
    parser.add_argument("--keep", type=float, help="share of the image that is given when completing (default 0.5)")
    parser.add_argument("--batch-images", type=int, default=64, help="images drawn at once (default 64)")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="where the grid goes, instead of the run's folder")
    parser.add_argument("--singles", metavar="FOLDER", type=Path, help="write each image as a PNG there, too")
    parser.add_argument("--log-to-mlflow", action="store_true", help="with --out: record the grid with the run, too")
    arguments = parser.parse_args()
    return run_tool(lambda: _sample(arguments), "a smaller --batch-images")


def _sample(arguments: argparse.Namespace) -> None:
    sampling = _checked(arguments)
    trained = load_trained_model(arguments.run, arguments.weights, arguments.last, arguments.checkpoint_url)
    if trained.device.type == "cuda" and trained.card.precision != "fp32":
        trained.model.bfloat16()
    if sampling.is_guided and not trained.card.model.label_dropout:
        raise UsageError(
            f"--guidance: {sampling.guidance:g} needs a model that knows images without a class, and this one was "
            "trained with model.label_dropout 0; leave the option out"
        )
    started = time.monotonic()
    if arguments.complete or arguments.complete_half:
        drawn = _completions(trained, arguments, sampling)
    elif trained.card.model.small_size or arguments.super_resolve:
        drawn = _super_resolutions(trained, arguments, sampling)
    else:
        drawn = _new_images(trained, arguments, sampling)
    seconds = time.monotonic() - started

    picture = grid(drawn.shown, drawn.columns, enlarge=max(1, 128 // trained.card.model.image_size))
    inside = trained.files.folder / "samples" / f"{drawn.name}-step-{trained.step:09d}.png"
    if arguments.out:
        save_picture(picture, arguments.out)
    if records := arguments.log_to_mlflow or not arguments.out:
        save_picture(picture, inside, within=trained.files.folder)
    if arguments.singles:
        for index, image in enumerate(drawn.images):
            save_picture(to_picture(image), arguments.singles / f"{index:05d}.png")
    if records:
        record_results(trained.files, trained.step, {}, [inside])
    source = f"{trained.weights} weights of step {trained.step}"
    print(f"{counted(len(drawn.images), 'image')} from {source} in {seconds:.1f} s: {arguments.out or inside}")


def _checked(arguments: argparse.Namespace) -> Sampling:
    """The options of drawing; UsageError for what is wrong whatever the model is."""
    for option in ("n", "batch_images"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')}: must be at least 1, not {value}")
    if arguments.keep is not None:
        if not (arguments.complete or arguments.complete_half):
            raise UsageError("--keep: says how much of an image is given; name the image with --complete")
        if not 0 <= arguments.keep <= 1:
            raise UsageError(f"--keep: must be between 0 and 1, not {arguments.keep:g}")
    if arguments.out and arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out: {arguments.out} must end in .png")
    try:
        return Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            guidance=arguments.guidance,
        )
    except ValueError as error:
        name, _, text = str(error).partition(":")
        raise UsageError(f"--{name.replace('_', '-')}:{text}") from None


def _new_images(trained: TrainedModel, arguments: argparse.Namespace, sampling: Sampling) -> Drawn:
    """A square of new images; a model of classes draws them in turn."""
    count = arguments.n or DEFAULT_NUM_IMAGES
    given = Given(labels=_labels(trained, arguments, count))
    images = _draw(trained, arguments, sampling, count, given)
    return Drawn("samples", images, images, math.ceil(count**0.5))


def _completions(trained: TrainedModel, arguments: argparse.Namespace, sampling: Sampling) -> Drawn:
    """Three columns: the image, the part that the model is given, and how it goes on."""
    size, small = trained.card.model.image_size, trained.card.model.small_size
    if arguments.complete:
        files = torch.stack([read_picture(path, size) for path in arguments.complete])
        originals = _in_turn(files, arguments.n or len(files)).to(trained.device)
        given = Given(
            labels=_labels(trained, arguments, len(originals)),
            small_images=area_downsample(originals, small) if small else None,
        )
    else:
        originals, given = _validation_images(trained, arguments)
    order = trained.model.generation_order
    known = torch.arange(len(order)) < round((0.5 if arguments.keep is None else arguments.keep) * len(order))
    kept = torch.empty_like(known)
    kept[order] = known
    # A position is a sub-pixel or a pixel; either way the image's rows come one after the other.
    mask = kept.view(size, size, -1).expand(-1, -1, 3).to(trained.device)
    images = _draw(trained, arguments, sampling, len(originals), given, originals, known)
    shown = interleave(originals.cpu(), originals.where(mask, UNKNOWN).cpu(), images)
    return Drawn("completions", images, shown, 6)


def _super_resolutions(trained: TrainedModel, arguments: argparse.Namespace, sampling: Sampling) -> Drawn:
    """Columns: the small image that the model is given, what it draws and, of validation images, the original."""
    size, small = trained.card.model.image_size, trained.card.model.small_size
    originals = None
    if arguments.super_resolve:
        if not small:
            raise UsageError(
                f"--super-resolve: the model of {arguments.run} was not trained for it (model.super_resolution is null)"
            )
        files = torch.stack(read_pictures(arguments.super_resolve, small))
        small_images = _in_turn(files, arguments.n or len(files)).to(trained.device)
        given = Given(labels=_labels(trained, arguments, len(small_images)), small_images=small_images)
    else:
        originals, given = _validation_images(trained, arguments)
        assert given.small_images is not None
        small_images = given.small_images
    images = _draw(trained, arguments, sampling, len(small_images), given)
    distance = consistency(images, small_images.cpu()).mean().item()
    print(f"consistency (root mean square difference to the small images, intensities 0 to 1): {distance:.4f}")
    columns = [enlarged(small_images.cpu(), size), images] + ([] if originals is None else [originals.cpu()])
    return Drawn("super-resolutions", images, interleave(*columns), 6)


def _draw(
    trained: TrainedModel,
    arguments: argparse.Namespace,
    sampling: Sampling,
    count: int,
    given: Given = NOTHING,
    originals: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """uint8 [count, H, W, 3] on the CPU, drawn in batches; see models/decoding.py."""
    length = len(trained.model.generation_order)
    keep = 0 if known is None else int(known.sum())
    starts = range(0, count, arguments.batch_images)
    bar = ProgressBar(max(1, len(starts) * (length - keep)), "positions")
    batches = []
    for index, start in enumerate(starts):
        batch = slice(start, min(start + arguments.batch_images, count))
        drawn = generate(
            trained.model,
            batch.stop - batch.start,
            seed=arguments.seed,
            first_image=start,
            given=given.select(batch),
            images=None if originals is None else originals[batch],
            known=known,
            sampling=sampling,
            progress=_batch_progress(bar, index * (length - keep), keep),
        )
        batches.append(drawn.cpu())
    return torch.cat(batches)


def _batch_progress(bar: ProgressBar, before: int, keep: int) -> Callable[[int, int], None]:
    return lambda done, total: bar.show(before + done - keep)


def _labels(trained: TrainedModel, arguments: argparse.Namespace, count: int) -> Tensor | None:
    """int64 [count]: the wanted classes in turn, or all; None for a model without classes."""
    num_classes, classes = trained.card.model.num_classes, arguments.classes
    if classes is None:
        return torch.arange(count, device=trained.device) % num_classes if num_classes else None
    if not num_classes:
        raise UsageError(f"--classes: the model of {trained.files.folder} was trained without classes; leave it out")
    wanted = [_class_number(trained, name.strip(), arguments.data_url) for name in classes.split(",")]
    return _in_turn(torch.tensor(wanted), count).to(trained.device)


def _class_number(trained: TrainedModel, name: str, data_url: str | None) -> int:
    num_classes = trained.card.model.num_classes
    if re.fullmatch("-?[0-9]+", name):
        if not 0 <= int(name) < num_classes:
            raise UsageError(f"--classes: {name} is not between 0 and {num_classes - 1}, the classes of the model")
        return int(name)
    names = open_shards(own_data(trained, trained.card.train_url, data_url)).classes
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or names[:3]
        raise UsageError(
            f"--classes: {name!r} is not a class of the training data; names are such as {', '.join(near)}"
        )
    return names.index(name)


def _in_turn(items: Tensor, count: int) -> Tensor:
    return items[torch.arange(count) % len(items)]


def _validation_images(trained: TrainedModel, arguments: argparse.Namespace) -> Inputs:
    """The first validation images (of the packed, shuffled order), as the model takes them, with the wanted classes."""
    shards = open_shards(own_data(trained, trained.card.validation_url, arguments.data_url))
    count = min(arguments.n or DEFAULT_NUM_IMAGES, shards.count)
    batch = next(evaluation_batches(shards, rank=0, world_size=1, batch_images=count, limit=count))
    images, given = model_inputs(batch.to(trained.device), trained.card.model)
    if arguments.classes is not None:
        given = dataclasses.replace(given, labels=_labels(trained, arguments, count))
    return images, given


if __name__ == "__main__":
    sys.exit(main())
