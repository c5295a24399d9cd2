"""
Noisy sums of the lesson `moments` without most of their noise: counts, means and covariances.

All of it is post-processing of what the queries of moment_images.py released, and reads nothing else. Covariances of
photos are freed of noise in photo_covariances.py.
"""

from __future__ import annotations

import math

import torch


_EDGE_TRIALS = 2
_LEAST_COUNT = 0.02  # images of a class over those that are expected, at the least


def denoised_counts(counts: torch.Tensor, noise: float) -> torch.Tensor:
    """
    Images per class `(k,)` over the number that is expected, nearer to 1 where they differ by little more than noise.

    None is below three times its noise, so that what is divided by it stays noise of the size that it is taken for.
    """
    differing = max(0.0, float((counts - 1).square().mean()) - noise**2)
    counts = 1 + (counts - 1) * (differing / (differing + noise**2) if differing else 0.0)
    return counts.clamp_min(min(1.0, max(3 * noise, _LEAST_COUNT)))


def denoised_means(
    coefficients: torch.Tensor, noise: torch.Tensor, *, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Coefficients of means without most of their noise.

    In each band of frequencies what is larger than its noise is kept (James and Stein 1961), first what classes have
    in common, then how each differs from it.

    Args:
        coefficients (`torch.Tensor` of shape `(k, C, H, H)`): Noisy sums over the number of images of each class.
        noise (`torch.Tensor` of shape `(k,)`): Standard deviation in each class: the larger, the fewer images it has.
        frequencies (`torch.Tensor` of shape `(H, H)`): Of the coefficients of a channel.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The coefficients, and the variance of the noise that is left in each.
    """
    num_classes, num_channels = coefficients.shape[:2]
    pooled = torch.einsum("k,kchw->chw", shares_of(noise), coefficients)
    own = coefficients - pooled
    pooled_variance = noise_of_mean(noise) ** 2
    own_variance = noise_of_differences(noise) if num_classes > 1 else 0.0
    left = torch.zeros_like(coefficients)
    bands = frequencies.floor().long()
    for channel in range(num_channels):
        for band in range(int(bands.max()) + 1):
            inside = bands == band
            count = int(inside.sum())
            if not count:
                continue
            kept = _kept(pooled[channel, inside], pooled_variance) if band > 0 else 1.0
            own_kept = torch.zeros_like(noise)
            if num_classes > 1:
                energy = float(own[:, channel, inside].square().sum()) / (count * (num_classes - 1))
                signal = max(0.0, energy - own_variance)
                own_kept = signal / (signal + noise.square()) if signal else own_kept
            pooled[channel, inside] *= kept
            own[:, channel, inside] *= own_kept[:, None]
            variances = own_kept.square() * noise.square() + (kept**2 - own_kept.square()) * pooled_variance
            left[:, channel, inside] = variances.clamp_min(0)[:, None]
    return pooled + own, left


def shares_of(noise: torch.Tensor) -> torch.Tensor:
    """Shares `(k,)` of the classes in all images: noise `(k,)` is one over the number of images of a class."""
    sizes = 1 / noise.clamp_min(1e-300)
    return sizes / sizes.sum()


def noise_of_mean(noise: torch.Tensor) -> float:
    """Standard deviation of the noise of the mean of all images, of that in each class `(k,)`."""
    return float((shares_of(noise) * noise).norm())


def noise_of_differences(noise: torch.Tensor) -> float:
    """
    Variance of the noise in the differences of k > 1 classes from the mean of all images, of that in each `(k,)`.

    It is that of their sum of squares over k - 1: of equal classes, the variance of the noise of a class.
    """
    variances = noise.square() * (1 - 2 * shares_of(noise)) + noise_of_mean(noise) ** 2
    return float(variances.sum()) / (len(noise) - 1)


def _kept(values: torch.Tensor, noise_variance: float) -> float:
    energy = float(values.square().mean())
    return max(0.0, 1 - noise_variance / energy) if energy > 0 else 1.0


def towards_ends(pixels: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Pixels that are nearer to 0 or 1 than the threshold are moved there, the nearer the more."""

    def to_zero(values: torch.Tensor) -> torch.Tensor:
        values = values.clamp_min(0)
        return values**3 / (values**2 + threshold**2 + 1e-12)

    return (1 - to_zero(1 - to_zero(pixels))).clamp(0, 1)


def shrunk_to_mean(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Values `(k, n)` of classes, nearer to their mean where they differ by little more than their noise `(k,)`."""
    if len(values) == 1:
        return values
    mean = shares_of(noise) @ values
    differing = (values.var(0) - noise.square().mean()).clamp_min(0)
    return mean + (values - mean) * differing / (differing + noise.square()[:, None]).clamp_min(1e-300)


def covariance_factors(covariances: torch.Tensor, noise: torch.Tensor, *, max_rank: int) -> torch.Tensor:
    """
    Factors `(k, D, rank)` of the covariances without their noise.

    What the classes have in common is known better than what each has of its own: first the spectrum of their mean is
    freed of noise, then what a class differs from it by is kept as far as it is larger than noise, and at last the
    spectrum of both together is freed of the noise that is left.

    Args:
        covariances (`torch.Tensor` of shape `(k, D, D)`): Noisy sums over the number of images of each class.
        noise (`torch.Tensor` of shape `(k,)`): Standard deviation of the noise of an off-diagonal entry of a class.
        max_rank (`int`): Largest number of directions kept.
    """
    size = covariances.shape[1]
    pooled = torch.einsum("k,kij->ij", shares_of(noise), covariances)
    values, vectors = torch.linalg.eigh(pooled)
    common = shrink_spectrum(values, 2 * noise_of_mean(noise) * math.sqrt(size))
    own = vectors.T @ (covariances - pooled) @ vectors
    kept = _share_of_own(own, common, (values.sum() - common.sum()).clamp_min(0), noise)
    values, turned = torch.linalg.eigh(torch.diag(common) + kept * own)
    values = shrink_spectrum(values, _edges(kept, noise)[:, None])
    factors = (vectors @ turned) * values.sqrt()[:, None]
    return factors[:, :, size - min(max_rank, size) :].flip(2).contiguous()


def _share_of_own(own: torch.Tensor, common: torch.Tensor, unseen: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""
    Shares `(k, D, D)` of what the classes differ by that are kept, in the eigenvectors of their common covariance.

    An entry (i, j) of the differences has the variance tau p_i p_j, p being the common variances, plus that of
    its noise. tau comes from all entries by weighted least squares; the share is that of a Wiener filter.

    Args:
        own (`torch.Tensor` of shape `(k, D, D)`): Differences of the noisy covariances from their mean.
        common (`torch.Tensor` of shape `(D,)`): Common variances; 0 where noise hides them.
        unseen (`torch.Tensor`): What the hidden ones add up to.
        noise (`torch.Tensor` of shape `(k,)`): Standard deviation of the noise of an off-diagonal entry of a class.
    """
    num_classes, size = own.shape[:2]
    if num_classes == 1:
        return torch.zeros_like(own)
    hidden = common <= 0
    variances = torch.where(hidden, unseen / hidden.sum().clamp_min(1), common)
    products = variances[:, None] * variances
    is_twice = 1 + torch.eye(size, dtype=own.dtype)  # the noise of a variance
    noise_variance = noise_of_differences(noise) * is_twice
    signal = signal_variance(own.square().sum(0) / (num_classes - 1), products, noise_variance)
    return signal / (signal + noise.square()[:, None, None] * is_twice).clamp_min(1e-300)


def signal_variance(measured: torch.Tensor, expected: torch.Tensor, noise_variance: torch.Tensor) -> torch.Tensor:
    """
    Variances of values without their noise: tau times what is `expected` of each, tau by weighted least squares.

    Args:
        measured (`torch.Tensor`): Squares of noisy values.
        expected (`torch.Tensor`): Variance of each without noise, up to the one factor tau.
        noise_variance (`torch.Tensor`): Variance of the noise in each.
    """
    weights = expected / (noise_variance + 0.1 * expected).square().clamp_min(1e-300)
    tau = ((measured - noise_variance) * weights).sum() / (expected * weights).sum().clamp_min(1e-300)
    return tau.clamp_min(0) * expected


def _edges(kept: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Largest eigenvalue of what is left of the noise in each class, `(k,)`, measured on separate noise."""
    (num_classes, size), generator = kept.shape[:2], torch.Generator().manual_seed(0)
    largest = []
    for _ in range(_EDGE_TRIALS):
        square = torch.randn(num_classes, size, size, generator=generator, dtype=torch.float64)
        symmetric = (square + square.transpose(1, 2)) * (noise / math.sqrt(2))[:, None, None]
        pooled = torch.einsum("k,kij->ij", shares_of(noise), symmetric)
        largest.append(torch.linalg.eigvalsh(pooled + kept * (symmetric - pooled))[:, -1])
    return torch.stack(largest).mean(0)


def shrink_spectrum(values: torch.Tensor, edge: float | torch.Tensor) -> torch.Tensor:
    r"""
    Eigenvalues of a symmetric matrix without the noise that was added to it.

    A symmetric Gaussian matrix whose eigenvalues end at `edge` turns a true eigenvalue l into l + (edge / 2)^2 / l
    where l is above `edge` / 2, and hides it below; of the eigenvector, 1 - (edge / 2)^2 / l^2 remains
    (Benaych-Georges and Nadakuditi 2011, arXiv 0910.2120, section 3.1). Returned is l times that, the value that is
    nearest to the true matrix; 0 where nothing stands out.

    Args:
        values (`torch.Tensor`): Eigenvalues of the noisy matrix.
        edge (`float` or `torch.Tensor`): Largest eigenvalue of the noise alone.
    """
    root = (values.square() - edge**2).clamp_min(0).sqrt()
    true = (values + root) / 2
    kept = 1 - (edge / 2) ** 2 / true.square().clamp_min(1e-300)
    return torch.where(values > edge, true * kept, 0.0)
