"""What does a trained model draw? Grids of new images, and held-out images whose lower half it completes.

    python -m trainer.sample --run runs/quickstart --n 16
    python -m trainer.sample --run runs/quickstart --n 16 --complete-half

Writes a PNG into the run's `samples` folder and into its MLflow run.
"""

import argparse
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.loader import evaluation_batches, open_shards
from models.generate import generate
from trainer.exit_codes import UsageError, run_tool
from trainer.run_folder import TrainedModel, load_trained_model
from trainer.tracking import record_results

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
    parser.add_argument("--run", required=True, help="folder of a run (run.dir of its config)")
    parser.add_argument("--n", type=int, default=16, help="number of images (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is calmer, 1 is the model (default 1)")
    parser.add_argument("--weights", choices=["raw", "ema"], default="raw", help="the weights, or their moving average")
    parser.add_argument(
        "--complete-half", action="store_true", help="complete the lower half of the first validation images"
    )
    arguments = parser.parse_args()
    return run_tool(lambda: _sample(arguments))


def _sample(arguments: argparse.Namespace) -> None:
    if arguments.n < 1:
        raise UsageError(f"--n: must be at least 1, not {arguments.n}")
    if arguments.temperature <= 0:
        raise UsageError(f"--temperature: must be above 0, not {arguments.temperature}")
    trained = load_trained_model(arguments.run, arguments.weights)
    if arguments.complete_half:
        name, picture = "completions", _completions(trained, arguments)
    else:
        name, picture = "samples", _new_images(trained, arguments)
    path = trained.files.folder / "samples" / f"{name}-step-{trained.step:09d}.png"
    picture.save(path)
    record_results(trained.files, trained.step, {}, [path])
    print(path)


def _new_images(trained: TrainedModel, arguments: argparse.Namespace) -> Image.Image:
    classes = trained.config.model.num_classes
    labels = torch.arange(arguments.n, device=trained.device) % classes if classes else None
    images = generate(
        trained.model,
        arguments.n,
        seed=arguments.seed,
        labels=labels,
        temperature=arguments.temperature,
        progress=_show_progress,
    )
    return grid(images, columns=round(arguments.n**0.5), enlarge=4)


def _completions(trained: TrainedModel, arguments: argparse.Namespace) -> Image.Image:
    """Three columns: the photograph, what the model is given, and how it goes on."""
    shards = open_shards(trained.config.data.validation_url)
    batch = next(
        evaluation_batches(shards, rank=0, world_size=1, batch_images=min(arguments.n, shards.count), limit=arguments.n)
    )
    originals = batch.images.to(trained.device)
    given = originals.clone()
    given[:, originals.shape[1] // 2 :] = 127
    images = generate(
        trained.model,
        len(originals),
        seed=arguments.seed,
        labels=batch.labels.to(trained.device)
        if batch.labels is not None and trained.config.model.num_classes
        else None,
        prefix=originals,
        keep=trained.model.pattern.length // 2,
        temperature=arguments.temperature,
        progress=_show_progress,
    )
    return grid(interleave(originals, given, images), columns=6, enlarge=4)


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 16 == 0 or done == total):
        end = "\n" if done == total else ""
        print(f"\r\x1b[Kdrawing position {done}/{total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
