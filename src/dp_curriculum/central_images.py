"""The easy stage: noisy aggregates of random samples of the images, released once.

DP-FETA (arXiv 2504.01395) takes the pixel-wise mean or mode of random samples of each class. Here every release is a
sum of norm-bounded contributions plus noise, divided by a public constant: its sensitivity does not depend on how many
images a class has, and a class without images releases noise like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dp_curriculum.accounting import GaussianEvent
from dp_curriculum.config import CentralImagesConfig
from dp_curriculum.data import bound_images, contributing
from dp_curriculum.randomness import SecretGenerator
from dp_curriculum.sampling import draw_indices


_SHARPEN = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 5.0, -1.0], [0.0, -1.0, 0.0]])
_CHUNK = 4096


@dataclass(frozen=True)
class CentralImages:
    """
    Released central images and the events that paid for them.

    Shapes:
        images: `torch.float32` of shape `(M, C, H, W)` in `[0, 1]`, M = classes × images per class.
        labels: `torch.int64` of shape `(M,)`.
        events: what the release spent; empty where nothing private was touched.
    """

    images: torch.Tensor
    labels: torch.Tensor
    events: tuple[GaussianEvent, ...]


def central_image_events(config: CentralImagesConfig) -> tuple[GaussianEvent, ...]:
    """What [`query_central_images`] spends with this configuration; it reads no data."""
    if config.central_statistic == "none":
        return ()
    return (
        GaussianEvent(
            noise_multiplier=config.central_noise_multiplier,
            sample_rate=config.central_sample_rate,
            num_steps=config.central_images_per_class,
        ),
    )


def central_image_sensitivity(config: CentralImagesConfig, *, num_values: int) -> float:
    """
    L2 distance by which one image, added or removed, moves the released sums.

    Args:
        config ([`CentralImagesConfig`]): The query.
        num_values (`int`): Pixels times channels of a downsampled image; the mode counts one level for each.
    """
    return config.central_max_image_norm if config.central_statistic == "mean" else float(num_values) ** 0.5


def query_central_images(
    images: torch.Tensor,
    labels: torch.Tensor,
    config: CentralImagesConfig,
    *,
    num_classes: int,
    public_dataset_size: int,
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
        resolution (`int`, *optional*): Side at which images are aggregated; half of H if unset.
        generator ([`SecretGenerator`], *optional*): Source of masks and noise; a new one if unset.

    Privacy:
        Each of the `central_images_per_class` rounds takes one Poisson sample with `central_sample_rate`. Mean: every
        downsampled image, less the constant `central_center`, is scaled to an L2 norm of at most
        `central_max_image_norm` and added to the sum of its class. Mode: it adds one count for each pixel and channel.
        An image enters the sum of one class only, so adding or removing it moves the stacked sums of all classes by at
        most [`central_image_sensitivity`]; replacing it, by at most twice that. Gaussian noise of `central_noise_multiplier`
        times that norm is added to the sums of all classes. What follows (division by the constant
        `sample_rate * public_dataset_size / num_classes`, clamping, resizing, filtering) is post-processing.

    Raises:
        ValueError: If shapes disagree.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"Expected images (N, C, H, W) and labels (N,): they have shapes {tuple(images.shape)} and {tuple(labels.shape)}."
        )
    channels, height, width = images.shape[1:]
    size = (resolution, resolution) if resolution else (max(1, height // 2), max(1, width // 2))
    if config.central_statistic == "none":
        return CentralImages(torch.empty(0, channels, height, width), torch.empty(0, dtype=torch.int64), ())
    generator = generator or SecretGenerator()
    num_values = channels * size[0] * size[1]
    noise_std = config.central_noise_multiplier * central_image_sensitivity(config, num_values=num_values)
    expected_class_count = config.central_sample_rate * public_dataset_size / num_classes
    released = []
    for _ in range(config.central_images_per_class):
        indices = draw_indices(generator, num_rows=len(images), sample_rate=config.central_sample_rate)
        indices = indices[contributing(labels[indices], num_classes)]
        total = torch.zeros(num_classes, *_contribution_shape(config, (channels, *size)), dtype=torch.float64)
        for part in indices.split(_CHUNK):
            small = F.interpolate(_as_unit_range(images[part]), size=size, mode="area")
            total.index_add_(0, labels[part], _contributions(small, config))
        total += generator.gaussian(total.shape, std=noise_std).to(total)
        released.append(_aggregate(total, config, expected_class_count))
    finished = _post_process(torch.cat(released).float(), config, size=(height, width))
    all_labels = torch.arange(num_classes).repeat(config.central_images_per_class)
    return CentralImages(finished, all_labels, central_image_events(config))


def _as_unit_range(images: torch.Tensor) -> torch.Tensor:
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    return bound_images(images.double() / scale)


def _contribution_shape(config: CentralImagesConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if config.central_statistic == "mean" else (config.central_num_bins, *shape)


def _contributions(images: torch.Tensor, config: CentralImagesConfig) -> torch.Tensor:
    """What each image `(B, C, h, w)` adds to the sum of its class, with an L2 norm of at most the sensitivity."""
    if config.central_statistic == "mean":
        centred = images - config.central_center
        norms = centred.flatten(1).norm(dim=1).clamp_min(config.central_max_image_norm)
        return centred * (config.central_max_image_norm / norms).view(-1, 1, 1, 1)
    levels = (images * config.central_num_bins).long().clamp_max(config.central_num_bins - 1)
    return F.one_hot(levels, config.central_num_bins).permute(0, 4, 1, 2, 3).double()


def _aggregate(noisy_sums: torch.Tensor, config: CentralImagesConfig, expected_class_count: float) -> torch.Tensor:
    """From noisy sums to small images `(classes, C, h, w)` in `[0, 1]`."""
    if config.central_statistic == "mean":
        return (config.central_center + noisy_sums / expected_class_count).clamp(0, 1)
    return noisy_sums.argmax(dim=1).double() / (config.central_num_bins - 1)


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
