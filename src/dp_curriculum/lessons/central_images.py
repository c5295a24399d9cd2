"""The lessons `mean` and `mode`: noisy aggregates of random samples of the images, released once.

DP-FETA (arXiv 2504.01395) takes the pixel-wise mean or mode of random samples of each class. Here every release is a
sum of norm-bounded contributions plus noise, divided by a public constant: its sensitivity does not depend on the
number of images in a class, and a class without images releases noise like any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.units import Units
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.lessons.lesson import LATENT_DEVIATION, Lesson, Tensors, contrast_over_noise, draw_rows
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


_SHARPEN = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 5.0, -1.0], [0.0, -1.0, 0.0]])
_MEDIAN_SIDE = 3

Statistic = Literal["mean", "mode"]


@dataclass(frozen=True)
class CentralImages:
    """
    Released central images.

    Shapes:
        images: `torch.float32` of shape `(M, C, H, W)` in `[0, 1]`, M = classes × rounds.
        labels: `torch.int64` of shape `(M,)`.
    """

    images: torch.Tensor
    labels: torch.Tensor


def central_image_norm(
    statistic: Statistic, *, num_values: int, background_level: float = 0.5, max_image_norm: float | None = None
) -> float:
    """
    L2 distance by which one image, added or removed, moves the released sums.

    Args:
        statistic (`"mean"` or `"mode"`): The mode counts one level of each value.
        num_values (`int`): Pixels times channels of a downsampled image.
        background_level (`float`, *optional*, defaults to 0.5): Grey level that is subtracted before clipping (mean).
        max_image_norm (`float`, *optional*): Bound of the mean; if unset, the norm that no centred image exceeds.
    """
    if statistic == "mode":
        return math.sqrt(num_values)
    return max_image_norm or max(background_level, 1 - background_level) * math.sqrt(num_values)


def query_central_images(
    images: torch.Tensor,
    labels: torch.Tensor,
    mechanism: PlannedMechanism,
    *,
    num_classes: int,
    public_dataset_size: int,
    statistic: Statistic = "mean",
    resolution: int | None = None,
    background_level: float = 0.5,
    num_levels: int = 2,
    post_process: bool = True,
    units: Units | None = None,
    generator: SecretGenerator | None = None,
) -> CentralImages:
    r"""
    Releases noisy aggregates of random samples of each class, one per class and step of the mechanism.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        mechanism ([`PlannedMechanism`]): As it was charged: clip norm, noise multiplier, sample rate, and one round
            per step. For the mode, the norm must be at least [`central_image_norm`], or counts are scaled down.
        num_classes (`int`): Number of classes, public.
        public_dataset_size (`int`): Number of images, or of persons, that the divisor assumes; public, or disclosed.
        statistic (`"mean"` or `"mode"`, *optional*, defaults to `"mean"`): Of each pixel and channel.
        resolution (`int`, *optional*): Side at which images are aggregated; half of H if unset.
        background_level (`float`, *optional*, defaults to 0.5): Public grey level subtracted before clipping (mean).
        num_levels (`int`, *optional*, defaults to 2): Grey levels that are counted (mode).
        post_process (`bool`, *optional*, defaults to `True`): Filter by a median and sharpen, after the release.
        units ([`Units`], *optional*): Persons, each of whom adds the average over their images; images if unset.
        generator ([`SecretGenerator`], *optional*): Source of masks and noise; a new one if unset.

    Privacy:
        Each round takes one Poisson sample with the mechanism's sample rate. Mean: every downsampled image, less the
        constant `background_level`, is scaled to an L2 norm of at most `clip_norm` and added to the sum of its class.
        Mode: it adds one count for each pixel and channel. An image enters the sum of one class only, so adding or
        removing it moves the stacked sums of all classes by at most that norm; replacing it, by at most twice that.
        Gaussian noise of `noise_multiplier` times the norm is added to the sums of all classes. What follows (division
        by the constant `sample_rate * public_dataset_size / num_classes`, clamping, resizing, filtering) is
        post-processing. Spent is `mechanism.event`.

    Raises:
        ValueError: If shapes disagree.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"Expected images (N, C, H, W) and labels (N,): they have shapes {shapes}.")
    channels, height, width = images.shape[1:]
    size = (resolution, resolution) if resolution else (max(1, height // 2), max(1, width // 2))
    event, generator = mechanism.event, generator or SecretGenerator()
    contribute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if statistic == "mean":
        shape: tuple[int, ...] = (channels, *size)
        contribute = functools.partial(_centred, size=size, background_level=background_level)
    else:
        shape = (num_levels, channels, *size)
        contribute = functools.partial(_level_counts, size=size, num_levels=num_levels)
    expected_class_count = event.sample_rate * public_dataset_size / num_classes
    released = []
    for _ in range(event.num_steps):
        sums = noisy_class_sums(
            images,
            labels,
            contribute,
            shape,
            num_classes=num_classes,
            mechanism=mechanism,
            units=units,
            generator=generator,
        )
        if statistic == "mean":
            released.append((background_level + sums / expected_class_count).clamp(0, 1))
        else:
            released.append(sums.argmax(dim=1).double() / (num_levels - 1))
    small = torch.cat(released).float()
    finished = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    finished = sharpen(median_filter(finished)) if post_process else finished
    return CentralImages(finished.clamp(0, 1), torch.arange(num_classes).repeat(event.num_steps))


def _centred(
    images: torch.Tensor, labels: torch.Tensor, *, size: tuple[int, int], background_level: float
) -> torch.Tensor:
    """Contribution of each image to the sum of its class for the mean, `(B, C, h, w)`, before clipping."""
    return F.interpolate(images, size=size, mode="area") - background_level


def _level_counts(
    images: torch.Tensor, labels: torch.Tensor, *, size: tuple[int, int], num_levels: int
) -> torch.Tensor:
    """Contribution of each image for the mode, `(B, levels, C, h, w)`: one count per value."""
    small = F.interpolate(images, size=size, mode="area")
    levels = (small * num_levels).long().clamp_max(num_levels - 1)
    return F.one_hot(levels, num_levels).permute(0, 4, 1, 2, 3).double()


def median_filter(images: torch.Tensor) -> torch.Tensor:
    """The median of each pixel's neighbourhood of three by three, `(M, C, H, W)`; the border counts as repeated."""
    padded = F.pad(images, (_MEDIAN_SIDE // 2,) * 4, mode="replicate")
    windows = padded.unfold(2, _MEDIAN_SIDE, 1).unfold(3, _MEDIAN_SIDE, 1)
    return windows.flatten(-2).median(dim=-1).values


def sharpen(images: torch.Tensor) -> torch.Tensor:
    """Five times each pixel less the four beside it, `(M, C, H, W)`; the border counts as repeated."""
    channels = images.shape[1]
    kernel = _SHARPEN.expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)


def _resolution(config: CurriculumConfig) -> int:
    """Side at which central images are aggregated, pixels."""
    return config.lessons.lesson_resolution or max(1, config.input_shape[1] // 2)


def _plan(statistic: Statistic, config: CurriculumConfig, noise_multiplier: float) -> tuple[PlannedMechanism, ...]:
    options, num_values = config.lessons, config.input_shape[0] * _resolution(config) ** 2
    usual = LATENT_DEVIATION * math.sqrt(num_values) if config.has_latents else None
    norm = central_image_norm(
        statistic,
        num_values=num_values,
        background_level=config.data.background_level,
        max_image_norm=options.lesson_max_image_norm or usual,
    )
    event = GaussianEvent(noise_multiplier, options.central_sample_rate, options.central_images_per_class)
    return (PlannedMechanism(f"central-images-{statistic}", norm, event),)


_MARGIN = 0.3  # share of the images of a class by which one level of a pixel is more frequent; typical


def _signal_to_noise(
    statistic: Statistic, config: CurriculumConfig, mechanisms: tuple[PlannedMechanism, ...], images_per_class: float
) -> float:
    (mechanism,) = mechanisms
    if statistic == "mean":
        return contrast_over_noise(config, mechanism, images_per_class)
    margin = _MARGIN * mechanism.event.sample_rate * images_per_class
    return margin / (math.sqrt(2) * mechanism.noise_std)  # of the difference of two counts


def _release(
    statistic: Statistic,
    private: PrivateImages,
    config: CurriculumConfig,
    mechanisms: tuple[PlannedMechanism, ...],
    public_dataset_size: int,
    generator: SecretGenerator,
) -> Tensors:
    released = query_central_images(
        private.images,
        private.labels,
        mechanisms[0],
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        statistic=statistic,
        resolution=_resolution(config),
        background_level=config.data.background_level,
        post_process=config.lessons.central_post_process,
        units=private.units,
        generator=generator,
    )
    return {"images": released.images, "labels": released.labels}


def _lesson(statistic: Statistic, *, noises_sums: bool) -> Lesson:
    return Lesson(
        plan=functools.partial(_plan, statistic),
        release=functools.partial(_release, statistic),
        draw=draw_rows,
        repeats=True,
        signal_to_noise=functools.partial(_signal_to_noise, statistic),
        noises_sums=noises_sums,
    )


MEAN = _lesson("mean", noises_sums=True)
MODE = _lesson("mode", noises_sums=False)
