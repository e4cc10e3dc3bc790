"""How many bits per dimension does a model need for images it was not trained on? Exactly, each image once.

`python -m trainer.evaluate --run runs/quickstart` scores the newest checkpoint of a run, beside what lossless image
formats need for the same images, and records both in the run.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.loader import evaluation_batches, open_shards
from models.image_transformer import ImageTransformerConfig
from models.likelihood import nats
from trainer.exit_codes import run_tool
from trainer.lossless_formats import UNIFORM_BITS_PER_DIM, available_codecs, codec_bits_per_dim
from trainer.model_inputs import model_inputs
from trainer.ranks import all_sum
from trainer.run_folder import add_run_arguments, load_trained_model
from trainer.tracking import record_results

Forward = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def evaluate(
    forward: Forward,
    model: ImageTransformerConfig,
    batches: Iterator[Batch],
    device: torch.device,
    expected_images: int,
) -> dict[str, float]:
    """Mean bits/dim over the valid images of all ranks' batches, and its standard error over images; collective.

    Raises RuntimeError if the ranks together did not see `expected_images` images.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # bits/dim of an image: sum, sum of squares, count
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            parameters = forward(*model_inputs(batch, model))
            image_nats = nats(model.output, parameters, batch.images).double().flatten(1).sum(1)
            bits = image_nats[batch.valid] / (batch.images[0].numel() * math.log(2))
            totals += torch.stack([bits.sum(), bits.square().sum(), bits.new_tensor(len(bits))])
    total, squares, count = all_sum(totals).tolist()
    if count != expected_images:
        raise RuntimeError(f"scored {count:.0f} validation images instead of {expected_images}")
    mean = total / count
    return {
        "val/bits_per_dim": mean,
        "val/bits_per_dim_stderr": math.sqrt(max(0.0, squares / count - mean**2) / count),
        "val/images": count,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    arguments = parser.parse_args()
    return run_tool(lambda: _evaluate_run(arguments))


def _evaluate_run(arguments: argparse.Namespace) -> None:
    weights = arguments.weights
    trained = load_trained_model(arguments.run, weights, arguments.last)
    config = trained.config
    shards = open_shards(config.data.validation_url)

    def batches() -> Iterator[Batch]:
        return evaluation_batches(shards, rank=0, world_size=1, batch_images=config.evaluate.batch_images, limit=None)

    scores = evaluate(trained.model, config.model, batches(), trained.device, shards.count)
    results = {f"final/{weights}_bits_per_dim": scores["val/bits_per_dim"]}
    for codec in available_codecs():
        images = (image for batch in batches() for image in batch.images[batch.valid].numpy())
        name = codec.lower().replace(" ", "_").replace("-", "_")
        results[f"final/{name}_bits_per_dim"] = codec_bits_per_dim(codec, images)
    record_results(trained.files, trained.step, results, [])
    print(f"bits/dim over all {shards.count} validation images of {shards.url}")
    print(f"  {'uniform model':<18} {UNIFORM_BITS_PER_DIM:.3f}")
    for codec in available_codecs():
        name = codec.lower().replace(" ", "_").replace("-", "_")
        print(f"  {codec:<18} {results[f'final/{name}_bits_per_dim']:.3f}   (one file an image)")
    print(
        f"  {'this model':<18} {scores['val/bits_per_dim']:.3f} +- {scores['val/bits_per_dim_stderr']:.3f}   "
        f"(step {trained.step}, {weights} weights)"
    )


if __name__ == "__main__":
    sys.exit(main())
