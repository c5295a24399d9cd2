"""
The noise that images are trained with: secret as the noise of the guarantee is, but no guarantee rests on it.

It is no part of what is charged, so it needs no defence of its floating-point values: one float32 normal a number,
where [`~randomness.SecretGenerator`] makes each from four of float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch


class DiffusionNoise:
    r"""
    Standard normals keyed from the operating system in each call; the key is forgotten when the call returns.

    From a known seed, the noise of every image would depend on how many images were drawn before it: one image more
    would change the gradients of all others.

    Args:
        device (`torch.device`): Where the normals are drawn, if it is a CUDA device, or else sent.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gaussian(self, shape: int | Sequence[int], std: float = 1.0) -> torch.Tensor:
        """Independent N(0, std^2) of float32, of `shape` or `(shape,)`."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if self.device.type == "cuda":
            seed = int.from_bytes(os.urandom(8), "little", signed=True)
            source = torch.Generator(self.device).manual_seed(seed)
            draws = torch.randn(sizes, device=self.device, generator=source)
        else:
            # torch's generator of a CPU keeps 32 bits of its seed; NumPy's Philox all 384 of key and counter.
            words = {"key": np.frombuffer(os.urandom(16), "<u8"), "counter": np.frombuffer(os.urandom(32), "<u8")}
            normals = np.random.Generator(np.random.Philox(**words)).standard_normal(math.prod(sizes), np.float32)
            draws = torch.from_numpy(normals).to(self.device).view(sizes)
        return draws if std == 1 else draws.mul_(std)
