"""How is the value of a position drawn from the model's output: temperature, top-k, top-p, guidance?

Shapes: C channels of a position (1 sub-pixel or the 3 of a pixel), K mixtures.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.by_channel import means_given
from models.likelihood import Categorical, Mixture, Output, log_bin_probability, split_mixture


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How far to depart from the model's own distribution. Without arguments, not at all.

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    """Categorical: logits are divided by it. Mixture: logits of the components are divided by it, scales multiplied.
    Values below 1 make calmer images."""
    top_k: int = 0
    """Draw each value from this many of the likeliest intensities; 0: from all."""
    top_p: float = 1.0
    """Draw each value from the fewest intensities that have this probability together; 1: from all."""
    guidance: float = 1.0
    """Classifier-free guidance (Ho and Salimans 2022): log p is extrapolated from the model without a class (0)
    through the one with it (1) beyond it (> 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: must be above 0 and finite, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 1, or 0 for all intensities, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance: must be at least 0 and finite, not {self.guidance}")

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1


def draw(
    output: Output,
    parameters: Tensor,
    uniforms: Tensor,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    without_class: Tensor | None = None,
) -> Tensor:
    """Intensities uint8 [..., C] drawn from parameters [..., C, 256] (categorical) or [..., 10 K] (mixture).

    uniforms float64 in (0, 1): [..., C, 256], one per intensity, or [..., 4], one for the component and one per
    channel.
    without_class, shaped like parameters: the model's output for no class, for guidance.

    Top-k, top-p and guidance of a mixture act on the 256 probabilities of each channel given those before it.
    """
    if isinstance(output, Categorical):
        logits = _guided(parameters.double(), without_class, sampling) / sampling.temperature
        # Gumbel-max: logits that differ a little mostly draw the same value. Looking ahead depends on that
        # (models/image_transformer/wave_decoder.py).
        return (_filtered(logits, sampling) - (-uniforms.log()).log()).argmax(-1).to(torch.uint8)
    given = [parameters] if without_class is None else [parameters, without_class]
    mixtures = [_at_temperature(split_mixture(each), sampling.temperature) for each in given]
    if without_class is not None or sampling.top_k or sampling.top_p < 1:
        return _draw_channels(mixtures, uniforms[..., 1:], sampling)
    return _draw_component(mixtures[0], uniforms)


def _draw_component(mixture: Mixture, uniforms: Tensor) -> Tensor:
    """Draw a component, then red, green and blue from it, in this order."""
    component = _draw_index(mixture.logits, uniforms[..., 0])
    index = component[..., None, None].expand(*component.shape, 1, 3)
    means, log_scales, coefficients = (parameter.gather(-2, index).squeeze(-2).unbind(-1) for parameter in mixture[1:])
    logistic = torch.logit(uniforms[..., 1:]).unbind(-1)

    def draw_channel(channel: int, mean: Tensor) -> Tensor:
        # Each channel is clipped and rounded before it conditions the next, as in the likelihood.
        value = mean + log_scales[channel].exp() * logistic[channel]
        return ((value.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    red = draw_channel(0, means[0])
    green = draw_channel(1, means[1] + coefficients[0] * red)
    blue = draw_channel(2, means[2] + coefficients[1] * red + coefficients[2] * green)
    return ((torch.stack([red, green, blue], dim=-1) + 1) * 127.5).round().to(torch.uint8)


def _draw_channels(mixtures: list[Mixture], uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw red, then green, then blue from 256 probabilities each; `mixtures` are that for the class and, for guidance,
    that for no class."""
    intensities = torch.arange(256, device=uniforms.device)
    log_weights = [mixture.logits.log_softmax(-1) for mixture in mixtures]
    drawn: list[Tensor] = []
    for channel in range(3):
        log_bins = [_log_bins(mixture, channel, drawn, intensities) for mixture in mixtures]
        log_p = [(w[..., None] + bins).logsumexp(-2) for w, bins in zip(log_weights, log_bins, strict=True)]
        logits = _guided(log_p[0], log_p[1] if len(log_p) > 1 else None, sampling)
        index = _draw_index(_filtered(logits, sampling), uniforms[..., channel])
        for which, bins in enumerate(log_bins):
            at_index = bins.gather(-1, index[..., None, None].expand(*bins.shape[:-1], 1)).squeeze(-1)
            log_weights[which] = (log_weights[which] + at_index).log_softmax(-1)
        drawn.append(index)
    return torch.stack(drawn, dim=-1).to(torch.uint8)


def _log_bins(mixture: Mixture, channel: int, drawn: list[Tensor], intensities: Tensor) -> Tensor:
    """[..., K, 256]: log-probability of each intensity of a channel under each component, given the channels drawn."""
    means = means_given(mixture, drawn)
    return log_bin_probability(intensities, means[..., None], mixture.log_scales[..., channel, None])


def _at_temperature(mixture: Mixture, temperature: float) -> Mixture:
    logits, means, log_scales, coefficients = (parameter.double() for parameter in mixture)
    return Mixture(logits / temperature, means, log_scales + math.log(temperature), coefficients)


def _guided(logits: Tensor, without_class: Tensor | None, sampling: Sampling) -> Tensor:
    if without_class is None:
        return logits
    without = without_class.double()
    return without + sampling.guidance * (logits - without)


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [..., n], -inf where top-k or top-p exclude a value. Of equally likely values the lowest stay."""
    if not sampling.top_k and sampling.top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        dropped[..., sampling.top_k :] = True
    if sampling.top_p < 1:
        p = ordered.softmax(-1)
        dropped |= p.cumsum(-1) - p >= sampling.top_p  # the likelier ones have the probability already
    return logits.masked_fill(dropped.gather(-1, order.argsort(-1)), -math.inf)


def _draw_index(logits: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [...]: an index into the last axis of logits [..., n] by inverting the distribution function."""
    p = logits.softmax(-1)
    # A share of the last sum, which rounding leaves a little off 1. So a value of probability 0 is never drawn.
    cumulative = p.cumsum(-1)
    return (cumulative <= uniforms[..., None] * cumulative[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
