"""Training on released images, after the easy stage. It reads no private data and spends nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from tqdm.auto import tqdm

from dp_curriculum.central_images import CentralImages
from dp_curriculum.config import CurriculumConfig, PretrainConfig
from dp_curriculum.edm import draw_sigma, drop_labels, edm_loss


def augment(images: torch.Tensor, config: PretrainConfig, generator: torch.Generator) -> torch.Tensor:
    r"""
    Moves each image by its own small random rotation, shift, change of size and shear.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Released images in `[0, 1]`.
        config ([`PretrainConfig`]): Largest values of each.
        generator (`torch.Generator`): Public randomness.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, in `[0, 1]`.
    """

    def uniform(limit: float) -> torch.Tensor:
        return (2 * torch.rand(len(images), generator=generator, device=images.device) - 1) * limit

    angle, shear = uniform(math.radians(config.augment_rotation)), uniform(config.augment_shear)
    scale = 1 + uniform(config.augment_scaling)
    # grid_sample maps output to input coordinates in [-1, 1]; a shift of one side is 2.
    shift_x, shift_y = uniform(2 * config.augment_translation), uniform(2 * config.augment_translation)
    flip = torch.ones_like(angle)
    if config.augment_flip:
        flip = torch.where(uniform(1.0) < 0, -flip, flip)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [flip * cos, shear - sin, shift_x, sin, cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)


def lesson_batches(
    lesson: CentralImages, config: PretrainConfig, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of augmented batches: images `(B, C, H, W)` in `[-1, 1]` and labels `(B,)`."""
    while True:
        rows = torch.randint(
            len(lesson.images), (config.pretrain_batch_size,), generator=generator, device=lesson.images.device
        )
        yield augment(lesson.images[rows], config, generator) * 2 - 1, lesson.labels[rows]


def pretrain(
    unet: UNet2DModel,
    lesson: CentralImages,
    config: CurriculumConfig,
    *,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    disable_progress_bar: bool = False,
) -> None:
    r"""
    Trains `unet` in place on the images of a lesson and leaves it with the averaged weights.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network, on its device.
        lesson ([`CentralImages`]): Released images, on the same device.
        config ([`CurriculumConfig`]): Its `pretraining` and `model` sections are read.
        generator (`torch.Generator`): Public randomness, on the same device.
        on_step (`Callable[[int, float], None]`, *optional*): Called with the step and its loss, every 50 steps.
        should_stop (`Callable[[], bool]`, *optional*): Asked after each step; training ends early where it says so.
        disable_progress_bar (`bool`, *optional*, defaults to `False`): Whether to hide the bar.

    Privacy:
        Post-processing of the released images: no private data is read, nothing is spent, and the loss may be shown.
    """
    options, device = config.pretraining, lesson.images.device
    optimizer = torch.optim.Adam(unet.parameters(), lr=options.pretrain_learning_rate)
    ema = EMAModel(unet.parameters(), decay=options.pretrain_ema_decay, foreach=True)
    null_label = int(unet.config.num_class_embeds) - 1
    unet.train()
    steps = tqdm(range(options.pretrain_steps), desc="easy stage, epsilon +0", disable=disable_progress_bar)
    for step, (images, labels) in zip(steps, lesson_batches(lesson, options, generator)):
        labels = drop_labels(labels, null_label=null_label, rate=options.label_dropout, generator=generator)
        sigma = draw_sigma(
            len(images),
            p_mean=options.pretrain_p_mean,
            p_std=options.pretrain_p_std,
            generator=generator,
            device=device,
        )
        noise = torch.randn(images.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.runtime.mixed_precision == "bf16"):
            loss = edm_loss(unet, images, noise, sigma, labels, sigma_data=config.model.sigma_data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.step(unet.parameters())
        if should_stop():
            break
        if on_step is not None and (step + 1) % 50 == 0:
            on_step(step + 1, loss.item())
            steps.set_postfix(loss=f"{loss.item():.3f}")
    ema.copy_to(unet.parameters())
