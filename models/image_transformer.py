"""What is the Image Transformer, and how large is it?

An autoregressive model of uint8 images (Parmar et al. 2018): a decoder of local self-attention layers over
the sub-pixels or pixels of the image and, for super-resolution, an encoder that reads a small image.

Shapes: B batch, H rows, W columns, L positions in storage order, T some of them, E encoder tokens, D width, N
heads, K head width, C values per position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from models.embedding import Embedding, InputEmbedding, Position
from models.layer import Attend, Block, Layer, NormPlace, norm, rotary
from models.likelihood import Output, initial_mixture
from models.local_attention import attend_to_all, local_attention
from models.pattern import Pattern, dilated_1d, full, local_1d, local_2d
from models.pixel_order import Input, Shift, grid_shape, source_positions, to_positions

Attention = Literal["local_1d", "local_2d", "full", "dilated_1d"]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ImageTransformerConfig:
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    image_size: int
    """Rows and columns of the square images."""
    input: Input
    """"categorical": a position is a sub-pixel, embedded by channel and intensity. "ordinal": a position is a
    pixel, its three intensities combined linearly."""
    output: Output
    """"categorical": 256 probabilities per sub-pixel. "mixture": a discretised mixture of logistics per
    pixel."""
    mixtures: int
    """Components of the mixture (the paper: 10); 0 for the categorical output."""
    attention: Attention
    """Which positions see each other in the decoder: see models/pattern.py."""
    query_block: int | tuple[int, int]
    """Positions per query block: a number, or rows and columns for local_2d; 0 for full attention."""
    memory: int | tuple[int, int]
    """Earlier positions a block sees besides itself: a number; rows above and columns to each side for
    local_2d; positions per chunk for dilated_1d; 0 for full attention."""
    dilation_gap: int
    """dilated_1d: positions skipped before each chunk of memory; else 0."""
    dilation_blocks: int
    """dilated_1d: number of chunks of memory; else 0."""
    shift: Shift
    """How inputs move on by one: "generation", along the generation order, or (local_2d only) "block", inside
    each block as in the original code, which hides each block's last value from other blocks but lets blocks
    be decoded in waves."""
    layers: int
    """Layers of the decoder."""
    width: int
    """Width of the tokens between the layers (d in the paper)."""
    heads: int
    """Attention heads."""
    key_heads: int
    """Heads of keys and values, each of which serves heads / key_heads neighbouring heads of queries (grouped-query
    attention, Ainslie et al. 2023), so that decoding keeps and reads so many times fewer of them; 0 for one each."""
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
    dropout: float
    """Rate of dropout on the embedded input and on what each sub-layer adds."""
    num_classes: int
    """Classes the model can be asked for; 0 for none."""
    label_dropout: float
    """Rate at which training hides the class of an image, so that the model also learns images of no class, which
    classifier-free guidance needs (Ho and Salimans 2022: 0.1); 0 for never."""
    condition_size: int
    """Rows and columns of the small image that is super-resolved; 0 for none."""
    encoder_layers: int
    """Layers of the encoder that reads it; 0 for none."""

    def __post_init__(self) -> None:
        if problems := _range_problems(self) or [*_attention_problems(self), *_combination_problems(self)]:
            raise ValueError("\n".join(problems))

    @property
    def num_key_heads(self) -> int:
        return self.key_heads or self.heads


class ImageTransformer(nn.Module):
    """Images, labels and conditions -> parameters of the distribution of every position given all before
    it."""

    positions: Tensor
    sources: Tensor
    slot_of_position: Tensor

    def __init__(
        self,
        config: ImageTransformerConfig,
        *,
        checkpoint_every_layers: int = 0,
        checkpoint_keeps_attention: bool = False,
    ) -> None:
        """checkpoint_every_layers: recompute every n-th layer in the backward pass instead of keeping its
        activations; with checkpoint_keeps_attention all of it but the results of attention, which are small for the
        time that they take."""
        super().__init__()
        self.config = config
        self.checkpoint_every_layers = checkpoint_every_layers
        self.checkpoint_context = _keep_attention if checkpoint_keeps_attention else noop_context_fn
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            self.pattern = make_pattern(config)
            self.register_buffer("positions", self.pattern.storage_order, persistent=False)
            self.register_buffer("sources", source_positions(self.pattern, config.shift), persistent=False)
            self.register_buffer("slot_of_position", self.pattern.slot_of_position, persistent=False)

        grid = grid_shape(config.image_size, config.input)
        self.embed_input = InputEmbedding(config.input, grid, config.width, config.position)
        if config.num_classes:
            # The last entry is no class.
            self.embed_class = Embedding(config.num_classes + (config.label_dropout > 0), config.width)
        if config.condition_size:
            self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_layer(config, is_decoder=True) for _ in range(config.layers))
        self.final_norm = norm(config.block, config.width) if config.norm == "pre" else nn.Identity()
        self.head = Head(config)

    def forward(self, images: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Parameters of the output distribution, fp32: [B, H, W, 3, 256] (categorical) or [B, H, W, 10
        mixtures].

        images uint8 [B, H, W, 3]; labels int64 [B] iff the model has classes (num_classes for no class, where it has
        label_dropout); condition uint8 [B, h, w, 3] iff it super-resolves. What is returned for a position depends on
        the values generated before it only.
        """
        self.check_inputs(images, labels, condition)
        if labels is not None and self.training and self.config.label_dropout:
            hidden = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(hidden, self.config.num_classes)
        values = to_positions(images, self.config.input)[:, self.sources.clamp(min=0)]
        slots = torch.arange(self.pattern.length, device=images.device)
        x = self.hidden(values, slots, labels, self.encode(condition), [self.attend] * self.config.layers)
        if not self.pattern.stored_in_raster_order:
            x = x[:, self.slot_of_position]
        size = self.config.image_size
        if self.config.output == "mixture":
            return self.head(x).view(-1, size, size, 10 * self.config.mixtures)
        return self.head(x).view(-1, size, size, 3, 256)

    def hidden(
        self,
        values: Tensor,
        slots: Tensor,
        labels: Tensor | None,
        encoder_kv: Sequence[KeysValues | None],
        attends: Sequence[Attend],
    ) -> Tensor:
        """Tokens [B, T, D] before the head, for storage slots [T] and the input values uint8 [B, T, C] they
        hold.

        Layer i attends by attends[i], and to encoder_kv[i] as of encode().
        """
        positions = self.positions[slots]
        x = self.embed_input(values, self.sources[slots], positions)
        if labels is not None:
            x = x + self.embed_class(labels)[:, None]
        x = self.dropout(x)
        rotation = _rotation(self.config, self.embed_input, positions)
        for index, (layer, attend, kv) in enumerate(zip(self.layers, attends, encoder_kv, strict=True)):
            if self.training and is_checkpointed(index, self.checkpoint_every_layers):
                keep_rng = self.config.dropout > 0
                x = checkpoint(
                    layer,
                    x,
                    attend,
                    rotation,
                    kv,
                    use_reentrant=False,
                    preserve_rng_state=keep_rng,
                    context_fn=self.checkpoint_context,
                )
            else:
                x = layer(x, attend, rotation, kv)
        return self.final_norm(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all positions by the pattern of this model."""
        return local_attention(q, k, v, self.pattern)

    def encode(self, condition: Tensor | None) -> list[KeysValues | None]:
        """What each layer of the decoder attends to in the small image: keys and values [B, N, E, K], N
        of them heads of keys, or None."""
        if condition is None:
            return [None] * self.config.layers
        encoded = self.encoder(condition)
        return [layer.encoder_attention.keys_values(encoded) for layer in self.layers if isinstance(layer, Layer)]

    def check_inputs(self, images: Tensor, labels: Tensor | None, condition: Tensor | None) -> None:
        """Raise ValueError where inputs do not fit the config."""
        config = self.config
        for name, given, size in (
            ("images", images, config.image_size),
            ("condition", condition, config.condition_size),
        ):
            if (given is None) != (size == 0):
                raise ValueError(
                    f"{name}: {'missing' if given is None else 'given'}, but its size in the config is {size}"
                )
            if given is not None and given.shape[1:] != (size, size, 3):
                raise ValueError(f"{name}: shape {tuple(given.shape)}, but the model reads [B, {size}, {size}, 3]")
        if (labels is None) != (config.num_classes == 0):
            raise ValueError(
                f"labels: {'missing' if labels is None else 'given'}, but num_classes is {config.num_classes}"
            )


class Encoder(nn.Module):
    """Reads a small image with global attention among its sub-pixels (section 3.3 of the paper)."""

    def __init__(self, config: ImageTransformerConfig) -> None:
        super().__init__()
        self.config = config
        grid = grid_shape(config.condition_size, "categorical")
        self.embed_input = InputEmbedding("categorical", grid, config.width, config.position)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_layer(config, is_decoder=False) for _ in range(config.encoder_layers))
        self.final_norm = norm(config.block, config.width) if config.norm == "pre" else nn.Identity()

    def forward(self, condition: Tensor) -> Tensor:
        """uint8 [B, h, w, 3] -> [B, E, D]."""
        values = to_positions(condition, "categorical")
        positions = torch.arange(values.shape[1], device=condition.device)
        x = self.dropout(self.embed_input(values, positions, positions))
        rotation = _rotation(self.config, self.embed_input, positions)
        for layer in self.layers:
            x = layer(x, attend_to_all, rotation, None)
        return self.final_norm(x)


class Head(nn.Linear):
    """Tokens [B, T, D] -> parameters of the output distribution in fp32, [B, T, C, 256] or [B, T, 10
    mixtures]."""

    def __init__(self, config: ImageTransformerConfig) -> None:
        is_mixture = config.output == "mixture"
        values_per_position = 1 if config.input == "categorical" else 3
        super().__init__(config.width, 10 * config.mixtures if is_mixture else 256 * values_per_position)
        self.is_mixture = is_mixture
        # Almost no opinion at first: uniform intensities, or a spread of mixtures.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(config.width))
        with torch.no_grad():
            self.bias.copy_(initial_mixture(config.mixtures) if is_mixture else torch.zeros_like(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        parameters = F.linear(x.float(), self.weight.float(), self.bias.float())
        return parameters if self.is_mixture else parameters.unflatten(-1, (-1, 256))


def make_pattern(config: ImageTransformerConfig) -> Pattern:
    """The decoder's attention pattern over the positions of an image."""
    height, width = grid_shape(config.image_size, config.input)
    length = height * width
    query, memory = config.query_block, config.memory
    if config.attention == "full":
        return full(length)
    if isinstance(query, int) and isinstance(memory, int):
        if config.attention == "dilated_1d":
            return dilated_1d(length, query, memory, config.dilation_gap, config.dilation_blocks)
        return local_1d(length, query, memory)
    assert not isinstance(query, int) and not isinstance(memory, int), "checked by the config"
    return local_2d(height, width, query, memory)


def num_parameters(config: ImageTransformerConfig) -> int:
    """Trainable numbers."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ImageTransformer(config).parameters())


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products for one image; a product of m x k and k x n counts 2 m k n."""

    forward: int
    backward: int
    """Gradients of weights and of activations: twice the forward products, but for those of the first layer, whose
    input needs no gradient."""
    recomputed: int
    """Forward products done a second time in the backward pass, because their activations were not kept."""

    @property
    def training(self) -> int:
        """What training a model of this shape takes, however it is done: the numerator of model FLOPs utilisation."""
        return self.forward + self.backward


PARTS = ("embedding", "encoder", "attention projections", "attention scores", "feed-forward", "head")
"""Of the model, in the order of the forward pass; scores are the products of queries, keys and values."""


def model_flops(
    config: ImageTransformerConfig, *, checkpoint_every_layers: int = 0, checkpoint_keeps_attention: bool = False
) -> Flops:
    """The sum over the parts of `flops_by_part`."""
    parts = flops_by_part(
        config,
        checkpoint_every_layers=checkpoint_every_layers,
        checkpoint_keeps_attention=checkpoint_keeps_attention,
    ).values()
    return Flops(
        forward=sum(part.forward for part in parts),
        backward=sum(part.backward for part in parts),
        recomputed=sum(part.recomputed for part in parts),
    )


def flops_by_part(
    config: ImageTransformerConfig, *, checkpoint_every_layers: int = 0, checkpoint_keeps_attention: bool = False
) -> dict[str, Flops]:
    """Exact: attention counts the pairs that the pattern lets see each other, and nothing else.

    Recomputation is that of every n-th layer of the decoder (0: none), with `checkpoint_keeps_attention` all of it but
    attention. What fused kernels compute again inside (scores in the backward pass) is not counted.
    """
    with torch.device("meta"):
        model = ImageTransformer(config)
    length, encoder_length = model.pattern.length, 3 * config.condition_size**2
    products = {  # forward, by the module's name
        name: 2 * module.in_features * module.out_features * (encoder_length if _reads_encoder(name) else length)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    own_pairs, encoder_pairs = model.pattern.num_pairs, length * encoder_length
    scores = 4 * config.attention_width * (own_pairs + encoder_pairs)  # of one layer of the decoder
    forward = dict.fromkeys(PARTS, 0)
    for name, flops in products.items():
        forward[_part_of(name)] += flops
    forward["attention scores"] = config.layers * scores
    forward["encoder"] += config.encoder_layers * 4 * config.attention_width * encoder_length**2

    recomputed = dict.fromkeys(PARTS, 0)
    for index in range(config.layers):
        if is_checkpointed(index, checkpoint_every_layers):
            # The keys and values of the encoder are computed for all layers at once, outside of them.
            for name, flops in products.items():
                if name.startswith(f"layers.{index}.") and not _reads_encoder(name):
                    recomputed[_part_of(name)] += flops
            recomputed["attention scores"] += 0 if checkpoint_keeps_attention else scores
            if config.norm == "pre" and config.dropout == 0:
                # Nothing after the layer's last product needs its result, so torch stops before it.
                recomputed["feed-forward"] -= products[f"layers.{index}.feed_forward.out"]
    first = products.get("embed_input.values", 0)  # a matrix only where intensities are combined linearly
    return {
        part: Flops(
            forward=forward[part],
            backward=2 * forward[part] - (first if part == "embedding" else 0),
            recomputed=recomputed[part],
        )
        for part in PARTS
        if forward[part]
    }


def _part_of(module: str) -> str:
    """The part of `PARTS` that a matrix product belongs to, by its module's name."""
    if module.startswith("encoder."):
        return "encoder"
    if module.startswith("embed"):
        return "embedding"
    if module.startswith("layers."):
        return "feed-forward" if ".feed_forward." in module else "attention projections"
    return "head"


def _keep_attention() -> tuple[Any, Any]:
    """Contexts of a layer's forward pass and of its recomputation: the results of attention are kept in between."""
    return create_selective_checkpoint_contexts(_checkpoint_policy)


def _checkpoint_policy(context: object, op: Any, *arguments: object, **keywords: object) -> CheckpointPolicy:
    # By name: which of torch's attention kernels exist depends on the build. The custom op is our own kernel.
    name = str(op)
    is_attention = "scaled_dot_product" in name or "image_transformer.local_attention" in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def is_checkpointed(layer: int, every: int) -> bool:
    """Whether the backward pass recomputes this layer of the decoder (0 is the first), at every n-th one; 0: none."""
    return every > 0 and (layer + 1) % every == 0


def _reads_encoder(name: str) -> bool:
    """Whether the module of this name is applied to the tokens of the small image."""
    return name.startswith("encoder.") or name.endswith(".encoder_attention.kv")


def _layer(config: ImageTransformerConfig, is_decoder: bool) -> Layer:
    attends_to_encoder = is_decoder and config.condition_size > 0
    num_layers = config.layers if is_decoder else config.encoder_layers
    return Layer(
        block=config.block,
        norm_place=config.norm,
        width=config.width,
        heads=config.heads,
        key_heads=config.num_key_heads,
        attention_width=config.attention_width,
        ff_width=config.ff_width,
        dropout=config.dropout,
        attends_to_encoder=attends_to_encoder,
        num_sublayers=num_layers * (3 if attends_to_encoder else 2),
    )


def _rotation(config: ImageTransformerConfig, embed_input: InputEmbedding, positions: Tensor) -> Tensor | None:
    if config.position != "rotary":
        return None
    return rotary(*embed_input.rows_and_columns(positions), config.attention_width // config.heads)


def _range_problems(config: ImageTransformerConfig) -> list[str]:
    problems = []
    for name in ("image_size", "layers", "width", "heads", "attention_width", "ff_width"):
        if getattr(config, name) < 1:
            problems.append(f"{name}: {getattr(config, name)} is not positive")
    for name in (
        *("key_heads", "mixtures", "dilation_gap", "dilation_blocks"),
        *("num_classes", "condition_size", "encoder_layers"),
    ):
        if getattr(config, name) < 0:
            problems.append(f"{name}: {getattr(config, name)} is negative")
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"{name}: {getattr(config, name)} is not in [0, 1)")
    return problems


def _attention_problems(config: ImageTransformerConfig) -> list[str]:
    """What is wrong with the fields that describe the attention pattern."""
    height, width = grid_shape(config.image_size, config.input)
    length, query, memory = height * width, config.query_block, config.memory
    problems = []
    if config.attention != "dilated_1d" and (config.dilation_gap or config.dilation_blocks):
        problems.append("dilation_gap, dilation_blocks: only dilated_1d attention has them; set both to 0")
    if config.attention != "local_2d" and config.shift == "block":
        problems.append("shift: 'block' is for local_2d attention only; choose 'generation'")

    if config.attention == "full":
        if query != 0 or memory != 0:
            problems.append("query_block, memory: full attention has neither; set both to 0")
    elif config.attention == "local_2d":
        for axis, name, size in ((0, "rows", height), (1, "columns", width)):
            if isinstance(query, int) or isinstance(memory, int):
                problems.append(f"query_block, memory: local_2d attention takes [rows, columns], not {query}, {memory}")
                break
            problems += _extent_problems(name, size, query[axis], memory[axis])
    elif not isinstance(query, int) or not isinstance(memory, int):
        problems.append(f"query_block, memory: {config.attention} attention takes numbers, not {query}, {memory}")
    elif config.attention == "local_1d":
        problems += _extent_problems("positions", length, query, memory)
    else:
        reach = (config.dilation_gap + memory) * config.dilation_blocks
        if memory < 1 or config.dilation_blocks < 1:
            problems.append("memory, dilation_blocks: dilated_1d attention needs at least 1 of each")
        problems += _extent_problems("positions", length, query, reach)
    return problems


def _extent_problems(name: str, size: int, query: int, memory: int) -> list[str]:
    """Along one axis: does the block tile it, and is there anything to see where the memory reaches?"""
    if query < 1 or size % query:
        divisors = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
        near = sorted(sorted(divisors, key=lambda divisor: abs(divisor - query))[:4])
        return [f"query_block: {query} does not divide the image's {size} {name}; choose e.g. one of {near}"]
    if not 0 <= memory <= size - query:
        return [
            f"memory: reaches {memory} {name} beyond a block of {query}, but the image has {size} in all; choose 0 to "
            f"{size - query}"
        ]
    return []


def _combination_problems(config: ImageTransformerConfig) -> list[str]:
    """Fields that are fine alone but not together."""
    head_width = config.attention_width / config.heads
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
            not (config.output == "mixture" and config.input == "categorical"),
            "output: a mixture describes whole pixels, but input 'categorical' makes a sequence of sub-pixels; set "
            "input to 'ordinal' or output to 'categorical'",
        ),
        (
            (config.mixtures > 0) == (config.output == "mixture"),
            f"mixtures: {config.mixtures} with output '{config.output}'; the mixture output needs at least 1 (the "
            "paper: 10), the categorical one takes 0",
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
            (config.encoder_layers > 0) == (config.condition_size > 0),
            f"encoder_layers: {config.encoder_layers} with condition_size {config.condition_size}; set both "
            "(super-resolution) or neither",
        ),
        (
            config.condition_size == 0
            or (config.condition_size < config.image_size and config.image_size % config.condition_size == 0),
            f"condition_size: {config.condition_size} is not a proper divisor of image_size {config.image_size}",
        ),
    ]
    return [problem for holds, problem in rules if not holds]
