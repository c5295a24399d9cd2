"""bfloat16 where a device computes it, and float32 where it would only imitate it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Literal, cast

import torch


Precision = Literal["no", "bf16"]


def launched_precision(asked: str | None, environment: Mapping[str, str] = os.environ) -> Precision:
    """
    The precision of a run: what its configuration asks for, or where it says nothing, what `accelerate launch` does.

    That is the rule of the `--mixed_precision` of diffusers' training scripts. What else a launch may ask for is
    refused by [`~processes.check_launch`].
    """
    return cast(Precision, asked or environment.get("ACCELERATE_MIXED_PRECISION", "no").lower())


def has_bf16(device: torch.device) -> bool:
    """True if the device has instructions for bfloat16. Others imitate it, which makes some CPUs ten times slower."""
    if device.type == "cpu":
        if platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
            return bool(torch.cpu._is_avx512_bf16_supported())
        # On other processors, and in older releases of torch: whether oneDNN offers it.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def passes_precision(device: torch.device, mixed_precision: str | None) -> str:
    """Precision in which [`autocast`] lets passes be computed there."""
    return "bfloat16" if mixed_precision == "bf16" and has_bf16(device) else "float32"


def autocast(device: torch.device, mixed_precision: str | None) -> torch.autocast:
    """
    The context of forward passes: bfloat16 autocast if asked for and the device [has it](`has_bf16`), else float32.

    Privacy:
        Clipping, sums and noise are outside of it, in float32 and float64: neither choice changes the guarantee.
    """
    low = passes_precision(device, mixed_precision) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
