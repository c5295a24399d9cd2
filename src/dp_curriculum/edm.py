"""EDM's preconditioned denoiser and its loss: their public face."""

from __future__ import annotations

from dp_curriculum.diffusion.edm import (
    build_unet,
    drop_labels,
    edm_denoise,
    edm_loss,
    noise_levels,
)


__all__ = [
    "build_unet",
    "drop_labels",
    "edm_denoise",
    "edm_loss",
    "noise_levels",
]
