"""Tiny autoencoders with random weights, whose latents have about the scale that they state."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL


def tiny_vae(channels: int = 3, latent_channels: int = 4, downsampling: int = 4, seed: int = 0, **fields: Any) -> Any:
    """An `AutoencoderKL` that makes images smaller by that factor; with attention, as those that people use."""
    depth = downsampling.bit_length()
    if "scaling_factor" not in fields:
        fields["scaling_factor"] = _scale(channels, latent_channels, downsampling, seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latent_channels,
            block_out_channels=(8, 16, 16, 16)[:depth],
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            norm_num_groups=4,
            sample_size=32,
            **fields,
        )
    return vae.eval()


@functools.cache
def _scale(channels: int, latent_channels: int, downsampling: int, seed: int) -> float:
    """One over the standard deviation of its latents, on random pixels."""
    vae = tiny_vae(channels, latent_channels, downsampling, seed, scaling_factor=1.0)
    images = torch.randn(8, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(1 / vae.encode(images).latent_dist.mode().std())


def save_vae(folder: Path, **options: Any) -> Path:
    """Saves one as `save_pretrained` does."""
    tiny_vae(**options).save_pretrained(folder)
    return folder


def random_pixels(count: int, channels: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Bytes `(N, C, H, W)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
