"""Moments: the noisy mean and covariance of each class, and random pictures that have them.

A mean is one picture of a class; its covariance tells how the pictures of the class differ. Both are sums over the
images, so both can be released with little noise. They are taken in the frequencies of the cosine transform: pictures
differ in few low ones, and little noise is spent on the rest. What the two queries released is a distribution that can
be drawn from, and whose best denoiser is known; see closed_form_prior.py. A third query may tell what the parts of
each class are like; see moment_components.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.units import Units
from dp_curriculum.lessons.class_sums import noisy_class_sums, unpack_symmetric
from dp_curriculum.lessons.lesson import LATENT_DEVIATION, Lesson, Tensors, contrast_over_noise
from dp_curriculum.lessons.moment_denoising import (
    covariance_factors,
    denoised_counts,
    denoised_means,
    shrunk_to_mean,
    towards_ends,
)
from dp_curriculum.lessons.photo_covariances import denoised_covariances
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


if TYPE_CHECKING:
    from dp_curriculum.closed_form_prior import Latent

_MAX_RANK = 64  # directions kept of a covariance
_ENERGY_WEIGHT = 0.3  # norm of the two energies of an image beside that of its outer product
_COUNT_SHARE = 0.25  # of the norm of an image that is a constant, whose sum counts the images of a class
_LARGEST_ENERGY = 0.15  # per value: images of a class rarely differ by more
_LARGEST_LATENT_ENERGY = 2 * LATENT_DEVIATION**2  # the same of latents
_BASE_RADIUS, _BASE_SIGNAL = 14.0, 300.0  # frequencies whose covariance is taken, at this many images over noise
_PHOTO_RADIUS = 9.5  # the same for photos
_PHOTO_PLANES = 1.5  # channels of photos, as frequencies below a radius count: differences of colour a quarter each
_FLATTENING = 0.25  # exponent of the public power of a coefficient by which it is made smaller
_LEAST_VARIANCE = 1e-7  # of a coefficient of photos, so that a covariance without energy has a root
# Of the components, in whose coordinates a typical image has length 1: one twice as far off adds nearly all it has.
_COMPONENTS_NORM = 4.0
_COARSE_SIDE = 14  # pixels per side at which a picture is judged


@dataclass(frozen=True)
class Moments:
    """
    Released moments of images, after shrinkage.

    Shapes:
        means: `torch.float32` of shape `(classes, C, H, W)`, in `[0, 1]`.
        factors: `torch.float32` of shape `(classes, C·H·W, rank)`; times its transpose it is a covariance. Of photos,
            images of more than 1,024 values, and of latents, `(classes, rank, rank)`, of their lowest frequencies.
        variances: `torch.float32` of shape `(classes,)`, of an image, summed over its values.
    """

    means: torch.Tensor
    factors: torch.Tensor
    variances: torch.Tensor

    def draw(self, labels: torch.Tensor, resolution: int, generator: torch.Generator) -> torch.Tensor:
        """Random images `(B, C, resolution, resolution)` in `[0, 1]` of the classes `labels` `(B,)`."""
        latent = _closed_form().fit_latent(self.means, self.factors, self.variances)
        return _draw_images(latent, self.means.shape[1:], labels, resolution, generator)


def query_moments(
    images: torch.Tensor,
    labels: torch.Tensor,
    mechanisms: tuple[PlannedMechanism, PlannedMechanism],
    *,
    num_classes: int,
    public_dataset_size: int,
    background_level: float = 0.5,
    radius: float | None = None,
    max_rank: int = _MAX_RANK,
    units: Units | None = None,
    generator: SecretGenerator | None = None,
) -> Moments:
    r"""
    Releases noisy means and covariances of the images, one of each per class.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, H)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        mechanisms (`tuple` of two [`PlannedMechanism`]): Of the means and of the covariances, as they were charged.
        num_classes (`int`): Number of classes, public.
        public_dataset_size (`int`): Number of images, or of persons, that the divisor assumes; public, or disclosed.
        background_level (`float`, *optional*, defaults to 0.5): Public grey level subtracted before clipping.
        radius (`float`, *optional*): Frequencies below it enter the covariance, in half cycles per side;
            [`covariance_radius`] of the public constants if unset.
        max_rank (`int`, *optional*): Largest number of directions kept of a covariance; of photos, all are.
        units ([`Units`], *optional*): Persons, each of whom adds the average over their images; images if unset.
        generator ([`SecretGenerator`], *optional*): Source of the noise; a new one if unset.

    Privacy:
        Two queries of all images, one after the other, each clipped to the `clip_norm` of its mechanism by
        [`noisy_class_sums`], which states the sensitivity. The first adds up the coefficients of images less the
        constant `background_level`, of photos times the public [`coefficient_weights`], and beside them a constant,
        whose sum counts the images of a class: both are clipped together. The second adds up the outer products of
        the low ones of the weighted coefficients of their residuals from the *released* means, and two energies, one
        of the low coefficients and one of the others. Dividing by the *released* counts, pooling over classes and
        frequencies, and shrinking the spectrum are post-processing.
    """
    generator = generator or SecretGenerator()
    shape = tuple(images.shape[1:])
    class_count = public_dataset_size / num_classes
    query = functools.partial(
        noisy_class_sums, images, labels, num_classes=num_classes, units=units, generator=generator
    )
    means, counts = _query_means(query, shape, mechanisms[0], class_count, background_level)
    return _query_covariances(query, means, counts, mechanisms[1], class_count, radius, max_rank)


def _query_means(
    query: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    mechanism: PlannedMechanism,
    class_count: float,
    background_level: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Released means `(k, C, H, W)`, and the number of images of each class over the expected one, `(k,)`."""
    weights = coefficient_weights(shape)
    weights = torch.ones_like(weights) if _closed_form().is_clamped(shape) else weights
    one = _COUNT_SHARE * mechanism.clip_norm

    def counted(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return F.pad((to_frequencies(pixels - background_level) * weights).flatten(1), (0, 1), value=one)

    sums = query(counted, (math.prod(shape) + 1,), mechanism=mechanism) / class_count
    noise = mechanism.noise_std / class_count
    counts = denoised_counts(sums[:, -1] / one, noise / one)
    coefficients = (sums[:, :-1] / counts[:, None]).unflatten(1, shape)
    frequencies = _closed_form().frequencies(shape[-1])
    coefficients, left = denoised_means(coefficients, noise / counts, frequencies=frequencies)
    means = to_pixels(coefficients / weights) + background_level
    if _closed_form().is_latent(shape):  # few of them are at an end of their range
        return means.clamp(0, 1), counts
    left = (left / weights.square()).mean((1, 2, 3), keepdim=True).sqrt()  # standard deviation in a pixel
    return towards_ends(means, 2 * left), counts


def _query_covariances(
    query: Callable[..., torch.Tensor],
    means: torch.Tensor,
    counts: torch.Tensor,
    mechanism: PlannedMechanism,
    class_count: float,
    radius: float | None,
    max_rank: int,
) -> Moments:
    """The moments, with covariances around the released means."""
    shape = tuple(means.shape[1:])
    is_clamped = _closed_form().is_clamped(shape)
    weights = coefficient_weights(shape)
    largest_energy = _LARGEST_LATENT_ENERGY if _closed_form().is_latent(shape) else _LARGEST_ENERGY
    is_low = _low_frequencies(shape, covariance_radius(shape, mechanism, class_count) if radius is None else radius)
    low_weights, size = weights.flatten()[is_low], int(is_low.sum())
    longest, most_energy = _bounds(mechanism.clip_norm)

    def residuals(pixels: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        coefficients = to_frequencies(pixels - means[classes]).flatten(1)
        low, high = coefficients[:, is_low], coefficients[:, ~is_low]
        weighted = low * low_weights
        # The energy of the low ones is that of what is made of their covariance: of photos, it is weighted.
        energies = torch.stack([(low if is_clamped else weighted).square().sum(1), high.square().sum(1)], dim=1)
        energies = energies / (largest_energy * coefficients.shape[1])
        energies = energies / energies.norm(dim=1, keepdim=True).clamp_min(1)
        return weighted * (longest / weighted.norm(dim=1, keepdim=True)).clamp_max(1), energies * most_energy

    sums = query(residuals, (size,), mechanism=mechanism, outer_products=True, num_extras=2) / class_count
    released, noise = sums / counts[:, None], mechanism.noise_std / class_count / counts
    unit = largest_energy * math.prod(shape) / most_energy
    energies = shrunk_to_mean(released[:, -2:] * unit, noise * unit).clamp_min(0)
    covariances = unpack_symmetric(released[:, :-2], size)
    # Residuals were scaled to one norm: their directions are those of the covariance, and the energy its size.
    if not is_clamped:
        factors = _photo_factors(covariances, energies[:, 0], noise / math.sqrt(2), weights, is_low)
        return Moments(means.float(), factors.float(), (factors.square().sum((1, 2)) + energies[:, 1]).float())
    size_of = (covariances.diagonal(dim1=1, dim2=2) / low_weights.square()).sum(1)
    scale = (energies[:, 0] / size_of.clamp_min(noise * math.sqrt(2 * size))).sqrt()[:, None, None]
    factors = covariance_factors(covariances, noise / math.sqrt(2), max_rank=max_rank) * scale / low_weights[:, None]
    spread = factors.new_zeros(len(means), math.prod(shape), factors.shape[2])
    spread[:, is_low] = factors
    spread = to_pixels(spread.transpose(1, 2).unflatten(2, shape)).flatten(2).transpose(1, 2)
    return Moments(means.float(), spread.float(), energies.sum(1).float())


def _photo_factors(
    covariances: torch.Tensor, energies: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor, is_low: torch.Tensor
) -> torch.Tensor:
    """Factors `(classes, m, m)` of the m low coefficients of photos, of noisy weighted covariances and energies."""
    power = _public_power(weights.shape) * weights.square()
    found = denoised_covariances(
        covariances,
        noise,
        power=power.where(is_low.view(weights.shape), 0.0),
        frequencies=_closed_form().frequencies(weights.shape[-1]),
    )
    found = found * (energies / found.diagonal(dim1=1, dim2=2).sum(1))[:, None, None]
    inverse = 1 / weights.flatten()[is_low]
    least = _LEAST_VARIANCE * torch.eye(len(inverse), dtype=found.dtype)
    return torch.linalg.cholesky(found * inverse[:, None] * inverse + least)


def covariance_radius(shape: tuple[int, ...], mechanism: PlannedMechanism, class_count: float) -> float:
    """
    Frequencies whose covariance is worth its noise, as a radius in half cycles per side: from public constants.

    The more frequencies, the more noise hides the common directions. Chosen on MNIST at three epsilons, and for
    photos on CIFAR-10 at two. Of latents as many coefficients are taken as of photos, from all of their channels.
    """
    signal = class_count / max(mechanism.event.noise_multiplier, 1e-9)
    base, least = _BASE_RADIUS if _closed_form().is_clamped(shape) else _PHOTO_RADIUS, 4.0
    if _closed_form().is_latent(shape):
        share = math.sqrt(_PHOTO_PLANES / shape[0])
        base, least = base * share, least * share
    return min(float(2 * shape[-1]), max(least, base * (signal / _BASE_SIGNAL) ** 0.2))


def _low_frequencies(shape: tuple[int, ...], radius: float) -> torch.Tensor:
    """Mask `(D,)` of the coefficients below a radius; of photos, half as long for differences of colour."""
    closed_form = _closed_form()
    if closed_form.is_clamped(shape):
        return (closed_form.frequencies(shape[-1]) < radius).expand(shape).flatten()
    return (closed_form.fineness(shape) < radius).flatten()


def coefficient_weights(shape: tuple[int, ...]) -> torch.Tensor:
    """
    Factors `(C, H, H)` of the coefficients of an image, ahead of clipping: from public constants.

    Coefficients fall off as 1 / f, and noise is the same for all: fine ones are made larger, such that more of them
    stand out. Means of images of at most 1,024 values are left as they are: coarse ones are what they are needed for.
    """
    power = _public_power(shape)
    weights = power**-_FLATTENING
    return weights * (power.sum() / (power * weights**2).sum()).sqrt()


def _public_power(shape: tuple[int, ...]) -> torch.Tensor:
    """Law of the variances of the coefficients of photos, up to a factor."""
    power = _closed_form().texture_power(shape)
    power[:, 0, 0] = power[:, 0, 1]  # a texture has no mean; photos differ in theirs
    return power


def _closed_form() -> ModuleType:
    """The closed form, imported when it is needed: it loads diffusers, for which a plan need not wait."""
    from dp_curriculum import closed_form_prior

    return closed_form_prior


def to_frequencies(images: torch.Tensor) -> torch.Tensor:
    """Coefficients `(..., C, H, H)` of images in an orthonormal basis: cosines, and brightness and two differences."""
    return _closed_form().to_frequencies(images)


def to_pixels(coefficients: torch.Tensor) -> torch.Tensor:
    """The images `(..., C, H, H)` of such coefficients."""
    return _closed_form().to_pixels(coefficients)


def _bounds(clip_norm: float) -> tuple[float, float]:
    """Longest residual, and largest norm of its energies: outer product and energies have the norm `clip_norm`."""
    squared = clip_norm / math.sqrt(1 + _ENERGY_WEIGHT**2)
    return math.sqrt(squared), _ENERGY_WEIGHT * squared


def _draw_images(
    latent: Latent, shape: torch.Size, labels: torch.Tensor, resolution: int, generator: torch.Generator
) -> torch.Tensor:
    device = labels.device
    normals = torch.randn(len(labels), latent.factors.shape[2], generator=generator, device=device)
    texture = torch.randn(len(labels), *shape, generator=generator, device=device)
    images = _closed_form().draw_latent(latent, labels, normals, texture).float()
    if resolution == shape[-1]:
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", align_corners=False)


def _plan(config: CurriculumConfig, noise_multiplier: float) -> tuple[PlannedMechanism, ...]:
    options, shape, level = config.lessons, config.input_shape, config.data.background_level
    root = math.sqrt(math.prod(shape))
    # Most photos are a fifth away from grey, weighted; digits and documents are black and white.
    contrast = 0.2 if shape[0] == 3 else max(level, 1 - level)
    residual = 0.1
    if config.has_latents:  # half of the spread of latents, in number, is in the frequencies that are taken
        contrast, residual = LATENT_DEVIATION, LATENT_DEVIATION / 2
    norm = options.lesson_max_image_norm or contrast * root
    residual = options.moment_max_residual_norm or residual * root
    event = GaussianEvent(noise_multiplier)
    planned = (
        PlannedMechanism("moments-mean", norm, event),
        PlannedMechanism("moments-covariance", residual**2, event),
    )
    if options.moment_components == 1:
        return planned
    return (*planned, PlannedMechanism("moments-components", _COMPONENTS_NORM, event))


def _release(
    private: PrivateImages,
    config: CurriculumConfig,
    mechanisms: tuple[PlannedMechanism, ...],
    public_dataset_size: int,
    generator: SecretGenerator,
) -> Tensors:
    mean, covariance, *further = mechanisms
    released = query_moments(
        private.images,
        private.labels,
        (mean, covariance),
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        background_level=config.data.background_level,
        units=private.units,
        generator=generator,
    )
    tensors = {"means": released.means, "factors": released.factors, "variances": released.variances}
    for mechanism in further:
        from dp_curriculum.lessons.moment_components import query_components  # loads diffusers

        components = query_components(
            private.images,
            private.labels,
            (released.means, released.factors, released.variances),
            mechanism,
            num_components=config.lessons.moment_components,
            public_dataset_size=public_dataset_size,
            units=private.units,
            generator=generator,
        )
        tensors |= {f"component_{name}": tensor for name, tensor in vars(components).items()}
    return tensors


def check_released(tensors: Tensors) -> None:
    """
    Refuses moments in a form that is not released any more, which a run that is resumed may hold.

    Raises:
        ValueError: If they have no variances, or are of photos and have directions in pixels.
    """
    is_old = "variances" not in tensors
    if not is_old and not _closed_form().is_clamped(tensors["means"].shape[1:]):
        is_old = tensors["factors"].shape[1] != tensors["factors"].shape[2]
    if is_old:
        raise ValueError("Refusing to use these moments: an earlier version released them. Start another run.")


def _prepare(
    tensors: Tensors, config: CurriculumConfig, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensors:
    check_released(tensors)
    moments = tuple(tensors[name].cpu() for name in ("means", "factors", "variances"))
    if config.lessons.moment_components > 1:
        latent = _closed_form().fit_components(*moments, _closed_form().released_components(tensors))
    else:
        latent = _closed_form().fit_latent(*moments)
    shares = tensors.get("component_shares", torch.ones(len(tensors["means"]), 1))
    return {
        "mean": latent.mean.float(),
        "factors": latent.factors.float(),
        "texture": latent.texture.float(),
        "means": tensors["means"],
        "shares": shares,
    }


def _draw(
    tensors: Tensors, count: int, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tensors["means"].shape[1:]
    latent = _closed_form().Latent(
        tensors["mean"], tensors["factors"], tensors["texture"], _closed_form().contrast_of(shape)
    )
    shares = tensors["shares"]
    labels = torch.randint(len(shares), (count,), generator=generator, device=latent.mean.device)
    rows = labels
    if shares.shape[1] > 1:
        rows = labels * shares.shape[1] + shares[labels].multinomial(1, generator=generator)[:, 0]
    return _draw_images(latent, shape, rows, resolution, generator), labels


def _signal_to_noise(
    config: CurriculumConfig, mechanisms: tuple[PlannedMechanism, ...], images_per_class: float
) -> float:
    """
    Signal over noise of the means: without them, the covariances are of no use. Of what they show at most 14 pixels
    per side are known by their low frequencies; noise of the high ones is taken away.
    """
    side = config.input_shape[1]
    return contrast_over_noise(config, mechanisms[0], images_per_class) * side / min(side, _COARSE_SIDE)


MOMENTS = Lesson(plan=_plan, release=_release, draw=_draw, prepare=_prepare, signal_to_noise=_signal_to_noise)
