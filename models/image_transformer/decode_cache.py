"""Where are the keys and values of earlier tokens kept while an image is drawn, and how does the next token see them?

Everything is allocated once, for the largest wave of the plan (models/image_transformer/decode_plan.py), and has one
shape for all steps: which keys a step sees is a comparison of tensors, so that a GPU can replay a step as a captured
graph.

Shapes: B batch, N heads, M heads of keys and values (N, or a divisor of it), K head width, G blocks decoded together, W
slots of a window, A steps computed together, T tokens (G A, and padding).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.image_transformer.decode_plan import UNSEEN, DecodePlan, Wave
from models.image_transformer.layer import Attend


class DecodeCache:
    """Windows and kept keys of all layers, and the state of the wave that is being decoded."""

    def __init__(
        self,
        plan: DecodePlan,
        *,
        layers: int,
        batch: int,
        key_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros, because a slot that is not seen is multiplied by weight 0, and 0 times infinity is not a number.
        rows, slots = plan.num_windows, plan.window_slots
        self.windows = torch.zeros(layers, 2, rows, batch, key_heads, slots, head_width, dtype=dtype, device=device)
        self.kept = torch.zeros(layers, 2, batch, key_heads, plan.kept_slots, head_width, dtype=dtype, device=device)
        self.order, self.until = (torch.full((rows, slots), UNSEEN, dtype=torch.int32, device=device) for _ in range(2))
        most_steps = max(wave.num_steps for wave in plan.waves)
        self.own_window_slots = torch.zeros(most_steps, dtype=torch.int64, device=device)
        self.own_windows = torch.zeros_like(self.own_window_slots)
        self._several_windows = plan.waves[0].own_windows is not None
        self._new_slots, self._new_windows = self.own_window_slots[:1], self.own_windows[:1]
        self._bias = torch.zeros(())

    def enter(self, wave: Wave) -> None:
        """Fill the windows of a wave with what its blocks see of earlier ones."""
        device = self.order.device
        self.order[: len(wave.order)] = wave.order.to(device)
        self.until[: len(wave.order)] = wave.until.to(device)
        if wave.own_windows is not None:
            self.own_windows[: wave.num_steps] = wave.own_windows.to(device)
        self.own_window_slots[: wave.num_steps] = wave.own_window_slots.to(device)
        for row, (window_slots, kept_slots) in enumerate(wave.loads):
            self.windows[:, :, row].index_copy_(
                4, window_slots.to(device), self.kept.index_select(4, kept_slots.to(device))
            )

    def leave(self, wave: Wave) -> None:
        """Keep what later blocks see of a wave."""
        device = self.order.device
        for row, (window_slots, kept_slots) in enumerate(wave.stores):
            keys = self.windows[:, :, row].index_select(4, window_slots.to(device))
            self.kept.index_copy_(4, kept_slots.to(device), keys)

    def attend_steps(self, rows: int, steps: Tensor) -> list[Attend]:
        """For each layer, attention of the tokens with these numbers (int64 [A]) of each of the first `rows` blocks;
        the tokens of a block come one after the other."""
        self._new_slots = self.own_window_slots.index_select(0, steps)
        order, until, attend_steps = self.order[:rows, None], self.until[:rows, None], self._attend_steps
        if self._several_windows:
            # As if each step were of a block of its own.
            self._new_windows = self.own_windows.index_select(0, steps)
            order, until = (x.index_select(0, self._new_windows)[:, None] for x in (self.order, self.until))
            steps, rows, attend_steps = steps[:, None], len(self.order), self._attend_steps_of_several_windows
        seen = (order <= steps[..., None]) & (until > steps[..., None])
        bias = torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, -math.inf)
        self._bias = bias[:, None, None, :, None]  # [G, 1, 1, A, 1, W]
        return [partial(attend_steps, windows[:, :rows]) for windows in self.windows]

    def _attend_steps(self, windows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, T, K], k and v [B, M, T, K], of which the first G A tokens are real; windows [2, G, B, M, W, K]."""
        rows, steps = windows.shape[1], len(self._new_slots)
        for window, new in zip(windows, (k, v), strict=True):
            window.index_copy_(3, self._new_slots, _by_block(new, rows, steps).to(window.dtype))
        keys, values = windows
        return self._attention(q, keys, values, steps)

    def _attend_steps_of_several_windows(self, windows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for A tokens of one block, each with one of the windows [2, G, B, M, W, K]."""
        steps = len(self._new_slots)
        for window, new in zip(windows, (k, v), strict=True):
            window[self._new_windows, :, :, self._new_slots] = _by_block(new, steps, 1).squeeze(3).to(window.dtype)
        keys, values = windows.index_select(1, self._new_windows)
        return self._attention(q, keys, values, 1)

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, steps: int) -> Tensor:
        """q and the result [B, N, T, K], keys and values [G, B, M, W, K], for A steps of each of the G."""
        rows, tokens = len(keys), q.shape[2]
        queries = _by_block(q, rows, steps).unflatten(2, (keys.shape[2], -1)).transpose(3, 4)  # [G, B, M, A, N / M, K]
        queries = queries.to(keys.dtype) * (1 / math.sqrt(q.shape[-1]))
        # Not the fused operator, and one product for each step: on a CPU the sums of a product depend on its number of
        # rows, and an image must not depend on the batch.
        scores = _stacked([each @ keys.transpose(-1, -2) for each in queries.unbind(3)], 3)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = (scores.to(wide) + self._bias).softmax(-1).to(values.dtype)
        out = _stacked([each @ values for each in weights.unbind(3)], 2)  # [G, B, A, M, N / M, K]
        out = out.flatten(3, 4).permute(1, 3, 0, 2, 4).flatten(2, 3).to(q.dtype)
        return F.pad(out, (0, 0, 0, tokens - rows * steps))

    def attend_several(self, row: int, start: int, stop: int) -> list[Attend]:
        """For each layer, attention of the tokens start..stop of one block, all at once."""
        steps = torch.arange(start, stop, device=self.order.device)
        if self._several_windows:
            return self.attend_steps(1, steps)
        seen = (self.order[row] <= steps[:, None]) & (self.until[row] > steps[:, None])
        slots = self.own_window_slots[start:stop]
        return [partial(self._attend_several, windows[:, row], slots, seen) for windows in self.windows]

    def _attend_several(self, windows: Tensor, slots: Tensor, seen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, T, K], k and v [B, M, T, K], of which the first tokens are real; windows [2, B, M, W, K], seen
        [tokens, W]."""
        tokens = len(slots)
        for window, new in zip(windows, (k, v), strict=True):
            window.index_copy_(2, slots, new[:, :, :tokens].to(window.dtype))
        keys, values = windows
        real = q[:, :, :tokens].to(keys.dtype)
        queries = real.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # those of a head of keys one after the other
        mask = seen.repeat(q.shape[1] // keys.shape[1], 1)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).view(*real.shape)
        return F.pad(out.to(q.dtype), (0, 0, 0, q.shape[2] - tokens))


def _by_block(x: Tensor, rows: int, steps: int) -> Tensor:
    """[B, N, T, K] -> [G, B, N, A, K] of the first G A tokens."""
    return x[:, :, : rows * steps].unflatten(2, (rows, steps)).permute(2, 0, 1, 3, 4)


def _stacked(parts: list[Tensor], axis: int) -> Tensor:
    """torch.stack, but without a copy for a single part: on a GPU that would be one more kernel in every layer."""
    return parts[0].unsqueeze(axis) if len(parts) == 1 else torch.stack(parts, axis)
