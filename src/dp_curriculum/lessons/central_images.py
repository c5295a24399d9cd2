"""The easy stage: noisy aggregates of random samples of the images, released once.

DP-FETA (arXiv 2504.01395) takes the pixel-wise mean or mode of random samples of each class. Here every release is a
sum of norm-bounded contributions plus noise, divided by a public constant: its sensitivity does not depend on how many
images a class has, and a class without images releases noise like any other.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from dp_curriculum.config import CentralImagesConfig
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.randomness import SecretGenerator


_SHARPEN = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 5.0, -1.0], [0.0, -1.0, 0.0]])


Statistic = Literal["mean", "mode"]


@dataclass(frozen=True)
class CentralImages:
    """
    Released central images and the events that paid for them.

    Shapes:
        images: `torch.float32` of shape `(M, C, H, W)` in `[0, 1]`, M = classes × images per class.
        labels: `torch.int64` of shape `(M,)`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    events: tuple[GaussianEvent, ...]


def central_image_event(config: CentralImagesConfig) -> GaussianEvent:
    """What [`query_central_images`] spends with this configuration; it reads no data."""
    return GaussianEvent(
        noise_multiplier=config.central_noise_multiplier,
        sample_rate=config.central_sample_rate,
        num_steps=config.central_images_per_class,
    )


def central_image_norm(config: CentralImagesConfig, statistic: Statistic, *, num_values: int) -> float:
    """
    L2 distance by which one image, added or removed, moves the released sums.

    Args:
        config ([`CentralImagesConfig`]): The query.
        statistic (`"mean"` or `"mode"`): The mode counts one level of each value.
        num_values (`int`): Pixels times channels of a downsampled image. Without `central_max_image_norm`, the bound
            of the mean is the norm that no centred image exceeds.
    """
    if statistic == "mode":
        return math.sqrt(num_values)
    return config.central_max_image_norm or max(config.central_center, 1 - config.central_center) * math.sqrt(
        num_values
    )


def query_central_images(
    images: torch.Tensor,
    labels: torch.Tensor,
    config: CentralImagesConfig,
    *,
    num_classes: int,
    public_dataset_size: int,
    statistic: Statistic = "mean",
    resolution: int | None = None,
    generator: SecretGenerator | None = None,
) -> CentralImages:
    r"""
    Releases `central_images_per_class` noisy aggregates of each class.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        config ([`CentralImagesConfig`]): Public parameters of the query.
        num_classes (`int`): Number of classes, public.
        public_dataset_size (`int`): Number of images that the divisor assumes; public, or disclosed.
        statistic (`"mean"` or `"mode"`, *optional*, defaults to `"mean"`): Of each pixel and channel.
        resolution (`int`, *optional*): Side at which images are aggregated; half of H if unset.
        generator ([`SecretGenerator`], *optional*): Source of masks and noise; a new one if unset.

    Privacy:
        Each of the `central_images_per_class` rounds takes one Poisson sample with `central_sample_rate`. Mean: every
        downsampled image, less the constant `central_center`, is scaled to an L2 norm of at most
        [`central_image_norm`] and added to the sum of its class. Mode: it adds one count for each pixel and channel.
        An image enters the sum of one class only, so adding or removing it moves the stacked sums of all classes by at
        most that norm; replacing it, by at most twice that. Gaussian noise of `central_noise_multiplier` times the
        norm is added to the sums of all classes. What follows (division by the constant
        `sample_rate * public_dataset_size / num_classes`, clamping, resizing, filtering) is post-processing.

    Raises:
        ValueError: If shapes disagree.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"Expected images (N, C, H, W) and labels (N,): they have shapes {shapes}.")
    channels, height, width = images.shape[1:]
    size = (resolution, resolution) if resolution else (max(1, height // 2), max(1, width // 2))
    shape = (channels, *size) if statistic == "mean" else (config.central_num_bins, channels, *size)
    norm = central_image_norm(config, statistic, num_values=channels * size[0] * size[1])
    expected_class_count = config.central_sample_rate * public_dataset_size / num_classes
    generator = generator or SecretGenerator()
    released = []
    for _ in range(config.central_images_per_class):
        sums = noisy_class_sums(
            images,
            labels,
            functools.partial(_centred if statistic == "mean" else _level_counts, size=size, config=config),
            shape,
            num_classes=num_classes,
            max_norm=norm,
            noise_multiplier=config.central_noise_multiplier,
            sample_rate=config.central_sample_rate,
            generator=generator,
        )
        if statistic == "mean":
            released.append((config.central_center + sums / expected_class_count).clamp(0, 1))
        else:
            released.append(sums.argmax(dim=1).double() / (config.central_num_bins - 1))
    finished = _post_process(torch.cat(released).float(), config, size=(height, width))
    all_labels = torch.arange(num_classes).repeat(config.central_images_per_class)
    return CentralImages(finished, all_labels, (central_image_event(config),))


def _centred(
    images: torch.Tensor, labels: torch.Tensor, *, size: tuple[int, int], config: CentralImagesConfig
) -> torch.Tensor:
    """What each image adds to the sum of its class for the mean, `(B, C, h, w)`, before it is clipped."""
    return F.interpolate(images, size=size, mode="area") - config.central_center


def _level_counts(
    images: torch.Tensor, labels: torch.Tensor, *, size: tuple[int, int], config: CentralImagesConfig
) -> torch.Tensor:
    """What each image adds for the mode, `(B, levels, C, h, w)`: one count for each value."""
    small = F.interpolate(images, size=size, mode="area")
    levels = (small * config.central_num_bins).long().clamp_max(config.central_num_bins - 1)
    return F.one_hot(levels, config.central_num_bins).permute(0, 4, 1, 2, 3).double()


def _post_process(images: torch.Tensor, config: CentralImagesConfig, *, size: tuple[int, int]) -> torch.Tensor:
    """Upsamples, takes the median of each neighbourhood, and sharpens."""
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    channels, side = images.shape[1], config.central_median_filter
    if side > 1:
        padded = F.pad(images, (side // 2,) * 4, mode="replicate")
        windows = padded.unfold(2, side, 1).unfold(3, side, 1)
        images = windows.flatten(-2).median(dim=-1).values
    if config.central_sharpen:
        kernel = _SHARPEN.expand(channels, 1, 3, 3)
        images = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
    return images.clamp(0, 1)
