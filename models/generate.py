"""How are images drawn from the model, position by position?

Each step feeds one token through the layers; the keys and values of earlier tokens are kept. While a query
block is being generated, what it can see lies in one window per layer: the memory of the block, then its own
tokens as they come.

Shapes: B batch, L positions, C values per position, N heads, K head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.image_transformer import ImageTransformer
from models.likelihood import draw
from models.linear import product_dtype
from models.local_attention import attend_to_all, local_attention
from models.pattern import Pattern, QueryBlock
from models.pixel_order import to_images, to_positions


@torch.no_grad()
def generate(
    model: ImageTransformer,
    num_images: int,
    *,
    seed: int,
    first_image: int = 0,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    prefix: Tensor | None = None,
    keep: int = 0,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw uint8 [B, H, W, 3] with B = num_images.

    The noise of an image depends on (seed, first_image + its index) alone: neither on the batch it is drawn
    in nor on the order of drawing. labels int64 [B] and condition uint8 [B, h, w, 3] as in
    ImageTransformer.forward. The first `keep` positions in generation order are taken from `prefix`, uint8
    [B, H, W, 3]. progress(done, total) is called after each position.
    """
    config, pattern = model.config, model.pattern
    if not 0 <= keep <= pattern.length:
        raise ValueError(f"keep: {keep} is not between 0 and the image's {pattern.length} positions")
    if keep and prefix is None:
        raise ValueError(f"keep: {keep} positions, but no prefix is given to take them from")
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} is not positive")
    if prefix is not None and len(prefix) != num_images:
        raise ValueError(f"prefix: {len(prefix)} images, but {num_images} are to be drawn")
    device = model.positions.device
    size = config.image_size
    if prefix is None:
        prefix = torch.zeros(num_images, size, size, 3, dtype=torch.uint8, device=device)
    model.check_inputs(prefix, labels, condition)

    was_training = model.training
    model.eval()
    encoder_kv = model.encode(condition)
    caches = [_Cache(pattern) for _ in model.layers]
    values = to_positions(prefix, config.input).clone()
    if keep:
        inputs = values[:, model.sources.clamp(min=0)]
        slots = torch.arange(pattern.length, device=device)
        model.hidden(inputs, slots, labels, encoder_kv, [cache.attend_to_pattern for cache in caches])

    images = first_image + torch.arange(num_images, device=device)
    slots_in_order = pattern.slot_of_rank.to(device)
    for block in pattern.blocks:
        if block.stop <= keep:
            continue
        uniforms = keyed_uniforms(seed, images, model.positions[slots_in_order[block.start : block.stop]])
        for cache in caches:
            cache.enter(block, max(keep - block.start, 0))
        for rank in range(max(keep, block.start), block.stop):
            slot = slots_in_order[rank : rank + 1]
            inputs = values[:, model.sources[slot].clamp(min=0)]
            hidden = model.hidden(inputs, slot, labels, encoder_kv, [cache.attend for cache in caches])
            noise = uniforms[:, rank - block.start]
            values[:, model.positions[slot]] = _draw_position(model, hidden, noise, temperature)[:, None]
            if progress is not None:
                progress(rank + 1, pattern.length)
    model.train(was_training)
    return to_images(values, size)


def consistency(images: Tensor, condition: Tensor) -> Tensor:
    """How far each super-resolved image, averaged over areas of the small image's size, is from the small image: [B].

    Root mean square difference, intensities on [0, 1]; 0 is perfect. images uint8 [B, H, W, 3], condition [B, h, w, 3].
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), condition.shape[1]).permute(0, 2, 3, 1)
    return ((small - condition) / 255).square().mean((1, 2, 3)).sqrt()


def _draw_position(model: ImageTransformer, hidden: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Values uint8 [B, C] of one position from its token [B, 1, D] and uniforms [B, 4]."""
    parameters = model.head(hidden)[:, 0]
    if model.config.output == "categorical":
        noise = noise[:, : parameters.shape[1]]
    return draw(model.config.output, parameters, noise, temperature)


class _Cache:
    """Keys and values of one layer: all that is generated, in storage order, and the window that the current
    block sees.

    Both are [2, B, N, slots, K], keys first, in the dtype of products.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.generated: Tensor | None = None
        self.window: Tensor | None = None
        self.num_seen = 0
        self.block: QueryBlock | None = None

    def attend_to_pattern(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all positions at once, [B, N, L, K]; keeps the keys and values."""
        self.generated = torch.stack([k, v]).to(product_dtype(k))
        return local_attention(q, k, v, self.pattern)

    def enter(self, block: QueryBlock, num_generated: int) -> None:
        """Begin a block of which `num_generated` tokens are kept already."""
        if self.generated is None:  # the very first: nothing to see yet, and the shape of keys is not known
            self.block = block
            return
        device = self.generated.device
        if self.block is not None:
            assert self.window is not None
            own = self.pattern.slot_of_rank[self.block.start : self.block.stop].to(device)
            self.generated[:, :, :, own] = self.window[:, :, :, self.num_seen - self.block.num_queries : self.num_seen]
        memory = [torch.arange(start, stop) for start, stop in block.memory]
        slots = torch.cat([*memory, self.pattern.slot_of_rank[block.start : block.start + num_generated]]).to(device)
        self.block, self.num_seen = block, len(slots)
        self.window = self._empty(self.generated, block.num_memory_keys + block.num_queries)
        self.window[:, :, :, : self.num_seen] = self.generated[:, :, :, slots]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the next token of the block, q, k and v [B, N, 1, K], to all it sees."""
        new = torch.stack([k, v]).to(product_dtype(k))
        if self.window is None:
            assert self.block is not None
            self.generated = self._empty(new, self.pattern.length)
            self.window = self._empty(new, self.block.num_queries)
        self.window[:, :, :, self.num_seen : self.num_seen + 1] = new
        self.num_seen += 1
        keys, values = self.window[:, :, :, : self.num_seen]
        return attend_to_all(q, keys, values)

    @staticmethod
    def _empty(like: Tensor, num_slots: int) -> Tensor:
        return like.new_empty(*like.shape[:3], num_slots, like.shape[-1])


PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LOW_32_BITS = 0xFFFFFFFF


def keyed_uniforms(seed: int, images: Tensor, positions: Tensor) -> Tensor:
    """float64 [B, T, 4] in (0, 1), each a function of seed, image index int64 [B] and raster position int64
    [T] alone.

    Philox4x32-10 (Salmon et al. 2011) with the seed as key and (position, image) as counter.
    """
    words = [
        positions[None, :].expand(len(images), -1),
        (images & LOW_32_BITS)[:, None].expand(-1, len(positions)),
        (images >> 32 & LOW_32_BITS)[:, None].expand(-1, len(positions)),
        torch.zeros(len(images), len(positions), dtype=torch.int64, device=images.device),
    ]
    keys = [seed & LOW_32_BITS, seed >> 32 & LOW_32_BITS]
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap around modulo 2^64, so their bits are those of the unsigned product.
        first, second = PHILOX_MULTIPLIERS[0] * words[0], PHILOX_MULTIPLIERS[1] * words[2]
        words = [
            (second >> 32 & LOW_32_BITS) ^ words[1] ^ keys[0],
            second & LOW_32_BITS,
            (first >> 32 & LOW_32_BITS) ^ words[3] ^ keys[1],
            first & LOW_32_BITS,
        ]
        keys = [(key + step) & LOW_32_BITS for key, step in zip(keys, PHILOX_KEY_STEPS, strict=True)]
    return (torch.stack(words, dim=-1).double() + 0.5) / 2**32
