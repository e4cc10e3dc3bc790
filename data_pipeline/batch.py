"""What does the trainer receive: the one type that crosses from the data pipeline into it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch of images of one rank."""

    images: Tensor
    """uint8 [B, H, W, 3]. The device scales, flips and transposes them: copying uint8 moves a quarter of the bytes."""
    labels: Tensor | None
    """int64 [B], or None when the data set has no classes."""
    valid: Tensor | None
    """bool [B], in evaluation only: False marks a black image that fills up a last batch and must not count."""
    position: int
    """Training: samples consumed when the step that this batch belongs to is done. Evaluation: its index."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device. Does not wait for the copy when the batch is in pinned memory."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
            valid=None if self.valid is None else self.valid.to(device, non_blocking=True),
            position=self.position,
        )
