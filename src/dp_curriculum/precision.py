"""bfloat16 where a device computes it, and float32 where it would only imitate it."""

from __future__ import annotations

from typing import Literal

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; others compute it in software, on a CPU ten times slower."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def autocast(device: torch.device, mixed_precision: Literal["no", "bf16", "fp16"]) -> torch.autocast:
    """
    The context of forward passes: bfloat16 autocast if asked for and the device [has it](`has_bf16`), else float32.

    Privacy:
        Clipping, sums and noise are outside of it, in float32 and float64: neither choice changes the guarantee.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16" and has_bf16(device))
