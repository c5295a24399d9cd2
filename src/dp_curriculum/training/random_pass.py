"""A pass of the network over random inputs, whose time depends on no image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DModel

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.precision import autocast


def _plain_backward(losses: torch.Tensor) -> None:
    losses.sum().backward()


def random_pass(
    unet: UNet2DModel,
    rows: int,
    config: CurriculumConfig,
    backward: Callable[[torch.Tensor], None] = _plain_backward,
) -> None:
    """
    Runs forward and backward over `rows` network inputs, as training does. It leaves no gradient behind.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network, on its device.
        rows (`int`): Network inputs.
        config ([`CurriculumConfig`]): Its `mixed_precision` is read.
        backward (`Callable`, *optional*): Takes the losses `(rows,)`; the plain sum of gradients if unset.
    """
    device, side = unet.device, unet.config.sample_size
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, unet.config.in_channels, side, side)
    inputs = torch.randn(shape, device=device, generator=generator)
    sigma, labels = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    with autocast(device, config.runtime.mixed_precision):
        output = unet(inputs, sigma, class_labels=labels).sample
    backward(output.float().square().mean(dim=(1, 2, 3)))
    unet.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
