"""Which random numbers does an image use, whatever the batch it is drawn in and the order of drawing?"""

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LOW_32_BITS = 0xFFFFFFFF


def keyed_uniforms(seed: int, images: Tensor, positions: Tensor, count: int = 4) -> Tensor:
    """float64 [B, T, count] in (0, 1), each a function of seed, image index int64 [B], raster position int64 [T] and
    its number alone; count is a multiple of 4.

    Philox4x32-10 (Salmon et al. 2011) with the seed as key and (position, image, number / 4) as counter.
    """
    shape = (len(images), len(positions), count // 4)
    words = [
        positions[None, :, None].expand(shape),
        (images & LOW_32_BITS)[:, None, None].expand(shape),
        (images >> 32 & LOW_32_BITS)[:, None, None].expand(shape),
        torch.arange(count // 4, device=images.device).expand(shape),
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
    return (torch.stack(words, dim=-1).flatten(2).double() + 0.5) / 2**32
