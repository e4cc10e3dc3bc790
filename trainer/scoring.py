"""What does a model score on a stream of images? Mean bits per dimension, exact, over the images of all ranks."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from models.given import Given
from models.likelihood import nats, nats_by_channel
from models.model import ModelShape
from trainer.model_inputs import model_inputs
from trainer.ranks import all_sum

Forward = Callable[[Tensor, Given], Tensor]
"""Images and what is given of them in, parameters of the output distribution out: a model or an engine's `forward`."""


def score(
    forward: Forward,
    model: ModelShape,
    batches: Iterator[Batch],
    device: torch.device,
    expected_images: int,
    nats_by_position: Tensor | None = None,
) -> dict[str, float]:
    """Mean bits/dim over the valid images of all ranks' batches, and its standard error over images; collective.

    `nats_by_position` is fp64 [H, W, 3] on the device; this rank's nats of each sub-pixel are added to it.
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
            if nats_by_position is not None:
                by_channel = nats_by_channel(model.output, parameters, batch.images)
                nats_by_position += by_channel[batch.valid].double().sum(0)
    total, squares, count = all_sum(totals).tolist()
    if count != expected_images:
        raise RuntimeError(f"scored {count:.0f} validation images instead of {expected_images}")
    mean = total / count
    return {
        "val/bits_per_dim": mean,
        "val/bits_per_dim_stderr": math.sqrt(max(0.0, squares / count - mean**2) / count),
        "val/images": count,
    }
