"""What does a trained model draw? Grids of new images, and held-out images that it completes or super-resolves.

    python -m trainer.sample --run runs/quickstart --n 16
    python -m trainer.sample --run runs/quickstart --n 16 --complete-half

Writes a PNG into the run's `samples` folder and into its MLflow run.
"""

import argparse
import math
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.loader import evaluation_batches, open_shards
from models.draw import Sampling
from models.generate import consistency, generate
from trainer.exit_codes import UsageError, run_tool
from trainer.model_inputs import Inputs, model_inputs
from trainer.run_folder import TrainedModel, add_run_arguments, load_trained_model
from trainer.tracking import record_results

UNKNOWN = 127
"""Grey: what a model that completes images is not given."""
GAP = 2
"""Pixels between the images of a grid, before enlarging."""


def grid(images: Tensor, columns: int, enlarge: int) -> Image.Image:
    """One picture of uint8 [N, H, W, 3] images, row by row on white, each pixel enlarged to a square of `enlarge`."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    shape = (GAP + rows * (height + GAP), GAP + columns * (width + GAP), 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images.cpu().numpy()):
        top, left = GAP + index // columns * (height + GAP), GAP + index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.repeat(enlarge, axis=0).repeat(enlarge, axis=1))


def interleave(*groups: Tensor) -> Tensor:
    """Image i of every group side by side: [N, ...] x G -> [N * G, ...]."""
    return torch.stack(groups, dim=1).flatten(0, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--n", type=int, default=16, help="number of images (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is calmer, 1 is the model (default 1)")
    parser.add_argument(
        "--complete-half", action="store_true", help="complete the lower half of the first validation images"
    )
    arguments = parser.parse_args()
    return run_tool(lambda: _sample(arguments))


def _sample(arguments: argparse.Namespace) -> None:
    if arguments.n < 1:
        raise UsageError(f"--n: must be at least 1, not {arguments.n}")
    if not 0 < arguments.temperature < math.inf:
        raise UsageError(f"--temperature: must be above 0, not {arguments.temperature}")
    trained = load_trained_model(arguments.run, arguments.weights, arguments.last)
    if arguments.complete_half:
        name, picture = "completions", _completions(trained, arguments)
    elif trained.config.model.condition_size:
        name, picture = "super-resolutions", _super_resolutions(trained, arguments)
    else:
        name, picture = "samples", _new_images(trained, arguments)
    path = trained.files.folder / "samples" / f"{name}-step-{trained.step:09d}.png"
    picture.save(path)
    record_results(trained.files, trained.step, {}, [path])
    print(path)


def _new_images(trained: TrainedModel, arguments: argparse.Namespace) -> Image.Image:
    """A square of new images; a model of classes draws them in turn."""
    classes = trained.config.model.num_classes
    labels = torch.arange(arguments.n, device=trained.device) % classes if classes else None
    images = generate(
        trained.model,
        arguments.n,
        seed=arguments.seed,
        labels=labels,
        sampling=Sampling(temperature=arguments.temperature),
        progress=_show_progress,
    )
    return grid(images, columns=math.ceil(arguments.n**0.5), enlarge=4)


def _completions(trained: TrainedModel, arguments: argparse.Namespace) -> Image.Image:
    """Three columns: the image, the half that the model is given, and how it goes on."""
    originals, labels, condition = _validation_images(trained, arguments.n)
    pattern = trained.model.pattern
    keep = pattern.length // 2
    kept = torch.zeros(pattern.length, dtype=torch.bool)
    kept[pattern.generation_order[:keep]] = True
    # A position is a sub-pixel or a pixel; either way the image's rows come one after the other.
    mask = kept.view(originals.shape[1], originals.shape[2], -1).expand(-1, -1, 3).to(trained.device)
    images = generate(
        trained.model,
        len(originals),
        seed=arguments.seed,
        labels=labels,
        condition=condition,
        prefix=originals,
        keep=keep,
        sampling=Sampling(temperature=arguments.temperature),
        progress=_show_progress,
    )
    return grid(interleave(originals, originals.where(mask, UNKNOWN), images), columns=6, enlarge=4)


def _super_resolutions(trained: TrainedModel, arguments: argparse.Namespace) -> Image.Image:
    """Three columns: the small image that the model is given, what it draws, and the original of the small one."""
    originals, labels, condition = _validation_images(trained, arguments.n)
    assert condition is not None
    images = generate(
        trained.model,
        len(originals),
        seed=arguments.seed,
        labels=labels,
        condition=condition,
        sampling=Sampling(temperature=arguments.temperature),
        progress=_show_progress,
    )
    distance = consistency(images, condition).mean().item()
    print(f"consistency (root mean square difference to the small images, intensities 0 to 1): {distance:.4f}")
    factor = originals.shape[1] // condition.shape[1]
    enlarged = condition.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return grid(interleave(enlarged, images, originals), columns=6, enlarge=4)


def _validation_images(trained: TrainedModel, count: int) -> Inputs:
    """The first validation images (of the packed, shuffled order), as the model takes them."""
    shards = open_shards(trained.config.data.validation_url)
    count = min(count, shards.count)
    batch = next(evaluation_batches(shards, rank=0, world_size=1, batch_images=count, limit=count))
    return model_inputs(batch.to(trained.device), trained.config.model)


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 16 == 0 or done == total):
        end = "\n" if done == total else ""
        print(f"\r\x1b[Kdrawing position {done}/{total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
