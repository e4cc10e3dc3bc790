"""Which bits/dim are published for a data set? Only figures of the very same images; versions are never mixed.

"Downsampled ImageNet" is three data sets. One model, trained on both, needs 3.69 bits/dim on the images of version A
and 3.44 on those of B (i-DODE). A is van den Oord et al. 2016, B is Chrabaszcz et al. 2017, C the recipe of Dhariwal
and Nichol 2021; the manifest of a data set says which one it is. Figures are of unconditional models, on validation
images for ImageNet and on test images for CIFAR-10.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Version = Literal["only one", "A", "B", "C"]
Evidence = Literal["stated", "data loader", "inferred"]
Measure = Literal["likelihood", "ELBO", "bound"]


@dataclass(frozen=True)
class Published:
    """One published figure."""

    model: str
    bits_per_dim: float
    source: str
    """The table or page it was read in, which may be that of a later paper."""
    version: Version
    """Of the images that were scored."""
    version_from: Evidence
    """How their version is known: its authors state it, their code loads those files, or it is inferred, from other
    figures that they compare with."""
    measure: Measure
    """The likelihood of the images; a variational bound on it (evidence lower bound); or another bound, such as the
    likelihood of images to which noise was added. The bits/dim of a bound are at least those of the model."""
    parameters: str = ""
    reproduced: str = ""
    """Whether others got the figure with the authors' settings; empty where nothing is known."""

    @property
    def millions(self) -> float | None:
        """Of parameters; None where they are not known."""
        return float(self.parameters.removesuffix(" M")) if self.parameters else None

    def __str__(self) -> str:
        return f"{'≤ ' if self.measure != 'likelihood' else ''}{self.bits_per_dim:.2f}"


_PIXELRNN = "van den Oord et al. 2016 (Pixel Recurrent Neural Networks)"
_GATED = "van den Oord et al. 2016 (Gated PixelCNN)"
_PAPER = "Parmar et al. 2018, table 4"
_SPARSE = "Child et al. 2019 (Sparse Transformer), table 1"
_VDVAE = "Child 2021 (VDVAE), table 2"
_HOURGLASS = "Nawrot et al. 2022 (Hourglass), table 3"
_COMBINER = "Ren et al. 2021 (Combiner), tables 1 and 2"
_MD4 = "Shi et al. 2024 (MD4), table 3"
_VDM = "google-research/vdm, README"
_IDODE = "Zheng et al. 2023 (i-DODE)"
_MULAN = "Sahoo et al. 2024 (MuLAN)"
_DENSEFLOW = "DenseFlow, repository"
_DIFFENC = "Nielsen et al. 2024 (DiffEnc)"
_BSI = "Lienen et al. 2025 (BSI)"
_FLOW_MATCHING = "Lipman et al. 2023 (Flow Matching)"


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "cifar10": (
        Published("PixelCNN", 3.14, _PIXELRNN, "only one", "stated", "likelihood"),
        Published("Row LSTM (PixelRNN)", 3.07, _PIXELRNN, "only one", "stated", "likelihood"),
        Published("Gated PixelCNN", 3.03, _MD4, "only one", "stated", "likelihood"),
        Published("Diagonal BiLSTM (PixelRNN)", 3.00, _MD4, "only one", "stated", "likelihood"),
        Published("PixelCNN++", 2.92, _MD4, "only one", "stated", "likelihood", "53.7 M"),
        Published(
            "Image Transformer",
            2.90,
            _PAPER,
            "only one",
            "stated",
            "likelihood",
            reproduced="not by outsiders (tensor2tensor issue 1665)",
        ),
        Published("PixelSNAIL", 2.85, _SPARSE, "only one", "stated", "likelihood", "46.2 M"),
        Published("Sparse Transformer", 2.80, _SPARSE, "only one", "stated", "likelihood", "59 M"),
        Published("Combiner-Axial", 2.77, _COMBINER, "only one", "stated", "likelihood"),
        Published("MD4", 2.75, _MD4, "only one", "stated", "ELBO", "28 M"),
    ),
    "imagenet32-A": (
        # NVlabs/NVAE, scripts/convert_tfrecord_to_lmdb.py: the records of imagenet-oord that Glow's code makes.
        Published("NVAE", 3.92, _VDVAE, "A", "data loader", "ELBO", "268 M"),
        Published("PixelRNN", 3.86, _PAPER, "A", "stated", "likelihood"),
        # aravindsrinivas/flowpp, flows_imagenet/create_imagenet_benchmark_datasets.py: train_32x32.tar.
        Published("Flow++", 3.86, _VDVAE, "A", "data loader", "bound", "169 M"),
        Published("Gated PixelCNN", 3.83, _PAPER, "A", "stated", "likelihood"),
        Published("PixelSNAIL", 3.80, _PAPER, "A", "data loader", "likelihood"),
        Published("VDVAE", 3.80, _VDVAE, "A", "data loader", "ELBO", "119 M"),
        Published("Image Transformer", 3.77, _PAPER, "A", "data loader", "likelihood"),
        Published("Axial Transformer", 3.76, _HOURGLASS, "A", "data loader", "likelihood"),
        Published("Hourglass", 3.74, _HOURGLASS, "A", "inferred", "likelihood"),
        # google-research/vdm, dataset.py: downsampled_imagenet/32x32 of TensorFlow Datasets.
        Published("VDM", 3.72, _VDM, "A", "data loader", "ELBO"),
        Published("i-DODE", 3.69, _IDODE, "A", "stated", "bound"),
        # s-sahoo/MuLAN, ldm/dataset.py: the same.
        Published("MuLAN", 3.67, _MULAN, "A", "data loader", "ELBO"),
    ),
    "imagenet32-B": (
        # denseflow/data/datasets/image/imagenet32.py: Imagenet32_train.zip.
        Published("DenseFlow", 3.63, _DENSEFLOW, "B", "data loader", "ELBO"),
        Published("Flow Matching", 3.53, _FLOW_MATCHING, "B", "data loader", "bound"),
        Published("DiffEnc", 3.46, _DIFFENC, "B", "inferred", "ELBO"),
        Published("i-DODE", 3.44, _IDODE, "B", "stated", "bound"),
        Published("BSI", 3.44, _BSI, "B", "inferred", "ELBO"),
    ),
    "imagenet64-A": (
        # openai/glow, data_loaders/generate_tfr/imagenet_oord.py: train_64x64 of image-net.org/small.
        Published("Glow", 3.81, _SPARSE, "A", "data loader", "bound"),
        Published("Reformer, 12 layers", 3.71, _COMBINER, "A", "inferred", "likelihood"),
        Published("Parallel Multiscale PixelCNN", 3.70, _SPARSE, "A", "inferred", "likelihood"),
        # aravindsrinivas/flowpp, as for 32x32: train_64x64.tar.
        Published("Flow++", 3.69, _VDVAE, "A", "data loader", "bound", "73 M"),
        Published("PixelRNN", 3.63, _PIXELRNN, "A", "stated", "likelihood"),
        Published("Gated PixelCNN", 3.57, _SPARSE, "A", "stated", "likelihood"),
        Published("SPN", 3.52, _SPARSE, "A", "inferred", "likelihood", "150 M"),
        Published("VDVAE", 3.52, _VDVAE, "A", "data loader", "ELBO", "125 M"),
        Published("Sparse Transformer", 3.44, _SPARSE, "A", "stated", "likelihood", "152 M"),
        Published("Axial Transformer", 3.44, _HOURGLASS, "A", "data loader", "likelihood"),
        Published("Hourglass", 3.44, _HOURGLASS, "A", "inferred", "likelihood"),
        Published("Routing Transformer", 3.43, _COMBINER, "A", "data loader", "likelihood"),
        Published("Combiner-Axial", 3.42, _COMBINER, "A", "inferred", "likelihood"),
        Published("Perceiver AR", 3.40, "Hawthorne et al. 2022 (Perceiver AR)", "A", "inferred", "likelihood", "770 M"),
        Published("VDM", 3.40, _VDM, "A", "inferred", "ELBO"),
        Published("MD4", 3.40, _MD4, "A", "inferred", "ELBO", "198 M"),
    ),
    "imagenet64-B": (
        # Its loader's instructions name the archives of B, its list of addresses those of A.
        Published("DenseFlow", 3.35, _DENSEFLOW, "B", "inferred", "ELBO", "130 M"),
        Published("Flow Matching", 3.31, _FLOW_MATCHING, "B", "data loader", "bound"),
    ),
}
"""By data set, each of one version, which stands at the end of its name where there are several."""


def data_set_key(data: Mapping[str, Any]) -> str | None:
    """The key above of a data set as a run describes it; None for one on which nothing is published."""
    if data.get("version") in ("A", "B", "C"):
        return f"imagenet{data.get('image_size')}-{data['version']}"
    if data.get("form") == "cifar10" and str(data.get("image_size")) == "32":
        return "cifar10"
    return None


def likelihoods_of_size(image_size: int) -> dict[str, list[Published]]:
    """By data set whose images have so many rows, the figures that are likelihoods, as ours are; none is empty."""
    found = {
        name: [entry for entry in entries if entry.measure == "likelihood"]
        for name, entries in PUBLISHED.items()
        if image_size == (32 if name == "cifar10" else int(name.removeprefix("imagenet").partition("-")[0]))
    }
    return {name: entries for name, entries in found.items() if entries}
