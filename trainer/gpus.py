"""How fast are a GPU's matrix products, how large is its memory, and how fast are its links?

Dense peaks (without sparsity) and memory are from NVIDIA's data sheets: "NVIDIA H100/H200 Tensor Core GPU", "NVIDIA
A100 Tensor Core GPU", "NVIDIA HGX B200" for B200, and the sheets of L40S, L40, L4, A40 and A10. Those of RTX are from
the papers on the Ada and Ampere GA102 architectures (bf16 with fp32 accumulation). For a GPU that is not listed, no
utilisation is reported: its peak is not guessed.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU's figures from its data sheet."""

    name: str
    """The name for `--gpu` of trainer.plan. All its words are in the name that CUDA reports."""
    bf16_tflops: float
    """Dense peak of bf16 and fp16 products accumulated in fp32."""
    tf32_tflops: float
    fp32_tflops: float
    """Without tensor cores: what torch's fp32 products use unless TF32 is allowed."""
    memory_gib: float
    """What the driver leaves to programs."""
    memory_gb_per_s: float
    link_gb_per_s: float
    """To the other GPUs of a node, in one direction: NVLink where the GPU has it, else PCIe."""

    def peak_tflops(self, precision: Precision) -> float:
        """Dense peak of the matrix products that training in this precision uses."""
        if precision != "fp32":
            return self.bf16_tflops
        return self.tf32_tflops if torch.backends.cuda.matmul.allow_tf32 else self.fp32_tflops


def _gpu(name: str, bf16: float, tf32: float, fp32: float, memory: float, bandwidth: float, link: float) -> Gpu:
    return Gpu(
        name=name,
        bf16_tflops=bf16,
        tf32_tflops=tf32,
        fp32_tflops=fp32,
        memory_gib=memory,
        memory_gb_per_s=bandwidth,
        link_gb_per_s=link,
    )


BF16_CAPABILITY = (8, 0)
"""Ampere's compute capability. Ampere was the first with bf16 in its tensor cores."""

# The more words a name has, the earlier it stands: "NVIDIA H100 PCIe" is no "H100".
GPUS = (
    _gpu("H100 PCIe", 756, 378, 51.2, 79.2, 2000, 64),
    _gpu("H100 NVL", 835.5, 417.5, 60, 93.1, 3938, 300),
    _gpu("RTX A6000", 154.8, 77.4, 38.7, 47.5, 768, 32),
    _gpu("RTX 4090", 165.2, 82.6, 82.6, 23.5, 1008, 32),
    _gpu("RTX 3090", 71, 35.6, 35.6, 23.6, 936, 32),
    _gpu("A100 40GB", 312, 156, 19.5, 39.4, 1555, 300),
    _gpu("B200", 2250, 1125, 75, 178, 7700, 900),
    _gpu("GH200", 989.4, 494.7, 66.9, 94.5, 4000, 450),
    _gpu("H200", 989.4, 494.7, 66.9, 139.8, 4800, 450),
    _gpu("H100", 989.4, 494.7, 66.9, 79.2, 3350, 450),
    _gpu("H800", 989.4, 494.7, 66.9, 79.2, 3350, 200),
    _gpu("A100", 312, 156, 19.5, 79.2, 2039, 300),
    _gpu("A800", 312, 156, 19.5, 79.2, 2039, 200),
    _gpu("L40S", 362, 183, 91.6, 44.5, 864, 32),
    _gpu("L40", 181, 90.5, 90.5, 44.5, 864, 32),
    _gpu("A40", 149.7, 74.8, 37.4, 44.4, 696, 32),
    _gpu("A10", 125, 62.5, 31.2, 22.5, 600, 32),
    _gpu("L4", 121, 60, 30.3, 22.3, 300, 32),
)


def missing_precision(precision: Precision, local_rank: int) -> str | None:
    """Why this rank's GPU should not train in this precision, in a sentence; None if it can, or on a CPU.

    On GPUs before Ampere torch emulates bf16: products work, but take many times as long.
    """
    if precision != "bf16" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(local_rank)
    if (major, minor) >= BF16_CAPABILITY:
        return None
    return (
        f"train.precision: {torch.cuda.get_device_name(local_rank)} (compute capability {major}.{minor}) has no bf16, "
        "which would be emulated at a fraction of its speed; take fp16 or fp32"
    )


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU with this name, of CUDA ("NVIDIA A100-SXM4-80GB") or of a user ("a100"); None if it is not listed."""
    words = device_name.lower().replace("-", " ").split()
    return next((gpu for gpu in GPUS if all(word in words for word in gpu.name.lower().split())), None)
