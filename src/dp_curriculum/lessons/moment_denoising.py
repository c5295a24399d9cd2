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
    shares = _shares(noise)
    pooled = torch.einsum("k,kchw->chw", shares, coefficients)
    own = coefficients - pooled
    pooled_variance = float((shares * noise).square().sum())
    own_variances = noise.square() * (1 - 2 * shares) + pooled_variance
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
                energy = float(own[:, channel, inside].square().sum()) / count - float(own_variances.sum())
                signal = max(0.0, energy / (num_classes - 1))
                own_kept = signal / (signal + noise.square()) if signal else own_kept
            pooled[channel, inside] *= kept
            own[:, channel, inside] *= own_kept[:, None]
            variances = own_kept.square() * noise.square() + (kept**2 - own_kept.square()) * pooled_variance
            left[:, channel, inside] = variances.clamp_min(0)[:, None]
    return pooled + own, left


def _shares(noise: torch.Tensor) -> torch.Tensor:
    """Shares `(k,)` of the classes in all images: noise `(k,)` is one over the number of images of a class."""
    sizes = 1 / noise.clamp_min(1e-300)
    return sizes / sizes.sum()


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
    mean = _shares(noise) @ values
    differing = (values.var(0) - noise.square().mean()).clamp_min(0)
    return mean + (values - mean) * differing / (differing + noise.square()[:, None]).clamp_min(1e-300)


def equally_noisy(covariances: torch.Tensor, counts: torch.Tensor, noise: float) -> tuple[torch.Tensor, float]:
    r"""
    Covariances of classes with few images, which are noisier, nearer to the common one; and the noise of all of them.

    `s_c` is the energy of a difference from the common covariance plus that of the noise of a class of usual size,
    over the same with the noise of class c: 1 where noise is small, and as much less as the class is noisier where
    it is large.

    Args:
        covariances (`torch.Tensor` of shape `(k, D, D)`): Noisy sums over the number of images of each class.
        counts (`torch.Tensor` of shape `(k,)`): That number over the usual one.
        noise (`float`): Norm of the noise of an entry and its mirror image in a class of usual size.

    Returns:
        `tuple[torch.Tensor, float]`: The covariances, and the norm of the noise that none of them exceeds.
    """
    shares, num_entries = counts / counts.sum(), covariances.shape[1] * (covariances.shape[1] + 1) / 2
    common = torch.einsum("k,kij->ij", shares, covariances)
    own = covariances - common
    noises = num_entries * (noise / counts).square()
    energy = (own.square().sum() - (noises * (1 - shares)).sum()).clamp_min(0) / len(counts)
    kept = ((energy + num_entries * noise**2) / (energy + noises).clamp_min(1e-300)).clamp_max(1)
    return common + kept[:, None, None] * own, max(noise, float((kept * noise / counts).max()))


def covariance_factors(covariances: torch.Tensor, noise: float, *, max_rank: int) -> torch.Tensor:
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
