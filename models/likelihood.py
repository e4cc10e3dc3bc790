"""How probable are the pixels under the model's output?

The output distributions (section 3.4 of the paper); models/drawing/draw.py draws from them:
- "categorical": 256 logits for each sub-pixel, parameters [B, H, W, 3, 256];
- "mixture": a discretised mixture of K logistics for each pixel (PixelCNN++), parameters [B, H, W, 10 K];
- "predictor_mixture": the same, computed from means that are relative to guesses (`around_guesses`);
- "predictor_categorical": logits again, to which a mixture around guesses was added (`logits_around_guesses`).

Shapes: B batch, H rows, W columns, K mixtures, P predictors.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.neighbours import PREDICTORS, Predictor


@dataclass(frozen=True, kw_only=True)
class CategoricalOutput:
    """256 probabilities for each sub-pixel."""

    kind: Literal["categorical"] = "categorical"


@dataclass(frozen=True, kw_only=True)
class PredictorCategoricalOutput:
    """256 probabilities for each sub-pixel, whose logits begin as those of a mixture of logistics around guesses from
    the neighbours of the pixel. Each moves with what its guess missed of the channels before. Raises ValueError.
    """

    kind: Literal["predictor_categorical"] = "predictor_categorical"
    predictors: tuple[Predictor, ...] = ("median", "average", "gradient", "learned")
    """How pixels are guessed (models/neighbours.py), one logistic for each. Each is computed at all 256 intensities."""

    def __post_init__(self) -> None:
        if problems := _problems_of(self.predictors):
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class MixtureOutput:
    """A discretised mixture of logistics for each pixel (Salimans et al. 2017). Raises ValueError."""

    kind: Literal["mixture"] = "mixture"
    components: int = 10
    """Logistics that are mixed (the paper: 10)."""

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: {self.components} is not positive")


@dataclass(frozen=True, kw_only=True)
class PredictorMixtureOutput:
    """A mixture of logistics whose means are given relative to guesses from the neighbours of the pixel: one for each
    predictor and scale. Green and blue move with what the predictor missed of the channels before them. Raises
    ValueError.
    """

    kind: Literal["predictor_mixture"] = "predictor_mixture"
    predictors: tuple[Predictor, ...] = PREDICTORS
    """How pixels are guessed (models/neighbours.py)."""
    scales: int = 2
    """Logistics around each guess, which start with different scales."""

    def __post_init__(self) -> None:
        problems = _problems_of(self.predictors)
        if self.scales < 1:
            problems.append(f"scales: {self.scales} is not positive")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def components(self) -> int:
        """Logistics that are mixed."""
        return len(self.predictors) * self.scales


def _problems_of(predictors: tuple[Predictor, ...]) -> list[str]:
    if predictors and len(set(predictors)) == len(predictors):
        return []
    return [f"predictors: {list(predictors)} must be one or more, each once"]


Categorical = CategoricalOutput | PredictorCategoricalOutput
"""Outputs whose parameters are logits."""
Mixtures = MixtureOutput | PredictorMixtureOutput
"""Outputs whose parameters are those of a mixture of logistics for each pixel."""
Output = Categorical | Mixtures

# Intensities 0..255 lie on [-1, 1], so that a level is 1 / 127.5 wide.
LEVELS_PER_UNIT = 127.5
LOG_SCALE_FLOOR = -7.0
# For bins of fewer scales than this, 1 - exp(-width) is its series up to the second term: the next is 4e-10 of it.
NARROW_BIN = 1e-4
INITIAL_LOG_SCALE = math.log(0.1)
# Of what a predictor misses: red, green given red, blue given both, in photographs; as a logistic's scale.
INITIAL_MISSES = tuple(deviation * math.sqrt(3) / math.pi for deviation in (0.06, 0.03, 0.03))
MISS_GAIN = 0.1
"""Of the means that are relative to guesses, which are about as small."""
INITIAL_SPREAD = -0.25
"""Log-scales of single logistics begin so much below those of the misses, which are not logistic: most are smaller."""
SMALLEST_BIN = 1e-8
"""Added to probabilities of which a logarithm is a logit."""


def nats(output: Output, parameters: Tensor, images: Tensor) -> Tensor:
    """Negative log-likelihood in nats: [B, H, W, 3] (categorical) or [B, H, W] (mixture), of images uint8 [B,
    H, W, 3].

    fp32, or fp64 for parameters in fp64.
    """
    if not isinstance(output, Categorical):
        return mixture_nats(parameters, images)
    logits = _at_least_fp32(parameters)
    losses = F.cross_entropy(logits.flatten(0, -2), images.flatten().long(), reduction="none")
    return losses.view(images.shape)


def bits_per_dim(total_nats: float, num_subpixels: int) -> float:
    """Bits per sub-pixel, the unit of every published table."""
    return total_nats / (num_subpixels * math.log(2))


class Mixture(NamedTuple):
    """Parameters of K logistics for each pixel; means and scales on the [-1, 1] scale of intensities."""

    logits: Tensor
    """[..., K]."""
    means: Tensor
    """[..., K, 3], of green and blue before the other channels are taken into account."""
    log_scales: Tensor
    """[..., K, 3], floored."""
    coefficients: Tensor
    """[..., K, 3] in (-1, 1): red on green, red on blue, green on blue."""


def split_mixture(parameters: Tensor) -> Mixture:
    """[..., 10 K] in the original's layout: K logits, K x 3 means, K x 3 log-scales, K x 3 coefficients
    before tanh."""
    if parameters.shape[-1] % 10:
        raise ValueError(f"a mixture takes 10 parameters per component, got {parameters.shape[-1]} in all")
    num_mixtures = parameters.shape[-1] // 10
    logits, *triples = _at_least_fp32(parameters).split([num_mixtures] + [3 * num_mixtures] * 3, dim=-1)
    means, log_scales, coefficients = (triple.unflatten(-1, (num_mixtures, 3)) for triple in triples)
    return Mixture(logits, means, log_scales.clamp(min=LOG_SCALE_FLOOR), coefficients.tanh())


def initial_mixture(num_mixtures: int) -> Tensor:
    """Parameters [10 K] to start from: reds spread evenly, and green near red and blue near green as in
    photographs."""
    spread = torch.linspace(-1, 1, 2 * num_mixtures + 1)[1::2]
    means = torch.stack([spread, torch.zeros(num_mixtures), torch.zeros(num_mixtures)], dim=-1)
    log_scales = torch.tensor([math.log(1 / num_mixtures), INITIAL_LOG_SCALE, INITIAL_LOG_SCALE]).expand(
        num_mixtures, 3
    )
    coefficients = torch.tensor([math.atanh(0.9), 0.0, math.atanh(0.9)]).expand(num_mixtures, 3)
    return torch.cat([torch.zeros(num_mixtures), means.flatten(), log_scales.flatten(), coefficients.flatten()])


def initial_predictor_mixture(output: PredictorMixtureOutput) -> Tensor:
    """Parameters [10 K] to start from: the guesses themselves, with scales that are typical of photographs."""
    spread = torch.linspace(-1.75, 1.25, 2 * output.scales + 1)[1::2]
    log_scales = (torch.tensor(INITIAL_MISSES).log() + spread[:, None]).repeat_interleave(len(output.predictors), dim=0)
    coefficients = torch.tensor([math.atanh(0.9), 0.0, math.atanh(0.9)]).expand(output.components, 3)
    return torch.cat([torch.zeros(4 * output.components), log_scales.flatten(), coefficients.flatten()])


def initial_parameters(output: Mixtures) -> Tensor:
    """Parameters [10 K] to start from."""
    if isinstance(output, PredictorMixtureOutput):
        return initial_predictor_mixture(output)
    return initial_mixture(output.components)


def around_guesses(parameters: Tensor, guesses: Tensor) -> Tensor:
    """Parameters [..., 10 K] with means that are relative to guesses [..., P, 3] -> those of a mixture, [..., 10 K].

    Component k belongs to guess k modulo P.
    """
    num_mixtures = parameters.shape[-1] // 10
    logits, means, log_scales, coefficients = parameters.split([num_mixtures] + [3 * num_mixtures] * 3, dim=-1)
    guess = guesses.repeat(*[1] * (guesses.ndim - 2), num_mixtures // guesses.shape[-2], 1)
    red, green, _ = guess.unbind(-1)
    on_green, red_on_blue, green_on_blue = coefficients.unflatten(-1, (num_mixtures, 3)).tanh().unbind(-1)
    # A mixture's green and blue move with the values of the channels before them, these with what is left of them.
    moved = torch.stack([torch.zeros_like(red), on_green * red, red_on_blue * red + green_on_blue * green], dim=-1)
    return torch.cat([logits, MISS_GAIN * means + (guess - moved).flatten(-2), log_scales, coefficients], dim=-1)


def logits_around_guesses(parameters: Tensor, guesses: Tensor, pixels: Tensor, channels: Tensor) -> Tensor:
    """Parameters [B, T, 256 + 5 P] of T sub-pixels and guesses of their pixels [B, T, P, 3] -> logits [B, T, 256].

    The parameters are logits, and for each guess a weight, a mean, a log-scale and two coefficients before tanh, all
    relative to what is typical of photographs. pixels [B, T, 3]: intensities on [-1, 1], of which those of channels
    before the sub-pixel's own count; channels int64 [T]. The bins' probabilities are products of sigmoids as in
    `log_bin_probability`: a difference would lose those of the tails.
    """
    predictors = guesses.shape[-2]
    logits, weights, means, log_scales, *coefficients = parameters.split([256] + [predictors] * 5, dim=-1)
    before = torch.arange(2, device=channels.device) < channels[:, None]  # red, green
    last = torch.arange(2, device=channels.device) == channels[:, None] - 1
    missed = (pixels[..., None, :2] - guesses[..., :2]) * before[:, None]
    moves = (torch.stack(coefficients, dim=-1) + math.atanh(0.9) * last[:, None]).tanh() * missed
    own = guesses.gather(-1, channels[:, None, None].expand(*guesses.shape[:-1], 1)).squeeze(-1)
    centres = own + MISS_GAIN * means + moves.sum(-1)
    red, after = (math.log(INITIAL_MISSES[channel]) for channel in (0, 1))
    first = torch.where(channels == 0, red, after)[:, None] + INITIAL_SPREAD
    steepness = (-(log_scales + first).clamp(min=LOG_SCALE_FLOOR)).exp()[..., None]
    edges = (torch.arange(255, device=parameters.device, dtype=parameters.dtype) + 0.5) / LEVELS_PER_UNIT - 1
    x = (edges - centres[..., None]) * steepness
    below, above = x.sigmoid(), (-x).sigmoid()
    inside = below[..., 1:] * above[..., :-1] * -torch.expm1(-steepness / LEVELS_PER_UNIT)
    bins = torch.cat([below[..., :1], inside, above[..., -1:]], dim=-1)
    return logits + ((weights.softmax(-1)[..., None] * bins).sum(-2) + SMALLEST_BIN).log()


def mixture_nats(parameters: Tensor, images: Tensor) -> Tensor:
    """Negative log-likelihood of whole pixels in nats, [B, H, W].

    The distribution of the original's discretized_mix_logistic_loss: the means of green and blue move with the true
    values of the channels before them; the outermost bins reach to infinity. But bins have their exact probabilities,
    which sum to one; the original gives those below 1e-5 the density at their centre instead, and they do not.
    """
    log_weights, log_probabilities = _component_log_probabilities(parameters, images)
    return -torch.logsumexp(log_weights + log_probabilities.sum(-1), dim=-1)


def nats_by_channel(output: Output, parameters: Tensor, images: Tensor) -> Tensor:
    """Negative log-likelihood in nats of red, of green given red, and of blue given both: [B, H, W, 3].

    Their sum over channels is that of `nats`. For the mixture by the chain rule, with the joint likelihoods of the
    first one, two and three channels.
    """
    if isinstance(output, Categorical):
        return nats(output, parameters, images)
    log_weights, log_probabilities = _component_log_probabilities(parameters, images)
    joint = -torch.logsumexp(log_weights.unsqueeze(-1) + log_probabilities.cumsum(-1), dim=-2)
    return joint.diff(dim=-1, prepend=torch.zeros_like(joint[..., :1]))


def _component_log_probabilities(parameters: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights of the components [B, H, W, K], and what each gives to the three intensities [B, H, W, K, 3]."""
    mixture = split_mixture(parameters)
    pixels = (images.to(mixture.means.dtype) / LEVELS_PER_UNIT - 1).unsqueeze(-2)
    red, green, _ = pixels.unbind(-1)
    on_green, red_on_blue, green_on_blue = mixture.coefficients.unbind(-1)
    shift = torch.stack([torch.zeros_like(on_green), on_green * red, red_on_blue * red + green_on_blue * green], dim=-1)
    log_probabilities = log_bin_probability(images.unsqueeze(-2), mixture.means + shift, mixture.log_scales)
    return mixture.logits.log_softmax(-1), log_probabilities


def log_bin_probability(intensities: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log(sigmoid(upper) - sigmoid(lower)) of the bins around intensities 0 to 255; shapes are broadcast.

    Exact: over all intensities the probabilities sum to one within 1e-6, for any mean and any scale in fp32. For that,
    edges are counted in levels, where they are whole numbers and a half, and neighbours share theirs to the last bit.
    The difference of the sigmoids would lose digits; the product sigmoid(u) sigmoid(-l) (1 - exp(l - u)), which equals
    it, keeps them, in its logarithm also where it is too small for a number.
    """
    distances = intensities - (means + 1) * LEVELS_PER_UNIT
    log_width = -log_scales - math.log(LEVELS_PER_UNIT)  # of a bin, in scales
    width = log_width.exp()
    log_below_upper, log_above_lower = F.logsigmoid(width * (distances + 0.5)), F.logsigmoid(width * (0.5 - distances))
    log_between = torch.where(
        width > NARROW_BIN, torch.log(-torch.expm1(-width.clamp(min=NARROW_BIN))), log_width - width / 2
    )
    log_inside = log_below_upper + log_above_lower + log_between
    return torch.where(intensities == 0, log_below_upper, torch.where(intensities == 255, log_above_lower, log_inside))


def _at_least_fp32(parameters: Tensor) -> Tensor:
    return parameters if parameters.dtype == torch.float64 else parameters.float()
