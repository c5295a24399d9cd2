"""Moments: the noisy mean and covariance of each class, and random pictures that have them.

A mean is one picture of a class; its covariance tells how the pictures of the class differ. Both are sums over the
images, so both can be released with little noise. They are taken in the frequencies of the cosine transform: pictures
differ in few low ones, and little noise is spent on the rest. What the two queries released is a distribution that can
be drawn from, and whose best denoiser is known; see closed_form_prior.py.
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
from dp_curriculum.lessons.photo_covariances import denoised_covariances
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


if TYPE_CHECKING:
    from dp_curriculum.closed_form_prior import Latent

_MAX_RANK = 64  # directions kept of a covariance
_EDGE_TRIALS = 2
_ENERGY_WEIGHT = 0.3  # norm of the two energies of an image beside that of its outer product
_COUNT_SHARE = 0.25  # of the norm of an image that is a constant, whose sum counts the images of a class
_LEAST_COUNT = 0.02  # images of a class over those that are expected, at the least
_LARGEST_ENERGY = 0.15  # per value: images of a class rarely differ by more
_LARGEST_LATENT_ENERGY = 2 * LATENT_DEVIATION**2  # the same of latents
_BASE_RADIUS, _BASE_SIGNAL = 14.0, 300.0  # frequencies whose covariance is taken, at this many images over noise
_PHOTO_RADIUS = 9.5  # the same for photos
_PHOTO_PLANES = 1.5  # channels of photos, as frequencies below a radius count: differences of colour a quarter each
_FLATTENING = 0.25  # exponent of the public power of a coefficient by which it is made smaller
_LEAST_VARIANCE = 1e-7  # of a coefficient of photos, so that a covariance without energy has a root
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
    counts = _clean_counts(sums[:, -1] / one, noise / one)
    coefficients = (sums[:, :-1] / counts[:, None]).unflatten(1, shape)
    return _clean_means(coefficients, noise / counts, weights=weights, background_level=background_level), counts


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
    released, noise = sums / counts[:, None], mechanism.noise_std / class_count
    unit = largest_energy * math.prod(shape) / most_energy
    energies = _shrunk_to_mean(released[:, -2:] * unit, noise * unit / counts).clamp_min(0)
    covariances, noise = _equally_noisy(unpack_symmetric(released[:, :-2], size), counts, noise)
    # Residuals were scaled to one norm: their directions are those of the covariance, and the energy its size.
    if not is_clamped:
        factors = _photo_factors(covariances, energies[:, 0], noise / math.sqrt(2), weights, is_low)
        return Moments(means.float(), factors.float(), (factors.square().sum((1, 2)) + energies[:, 1]).float())
    size_of = (covariances.diagonal(dim1=1, dim2=2) / low_weights.square()).sum(1)
    scale = (energies[:, 0] / size_of.clamp_min(noise * math.sqrt(2 * size))).sqrt()[:, None, None]
    factors = _factors(covariances, noise / math.sqrt(2), max_rank=max_rank) * scale / low_weights[:, None]
    spread = factors.new_zeros(len(means), math.prod(shape), factors.shape[2])
    spread[:, is_low] = factors
    spread = to_pixels(spread.transpose(1, 2).unflatten(2, shape)).flatten(2).transpose(1, 2)
    return Moments(means.float(), spread.float(), energies.sum(1).float())


def _photo_factors(
    covariances: torch.Tensor, energies: torch.Tensor, noise: float, weights: torch.Tensor, is_low: torch.Tensor
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


def _clean_counts(counts: torch.Tensor, noise: float) -> torch.Tensor:
    """
    Images per class `(k,)` over the number that is expected, nearer to 1 where they differ by little more than noise.

    None is below three times its noise, so that what is divided by it stays noise of the size that it is taken for.
    """
    differing = max(0.0, float((counts - 1).square().mean()) - noise**2)
    counts = 1 + (counts - 1) * (differing / (differing + noise**2) if differing else 0.0)
    return counts.clamp_min(min(1.0, max(3 * noise, _LEAST_COUNT)))


def _clean_means(
    coefficients: torch.Tensor, noise: torch.Tensor, *, weights: torch.Tensor, background_level: float
) -> torch.Tensor:
    """
    Means `(k, C, H, H)` in `[0, 1]` of noisy weighted coefficients of images less the background, without most noise.

    In each band of frequencies what is larger than its noise is kept (James and Stein 1961), first what classes have
    in common, then how each differs from it. Pixels that are within their noise of black or white become that.
    `noise` `(k,)` is the standard deviation in each class, which is the larger the fewer images it has.
    """
    num_classes, num_channels, size, _ = coefficients.shape
    shares = (1 / noise) / (1 / noise).sum()  # of the images
    pooled = torch.einsum("k,kchw->chw", shares, coefficients)
    own = coefficients - pooled
    pooled_variance = float((shares * noise).square().sum())
    own_variances = noise.square() * (1 - 2 * shares) + pooled_variance
    gain = torch.zeros_like(coefficients)
    bands = _closed_form().frequencies(size).floor().long()
    for channel in range(num_channels):
        for band in range(int(bands.max()) + 1):
            inside = bands == band
            count = int(inside.sum())
            if not count:
                continue
            kept = _kept(pooled[channel, inside], pooled_variance) if band > 0 else 1.0
            own_kept = torch.zeros_like(noise)
            if num_classes > 1:
                energy = float(own[:, channel, inside].square().sum()) / count - float(own_variances.sum())
                signal = max(0.0, energy / (num_classes - 1))
                own_kept = signal / (signal + noise.square()) if signal else own_kept
            pooled[channel, inside] *= kept
            own[:, channel, inside] *= own_kept[:, None]
            common = (kept**2 - own_kept.square()) * pooled_variance / noise.square()
            gain[:, channel, inside] = (own_kept.square() + common)[:, None]
    if _closed_form().is_latent(coefficients.shape[1:]):  # few of them are at an end of their range
        return (to_pixels((pooled + own) / weights) + background_level).clamp(0, 1)
    left = noise * (gain / weights.square()).mean((1, 2, 3)).clamp_min(0).sqrt()  # standard deviation in a pixel
    return _towards_ends(to_pixels((pooled + own) / weights) + background_level, 2 * left[:, None, None, None])


def _kept(values: torch.Tensor, noise_variance: float) -> float:
    energy = float(values.square().mean())
    return max(0.0, 1 - noise_variance / energy) if energy > 0 else 1.0


def _towards_ends(pixels: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Pixels that are nearer to 0 or 1 than the threshold are moved there, the nearer the more."""

    def to_zero(values: torch.Tensor) -> torch.Tensor:
        values = values.clamp_min(0)
        return values**3 / (values**2 + threshold**2 + 1e-12)

    return (1 - to_zero(1 - to_zero(pixels))).clamp(0, 1)


def _shrunk_to_mean(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Values `(k, n)` of classes, nearer to their mean where they differ by little more than their noise `(k,)`."""
    if len(values) == 1:
        return values
    shares = (1 / noise) / (1 / noise).sum()
    mean = shares @ values
    differing = (values.var(0) - noise.square().mean()).clamp_min(0)
    return mean + (values - mean) * differing / (differing + noise.square()[:, None]).clamp_min(1e-300)


def _equally_noisy(covariances: torch.Tensor, counts: torch.Tensor, noise: float) -> tuple[torch.Tensor, float]:
    r"""
    Covariances of classes with few images, which are noisier, nearer to the common one; and the noise of all of them.

    `s_c` is the energy of a difference from the common covariance plus that of the noise of a class of usual size,
    over the same with the noise of class c: 1 where noise is small, and as much less as the class is noisier where
    it is large.

    Args:
        covariances (`torch.Tensor` of shape `(k, D, D)`): Noisy sums over the number of images of each class.
        counts (`torch.Tensor` of shape `(k,)`): That number over the usual one.
        noise (`float`): Norm of the noise of an entry and its mirror image in a class of usual size.
    """
    shares, num_entries = counts / counts.sum(), covariances.shape[1] * (covariances.shape[1] + 1) / 2
    common = torch.einsum("k,kij->ij", shares, covariances)
    own = covariances - common
    noises = num_entries * (noise / counts).square()
    energy = (own.square().sum() - (noises * (1 - shares)).sum()).clamp_min(0) / len(counts)
    kept = ((energy + num_entries * noise**2) / (energy + noises)).clamp_max(1)
    return common + kept[:, None, None] * own, max(noise, float((kept * noise / counts).max()))


def _factors(covariances: torch.Tensor, noise: float, *, max_rank: int) -> torch.Tensor:
    """
    Factors `(classes, D, rank)` of the covariances `(classes, D, D)` without their noise.

    What the classes have in common is known better than what each has of its own: first the spectrum of their mean is
    freed of noise, then what a class differs from it by is kept as far as it is larger than noise, and at last the
    spectrum of both together is freed of the noise that is left.
    """
    num_classes, size = covariances.shape[:2]
    pooled = covariances.mean(0)
    values, vectors = torch.linalg.eigh(pooled)
    common = shrink_spectrum(values, 2 * noise * math.sqrt(size / num_classes))
    own = vectors.T @ (covariances - pooled) @ vectors
    kept = _share_of_own(own, common, (values.sum() - common.sum()).clamp_min(0), noise)
    values, turned = torch.linalg.eigh(torch.diag(common) + kept * own)
    values = shrink_spectrum(values, _edge(kept, num_classes, noise))
    factors = (vectors @ turned) * values.sqrt()[:, None]
    return factors[:, :, size - min(max_rank, size) :].flip(2).contiguous()


def _share_of_own(own: torch.Tensor, common: torch.Tensor, unseen: torch.Tensor, noise: float) -> torch.Tensor:
    r"""
    Share `(D, D)` of what the classes differ by that is kept, in the eigenvectors of their common covariance.

    An entry (i, j) of the differences has the variance tau p_i p_j, p being the common variances, plus that of
    its noise. tau comes from all entries by weighted least squares; the share is that of a Wiener filter.

    Args:
        own (`torch.Tensor` of shape `(classes, D, D)`): Differences of the noisy covariances from their mean.
        common (`torch.Tensor` of shape `(D,)`): Common variances; 0 where noise hides them.
        unseen (`torch.Tensor`): What the hidden ones add up to.
        noise (`float`): Standard deviation of the noise of an off-diagonal entry of one class.
    """
    num_classes, size = own.shape[:2]
    if num_classes == 1:
        return torch.zeros_like(own[0])
    hidden = common <= 0
    variances = torch.where(hidden, unseen / hidden.sum().clamp_min(1), common)
    products = variances[:, None] * variances
    noise_variance = torch.full_like(products, noise**2)
    noise_variance.diagonal().mul_(2)
    measured = own.square().sum(0) / (num_classes - 1)
    weights = products / (noise_variance + 0.1 * products).square().clamp_min(1e-300)
    tau = ((measured - noise_variance) * weights).sum() / (products * weights).sum().clamp_min(1e-300)
    signal = tau.clamp_min(0) * products
    return signal / (signal + noise_variance).clamp_min(1e-300)


def _edge(kept: torch.Tensor, num_classes: int, noise: float) -> float:
    """Largest eigenvalue of what is left of the noise, measured on separate noise."""
    size, generator = len(kept), torch.Generator().manual_seed(0)
    largest = []
    for _ in range(_EDGE_TRIALS):
        square = torch.randn(num_classes, size, size, generator=generator, dtype=torch.float64)
        symmetric = (square + square.transpose(1, 2)) * (noise / math.sqrt(2))
        pooled = symmetric.mean(0)
        largest.append(torch.linalg.eigvalsh(pooled + kept * (symmetric - pooled))[:, -1].mean())
    return float(torch.stack(largest).mean())


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
        background_level=config.data.background_level,
        units=private.units,
        generator=generator,
    )
    return {"means": released.means, "factors": released.factors, "variances": released.variances}


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
    latent = _closed_form().fit_latent(*(tensors[name].cpu() for name in ("means", "factors", "variances")))
    return {
        "mean": latent.mean.float(),
        "factors": latent.factors.float(),
        "texture": latent.texture.float(),
        "means": tensors["means"],
    }


def _draw(
    tensors: Tensors, count: int, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tensors["means"].shape[1:]
    latent = _closed_form().Latent(
        tensors["mean"], tensors["factors"], tensors["texture"], _closed_form().contrast_of(shape)
    )
    labels = torch.randint(len(latent.mean), (count,), generator=generator, device=latent.mean.device)
    return _draw_images(latent, shape, labels, resolution, generator), labels


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
