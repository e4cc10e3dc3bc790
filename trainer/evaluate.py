"""How many bits per dimension does a model need for images it was not trained on? Exactly, each image once.

python -m trainer.evaluate --run runs/quickstart --weights ema
deepspeed --module trainer.evaluate --run runs/imagenet64_big --weights ema      # on all GPUs of this machine

Scores the newest checkpoint of a run on any number of ranks, beside what lossless image formats need for the same
images, and says how the bits are spread over channels and over the image. All of it goes into the run's folder
(`evaluation/`) and into its MLflow run.
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from data_pipeline.batch import Batch
from data_pipeline.loader import Shards, evaluation_batches, open_shards
from trainer.command_line import run_tool
from trainer.errors import UsageError, code_of
from trainer.heat_map import heat_map
from trainer.lossless_formats import (
    JPEG_XL,
    MOSAIC_PIXELS,
    UNIFORM_BITS_PER_DIM,
    available_codecs,
    codec_bits_per_dim,
    mosaic,
    mosaic_shape,
)
from trainer.pictures import png
from trainer.ranks import Ranks, all_sum, from_rank_0, ranks_from_environment
from trainer.record.tool_results import record_results
from trainer.safe_files import write_file
from trainer.scoring import score
from trainer.trained_model import TrainedModel, add_data_argument, add_run_arguments, load_trained_model, own_data

CHANNELS = ("red", "green", "blue")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    add_data_argument(parser)
    parser.add_argument(
        "--batch-images", type=int, help="images that a rank scores at once (default: evaluate.batch_images of the run)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by deepspeed
    arguments = parser.parse_args()
    return run_tool(lambda: _evaluate_run(arguments, ranks_from_environment()), "a smaller --batch-images")


def _evaluate_run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    with _all_ranks(ranks):
        trained = _load_on_all_ranks(arguments, ranks)
        card = trained.card
        shards = open_shards(card.validation_url)
        size = card.model.image_size
        by_position = torch.zeros(size, size, 3, dtype=torch.float64, device=trained.device)
        batches = evaluation_batches(
            shards,
            rank=ranks.rank,
            world_size=ranks.world_size,
            batch_images=card.batch_images,
            limit=None,
        )
        total = -(-shards.count // (ranks.world_size * card.batch_images))
        watched = _with_progress(batches, total) if ranks.rank == 0 else batches
        scores = score(trained.model, card.model, watched, trained.device, shards.count, by_position)
        all_sum(by_position)
        if ranks.rank == 0:
            bits = (by_position / (shards.count * math.log(2))).cpu().numpy()
            _report(trained, shards, scores, bits)


@contextlib.contextmanager
def _all_ranks(ranks: Ranks) -> Iterator[None]:
    """The process group of several ranks, on this rank's GPU if there are any."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    if ranks.world_size > 1:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    yield
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()


def _load_on_all_ranks(arguments: argparse.Namespace, ranks: Ranks) -> TrainedModel:
    """The model as rank 0 reads it: while a run trains, another rank could find a newer checkpoint."""
    trained, problem = None, None
    if ranks.rank == 0:
        try:
            trained = load_trained_model(arguments.run, arguments.weights, arguments.last, arguments.checkpoint_url)
            url = own_data(trained, trained.card.validation_url, arguments.data_url)
            batch_images = _batch_images(arguments.batch_images, trained.card.batch_images)
            trained = replace(trained, card=replace(trained.card, validation_url=url, batch_images=batch_images))
        except Exception as error:  # noqa: BLE001 (the other ranks wait for it; raised below)
            problem = error
    if ranks.world_size == 1 and problem is None:
        assert trained is not None
        return trained
    code = from_rank_0(None if problem is None else code_of(problem))
    if problem is not None:
        raise problem
    if code is not None:
        raise SystemExit(code)  # rank 0 tells why
    told = from_rank_0((trained.card, trained.run, trained.step, trained.weights, trained.files) if trained else None)
    if trained is None:
        card, run, step, weights, files = told
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = card.model.build().to(device).eval()
        trained = TrainedModel(model, card, run, step, weights, files, device)
    if trained.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    for tensor in trained.model.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)
    return trained


def _batch_images(wanted: int | None, of_the_run: int) -> int:
    if wanted is not None and wanted < 1:
        raise UsageError(f"--batch-images: must be at least 1, not {wanted}")
    return wanted or of_the_run


def _report(trained: TrainedModel, shards: Shards, scores: dict[str, float], bits: np.ndarray) -> None:
    """Record and print the result; `bits` are the mean bits of each sub-pixel, [H, W, 3]."""
    weights = trained.weights
    mean, error = scores["val/bits_per_dim"], scores["val/bits_per_dim_stderr"]
    channels = dict(zip(CHANNELS, bits.mean(axis=(0, 1)).tolist(), strict=True))
    final = {f"final/{weights}_bits_per_dim": mean, f"final/{weights}_bits_per_dim_stderr": error}
    final |= {f"final/{weights}_bits_per_dim_{channel}": value for channel, value in channels.items()}
    formats = _lossless_formats(shards)
    for codec, (files, tiles) in formats.items():
        name = codec.lower().replace(" ", "_").replace("-", "_")
        final |= {f"final/{name}_bits_per_dim": files, f"final/{name}_mosaic_bits_per_dim": tiles}
    details = {
        "weights": weights,
        "step": trained.step,
        "data": {"url": shards.url, "name": shards.manifest.name, "digest": shards.digest, "images": shards.count},
        "bits_per_dim": mean,
        "standard_error": error,
        "bits_per_dim_by_channel": channels,
        "bits_per_dim_by_row": bits.mean(axis=(1, 2)).tolist(),
        "bits_per_dim_by_column": bits.mean(axis=(0, 2)).tolist(),
    }
    record_results(trained.files, trained.step, final, _write(trained, bits, details), folder="evaluation")

    print(f"bits/dim over all {shards.count} validation images of {shards.url}")
    print(f"  {'uniform model':<18} {UNIFORM_BITS_PER_DIM:.3f}")
    few = _few_images(shards)
    shown = math.prod(mosaic_shape(few))
    for codec, (files, tiles) in formats.items():
        of = f" of the first {few}" if codec == JPEG_XL and few < shards.count else ""
        print(f"  {codec:<18} {files:.3f}   (one file an image{of}; {tiles:.3f} as one file of {shown} images)")
    if JPEG_XL not in formats:
        print(f"  {JPEG_XL:<18} left out: the package pylibjxl is not installed")
    print(f"  {'this model':<18} {mean:.3f} +- {error:.3f}   (step {trained.step}, {weights} weights)")
    print(f"  {'':<18} {', '.join(f'{channel} {value:.3f}' for channel, value in channels.items())}")
    print(f"bits of each position: {trained.files.folder / 'evaluation'}/{_stem(trained)}.png, .npy, .json")


def _lossless_formats(shards: Shards) -> dict[str, tuple[float, float]]:
    """Bits/dim of each format: with one file an image, and with one file for the first images side by side."""
    few = _few_images(shards)
    tiles = mosaic(np.stack(list(_images(shards, limit=few))))
    return {
        codec: (
            codec_bits_per_dim(codec, _images(shards, limit=few if codec == JPEG_XL else None)),
            codec_bits_per_dim(codec, [tiles]),
        )
        for codec in available_codecs()
    }


def _few_images(shards: Shards) -> int:
    """So many of the first images as a mosaic holds; a large one takes JPEG-XL hours."""
    return min(shards.count, max(1, MOSAIC_PIXELS // shards.manifest.image_size**2))


def _images(shards: Shards, limit: int | None) -> Iterator[np.ndarray]:
    """The first images, or all, one by one: uint8 [H, W, 3]."""
    for batch in evaluation_batches(shards, rank=0, world_size=1, batch_images=128, limit=limit):
        yield from batch.images[batch.valid].numpy()


def _write(trained: TrainedModel, bits: np.ndarray, details: dict[str, object]) -> list[Path]:
    """The files of the breakdown, in the run's folder `evaluation`."""
    stem = trained.files.folder / "evaluation" / _stem(trained)
    array, picture, text = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".npy", ".png", ".json"))
    values = io.BytesIO()
    np.save(values, bits.astype(np.float32))
    maps = {"all channels": bits.mean(axis=2)} | {name: bits[:, :, index] for index, name in enumerate(CHANNELS)}
    contents = {
        picture: png(heat_map(maps, "bits per sub-pixel")),
        array: values.getvalue(),
        text: json.dumps(details, indent=1).encode(),
    }
    for path, content in contents.items():
        write_file(path, content, within=trained.files.folder)
    return [picture, array, text]


def _stem(trained: TrainedModel) -> str:
    return f"bits-{trained.weights}-step-{trained.step:09d}"


def _with_progress(batches: Iterator[Batch], total: int) -> Iterator[Batch]:
    """The same batches, with a live line on a terminal."""
    for done, batch in enumerate(batches, start=1):
        yield batch
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r\x1b[Kscored batch {done}/{total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
