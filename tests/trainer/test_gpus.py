"""Does the name that CUDA reports lead to the right GPU, and an unknown one to none?"""

import pytest
import torch

from trainer.gpus import GPUS, find_gpu, missing_precision


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h200", "H200"),
    ],
)
def test_a_reported_name_is_found(reported: str, name: str) -> None:
    gpu = find_gpu(reported)
    assert gpu is not None and gpu.name == name


@pytest.mark.parametrize("unknown", ["NVIDIA A1000", "NVIDIA GeForce RTX 5090", "AMD Instinct MI300X", "H20", ""])
def test_an_unknown_gpu_is_not_taken_for_a_known_one(unknown: str) -> None:
    assert find_gpu(unknown) is None


def test_every_listed_gpu_is_found_by_its_own_name() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


def test_the_peak_is_that_of_the_precision() -> None:
    h200 = find_gpu("H200")
    assert h200 is not None
    assert h200.peak_tflops("bf16") == h200.peak_tflops("fp16") == pytest.approx(989, abs=1)
    assert h200.peak_tflops("fp32") == pytest.approx(67, abs=1)  # TF32 is off unless somebody allows it


@pytest.mark.parametrize(
    ("capability", "precision", "refused"),
    [((7, 5), "bf16", True), ((7, 5), "fp16", False), ((7, 5), "fp32", False), ((8, 0), "bf16", False)],
)
def test_bf16_needs_a_gpu_that_has_it(
    capability: tuple[int, int], precision: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    text = missing_precision(precision, 0)  # type: ignore[arg-type]
    assert (text is not None) == refused
    assert text is None or "Tesla T4 (compute capability 7.5) has no bf16" in text


def test_on_a_cpu_bf16_is_a_matter_of_speed_alone() -> None:
    assert torch.cuda.is_available() or missing_precision("bf16", 0) is None
