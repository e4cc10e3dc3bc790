"""Which laws are published for models that predict the next pixel, and which size do they give a budget?

Their constants are those of other images, of models without our attention, and of other ways to count: N without
embeddings, C as 6 N for each token. Exponents and sizes can stand beside ours; the bits/dim of other images cannot.

Read where: table 1 of Henighan et al. 2020 (arXiv 2010.14701v2) in full. Of Yan et al. 2025 (arXiv 2511.08704v1)
abstract and caption of figure 1, not the tables of exponents: hence one ratio for all budgets. Their budgets
end at 7e19 FLOP, and where images grow, they find, the model has to grow much faster than the data.
"""

import math
from dataclasses import dataclass

PETAFLOP_DAY = 1e15 * 24 * 3600
"""FLOP."""
LANGUAGE_TOKENS_PER_PARAMETER = 20.0
"""Of compute-optimal language models (Hoffmann et al. 2022), which Yan et al. compare with."""


@dataclass(frozen=True)
class PublishedLaw:
    """The compute-optimal size: N = (C / unit)^growth."""

    name: str
    source: str
    image_size: int
    """Rows and columns of the images that it was measured on."""
    unit: float
    """FLOP."""
    growth: float
    fall: float | None = None
    """Exponent with which the loss above its floor falls with compute; None where it is not known."""

    @property
    def paper(self) -> str:
        """Authors and year."""
        return self.name.partition(",")[0]

    def best_size(self, flops: float) -> float:
        """Parameters."""
        return math.exp(self.growth * math.log(flops / self.unit))


def _henighan(size: int, unit: float, growth: float, fall: float) -> PublishedLaw:
    return PublishedLaw(
        name=f"Henighan et al. 2020, {size}x{size}",
        source="Henighan et al. 2020 (Scaling Laws for Autoregressive Generative Modeling), table 1",
        image_size=size,
        unit=unit * PETAFLOP_DAY,
        growth=growth,
        fall=fall,
    )


def _yan(times: float) -> PublishedLaw:
    """C = 6 N D and D = ratio N."""
    ratio = times * LANGUAGE_TOKENS_PER_PARAMETER
    return PublishedLaw(
        name=f"Yan et al. 2025, 32x32, {ratio:.0f} tokens a parameter",
        source=f"Yan et al. 2025 (Rethinking Generative Image Pretraining), figure 1: {times:.0f} times the tokens per "
        f"parameter of language, there {LANGUAGE_TOKENS_PER_PARAMETER:.0f} (Hoffmann et al. 2022)",
        image_size=32,
        unit=6 * ratio,
        growth=0.5,
    )


PUBLISHED_LAWS = (
    _henighan(8, 5.3e-14, 0.64, 0.19),
    _henighan(16, 4.8e-12, 0.75, 0.16),
    _henighan(32, 1.6e-13, 0.65, 0.10),
    _yan(10),
    _yan(20),
)


def laws_for(image_size: int) -> tuple[PublishedLaw, ...]:
    """The laws of images whose size is nearest to this one, by its ratio to theirs."""
    distances = [abs(math.log(law.image_size / image_size)) for law in PUBLISHED_LAWS]
    return tuple(law for law, distance in zip(PUBLISHED_LAWS, distances, strict=True) if distance == min(distances))
