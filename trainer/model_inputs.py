"""What does the model get to see of a batch: images, and where its config asks for them labels and small images?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import Batch
from models.given import Given
from models.model import ModelShape

Inputs = tuple[Tensor, Given]
"""images uint8 [B, H, W, 3], and what is given of them."""


def model_inputs(batch: Batch, model: ModelShape) -> Inputs:
    """The model's arguments for a batch that is on its device."""
    return batch.images, Given(
        labels=batch.labels if model.num_classes else None,
        small_images=area_downsample(batch.images, model.small_size) if model.small_size else None,
    )


def blank_inputs(model: ModelShape, device: torch.device, num_images: int = 1) -> Inputs:
    """Black images of class 0, for a forward pass whose result does not matter."""
    size, small = model.image_size, model.small_size
    images = torch.zeros(num_images, size, size, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(num_images, dtype=torch.int64, device=device) if model.num_classes else None
    small_images = torch.zeros(num_images, small, small, 3, dtype=torch.uint8, device=device) if small else None
    return images, Given(labels=labels, small_images=small_images)


def area_downsample(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3]: the mean of each square, rounded (area interpolation).

    `size` divides H and W, as the model's config has checked.
    """
    small = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), images.shape[1] // size)
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
