"""What is the Image Transformer, from images to the parameters of a distribution?

An autoregressive model of uint8 images (Parmar et al. 2018): a decoder of local self-attention layers over
the sub-pixels or pixels of the image and, for super-resolution, an encoder that reads a small image.

Shapes: B batch, H rows, W columns, L positions in storage order, T some of them, E encoder tokens, D width, N
heads, K head width, C values per position.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from models.attention.local_attention import attend_to_all, local_attention
from models.attention.pattern import Pattern
from models.given import NOTHING, Given
from models.head import Head
from models.image_transformer.channel_tokens import ChannelTokens
from models.image_transformer.embedding import Embedding, InputEmbedding
from models.image_transformer.layer import Attend, Layer, attend_in_turn, norm, rotary
from models.image_transformer.pixel_order import grid_shape, source_positions, to_positions
from models.image_transformer.shape import ImageTransformerShape, make_patterns
from models.likelihood import (
    Categorical,
    PredictorCategoricalOutput,
    PredictorMixtureOutput,
    around_guesses,
    logits_around_guesses,
)
from models.model import Intensities, Model, Recompute, check_inputs
from models.neighbours import NeighbourhoodStem, Predictors, SubpixelStem

KeysValues = tuple[Tensor, Tensor]


class Network(Model):
    """The weights, and the forward pass of whole images and of some of their tokens."""

    config: ImageTransformerShape

    positions: Tensor
    sources: Tensor
    slot_of_position: Tensor

    def __init__(self, config: ImageTransformerShape, recompute: Recompute = Recompute()) -> None:  # noqa: B008
        super().__init__()
        self.config, self.recompute = config, recompute
        self.checkpoint_context = _keep_attention if recompute.keeps_attention else noop_context_fn
        with torch.device("cpu"):  # also where the weights are built on the meta device, to be counted
            distinct = {attention: make_patterns(config, attention) for attention in config.attentions}
            self.patterns = [distinct[attention] for attention in config.attentions]
            """Of each layer, those that its heads take in turn."""
            first = self.patterns[0][0]  # all have its order of generation and of storage
            self.length = first.length
            self.generation_order = first.generation_order
            if config.draws_by_channel:
                self.generation_order = (3 * first.generation_order[:, None] + torch.arange(3)).flatten()
            self.stored_in_raster_order = first.stored_in_raster_order
            self.register_buffer("positions", first.storage_order, persistent=False)
            self.register_buffer("sources", source_positions(first, config.shift), persistent=False)
            self.register_buffer("slot_of_position", first.slot_of_position, persistent=False)
        by_patterns = {
            patterns: attend_in_turn([_attend_by(pattern) for pattern in patterns]) for patterns in distinct.values()
        }
        self.attends = [by_patterns[patterns] for patterns in self.patterns]
        """How the tokens of whole images attend to each other, in each layer."""

        grid = grid_shape(config.image_size, config.input)
        self.enter = Intensities() if config.input == "ordinal" else nn.Identity()
        self.intensities = Intensities() if config.input == "categorical" else nn.Identity()
        """Of values that have passed `enter`."""
        pixel_order = first.generation_order
        if config.input == "categorical":
            pixel_order = pixel_order[::3] // 3
        stem: NeighbourhoodStem | None = None
        if config.stem == "neighbourhood":
            make_stem = SubpixelStem if config.input == "categorical" else NeighbourhoodStem
            stem = make_stem(config.image_size, pixel_order, config.width)
        self.embed_input = InputEmbedding(config.input, grid, config.width, config.position, stem)
        if config.num_classes:
            # The last entry is no class.
            self.embed_class = Embedding(config.num_classes + (config.label_dropout > 0), config.width)
        if config.small_size:
            self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_layer(config, is_decoder=True) for _ in range(config.layers))
        self.final_norm = norm(config.block, config.width) if config.norm == "pre" else nn.Identity()
        if config.draws_by_channel:
            self.channels = ChannelTokens(config, pixel_order)
        self.head = Head(config.width, config.output, 1 if config.input == "categorical" else 3)
        if isinstance(config.output, PredictorMixtureOutput | PredictorCategoricalOutput):
            self.predictors = Predictors(config.output.predictors, config.image_size, pixel_order)

    def forward(self, images: Tensor, given: Given = NOTHING) -> Tensor:
        """As in Model. In training, labels are hidden at the rate of label_dropout."""
        check_inputs(self.config, images, given)
        labels = given.labels
        if labels is not None and self.training and self.config.label_dropout:
            hidden = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(hidden, self.config.num_classes)
        values = self.entered(images.reshape(len(images), len(self.generation_order), -1))
        slots = torch.arange(self.length, device=images.device)
        inputs = self.inputs(values, slots)
        x = self.hidden(inputs, slots, labels, self.encode(given.small_images), self.attends)
        if not self.stored_in_raster_order:
            x = x[:, self.slot_of_position]
        size, output = self.config.image_size, self.config.output
        of_pixel = (3, 256) if isinstance(output, Categorical) else (10 * output.components,)
        return self.parameters_of(x, values, slots).view(-1, size, size, *of_pixel)

    def entered(self, values: Tensor) -> Tensor:
        """What the tokens see of uint8 values [B, positions, any number] in raster order, by token: [B, L, C]."""
        values = self.enter(values)
        return values.unflatten(1, (-1, 3)).squeeze(-1) if self.config.draws_by_channel else values

    def inputs(self, values: Tensor, slots: Tensor) -> Tensor:
        """What the tokens of storage slots [T] get of the values before theirs, [B, T, any number], among all values
        [B, L, C] as of `entered`; those at or after a slot's position in the order of generation play no part."""
        stem = self.embed_input.values
        if isinstance(stem, SubpixelStem):
            return stem.tokens(self._pixels(values), self.positions[slots])
        if isinstance(stem, NeighbourhoodStem):
            return stem.features(values, self.positions[slots])
        return values.index_select(1, self.sources[slots].clamp(min=0))

    def parameters_of(self, x: Tensor, values: Tensor, positions: Tensor, channels: range = range(3)) -> Tensor:
        """What the head makes of tokens [B, T, D] of raster positions [T]; values as in `inputs`. Where a pixel's
        channels are drawn one after the other, of these channels."""
        if self.config.draws_by_channel:
            return self._by_channel(x, values, positions, channels)
        parameters = self.head(x)
        if isinstance(self.config.output, PredictorMixtureOutput):
            parameters = around_guesses(parameters, self.predictors(values, positions))
        elif isinstance(self.config.output, PredictorCategoricalOutput):
            pixels, of = self._pixels(values), positions // 3
            every = torch.arange(pixels.shape[1], device=of.device)
            once = len(positions) > len(every)  # each pixel, instead of each sub-pixel
            guesses = self.predictors(pixels, every).index_select(1, of) if once else self.predictors(pixels, of)
            own = pixels.index_select(1, of)
            parameters = logits_around_guesses(parameters, guesses, own, positions % 3)[:, :, None]
        return parameters

    def _by_channel(self, x: Tensor, values: Tensor, positions: Tensor, channels: range) -> Tensor:
        """[B, T, channels, 256], of each channel given those before it."""
        of_channels = torch.arange(channels.start, channels.stop, device=positions.device)
        parameters = self.head(self.channels(x, values, positions, of_channels)).flatten(1, 2)
        guesses, pixels = (
            each.repeat_interleave(len(channels), dim=1)
            for each in (self.predictors(values, positions), values.index_select(1, positions))
        )
        logits = logits_around_guesses(parameters, guesses, pixels, of_channels.repeat(len(positions)))
        return logits.unflatten(1, (-1, len(channels)))

    def _pixels(self, values: Tensor) -> Tensor:
        """Intensities of pixels [B, L / 3, 3], of values [B, L, 1] of sub-pixels."""
        pixels: Tensor = self.intensities(values).unflatten(1, (-1, 3)).squeeze(-1)
        return pixels

    def hidden(
        self,
        inputs: Tensor,
        slots: Tensor,
        labels: Tensor | None,
        encoder_kv: Sequence[KeysValues | None],
        attends: Sequence[Attend],
    ) -> Tensor:
        """Tokens [B, T, D] before the head, for storage slots [T] and their `inputs`.

        Layer i attends by attends[i], and to encoder_kv[i] as of encode().
        """
        positions = self.positions[slots]
        x = self.embed_input(inputs, self.sources[slots], positions)
        if labels is not None:
            x = x + self.embed_class(labels)[:, None]
        x = self.dropout(x)
        rotation = _rotation(self.config, self.embed_input, positions)
        through = partial(self.through, draws_random=self.config.dropout > 0, context_fn=self.checkpoint_context)
        for index, (layer, attend, kv) in enumerate(zip(self.layers, attends, encoder_kv, strict=True)):
            x = through(index, layer, x, attend, rotation, kv)
        return self.final_norm(x)

    def encode(self, small_images: Tensor | None) -> list[KeysValues | None]:
        """What each layer of the decoder attends to in the small image: keys and values [B, heads of keys, E, K], or
        None."""
        if small_images is None:
            return [None] * self.config.layers
        encoded = self.encoder(small_images)
        return [layer.encoder_attention.keys_values(encoded) for layer in self.layers if isinstance(layer, Layer)]


class Encoder(nn.Module):
    """Reads a small image with global attention among its sub-pixels (section 3.3 of the paper)."""

    def __init__(self, config: ImageTransformerShape) -> None:
        super().__init__()
        self.config = config
        grid = grid_shape(config.small_size, "categorical")
        self.embed_input = InputEmbedding("categorical", grid, config.width, config.position)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_layer(config, is_decoder=False) for _ in range(config.encoder_layers))
        self.final_norm = norm(config.block, config.width) if config.norm == "pre" else nn.Identity()

    def forward(self, small_images: Tensor) -> Tensor:
        """uint8 [B, h, w, 3] -> [B, E, D]."""
        values = to_positions(small_images, "categorical")
        positions = torch.arange(values.shape[1], device=small_images.device)
        x = self.dropout(self.embed_input(values, positions, positions))
        rotation = _rotation(self.config, self.embed_input, positions)
        for layer in self.layers:
            x = layer(x, attend_to_all, rotation, None)
        return self.final_norm(x)


ATTENTION_OPERATORS = ("scaled_dot_product", "image_transformer.local_attention", "image_transformer.attention_on_meta")
"""Parts of the names of torch's and our own operators that compute attention."""


def _attend_by(pattern: Pattern) -> Attend:
    """Attention of all positions by a pattern."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, pattern)

    return attend


def _keep_attention() -> tuple[Any, Any]:
    """Contexts of a layer's forward pass and of its recomputation: the results of attention are kept in between."""
    return create_selective_checkpoint_contexts(_checkpoint_policy)


def _checkpoint_policy(context: object, op: Any, *arguments: object, **keywords: object) -> CheckpointPolicy:
    # By name: which of torch's attention kernels exist depends on the build.
    name = str(op)
    is_attention = any(part in name for part in ATTENTION_OPERATORS)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _layer(config: ImageTransformerShape, is_decoder: bool) -> Layer:
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


def _rotation(config: ImageTransformerShape, embed_input: InputEmbedding, positions: Tensor) -> Tensor | None:
    if config.position != "rotary":
        return None
    return rotary(*embed_input.rows_and_columns(positions), config.attention_width // config.heads)
