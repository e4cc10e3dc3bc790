"""Which options does the Image Transformer have, and which of them fit together?

Everything that decides the shape of the model. The decoder's attention pattern and the output distribution are tagged
unions: each kind has just the fields that it needs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from models.attention.pattern import Pattern, dilated_1d, fixed_1d, full, local_1d, local_2d, sliding_1d, strided_1d
from models.image_transformer.embedding import Position
from models.image_transformer.layer import Block, NormPlace
from models.image_transformer.pixel_order import Input, Shift, grid_shape
from models.likelihood import Categorical, Output, PredictorCategoricalOutput, PredictorMixtureOutput
from models.neighbours import Stem

LARGEST = {
    "image_size": 1024,
    "layers": 4096,
    "width": 1 << 17,
    "heads": 1 << 14,
    "attention_width": 1 << 17,
    "ff_width": 1 << 20,
}
"""Far beyond what anybody trains. A config may come from a stranger, and its sizes decide what a computer does."""
MOST_CLASSES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Local1D:
    """Blocks of consecutive positions; each also sees the positions just before it (section 3.3 of the paper)."""

    kind: Literal["local_1d"] = "local_1d"
    query_block: int
    """Positions of a block; divides the number of positions."""
    memory: int
    """Positions that a block sees before its first one."""


@dataclass(frozen=True, kw_only=True)
class Local2D:
    """Rectangular blocks of the grid; each also sees a flange of the grid around it (section 3.3 of the paper)."""

    kind: Literal["local_2d"] = "local_2d"
    query_block: tuple[int, int]
    """Rows and columns of a block; both divide the grid's."""
    memory: tuple[int, int]
    """Rows above a block that it sees, and columns to each side."""
    shift: Shift = "generation"
    """How inputs move on by one: "generation", along the generation order, or "block", inside each block as in the
    original code, which hides each block's last value from other blocks but lets blocks be decoded in waves."""


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every position sees all before it."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class Dilated1D:
    """Blocks of consecutive positions; each also sees chunks of earlier positions with gaps between them."""

    kind: Literal["dilated_1d"] = "dilated_1d"
    query_block: int
    """Positions of a block; divides the number of positions."""
    memory: int
    """Positions of a chunk."""
    gap: int
    """Positions that are skipped before each chunk."""
    chunks: int
    """Number of chunks."""


@dataclass(frozen=True, kw_only=True)
class Sliding1D:
    """Each position sees the last ones: the Sparse Transformer's local attention (Child et al. 2019)."""

    kind: Literal["sliding_1d"] = "sliding_1d"
    window: int
    """Positions that each one sees, itself included."""


@dataclass(frozen=True, kw_only=True)
class Strided1D:
    """Each position sees every stride-th one back from itself (Child et al. 2019, section 4.3)."""

    kind: Literal["strided_1d"] = "strided_1d"
    stride: int
    """Positions from one that is seen to the next."""


@dataclass(frozen=True, kw_only=True)
class Fixed1D:
    """Blocks of consecutive positions; each also sees the last few of every earlier block (Child et al. 2019, section
    4.3)."""

    kind: Literal["fixed_1d"] = "fixed_1d"
    query_block: int
    """Positions of a block; divides the number of positions."""
    summary: int
    """Positions of each earlier block that are seen: its last ones."""
    groups: int = 1
    """The heads take turns: those of the second of so many groups see the `summary` positions before the last ones, and
    so on. A divisor of heads; 1 for all the same."""


Attention = Local1D | Local2D | Full | Dilated1D | Sliding1D | Strided1D | Fixed1D
"""Which positions see each other in the decoder; models/attention/pattern.py draws them."""


@dataclass(frozen=True, kw_only=True)
class SuperResolution:
    """The encoder that reads a small image of which the model draws a large one (section 5.2 of the paper)."""

    small_size: int
    """Rows and columns of the small image; a proper divisor of image_size."""
    encoder_layers: int
    """Layers of the encoder."""


@dataclass(frozen=True, kw_only=True)
class ImageTransformerShape:
    """The fields of the config (`ImageTransformerConfig`). Raises ValueError with one problem a line."""

    family: Literal["image_transformer"] = "image_transformer"
    image_size: int
    """Rows and columns of the square images."""
    input: Input
    """"categorical": a position is a sub-pixel, embedded by channel and intensity. "ordinal": a position is a
    pixel, its three intensities combined linearly."""
    output: Output
    """The distribution of a value: 256 probabilities of a sub-pixel, or a mixture of logistics of a pixel; both also
    around guesses from its neighbours. "predictor_categorical" for input "ordinal": a small network draws the channels
    of a pixel one after the other, so that a third as many tokens go through the layers."""
    stem: Stem = "previous"
    """What a token is made of, beside its position. "previous": the value generated just before (the paper).
    "neighbourhood": the pixels around that are known, and their differences; of a sub-pixel, also the known channels of
    its own pixel. Blocks are then not decoded in waves."""
    attention: Attention | tuple[Attention, ...]
    """Which positions see each other: one pattern for all layers of the decoder, or a list of patterns that the layers
    take in turn, all with the same order of generation."""
    layers: int
    """Layers of the decoder."""
    width: int
    """Width of the tokens between the layers (d in the paper)."""
    heads: int
    """Attention heads."""
    key_heads: int = 0
    """Heads of keys and values, each of which serves heads / key_heads neighbouring heads of queries (grouped-query
    attention, Ainslie et al. 2023), so that decoding keeps and reads fewer of them by that factor; 0 for one each."""
    attention_width: int
    """Width of all heads' queries together; also of keys and values where key_heads is 0."""
    ff_width: int
    """Width inside the feed-forward network."""
    block: Block
    """"paper": LayerNorm, ReLU, biases in the feed-forward network. "modern": RMSNorm, SwiGLU, normalised
    queries and keys, no biases."""
    norm: NormPlace
    """Normalise after each sum ("post", the paper) or before each sub-layer ("pre")."""
    position: Position
    """Codes of row and column added to the input, half the width each: "sine" or "learned". "rotary":
    learned, and in every layer queries and keys are turned by row and column."""
    dropout: float = 0.0
    """Rate of dropout on the embedded input and on what each sub-layer adds."""
    num_classes: int = 0
    """Classes the model can be asked for; 0 for none."""
    label_dropout: float = 0.0
    """Rate at which training hides the class of an image, so that the model also learns images of no class, which
    classifier-free guidance needs (Ho and Salimans 2022: 0.1); 0 for never."""
    super_resolution: SuperResolution | None = None
    """What reads the small image that is super-resolved; null for none."""

    def __post_init__(self) -> None:
        if problems := _range_problems(self) or [*_attention_problems(self), *_combination_problems(self)]:
            raise ValueError("\n".join(problems))

    @property
    def num_key_heads(self) -> int:
        return self.key_heads or self.heads

    @property
    def small_size(self) -> int:
        """Rows and columns of the small image that is super-resolved; 0 for none."""
        return self.super_resolution.small_size if self.super_resolution else 0

    @property
    def encoder_layers(self) -> int:
        return self.super_resolution.encoder_layers if self.super_resolution else 0

    @property
    def sees_neighbours(self) -> bool:
        """Whether anything but attention sees the pixels around: the input, or what the output is relative to."""
        around_guesses = isinstance(self.output, PredictorMixtureOutput | PredictorCategoricalOutput)
        return self.stem == "neighbourhood" or around_guesses

    @property
    def draws_by_channel(self) -> bool:
        """Whether tokens are pixels, whose channels are drawn one after the other (channel_tokens.py)."""
        return self.input == "ordinal" and isinstance(self.output, PredictorCategoricalOutput)

    @property
    def shift(self) -> Shift:
        """How inputs move on by one, the same in all layers."""
        return _shift(self.attentions[0])

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The pattern of each layer of the decoder."""
        given = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        return tuple(given[layer % len(given)] for layer in range(self.layers))


def make_patterns(config: ImageTransformerShape, attention: Attention) -> tuple[Pattern, ...]:
    """Attention patterns over the positions of the model's images, which the heads of a layer take in turn; nearly
    always one."""
    height, width = grid_shape(config.image_size, config.input)
    length = height * width
    match attention:
        case Full():
            return (full(length),)
        case Local1D():
            return (local_1d(length, attention.query_block, attention.memory),)
        case Dilated1D():
            return (dilated_1d(length, attention.query_block, attention.memory, attention.gap, attention.chunks),)
        case Local2D():
            return (local_2d(height, width, attention.query_block, attention.memory, cell=_common_cell(config)),)
        case Sliding1D():
            return (sliding_1d(length, attention.window),)
        case Strided1D():
            return (strided_1d(length, attention.stride),)
        case Fixed1D():
            groups = range(attention.groups)
            return tuple(fixed_1d(length, attention.query_block, attention.summary, group) for group in groups)


def _cuts_pixels(config: ImageTransformerShape) -> bool:
    """Whether something is generated between the sub-pixels of a pixel."""
    attention = config.attentions[0]  # all have its order
    return isinstance(attention, Local2D) and attention.query_block[1] % 3 != 0


def _common_cell(config: ImageTransformerShape) -> tuple[int, int]:
    """Rows and columns of the cells of which all blocks and memories of the layers' 2D patterns are made."""
    given = config.attention if isinstance(config.attention, tuple) else (config.attention,)
    extents = [sizes for each in given if isinstance(each, Local2D) for sizes in (each.query_block, each.memory)]
    rows, columns = (math.gcd(*axis) for axis in zip(*extents, strict=True))
    return rows, columns


def _range_problems(config: ImageTransformerShape) -> list[str]:
    problems = []
    for name, most in LARGEST.items():
        if getattr(config, name) < 1:
            problems.append(f"{name}: {getattr(config, name)} is not positive")
        if getattr(config, name) > most:
            problems.append(f"{name}: {getattr(config, name)} is more than {most}")
    for name in ("key_heads", "num_classes"):
        if getattr(config, name) < 0:
            problems.append(f"{name}: {getattr(config, name)} is negative")
    if config.num_classes > MOST_CLASSES:
        problems.append(f"num_classes: {config.num_classes} is more than {MOST_CLASSES}")
    if config.encoder_layers > LARGEST["layers"]:
        problems.append(f"super_resolution.encoder_layers: {config.encoder_layers} is more than {LARGEST['layers']}")
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"{name}: {getattr(config, name)} is not in [0, 1)")
    return problems


def _attention_problems(config: ImageTransformerShape) -> list[str]:
    """What is wrong with the attention patterns, alone and together."""
    if not isinstance(config.attention, tuple):
        return _pattern_problems(config, config.attention, "attention")
    if not config.attention:
        return ["attention: the list is empty; give a pattern, or a list of patterns that the layers take in turn"]
    if len(config.attention) > config.layers:
        return [f"attention: a list of {len(config.attention)} patterns, but the model has {config.layers} layers"]
    problems = [
        problem
        for index, attention in enumerate(config.attention)
        for problem in _pattern_problems(config, attention, f"attention.{index}")
    ]
    if problems:
        return problems
    first, *others = (make_patterns(config, attention)[0] for attention in config.attention)
    for index, other in enumerate(others, start=1):
        same = torch.equal(first.storage_order, other.storage_order) and torch.equal(first.rank, other.rank)
        if not same or _shift(config.attention[index]) != _shift(config.attention[0]):
            problems.append(
                f"attention.{index}: generates or stores positions in another order than attention.0; layers can take "
                "turns only with patterns of one order (local_2d: the same query_block; others: any)"
            )
    return problems


def _pattern_problems(config: ImageTransformerShape, attention: Attention, name: str) -> list[str]:
    """What is wrong with one pattern, for images of this size."""
    height, width = grid_shape(config.image_size, config.input)
    length = height * width
    match attention:
        case Full():
            return []
        case Local1D():
            return _extent_problems(name, "positions", length, attention.query_block, attention.memory)
        case Local2D():
            return [
                problem
                for axis, extent, size in ((0, "rows", height), (1, "columns", width))
                for problem in _extent_problems(name, extent, size, attention.query_block[axis], attention.memory[axis])
            ]
        case Dilated1D():
            problems = []
            if attention.memory < 1 or attention.chunks < 1:
                problems.append(f"{name}.memory: dilated_1d attention needs at least 1, and as many chunks")
            if attention.gap < 0:
                problems.append(f"{name}.gap: {attention.gap} is negative")
            reach = (attention.gap + attention.memory) * attention.chunks
            return problems or _extent_problems(name, "positions", length, attention.query_block, reach)
        case Sliding1D():
            return _count_problems(f"{name}.window", attention.window, length)
        case Strided1D():
            return _count_problems(f"{name}.stride", attention.stride, length)
        case Fixed1D():
            return _fixed_problems(config, attention, name, length)


def _count_problems(name: str, count: int, length: int) -> list[str]:
    if 1 <= count <= length:
        return []
    return [f"{name}: {count}, but the image has {length} positions; choose 1 to {length}"]


def _fixed_problems(config: ImageTransformerShape, attention: Fixed1D, name: str, length: int) -> list[str]:
    block, summary, groups = attention.query_block, attention.summary, attention.groups
    if problems := _extent_problems(name, "positions", length, block, 0):
        return problems
    if summary < 1 or groups < 1 or summary * groups > block:
        return [
            f"{name}.summary: {summary} positions for each of {groups} groups of heads, but a block has {block}; "
            f"choose at least 1 of each, and together at most {block}"
        ]
    heads_of_a_key = config.heads // config.num_key_heads
    if config.heads % groups or (config.num_key_heads != config.heads and heads_of_a_key % groups):
        return [
            f"{name}.groups: {groups} groups do not take turns evenly among {config.heads} heads, of which "
            f"{heads_of_a_key} share their keys; choose a divisor of the heads, and of those that share keys"
        ]
    return []


def _extent_problems(name: str, extent: str, size: int, query: int, memory: int) -> list[str]:
    """Along one axis: does the block tile it, and is there anything to see where the memory reaches?"""
    if query < 1 or size % query:
        divisors = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
        near = sorted(sorted(divisors, key=lambda divisor: abs(divisor - query))[:4])
        return [f"{name}.query_block: {query} does not divide the image's {size} {extent}; choose e.g. one of {near}"]
    if not 0 <= memory <= size - query:
        return [
            f"{name}.memory: reaches {memory} {extent} beyond a block of {query}, but the image has {size} in all; "
            f"choose 0 to {size - query}"
        ]
    return []


def _shift(attention: Attention) -> Shift:
    return attention.shift if isinstance(attention, Local2D) else "generation"


def _combination_problems(config: ImageTransformerShape) -> list[str]:
    """Fields that are fine alone but not together."""
    head_width = config.attention_width / config.heads
    is_mixture = not isinstance(config.output, Categorical)
    rules: list[tuple[bool, str]] = [
        (
            head_width.is_integer(),
            f"heads: {config.heads} does not divide attention_width {config.attention_width}",
        ),
        (
            config.heads % config.num_key_heads == 0,
            f"key_heads: {config.key_heads} does not divide heads {config.heads}",
        ),
        (
            not (config.block == "paper" and config.num_key_heads != config.heads),
            f"key_heads: {config.key_heads} for {config.heads} heads, but in the paper's block each has its own; set "
            "key_heads to 0, or block to 'modern'",
        ),
        (
            config.width % 4 == 0,
            f"width: {config.width} is not a multiple of 4, but codes of row and column take half of it each",
        ),
        (
            config.position != "rotary" or head_width % 4 == 0,
            f"position: rotary needs attention_width / heads, {head_width:g}, to be a multiple of 4",
        ),
        (
            not (is_mixture and config.input == "categorical"),
            "output: a mixture describes whole pixels, but input 'categorical' makes a sequence of sub-pixels; set "
            "input to 'ordinal' or output to 'categorical'",
        ),
        (
            not (config.sees_neighbours and config.input == "categorical" and _cuts_pixels(config)),
            "attention: a block of sub-pixels cuts a pixel, of which neighbours would be known in part; set the "
            "columns of query_block to a multiple of 3, or have neither stem 'neighbourhood' nor predictors",
        ),
        (
            not (config.block == "modern" and config.norm == "post"),
            "norm: the modern block is made for 'pre'",
        ),
        (
            config.label_dropout == 0 or config.num_classes > 0,
            f"label_dropout: {config.label_dropout}, but the model has no classes to hide; set it to 0, or num_classes",
        ),
        (
            not config.super_resolution or config.encoder_layers >= 1,
            f"super_resolution.encoder_layers: {config.encoder_layers} is not positive",
        ),
        (
            not config.super_resolution
            or (1 <= config.small_size < config.image_size and config.image_size % config.small_size == 0),
            f"super_resolution.small_size: {config.small_size} is not a proper divisor of image_size "
            f"{config.image_size}",
        ),
    ]
    return [problem for holds, problem in rules if not holds]
