"""What does the Image Transformer offer as a family of models? Its config, and the model that the config builds.

The parts, in the order in which they use each other: shape.py, network.py, wave_decoder.py, account.py.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from models.drawing.canvas import Canvas
from models.image_transformer.account import account_of
from models.image_transformer.network import Network
from models.image_transformer.shape import Fixed1D, ImageTransformerShape
from models.image_transformer.wave_decoder import WaveDecoder
from models.model import Account, Entrance, Intensities, Recompute


@dataclass(frozen=True, kw_only=True)
class ImageTransformerConfig(ImageTransformerShape):
    """Everything that decides the shape of the model. Raises ValueError with one problem a line."""

    @property
    def num_units(self) -> int:
        return self.layers

    @property
    def unit_period(self) -> int:
        return len(self.attention) if isinstance(self.attention, tuple) else 1

    def with_units(self, count: int) -> Self:
        return dataclasses.replace(self, layers=count)

    def narrow(self) -> Self:
        kinds = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        heads = math.lcm(*(kind.groups for kind in kinds if isinstance(kind, Fixed1D)))
        thin = dataclasses.replace(self, width=8, ff_width=8, dropout=0.0, label_dropout=0.0)
        return dataclasses.replace(thin, heads=heads, key_heads=0, attention_width=4 * heads)

    def build(self, recompute: Recompute = Recompute()) -> "ImageTransformer":  # noqa: B008 (immutable)
        return ImageTransformer(self, recompute)

    def account(self, recompute: Recompute = Recompute()) -> Account:  # noqa: B008 (immutable)
        with torch.device("meta"):
            return account_of(ImageTransformer(self), recompute)


class ImageTransformer(Network):
    """An Image Transformer that can be trained and drawn from."""

    def entrances(self) -> tuple[Entrance, ...]:
        if isinstance(self.enter, Intensities):  # which are looked at by stem and predictors, too
            return (Entrance(self.enter, torch.arange(len(self.generation_order)), looks_up=True),)
        seen = Entrance(self.intensities, torch.arange(self.length), looks_up=True)
        if self.config.stem == "neighbourhood":
            return (seen,)
        return Entrance(self.embed_input, self.sources, looks_up=True), seen

    def units(self) -> Iterator[nn.Module]:
        if self.config.small_size:
            yield from self.encoder.layers
        yield from self.layers

    def decoder(self, canvas: Canvas, *, in_waves: bool = True, look_ahead: bool = True) -> WaveDecoder:
        """in_waves: decode blocks that do not see each other together, where the patterns have such blocks.
        look_ahead: compute further tokens of a single image on a CPU. Neither changes the images."""
        return WaveDecoder(self, canvas, in_waves=in_waves, look_ahead=look_ahead)
