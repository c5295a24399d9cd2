"""Tiny networks as DDPM trains them, in the style of `google/ddpm-cifar10-32`, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def tiny_unet(channels: int = 1, **fields: Any) -> UNet2DModel:
    """Attention on one level, asymmetric padding, another frequency shift: what ours do not have."""
    options: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        **fields,
    }
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return UNet2DModel(**options).eval()


def tiny_pipeline(prediction_type: str = "epsilon", **schedule: Any) -> DDPMPipeline:
    """A diffusers pipeline around it."""
    return DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type=prediction_type, **schedule))


def save_tiny(folder: Path, prediction_type: str = "epsilon", **schedule: Any) -> Path:
    """Saves one as `save_pretrained` does."""
    tiny_pipeline(prediction_type, **schedule).save_pretrained(folder)
    return folder


def ddim_images(pipeline: DDPMPipeline, num_steps: int, seed: int, count: int, **schedule: Any) -> torch.Tensor:
    """What diffusers' own DDIM pipeline makes of it, in [0, 1]."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **schedule)
    theirs = DDIMPipeline(pipeline.unet, scheduler)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return theirs(count, generator=generator, num_inference_steps=num_steps, output_type="pt").images
