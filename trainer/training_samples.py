"""What does the model draw at this point of its training? A grid for the run's page, the same noise each time."""

import math
from collections.abc import Callable

import torch
from PIL import Image

from data_pipeline.loader import Shards, evaluation_batches
from models.decoding import generate
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.model_inputs import model_inputs
from trainer.pictures import grid
from trainer.ranks import Ranks, from_all_ranks


def draw_grid(
    engine: Engine,
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
    validation_shards: Shards,
    alive: Callable[[], None],
) -> Image.Image | None:
    """`tracking.sample_images` images on rank 0, None on the others; collective.

    They are drawn in fp32, from the moving average of the weights if one is kept. Each rank draws its share, and holds
    a whole copy of the weights meanwhile. Classes and small images are those of the first validation images.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensors in engine.state():
        weights[name] = tensors.get("ema", tensors["weight"]).float().clone()
        alive()
    model = config.model.build()
    model.load_state_dict(weights)
    model.to(device).eval()
    count = min(config.tracking.sample_images, validation_shards.count)
    share = math.ceil(count / ranks.world_size)
    first = ranks.rank * share
    batch = next(evaluation_batches(validation_shards, rank=0, world_size=1, batch_images=count, limit=count))
    _, given = model_inputs(batch.to(device), config.model)
    mine = slice(first, min(first + share, count))
    drawn = None
    if mine.start < mine.stop:
        drawn = generate(
            model,
            mine.stop - mine.start,
            seed=config.run.seed,
            first_image=first,
            given=given.select(mine),
            progress=lambda done, total: alive(),
        ).cpu()
    gathered = [images for images in from_all_ranks(drawn) if images is not None]
    if ranks.rank != 0:
        return None
    return grid(torch.cat(gathered), columns=math.ceil(count**0.5), enlarge=max(1, 128 // config.model.image_size))
