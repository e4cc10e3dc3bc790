"""Which bits/dim are published for a data set? Only figures of the very same images; versions are never mixed.

"Downsampled ImageNet" is three data sets. One model, trained on both, needs 3.69 bits/dim on the images of version A
and 3.43 on those of B (i-DODE). A is van den Oord et al. 2016, B is Chrabaszcz et al. 2017, C the recipe of Dhariwal
and Nichol 2021; the manifest of a data set says which one it is. Figures are of unconditional models, on validation
images for ImageNet and on test images for CIFAR-10. Values of which only an upper bound is known are marked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published figure."""

    model: str
    bits_per_dim: float
    source: str
    """The table or page it was read in, which may be that of a later paper."""
    parameters: str = ""
    is_bound: bool = False

    def __str__(self) -> str:
        return f"{'≤ ' if self.is_bound else ''}{self.bits_per_dim:.2f}"


_PAPER = "Parmar et al. 2018, table 4"
_SPARSE = "Child et al. 2019 (Sparse Transformer), table 1"
_VDVAE = "Child 2021 (VDVAE), table 2"
_HOURGLASS = "Nawrot et al. 2022 (Hourglass), table 3"
_COMBINER = "Ren et al. 2021 (Combiner), tables 1 and 2"
_MD4 = "Shi et al. 2024 (MD4), table 3"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "cifar10": (
        Published("Gated PixelCNN", 3.03, _MD4),
        Published("PixelRNN", 3.00, _MD4),
        Published("PixelCNN++", 2.92, _MD4, "53 M"),
        Published("Image Transformer", 2.90, _PAPER),
        Published("PixelSNAIL", 2.85, _SPARSE, "46 M"),
        Published("Sparse Transformer", 2.80, _SPARSE, "59 M"),
        Published("Combiner-Axial", 2.77, _COMBINER),
        Published("MD4", 2.75, _MD4, "28 M", is_bound=True),
    ),
    "imagenet32-A": (
        Published("NVAE", 3.92, _VDVAE, "268 M", is_bound=True),
        Published("PixelRNN", 3.86, _PAPER),
        Published("Flow++", 3.86, _VDVAE, "169 M"),
        Published("Gated PixelCNN", 3.83, _PAPER),
        Published("PixelSNAIL", 3.80, _PAPER),
        Published("VDVAE", 3.80, _VDVAE, "119 M", is_bound=True),
        Published("Image Transformer", 3.77, _PAPER),
        Published("Axial Transformer", 3.76, _HOURGLASS),
        Published("Hourglass", 3.74, _HOURGLASS),
        Published("VDM", 3.72, "google-research/vdm, README", is_bound=True),
        Published("i-DODE", 3.69, "Zheng et al. 2023 (i-DODE)"),
    ),
    "imagenet32-B": (
        Published("DenseFlow", 3.63, "DenseFlow, repository"),
        Published("i-DODE", 3.43, "Zheng et al. 2023 (i-DODE)"),
    ),
    "imagenet64-A": (
        Published("Glow", 3.81, _SPARSE),
        Published("Reformer, 12 layers", 3.71, _COMBINER),
        Published("Parallel Multiscale PixelCNN", 3.70, _SPARSE),
        Published("Flow++", 3.69, _VDVAE, "73 M"),
        Published("Gated PixelCNN", 3.57, _SPARSE),
        Published("SPN", 3.52, _SPARSE, "150 M"),
        Published("VDVAE", 3.52, _VDVAE, "125 M", is_bound=True),
        Published("Sparse Transformer", 3.44, _SPARSE, "152 M"),
        Published("Axial Transformer", 3.44, _HOURGLASS),
        Published("Hourglass", 3.44, _HOURGLASS),
        Published("Routing Transformer", 3.43, _COMBINER),
        Published("Combiner-Axial", 3.42, _COMBINER),
        Published("Perceiver AR", 3.40, "Hawthorne et al. 2022", "770 M"),
        Published("VDM", 3.40, "google-research/vdm, README", is_bound=True),
        Published("MD4", 3.40, _MD4, "198 M", is_bound=True),
    ),
    "imagenet64-B": (Published("DenseFlow", 3.35, "DenseFlow, repository", "130 M"),),
}


def data_set_key(data: Mapping[str, Any]) -> str | None:
    """The key above of a data set as a run describes it; None for one on which nothing is published."""
    if data.get("version") in ("A", "B", "C"):
        return f"imagenet{data['image_size']}-{data['version']}"
    if data.get("form") == "cifar10" and int(data["image_size"]) == 32:
        return "cifar10"
    return None
