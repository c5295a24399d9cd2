"""Training on the released images of a lesson. It reads no private data and spends nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import reduce
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from tqdm.auto import tqdm

from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import CurriculumConfig, PretrainConfig
from dp_curriculum.diffusion.edm import drop_labels, edm_loss, noise_levels
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule


CHECK_STEPS, CHECK_IMAGES = 50, 256
EMA_DECAY = 0.999


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Largest random changes to an image: degrees, fractions of a side and of the size, and shear."""

    rotation: float = 0.0
    translation: float = 0.0
    scaling: float = 0.0
    shear: float = 0.0
    flip: bool = False


AUGMENTATIONS = {
    "none": Augmentation(),
    "shift": Augmentation(translation=0.03, scaling=0.05),
    "affine": Augmentation(rotation=10.0, translation=0.08, scaling=0.1, shear=0.1),
}


def augmentation(options: PretrainConfig) -> Augmentation:
    """The largest changes that the options ask for."""
    return replace(AUGMENTATIONS[options.augmentation], flip=options.augment_flip)


def augment(images: torch.Tensor, largest: Augmentation, generator: torch.Generator) -> torch.Tensor:
    r"""
    Moves each image by its own small random rotation, shift, change of size and shear.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Released images in `[0, 1]`.
        largest ([`Augmentation`]): Largest change of each kind.
        generator (`torch.Generator`): Public randomness.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, in `[0, 1]`.
    """

    def uniform(limit: float) -> torch.Tensor:
        return (2 * torch.rand(len(images), generator=generator, device=images.device) - 1) * limit

    angle, shear = uniform(math.radians(largest.rotation)), uniform(largest.shear)
    scale = 1 + uniform(largest.scaling)
    # grid_sample maps output to input coordinates in [-1, 1]; a shift of one side is 2.
    shift_x, shift_y = uniform(2 * largest.translation), uniform(2 * largest.translation)
    flip = torch.ones_like(angle)
    if largest.flip:
        flip = torch.where(uniform(1.0) < 0, -flip, flip)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [flip * cos, flip * (shear - sin), shift_x, sin, cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)


Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def mixed(draws: Sequence[Draw]) -> Draw:
    """Draws equally from several lessons: as many images of each, if the count can be divided."""

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        # Where it cannot, chance says who gives one more: over the steps, each gives as many.
        turn = int(torch.randint(len(draws), (), generator=generator, device=generator.device))
        whole, left = divmod(count, len(draws))
        sizes = [whole + ((index + turn) % len(draws) < left) for index in range(len(draws))]
        images, labels = zip(*(one(size, generator) for one, size in zip(draws, sizes) if size))
        return torch.cat(images), torch.cat(labels)

    return draws[0] if len(draws) == 1 else draw


class EarlyStopping:
    r"""
    Ends a lesson once the averaged weights have stopped getting better on images that it is not taught with.

    Args:
        batch (`tuple`): Images to check with, noised, as [`edm_loss`] takes them: the same at each check, so that
            a difference comes from the weights alone.
        config ([`CurriculumConfig`]): Its `model` section and `mixed_precision` are read.
        patience (`int`): Checks without a lower loss, after which it ends.
        prior ([`ClosedFormPrior`], *optional*): What the network adds to.
        schedule ([`NoiseSchedule`], *optional*): That of a network which began as DDPM.

    Privacy:
        Post-processing of the released images, as pretraining is: no private data is read.
    """

    def __init__(
        self,
        batch: tuple[torch.Tensor, ...],
        config: CurriculumConfig,
        *,
        patience: int,
        prior: ClosedFormPrior | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        self.batch, self.config, self.patience, self.prior, self.waited = batch, config, patience, prior, 0
        self.schedule = schedule
        self.lowest, self.best = math.inf, list[torch.Tensor]()

    @torch.no_grad()
    def has_ended(self, unet: UNet2DModel, ema: EMAModel) -> bool:
        """One check of the averaged weights; the best so far are kept in `best`."""
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        loss = _loss(unet, self.batch, self.config, self.prior, self.schedule)
        ema.restore(unet.parameters())
        if torch.distributed.is_initialized():  # all processes end at the same step, whatever their devices round
            loss = reduce(loss, reduction="mean")
        self.waited += 1
        if loss < self.lowest:
            self.lowest, self.waited = float(loss), 0
            self.best = [average.clone() for average in ema.shadow_params]
        return self.waited >= self.patience


def pretrain(
    unet: UNet2DModel,
    draw: Draw,
    config: CurriculumConfig,
    *,
    generator: torch.Generator,
    check_draw: Draw | None = None,
    prior: ClosedFormPrior | None = None,
    schedule: NoiseSchedule | None = None,
    num_steps: int | None = None,
    num_processes: int = 1,
    description: str = "pretraining",
    on_step: Callable[[int, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    disable_progress_bar: bool = False,
) -> None:
    r"""
    Trains `unet` in place on the images of a lesson and leaves it with the averaged weights.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network, on its device; equal on all processes.
        draw (`Callable`): `(count, generator)` to released images `(count, C, H, W)` in `[0, 1]` and labels
            `(count,)`, on the device of the network.
        config ([`CurriculumConfig`]): Its `pretraining` and `model` sections are read.
        generator (`torch.Generator`): Public randomness, on the same device; another one on each process.
        check_draw (`Callable`, *optional*): As `draw`, of images that were held out from it, for
            `pretrain_patience`; `draw` itself if unset.
        prior ([`ClosedFormPrior`], *optional*): What the network adds to, on its device.
        schedule ([`NoiseSchedule`], *optional*): That of a network which began as DDPM.
        num_steps (`int`, *optional*): Optimizer steps; `pretrain_steps` if unset. `pretrain_patience` may end earlier,
            with the best weights.
        num_processes (`int`, *optional*, defaults to 1): Processes that share each batch and average their gradients.
        description (`str`, *optional*): Name of the progress bar.
        on_step (`Callable[[int, float], None]`, *optional*): Called with the step and its loss, every 50 steps.
        should_stop (`Callable[[], bool]`, *optional*): Asked after each step; training ends early where it says so.
        disable_progress_bar (`bool`, *optional*, defaults to `False`): Whether to hide the bar.

    Privacy:
        Post-processing of the released images: no private data is read, nothing is spent, and the loss may be shown.
    """
    options = config.pretraining
    optimizer = torch.optim.Adam(unet.parameters(), lr=options.pretrain_learning_rate, foreach=True)
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY, foreach=True)
    batch_size = math.ceil(options.pretrain_batch_size / num_processes)
    null_label = int(unet.config.num_class_embeds) - 1
    make_batch = functools.partial(_noised_batch, config=config, null_label=null_label, schedule=schedule)
    stopping = None
    if options.pretrain_patience is not None:
        held_out = make_batch(check_draw or draw, CHECK_IMAGES, generator=torch.Generator(unet.device).manual_seed(0))
        patience = options.pretrain_patience
        stopping = EarlyStopping(held_out, config, patience=patience, prior=prior, schedule=schedule)
    unet.train()
    num_steps = options.pretrain_steps if num_steps is None else num_steps
    steps = tqdm(range(num_steps), desc=description, disable=disable_progress_bar)
    for step in steps:
        loss = _loss(unet, make_batch(draw, batch_size, generator=generator), config, prior, schedule)
        optimizer.zero_grad()
        loss.backward()
        if num_processes > 1:
            _average_gradients(unet)
        optimizer.step()
        ema.step(unet.parameters())
        if should_stop():
            break
        if (step + 1) % CHECK_STEPS == 0:
            if on_step is not None:
                on_step(step + 1, loss.item())
                steps.set_postfix(loss=f"{loss.item():.3f}")
            if stopping is not None and stopping.has_ended(unet, ema):
                break
    steps.close()
    if stopping is not None and stopping.best:
        ema.shadow_params = stopping.best
    ema.copy_to(unet.parameters())


def _noised_batch(
    draw: Draw,
    count: int,
    config: CurriculumConfig,
    generator: torch.Generator,
    *,
    null_label: int,
    schedule: NoiseSchedule | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moved images, noise, noise levels and labels, some withheld, as [`edm_loss`] takes them."""
    options, device = config.pretraining, generator.device
    images, labels = draw(count, generator)
    images = augment(images, augmentation(options), generator) * 2 - 1
    label_normals, sigma_normals = torch.randn(2, count, generator=generator, device=device)
    labels = drop_labels(labels, label_normals, null_label=null_label, rate=config.model.label_dropout)
    sigma = noise_levels(sigma_normals, p_mean=options.pretrain_p_mean, schedule=schedule)
    return images, torch.randn(images.shape, generator=generator, device=device), sigma, labels


def _loss(
    unet: UNet2DModel,
    batch: tuple[torch.Tensor, ...],
    config: CurriculumConfig,
    prior: ClosedFormPrior | None,
    schedule: NoiseSchedule | None = None,
) -> torch.Tensor:
    with autocast(unet.device, config.runtime.mixed_precision):
        return edm_loss(unet, *batch, prior=prior, schedule=schedule).mean()


def _average_gradients(unet: UNet2DModel) -> None:
    gradients = [parameter.grad for parameter in unet.parameters()]
    mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))
