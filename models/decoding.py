"""How are images drawn from a model, whatever its family?

What is known is put on a canvas (models/drawing/canvas.py), and the model's decoder draws the rest, step by step.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.drawing.canvas import Canvas, Decoder
from models.drawing.draw import Sampling
from models.given import NOTHING, Given
from models.model import Model, check_inputs


class Step(NamedTuple):
    """What one step has done."""

    done: int
    """Positions that have their value, those known included."""
    total: int
    positions: Tensor
    """int64 on the CPU: raster positions that got their value in this step; known ones may be among them."""


def generate(
    model: Model,
    num_images: int,
    *,
    seed: int,
    first_image: int = 0,
    given: Given = NOTHING,
    images: Tensor | None = None,
    known: Tensor | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    decoder: Callable[[Canvas], Decoder] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw uint8 [B, H, W, 3] with B = num_images; see Decoding. progress(done, total) is called after each step."""
    decoding = Decoding(
        model,
        num_images,
        seed=seed,
        first_image=first_image,
        given=given,
        images=images,
        known=known,
        sampling=sampling,
        decoder=decoder,
    )
    for step in decoding:
        if progress is not None:
            progress(step.done, step.total)
    return decoding.images


class Decoding:
    """The drawing of a batch of images: iterate once, and look at `images` at any time in between."""

    def __init__(
        self,
        model: Model,
        num_images: int,
        *,
        seed: int,
        first_image: int = 0,
        given: Given = NOTHING,
        images: Tensor | None = None,
        known: Tensor | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        decoder: Callable[[Canvas], Decoder] | None = None,
    ) -> None:
        """The noise of an image depends on (seed, first_image + its index) alone: neither on the batch it is drawn in
        nor on the order of drawing. given as in Model.forward, for B images.

        known: bool [L] by place in the order of generation, the positions whose values are taken from `images`, uint8
        [B, H, W, 3]; None for none. The others are drawn given all values before them in that order.
        decoder: instead of model.decoder. Every decoder of a model draws the same images.
        Raises ValueError for arguments that do not fit the model or each other.
        """
        config, order, device = model.config, model.generation_order, model.device
        if known is None:
            known = torch.zeros(len(order), dtype=torch.bool)
        if known.shape != order.shape or known.dtype != torch.bool:
            raise ValueError(f"known: {known.dtype} {list(known.shape)}, but the model asks for bool [{len(order)}]")
        if known.any() and images is None:
            raise ValueError(f"known: {int(known.sum())} positions, but no images are given to take them from")
        named = (("labels", given.labels), ("small_images", given.small_images), ("images", images))
        for name, tensor in named:
            if tensor is not None and len(tensor) != num_images:
                raise ValueError(f"{name}: {len(tensor)} images, but {num_images} are to be drawn")
        if images is None:
            images = torch.zeros(num_images, config.image_size, config.image_size, 3, dtype=torch.uint8, device=device)
        check_inputs(config, images, given)
        labels = given.labels
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_classes:
            raise ValueError(
                f"labels: from {labels.min()} to {labels.max()}, but classes are 0 to {config.num_classes - 1}"
            )
        copies = 1
        if sampling.is_guided:
            if not config.label_dropout:
                raise ValueError(
                    f"guidance: {sampling.guidance}, but the model knows no images without a class (label_dropout is 0 "
                    "in its config); choose 1"
                )
            assert labels is not None, "a model with label_dropout has classes"
            copies = 2
            without = torch.full_like(labels, config.num_classes)
            given = given.repeat(2)
            given = Given(labels=torch.cat([labels, without]), small_images=given.small_images)
        by_position = torch.empty_like(known)
        by_position[order] = known.cpu()
        self._model = model
        self._canvas = Canvas(
            values=images.reshape(num_images, len(order), -1).clone(),
            known=by_position,
            given=given,
            copies=copies,
            output=config.output,
            sampling=sampling,
            seed=seed,
            image_numbers=first_image + torch.arange(num_images, device=device),
        )
        self._decoder = (decoder or model.decoder)(self._canvas)

    @property
    def images(self) -> Tensor:
        """uint8 [B, H, W, 3]; what is not drawn yet is as in the images that were given, or black."""
        size = self._model.config.image_size
        return self._canvas.values.view(-1, size, size, 3)

    @property
    def parameters(self) -> Tensor:
        """What the values of the last step were drawn from, in the order of its positions: [B, positions, C, 256] or
        [B, positions, 10 components]; overwritten by the next step."""
        return self._decoder.parameters[: len(self._canvas.values)]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        known = self._canvas.known
        done, total = int(known.sum()), len(known)
        was_training = self._model.training
        self._model.eval()
        try:
            for positions in self._decoder.steps():
                done += int((~known[positions]).sum())
                yield Step(done, total, positions)
        finally:
            self._model.train(was_training)


def consistency(images: Tensor, small_images: Tensor) -> Tensor:
    """How far each super-resolved image, averaged over areas of the small image's size, is from the small image: [B].

    Root mean square difference, intensities on [0, 1]; 0 is perfect. images uint8 [B, H, W, 3], small_images [B, h, w,
    3].
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), small_images.shape[1]).permute(0, 2, 3, 1)
    return ((small - small_images) / 255).square().mean((1, 2, 3)).sqrt()
