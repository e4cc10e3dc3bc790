"""What is a model told about an image beside its pixels?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of each image of a batch; None where a model takes nothing of the kind."""

    labels: Tensor | None = None
    """int64 [B]: the class; num_classes of the model's config stands for no class."""
    small_images: Tensor | None = None
    """uint8 [B, h, w, 3]: the small image that is super-resolved."""

    def select(self, index: slice | Tensor) -> "Given":
        """That of some images of the batch."""
        return self._each(lambda tensor: tensor[index])

    def repeat(self, times: int) -> "Given":
        """The batch several times, one after the other."""
        return self._each(lambda tensor: torch.cat([tensor] * times))

    def to(self, device: torch.device) -> "Given":
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Given":
        return Given(
            labels=None if self.labels is None else change(self.labels),
            small_images=None if self.small_images is None else change(self.small_images),
        )


NOTHING = Given()
