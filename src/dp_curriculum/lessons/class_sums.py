"""The one private query of all lessons: a noisy sum per class of bounded contributions, one per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from dp_curriculum.data.images import contributing, to_unit_range
from dp_curriculum.privacy.limits import check_mechanism
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


_CHUNK_VALUES = 2**24  # contributions in memory at once


def noisy_class_sums(
    images: torch.Tensor,
    labels: torch.Tensor,
    contribute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    *,
    num_classes: int,
    mechanism: PlannedMechanism,
    generator: SecretGenerator,
) -> torch.Tensor:
    r"""
    Adds up what the images of each class contribute, then adds noise: one step of a mechanism.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        contribute (`Callable`): Images `(B, C, H, W)` as float64 in `[0, 1]` and labels `(B,)` to `(B, *shape)`. What
            it makes of an image must depend on that image, its label and public values alone.
        shape (`Sequence[int]`): Of a contribution.
        num_classes (`int`): Number of classes, public.
        mechanism ([`PlannedMechanism`]): As it was charged. A contribution longer than its `clip_norm` is scaled down
            to it, and one that is not finite adds zero; an image enters with probability `sample_rate`; the noise has
            a standard deviation of `noise_multiplier` times `clip_norm`.
        generator ([`SecretGenerator`]): Source of mask and noise.

    Raises:
        ValueError: If norm, noise or sample rate is out of the [range](`~limits`) in which its bound was tested.

    Returns:
        `torch.Tensor` of shape `(num_classes, *shape)`: float64. Every class is in it, also one without images.

    Privacy:
        An image enters the sum of one class only, with a norm of at most `clip_norm`. Adding or removing it moves the
        stacked sums of all classes by at most `clip_norm` in L2; replacing it, by at most twice that. Spent is one of
        the steps of `mechanism.event`.
    """
    event, clip_norm = mechanism.event, mechanism.clip_norm
    check_mechanism(clip_norm=clip_norm, noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)
    indices = generator.poisson_sample(len(images), event.sample_rate)
    indices = indices[contributing(labels[indices], num_classes)]
    sums = torch.zeros(num_classes, *shape, dtype=torch.float64)
    for rows in indices.split(max(1, _CHUNK_VALUES // math.prod(shape))):
        pixels = to_unit_range(images[rows], dtype=torch.float64)
        sums.index_add_(0, labels[rows], _clip(contribute(pixels, labels[rows]), clip_norm))
    # In float64 up to the sum: rounded earlier, noise is a grid through which the sum shows.
    return sums + generator.gaussian(sums.shape, std=mechanism.noise_std, dtype=torch.float64).to(sums)


def _clip(contributions: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scales each row down to the norm, where it is longer; a row that is not finite becomes zero."""
    norms = contributions.flatten(1).norm(dim=1)
    factors = torch.where(norms.isfinite(), max_norm / norms.clamp_min(max_norm), 0.0)
    return contributions.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * factors.view(
        -1, *[1] * (contributions.ndim - 1)
    )
