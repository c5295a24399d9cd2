"""bfloat16 where a device computes it, and float32 where it would only imitate it."""

from __future__ import annotations

import platform
from typing import Literal

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; others imitate it, which makes some CPUs ten times slower."""
    if device.type == "cpu":
        if platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
            return bool(torch.cpu._is_avx512_bf16_supported())
        # On other processors, and in older releases of torch: whether oneDNN offers it.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def passes_precision(device: torch.device, mixed_precision: Literal["no", "bf16", "fp16"]) -> str:
    """In what [`autocast`] lets passes be computed there."""
    return "bfloat16" if mixed_precision == "bf16" and has_bf16(device) else "float32"


def autocast(device: torch.device, mixed_precision: Literal["no", "bf16", "fp16"]) -> torch.autocast:
    """
    The context of forward passes: bfloat16 autocast if asked for and the device [has it](`has_bf16`), else float32.

    Privacy:
        Clipping, sums and noise are outside of it, in float32 and float64: neither choice changes the guarantee.
    """
    low = passes_precision(device, mixed_precision) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
