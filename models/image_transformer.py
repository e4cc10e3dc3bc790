"""What is the Image Transformer, and how large is it?

An autoregressive model of uint8 images (Parmar et al. 2018): a decoder of local self-attention layers over
the sub-pixels or pixels of the image and, for super-resolution, an encoder that reads a small image.

Shapes: B batch, H rows, W columns, L positions in storage order, T some of them, E encoder tokens, D width, N
heads, K head width, C values per position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from models.embedding import Embedding, InputEmbedding
from models.image_transformer_config import ImageTransformerConfig, make_pattern
from models.layer import Attend, Layer, norm, rotary
from models.likelihood import MixtureOutput, initial_mixture
from models.local_attention import attend_to_all, local_attention
from models.pixel_order import grid_shape, source_positions, to_positions

KeysValues = tuple[Tensor, Tensor]


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
            distinct = {attention: make_pattern(config, attention) for attention in config.attentions}
            self.patterns = [distinct[attention] for attention in config.attentions]
            self.pattern = self.patterns[0]
            self.register_buffer("positions", self.pattern.storage_order, persistent=False)
            self.register_buffer("sources", source_positions(self.pattern, config.shift), persistent=False)
            self.register_buffer("slot_of_position", self.pattern.slot_of_position, persistent=False)

        grid = grid_shape(config.image_size, config.input)
        self.embed_input = InputEmbedding(config.input, grid, config.width, config.position)
        if config.num_classes:
            # The last entry is no class.
            self.embed_class = Embedding(config.num_classes + (config.label_dropout > 0), config.width)
        if config.small_size:
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
        if isinstance(self.config.output, MixtureOutput):
            return self.head(x).view(-1, size, size, 10 * self.config.output.components)
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
            ("condition", condition, config.small_size),
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
        grid = grid_shape(config.small_size, "categorical")
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
        values_per_position = 1 if config.input == "categorical" else 3
        components = config.output.components if isinstance(config.output, MixtureOutput) else 0
        super().__init__(config.width, 10 * components if components else 256 * values_per_position)
        self.is_mixture = components > 0
        # Almost no opinion at first: uniform intensities, or a spread of mixtures.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(config.width))
        with torch.no_grad():
            self.bias.copy_(initial_mixture(components) if components else torch.zeros_like(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        parameters = F.linear(x.float(), self.weight.float(), self.bias.float())
        return parameters if self.is_mixture else parameters.unflatten(-1, (-1, 256))


def num_positions(config: ImageTransformerConfig) -> int:
    """Positions of the sequence that an image is."""
    height, width = grid_shape(config.image_size, config.input)
    return height * width


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
    length, encoder_length = model.pattern.length, 3 * config.small_size**2
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
    attends_to_encoder = is_decoder and config.small_size > 0
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
