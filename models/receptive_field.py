"""How much of what was generated before does a position of a model see? Measured by gradients, for any family.

Which values reach a position depends on kernels, patterns and layers, and not on widths: so the same architecture is
built with few features, with random weights, and differentiated. A gradient is exactly zero where nothing is seen.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from models.given import Given
from models.model import Entrance, Model, ModelConfig

IMAGES = 3
"""Random images whose gradients are looked at together: in one alone, what lies on the way may be cut off (ReLU)."""
JITTER = 0.1
"""Standard deviation of what is added to all weights, so that those that begin as zero let gradients pass."""
MOST_IMAGE_SIZE, MOST_UNITS, MOST_FLOPS = 128, 512, 2e9
"""Of a model that is measured; FLOPs are those of a forward pass with few features. 48 layers of 64x64 images, 1.4e9,
took a minute on a busy core; most models of 32x32 take seconds."""


@dataclass(frozen=True)
class ReceptiveField:
    """Of the first position that is generated of the pixel in the middle of the image, in pixels other than its own."""

    seen: int
    past: int
    """Pixels of which something is generated before."""


@lru_cache(maxsize=64)
def receptive_field(config: ModelConfig) -> ReceptiveField | None:
    """None for a model that is too large to be measured at once. Draws no random numbers of the caller's."""
    if config.image_size > MOST_IMAGE_SIZE or config.num_units > MOST_UNITS:
        return None
    narrow = config.narrow()
    if narrow.account().flops.forward > MOST_FLOPS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = narrow.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(JITTER * torch.randn_like(parameter))
        order, size = model.generation_order, config.image_size
        per_pixel = len(order) // size**2
        middle = size // 2 * size + size // 2
        rank = int((order // per_pixel == middle).nonzero()[0])
        seen = seen_by(model, [int(order[rank])])[0]
    pixels = {int(position) // per_pixel for position in seen.nonzero()} - {middle}
    past = {int(position) // per_pixel for position in order[:rank]} - {middle}
    return ReceptiveField(len(pixels), len(past))


def seen_by(model: Model, positions: list[int], num_images: int = IMAGES) -> Tensor:
    """bool [positions, L]: whether the output of a position depends on the value of each, by raster position."""
    config, length = model.config, len(model.generation_order)
    generator = torch.Generator().manual_seed(0)

    def random_images(size: int) -> Tensor:
        return torch.randint(0, 256, (num_images, size, size, 3), dtype=torch.uint8, generator=generator)

    given = Given(
        labels=torch.arange(num_images) % config.num_classes if config.num_classes else None,
        small_images=random_images(config.small_size) if config.small_size else None,
    )
    entered: list[tuple[Tensor, Tensor]] = []
    """Rows of values, and the position of each."""

    def handed(rows: Tensor, positions: Tensor) -> Tensor:
        entered.append((rows.detach().requires_grad_(), positions))
        return entered[-1][0]

    def hook_of(entrance: Entrance) -> RemovableHandle:
        if entrance.looks_up:
            return entrance.module.register_forward_hook(lambda _, __, output: handed(output, entrance.positions))
        return entrance.module.register_forward_pre_hook(
            lambda _, inputs: (handed(inputs[0], entrance.positions), *inputs[1:])
        )

    with torch.enable_grad():
        hooks = [hook_of(entrance) for entrance in model.entrances()]
        outputs = model(random_images(config.image_size), given).reshape(num_images, length, -1)
        for hook in hooks:
            hook.remove()
        # Random factors, so that gradients of a position's outputs do not cancel.
        factors = torch.randn(outputs.shape[2], generator=generator, dtype=outputs.dtype)
        seen = torch.zeros(len(positions), length, dtype=torch.bool)
        for row, position in zip(seen, positions, strict=True):
            rows = [each for each, _ in entered]
            of_position = (outputs[:, position] * factors).sum()
            gradients = torch.autograd.grad(of_position, rows, retain_graph=True, allow_unused=True)
            for gradient, (_, places) in zip(gradients, entered, strict=True):
                if gradient is not None:
                    touched = gradient.reshape(num_images, len(places), -1).abs().amax((0, 2)) > 0
                    sources = places[touched]
                    row[sources[sources >= 0]] = True
    return seen
