"""Moment images: random pictures with the noisy mean and covariance of each class.

A mean is one picture of a class; its covariance tells how the pictures of the class differ. Both are sums over the
images, so both can be released with little noise. Of the noisy covariance only the directions that stand out from the
noise are kept, shrunk by how much of them is noise. Pictures drawn along them are an unlimited lesson.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.lessons.class_sums import noisy_class_sums, unpack_symmetric
from dp_curriculum.lessons.lesson import Lesson, Tensors, contrast_over_noise
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


_OWN_SHARE = 0.5  # of a class' own covariance in what is taught; the rest is that of all classes
_MAX_RANK = 64  # directions kept of a covariance


@dataclass(frozen=True)
class Moments:
    """
    Released moments of small images, after shrinkage.

    Shapes:
        means: `torch.float32` of shape `(classes, C, h, w)`.
        factors: `torch.float32` of shape `(classes, C·h·w, rank)`; an image of a class is its mean plus its factor
            times a standard normal vector.
    """

    means: torch.Tensor
    factors: torch.Tensor

    def draw(self, labels: torch.Tensor, resolution: int, generator: torch.Generator) -> torch.Tensor:
        """Random images `(B, C, resolution, resolution)` in `[0, 1]` of the classes `labels` `(B,)`."""
        return draw_moment_images(self.means, self.factors, labels, resolution, generator)


def draw_moment_images(
    means: torch.Tensor, factors: torch.Tensor, labels: torch.Tensor, resolution: int, generator: torch.Generator
) -> torch.Tensor:
    """Random images `(B, C, resolution, resolution)` in `[0, 1]`; see [`Moments`] for the shapes."""
    normal = torch.randn(len(labels), factors.shape[2], 1, generator=generator, device=factors.device)
    small = means[labels] + (factors[labels] @ normal).view(len(labels), *means.shape[1:])
    return F.interpolate(small.clamp(0, 1), size=(resolution, resolution), mode="bilinear", align_corners=False)


def query_moments(
    images: torch.Tensor,
    labels: torch.Tensor,
    mechanisms: tuple[PlannedMechanism, PlannedMechanism],
    *,
    num_classes: int,
    public_dataset_size: int,
    resolution: int,
    background_level: float = 0.5,
    own_share: float = _OWN_SHARE,
    max_rank: int = _MAX_RANK,
    generator: SecretGenerator | None = None,
) -> Moments:
    r"""
    Releases noisy means and covariances of small images, one of each per class.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        mechanisms (`tuple` of two [`PlannedMechanism`]): Of the means and of the covariances, as they were charged.
        num_classes (`int`): Number of classes, public.
        public_dataset_size (`int`): Number of images that the divisor assumes; public, or disclosed.
        resolution (`int`): Side h = w of the small images.
        background_level (`float`, *optional*, defaults to 0.5): Public grey level subtracted before clipping.
        own_share (`float`, *optional*): Share of a class' own covariance; the rest is that of all classes.
        max_rank (`int`, *optional*): Largest number of directions kept of a covariance.
        generator ([`SecretGenerator`], *optional*): Source of the noise; a new one if unset.

    Privacy:
        Two queries of all images, one after the other. The first adds up small images less the constant
        `background_level`. The second adds up the outer products of their residuals from the *released* means, whose
        L2 norm is the squared norm of the residual. Both are clipped to the `clip_norm` of their mechanism by
        [`noisy_class_sums`], which states the sensitivity. Dividing by the constant `public_dataset_size /
        num_classes`, pooling over classes and shrinking the spectrum are post-processing.
    """
    generator = generator or SecretGenerator()
    shape = (images.shape[1], resolution, resolution)
    num_values, class_count = math.prod(shape), public_dataset_size / num_classes
    query = functools.partial(noisy_class_sums, images, labels, num_classes=num_classes, generator=generator)

    def centred(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return F.interpolate(pixels, size=shape[1:], mode="area") - background_level

    sums = query(centred, shape, mechanism=mechanisms[0])
    means = background_level + sums / class_count

    def residuals(pixels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return (F.interpolate(pixels, size=shape[1:], mode="area") - means[classes]).flatten(1)

    packed = query(residuals, (num_values,), mechanism=mechanisms[1], outer_products=True)
    covariances = unpack_symmetric(packed / class_count, num_values)
    noise = mechanisms[1].noise_std / class_count / math.sqrt(2)  # of an off-diagonal entry
    factors = _factors(covariances, noise, own_share=own_share, max_rank=max_rank)
    return Moments(means.clamp(0, 1).float(), factors.float())


def _factors(covariances: torch.Tensor, noise: float, *, own_share: float, max_rank: int) -> torch.Tensor:
    """
    Factors `(classes, D, rank)` of the covariances `(classes, D, D)` without their noise.

    What the classes have in common is known better than what each has of its own: `own_share` of a class' covariance
    is mixed with the rest of their mean.
    """
    num_classes, size = covariances.shape[:2]
    mixed = own_share * covariances + (1 - own_share) * covariances.mean(0)
    # Variance of the mixture's noise: the mean has 1 / classes of it, and shares the class' own.
    shared = (1 - own_share) ** 2 + 2 * own_share * (1 - own_share)
    edge = 2 * noise * math.sqrt(size * (own_share**2 + shared / num_classes))
    values, vectors = torch.linalg.eigh(mixed)
    values = shrink_spectrum(values, edge)
    factors = vectors * values.sqrt()[:, None]
    return factors[:, :, size - min(max_rank, size) :].flip(2).contiguous()


def shrink_spectrum(values: torch.Tensor, edge: float) -> torch.Tensor:
    r"""
    Eigenvalues of a symmetric matrix without the noise that was added to it.

    A symmetric Gaussian matrix whose eigenvalues end at `edge` turns a true eigenvalue l into l + (edge / 2)^2 / l
    where l is above `edge` / 2, and hides it below; of the eigenvector, 1 - (edge / 2)^2 / l^2 remains
    (Benaych-Georges and Nadakuditi 2011, arXiv 0910.2120, section 3.1). Returned is l times that, the value that is
    nearest to the true matrix; 0 where nothing stands out.

    Args:
        values (`torch.Tensor`): Eigenvalues of the noisy matrix.
        edge (`float`): Largest eigenvalue of the noise alone.
    """
    root = (values.square() - edge**2).clamp_min(0).sqrt()
    true = (values + root) / 2
    kept = 1 - (edge / 2) ** 2 / true.square().clamp_min(1e-300)
    return torch.where(values > edge, true * kept, 0.0)


def _resolution(config: CurriculumConfig) -> int:
    """Side at which moments are taken, pixels."""
    return config.lessons.lesson_resolution or max(1, min(14, config.data.resolution // 2))


def _plan(config: CurriculumConfig, noise_multiplier: float) -> tuple[PlannedMechanism, ...]:
    options = config.lessons
    root, level = math.sqrt(config.data.channels * _resolution(config) ** 2), config.data.background_level
    norm = options.lesson_max_image_norm or max(level, 1 - level) * root
    residual = options.moment_max_residual_norm or 0.2 * root
    event = GaussianEvent(noise_multiplier)
    return (
        PlannedMechanism("moments-mean", norm, event),
        PlannedMechanism("moments-covariance", residual**2, event),
    )


def _release(
    private: PrivateImages,
    config: CurriculumConfig,
    mechanisms: tuple[PlannedMechanism, ...],
    public_dataset_size: int,
    generator: SecretGenerator,
) -> Tensors:
    mean, covariance = mechanisms
    released = query_moments(
        private.images,
        private.labels,
        (mean, covariance),
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        resolution=_resolution(config),
        background_level=config.data.background_level,
        generator=generator,
    )
    return {"means": released.means, "factors": released.factors}


def _draw(
    tensors: Tensors, count: int, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    means, factors = tensors["means"], tensors["factors"]
    labels = torch.randint(len(means), (count,), generator=generator, device=means.device)
    return draw_moment_images(means, factors, labels, resolution, generator), labels


def _signal_to_noise(
    config: CurriculumConfig, mechanisms: tuple[PlannedMechanism, ...], images_per_class: float
) -> float:
    """Signal over noise of the means: without them, the covariances are of no use."""
    return contrast_over_noise(mechanisms[0], images_per_class)


MOMENTS = Lesson(plan=_plan, release=_release, draw=_draw, signal_to_noise=_signal_to_noise)
