"""What the device can do: precision, and peak FLOPs where they are published."""

import re
from typing import Literal

import torch

# Dense bfloat16 tensor-core peaks in FLOPs per second with float32 accumulation, from NVIDIA's and AMD's data sheets
# (figures with sparsity halved). The first name that is a word of the device's name counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2.25e15),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 383e12),
)


def choose_precision(name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type of matrix products on `device`; auto takes bfloat16 on CUDA devices that have it."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Published dense peak of `device` in FLOPs per second; None where none is known (CPUs, other precisions)."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    device_name = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)
