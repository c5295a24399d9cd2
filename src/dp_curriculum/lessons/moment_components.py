"""Components: what each part of a class is like, so that sampling starts from several Gaussians per class.

A class of pictures is seldom one Gaussian: a bag has a handle or none. Where to cut a class is read off its released
Gaussian, which costs nothing. One query then tells how the images of a part differ from what the Gaussian has in it.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, fields

import torch
from scipy.cluster.vq import kmeans2

from dp_curriculum.closed_form_prior import Components, draw_latent, fit_latent
from dp_curriculum.data.images import to_unit_range
from dp_curriculum.data.units import Units, contributing
from dp_curriculum.lessons.class_sums import CHUNK_VALUES, noisy_class_sums, unpack_symmetric
from dp_curriculum.lessons.moment_denoising import denoised_counts, signal_variance
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


_FLATTENING = 0.5  # exponent of its standard deviation by which a coordinate is made smaller
_ONE, _LINEAR = 0.5, 0.5  # a constant that counts images, and the factor of the coordinates beside their products
_DRAWS = 4000  # per class, of the released Gaussian
_ROUNDS = 20  # of k-means
_PIXEL_UNIT, _SCORE_UNIT = 2.0**-12, 2.0**-20  # in whole numbers of which a cut reckons
_LEAST_COUNT = 3.0  # images of a part, in standard deviations of the noise of their number, unless fewer are expected
_LEAST_SHARE = 1e-3  # of a class


@dataclass(frozen=True)
class _Coordinates:
    """
    Coordinates of images in the released directions of their class, such that a typical image has length 1.

    Shapes:
        means: `(k, D)`.
        directions: `(k, r, D)`, of which a coordinate is the product with an image less its mean.
        variances: `(k, r)`, of the coordinates; 0 where a class has fewer directions.
        back: `(k, r, r)`, from coordinates to the normals of the released factors.
        basis, spread: `(k, D, r)` and `(k, r)`: the orthonormal directions, and the standard deviation along each.
    """

    means: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor
    back: torch.Tensor
    basis: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, means: torch.Tensor, factors: torch.Tensor) -> _Coordinates:
        basis, spread, turn = torch.linalg.svd(factors.double(), full_matrices=False)
        is_kept = spread > 1e-6 * spread.amax(1, keepdim=True).clamp_min(1e-6)
        spread = torch.where(is_kept, spread, 0.0)
        powers = torch.where(is_kept, spread.clamp_min(1e-300) ** -_FLATTENING, 0.0)
        length = (spread * powers).norm(dim=1, keepdim=True).clamp_min(1e-300)
        scales = powers / length
        inverse = torch.where(is_kept, 1 / (spread * scales).clamp_min(1e-300), 0.0)
        return cls(
            means=means.flatten(1).double(),
            directions=scales[:, :, None] * basis.mT,
            variances=(spread * scales).square(),
            back=turn.mT * inverse[:, None],
            basis=basis,
            spread=spread,
        )

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Coordinates `(B, r)` of images `(B, C, H, W)` of the classes `(B,)`."""
        found = pixels.new_zeros(len(pixels), self.directions.shape[1])
        for label in labels.unique().tolist():
            rows = labels == label
            found[rows] = (pixels[rows].flatten(1) - self.means[label]) @ self.directions[label].T
        return found


@dataclass(frozen=True)
class _Cut:
    """
    The parts of each class: an image belongs to the one whose score is largest, the first of equal ones.

    It reckons in whole numbers, whose sums are exact in whatever order: to which part an image belongs depends on
    that image alone, and not, by a rounding, on the images it is in a batch with.

    Shapes:
        weights: `(k, m, D)`, whole numbers.
        biases: `(k, m)`, whole numbers.
    """

    weights: torch.Tensor
    biases: torch.Tensor

    @classmethod
    def between(cls, centres: torch.Tensor, means: torch.Tensor) -> _Cut:
        """The nearest of the centres `(k, m, D)`, which are relative to the means `(k, D)`."""
        biases = -torch.einsum("kmd,kd->km", centres, means) - centres.square().sum(2) / 2
        return cls((centres / _SCORE_UNIT).round(), (biases / (_SCORE_UNIT * _PIXEL_UNIT)).round())

    def parts_of(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Parts `(B,)` of images `(B, C, H, W)` in [0, 1], counted on from class to class."""
        whole = (pixels.flatten(1).double().nan_to_num().clamp(0, 1) / _PIXEL_UNIT).round()
        count = self.weights.shape[1]
        places, found = torch.arange(count), torch.zeros_like(labels)
        for label in labels.unique().tolist():
            rows = labels == label
            scores = whole[rows] @ self.weights[label].T + self.biases[label]
            found[rows] = label * count + (scores * count - places).argmax(1)
        return found


def query_components(
    images: torch.Tensor,
    labels: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mechanism: PlannedMechanism,
    *,
    num_components: int,
    public_dataset_size: int,
    units: Units | None = None,
    generator: SecretGenerator | None = None,
) -> Components:
    r"""
    Releases the share, the mean and the covariance of each part of each class.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, H)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        moments (`tuple` of means, factors and variances): Released ones of each class; see [`Moments`].
        mechanism ([`PlannedMechanism`]): As it was charged.
        num_components (`int`): Parts m of each class.
        public_dataset_size (`int`): Number of images, or of persons, that the divisor assumes; public, or disclosed.
        units ([`Units`], *optional*): Persons, each of whom adds the average over their images; images if unset.
        generator ([`SecretGenerator`], *optional*): Source of the noise; a new one if unset.

    Privacy:
        One query of all images, clipped to the `clip_norm` of its mechanism by [`noisy_class_sums`], which states the
        sensitivity, with the parts in place of the classes. The parts follow from the released moments; to which of
        them an image belongs depends on that image, its class and public values alone. Each image adds a constant,
        its coordinates in the released directions, and their outer product, all clipped together. The
        rest is post-processing: a part keeps of what differs from the released Gaussian what is larger than noise.
    """
    generator = generator or SecretGenerator()
    means, factors, _ = moments
    coordinates = _Coordinates.of(means, factors)
    num_classes, rank = coordinates.variances.shape
    cut, own = _cut(coordinates, means, factors, num_components)

    def contribute(pixels: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = coordinates(pixels, parts // num_components)
        return vectors, torch.cat([vectors.new_full((len(vectors), 1), _ONE), _LINEAR * vectors], dim=1)

    sums = noisy_class_sums(
        images,
        _all_parts(cut, images, labels, num_classes),
        contribute,
        (rank,),
        num_classes=num_classes * num_components,
        mechanism=mechanism,
        outer_products=True,
        num_extras=1 + rank,
        units=units,
        generator=generator,
    )
    per_class = public_dataset_size / num_classes
    expected = coordinates.variances.repeat_interleave(num_components, 0)
    parts = _denoised(sums / per_class, mechanism.noise_std / per_class, own, expected, num_components)
    return parts.as_components(coordinates.back)


def _cut(
    coordinates: _Coordinates, means: torch.Tensor, factors: torch.Tensor, num_components: int
) -> tuple[_Cut, _Parts]:
    """
    Cuts each class by k-means on draws of its released Gaussian, and takes the moments of the draws in each part.

    The draws hold the variance of the released directions alone: a prior adds what is in none of them to each part.
    """
    latent = fit_latent(means, factors, factors.square().sum((1, 2)))
    centres = means.new_zeros(len(means), num_components, means[0].numel(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    own = []
    for label in range(len(means)):  # one after the other, for the memory that draws take
        labels = torch.full((_DRAWS,), label)
        drawn = draw_latent(latent, labels, normal(_DRAWS, factors.shape[2]), normal(_DRAWS, *means.shape[1:]))
        basis = coordinates.basis[label][:, coordinates.spread[label] > 0]
        if basis.shape[1]:  # else nothing stands out, and all images are in the first part
            points = ((drawn.flatten(1) - coordinates.means[label]) @ basis).numpy()
            with warnings.catch_warnings():  # of a part that is left without draws, which keeps its centre
                warnings.simplefilter("ignore", UserWarning)
                found, _ = kmeans2(points, points[:num_components], iter=_ROUNDS, minit="matrix")
            centres[label] = torch.from_numpy(found) @ basis.T
        alone = _Cut.between(centres[label : label + 1], coordinates.means[label : label + 1])
        own.append(
            _Parts.of(coordinates(drawn, labels), alone.parts_of(drawn, torch.zeros_like(labels)), num_components)
        )
    together = (torch.cat([getattr(parts, field.name) for parts in own]) for field in fields(_Parts))
    return _Cut.between(centres, coordinates.means), _Parts(*together)


def _all_parts(cut: _Cut, images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Parts `(N,)` of all images; -1 of those that are in no class."""
    parts = torch.full_like(labels, -1)
    rows = contributing(labels, num_classes).nonzero().flatten()
    for some in rows.split(max(1, CHUNK_VALUES // math.prod(images.shape[1:]))):
        parts[some] = cut.parts_of(to_unit_range(images[some], dtype=torch.float64), labels[some])
    return parts


@dataclass(frozen=True)
class _Parts:
    """
    Moments of parts in their coordinates.

    Shapes:
        shares: `(P,)`, of a class.
        means: `(P, r)`.
        covariances: `(P, r, r)`.
    """

    shares: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    @classmethod
    def of(cls, points: torch.Tensor, parts: torch.Tensor, num_parts: int) -> _Parts:
        """Moments of draws `(n, r)` of one class; a part with none of them has zeros."""
        shares = torch.bincount(parts, minlength=num_parts).double() / len(points)
        means, covariances = (points.new_zeros(num_parts, *[points.shape[1]] * count) for count in (1, 2))
        for part in parts.unique().tolist():
            own = points[parts == part]
            means[part] = own.mean(0)
            covariances[part] = (own - means[part]).T @ (own - means[part]) / len(own)
        return cls(shares, means, covariances)

    def as_components(self, back: torch.Tensor) -> Components:
        """The same as affine maps of the normals of the released factors, by maps `(k, r, r)` to these."""
        num_classes, rank = back.shape[:2]
        values, vectors = torch.linalg.eigh(self.covariances)
        roots = vectors * values.clamp_min(0).sqrt()[:, None]
        shares, means = self.shares.view(num_classes, -1), self.means.view(num_classes, -1, rank)
        return Components(
            shares=(shares / shares.sum(1, keepdim=True)).float(),
            offsets=torch.einsum("krs,kms->kmr", back, means).float(),
            roots=torch.einsum("krs,kmst->kmrt", back, roots.view(num_classes, -1, rank, rank)).float(),
        )


def _denoised(sums: torch.Tensor, noise: float, own: _Parts, expected: torch.Tensor, num_components: int) -> _Parts:
    """
    Moments of the parts without most of their noise: those of the released Gaussian, and of what the images differ by
    as much as a Wiener filter keeps.

    Args:
        sums (`torch.Tensor` of shape `(P, r (r + 1) / 2 + 1 + r)`): Noisy sums, over the expected number of images of
            a class.
        noise (`float`): Standard deviation of their noise.
        own ([`_Parts`]): Moments of the draws.
        expected (`torch.Tensor` of shape `(P, r)`): Variances of the coordinates.
        num_components (`int`): Parts of a class.
    """
    rank = expected.shape[1]
    counts, count_noise = sums[:, -1 - rank] / _ONE, noise / _ONE
    of_classes = denoised_counts(counts.view(-1, num_components).sum(1), count_noise * math.sqrt(num_components))
    likely = own.shares * of_classes.repeat_interleave(num_components)
    counts = _kept(counts, likely, counts.new_tensor(count_noise**2), own.shares.square())
    counts = torch.maximum(counts, likely.clamp_max(_LEAST_COUNT * count_noise).clamp_min(_LEAST_SHARE))
    variance = (noise / counts).square()
    means = sums[:, -rank:] / _LINEAR / counts[:, None]
    means = _kept(means, own.means, variance[:, None] / _LINEAR**2, expected)
    covariances = unpack_symmetric(sums[:, : -1 - rank], rank) / counts[:, None, None]
    covariances = covariances - means[:, :, None] * means[:, None]
    of_entry = variance[:, None, None] * (1 + torch.eye(rank, dtype=sums.dtype)) / 2
    covariances = _kept(covariances, own.covariances, of_entry, expected[:, :, None] * expected[:, None])
    return _Parts(counts, means, covariances)


def _kept(
    noisy: torch.Tensor, own: torch.Tensor, noise_variance: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Values of the Gaussian, plus the share of the differences from it that is signal: at most what is `expected`."""
    differences = noisy - own
    signal = torch.minimum(signal_variance(differences.square(), expected, noise_variance), expected)
    return own + differences * signal / (signal + noise_variance).clamp_min(1e-300)
