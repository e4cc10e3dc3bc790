"""What does the model get to see of a batch: images, and where its config asks for them labels and small images?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import Batch
from models.image_transformer_config import ImageTransformerConfig

Inputs = tuple[Tensor, Tensor | None, Tensor | None]
"""images uint8 [B, H, W, 3], labels int64 [B] or None, condition uint8 [B, h, w, 3] or None."""


def model_inputs(batch: Batch, model: ImageTransformerConfig) -> Inputs:
    """The model's arguments for a batch that is on its device."""
    labels = batch.labels if model.num_classes else None
    condition = area_downsample(batch.images, model.small_size) if model.small_size else None
    return batch.images, labels, condition


def blank_inputs(model: ImageTransformerConfig, device: torch.device) -> Inputs:
    """One black image of class 0, for a forward pass whose result does not matter."""
    size, small = model.image_size, model.small_size
    images = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device) if model.num_classes else None
    condition = torch.zeros(1, small, small, 3, dtype=torch.uint8, device=device) if small else None
    return images, labels, condition


def area_downsample(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3]: the mean of each square, rounded (area interpolation).

    `size` divides H and W, as the model's config has checked.
    """
    small = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), images.shape[1] // size)
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
