"""What happens to the tokens in one layer of the decoder or the encoder?

A layer is self-attention, then (decoder of super-resolution only) attention to the encoder's output, then a
feed-forward network that treats every token alike; each is added to its input. How tokens of the sequence
attend to each other is a function given by the caller, so that training (all tokens at once) and decoding
(one token and a cache) share this code.

Shapes: B batch, T tokens, E encoder tokens, D width, N heads, M heads of keys and values (N, or a divisor of it), K
head width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.local_attention import attend_to_all
from models.linear import Linear

Block = Literal["paper", "modern"]
NormPlace = Literal["post", "pre"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, N, T, K], k and v [B, M, T, K] -> [B, N, T, K]."""
Std = Callable[[int, int], float]
"""(fan-in, fan-out) -> standard deviation of initial weights."""

NORM_EPSILON = 1e-6
ROTARY_LONGEST_WAVELENGTH = 100.0


def norm(block: Block, width: int) -> nn.Module:
    """LayerNorm for the paper's block, RMSNorm for the modern one."""
    if block == "paper":
        return nn.LayerNorm(width, eps=NORM_EPSILON)
    return nn.RMSNorm(width, eps=NORM_EPSILON)


class Layer(nn.Module):
    """One layer; `post` normalises after each sum as equations 1 and 2 of the paper do, `pre` before each
    sub-layer."""

    def __init__(
        self,
        *,
        block: Block,
        norm_place: NormPlace,
        width: int,
        heads: int,
        key_heads: int,
        attention_width: int,
        ff_width: int,
        dropout: float,
        attends_to_encoder: bool,
        num_sublayers: int,
    ) -> None:
        super().__init__()
        self.norm_place = norm_place
        self.dropout = nn.Dropout(dropout)
        std_in, std_out = _stds(block, num_sublayers)
        self.attention_norm = norm(block, width)
        self.attention = SelfAttention(block, width, heads, key_heads, attention_width, std_in, std_out)
        if attends_to_encoder:
            self.encoder_attention_norm = norm(block, width)
            self.encoder_attention = EncoderAttention(block, width, heads, key_heads, attention_width, std_in, std_out)
        self.feed_forward_norm = norm(block, width)
        self.feed_forward = FeedForward(block, width, ff_width, std_in, std_out)

    def forward(
        self, x: Tensor, attend: Attend, rotation: Tensor | None, encoder_kv: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x and the result are [B, T, D]; rotation as of rotary; encoder_kv as of
        EncoderAttention.keys_values."""
        x = self._add(x, self.attention_norm, lambda h: self.attention(h, attend, rotation))
        if encoder_kv is not None:
            x = self._add(x, self.encoder_attention_norm, lambda h: self.encoder_attention(h, *encoder_kv))
        return self._add(x, self.feed_forward_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_place == "post":
            return norm(x + self.dropout(sublayer(x)))
        return x + self.dropout(sublayer(norm(x)))


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of one sequence."""

    def __init__(
        self, block: Block, width: int, heads: int, key_heads: int, attention_width: int, std_in: Std, std_out: Std
    ) -> None:
        super().__init__()
        self.heads = (heads, key_heads, key_heads)
        self.widths = tuple(attention_width // heads * each for each in self.heads)
        self.qkv = Linear(width, sum(self.widths), std=std_in(width, attention_width))
        self.q_norm, self.k_norm = (_head_norm(block, attention_width // heads) for _ in range(2))
        self.out = Linear(attention_width, width, std=std_out(attention_width, width))

    def forward(self, x: Tensor, attend: Attend, rotation: Tensor | None) -> Tensor:
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (_split_heads(part, heads) for part, heads in zip(parts, self.heads, strict=True))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(_merge_heads(attend(q, k, v)))


class EncoderAttention(nn.Module):
    """Multi-head attention of every token to all tokens of the encoder."""

    def __init__(
        self, block: Block, width: int, heads: int, key_heads: int, attention_width: int, std_in: Std, std_out: Std
    ) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.q = Linear(width, attention_width, std=std_in(width, attention_width))
        self.kv = Linear(width, 2 * (attention_width // heads) * key_heads, std=std_in(width, attention_width))
        self.q_norm, self.k_norm = (_head_norm(block, attention_width // heads) for _ in range(2))
        self.out = Linear(attention_width, width, std=std_out(attention_width, width))

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder output [B, E, D] -> keys and values [B, M, E, K]; the same for every token that is
        decoded."""
        k, v = self.kv(encoded).chunk(2, dim=-1)
        return self.k_norm(_split_heads(k, self.key_heads)), _split_heads(v, self.key_heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.q_norm(_split_heads(self.q(x), self.heads))
        return self.out(_merge_heads(attend_to_all(q, k, v)))


class FeedForward(nn.Module):
    """W1 ReLU(W2 x) with biases in the paper's block, SwiGLU without in the modern one."""

    def __init__(self, block: Block, width: int, ff_width: int, std_in: Std, std_out: Std) -> None:
        super().__init__()
        self.gated = block == "modern"
        hidden = 2 * ff_width if self.gated else ff_width
        self.hidden = Linear(width, hidden, std=std_in(width, ff_width), bias=not self.gated)
        self.out = Linear(ff_width, width, std=std_out(ff_width, width), bias=not self.gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.hidden(x).chunk(2, dim=-1)
            return self.out(F.silu(gate) * value)
        return self.out(F.relu(self.hidden(x)))


def attend_in_turn(attends: Sequence[Attend]) -> Attend:
    """Attention in which head h attends by attends[h modulo their number]."""
    if len(attends) == 1:
        return attends[0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Where heads share keys, each of these serves all kinds of heads.
        has_own = q.shape[1] == k.shape[1]
        results = [
            each(*(x[:, turn :: len(attends)] if x is q or has_own else x for x in (q, k, v)))
            for turn, each in enumerate(attends)
        ]
        return torch.stack(results, dim=2).flatten(1, 2)

    return attend


def rotary(rows: Tensor, columns: Tensor, head_width: int) -> Tensor:
    """The rotation of each position for rotate, as cosines and sines [2, T, K / 2] of its angles.

    The first half of the pairs turns with the row, the second with the column.
    """
    frequencies = ROTARY_LONGEST_WAVELENGTH ** -torch.linspace(0, 1, head_width // 4, device=rows.device)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + K/2}) by its angle; x [B, N, T, K], computed in fp32 at least.

    Products of queries and keys then depend on differences of positions only (rotary positions).
    """
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def _stds(block: Block, num_sublayers: int) -> tuple[Std, Std]:
    """Initial standard deviations of the matrices that read the hidden states, and of those whose result is added.

    The paper's block starts like the original code, with variance 0.2 / mean(fan-in, fan-out). In the modern block a
    matrix that reads keeps the variance; those that write share it, so that their sum over all sub-layers keeps it too.
    """
    if block == "paper":

        def fan_average(fan_in: int, fan_out: int) -> float:
            return math.sqrt(0.4 / (fan_in + fan_out))

        return fan_average, fan_average
    return (
        lambda fan_in, fan_out: 1 / math.sqrt(fan_in),
        lambda fan_in, fan_out: 1 / math.sqrt(fan_in * num_sublayers),
    )


def _head_norm(block: Block, head_width: int) -> nn.Module:
    """The modern block normalises queries and keys over the head width, which bounds the attention logits."""
    return nn.RMSNorm(head_width, eps=NORM_EPSILON) if block == "modern" else nn.Identity()


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, N * K] -> [B, N, T, K]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """[B, N, T, K] -> [B, T, N * K]."""
    return x.transpose(1, 2).flatten(2)
