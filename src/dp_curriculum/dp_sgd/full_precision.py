"""Arithmetic in which a norm and a sum are of the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bf16 in products of float32, and the same bits for the same convolution.

    A norm and a sum must be those of the same numbers, or the clip bound is off.
    """
    cudnn, matmul_precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark}
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(**kept, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
