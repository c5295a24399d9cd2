"""Covariances of photos without most of their noise: what is public of photos is known ahead, and noise is not."""

from __future__ import annotations

import math

import torch

from dp_curriculum.lessons.moment_denoising import noise_of_differences, noise_of_mean, shares_of


_BANDS_PER_OCTAVE = 2  # in which the spectrum is fitted
_SPREAD_OF_BANDS = 0.5  # how far a band is from the public law, as a share of it
_LEAST_OF_BAND = 0.05  # share of the law that is left at least
_COARSE, _MIDDLE = 4.0, 8.0  # frequencies at which entries are put into groups, in half cycles per side
_LEAST_COMMON, _LEAST_OWN = 0.01, 0.05  # of the variance that is expected in a direction: the least that is left


def denoised_covariances(
    covariances: torch.Tensor, noise: torch.Tensor, *, power: torch.Tensor, frequencies: torch.Tensor
) -> torch.Tensor:
    """
    Covariances `(classes, D, D)` of the coefficients of photos, without most of their noise, positive definite.

    Coefficients of photos are nearly independent, and their variances follow a public law. So three things are told
    from noise, one after the other: the spectrum that the classes have in common, band by band; how their common
    covariance differs from it; and how each class differs from that. The last two are filtered entry by entry. No
    direction is dropped because noise alone could be as large.

    Args:
        covariances (`torch.Tensor` of shape `(classes, D, D)`): Released, float64.
        noise (`torch.Tensor` of shape `(classes,)`): Standard deviation of the noise of an off-diagonal entry of each
            class: the larger, the fewer images it has. That of a diagonal one is larger by the square root of 2.
        power (`torch.Tensor` of shape `(channels, H, H)`): Public law of the variances of all coefficients; 0 for
            those that are not among the D.
        frequencies (`torch.Tensor` of shape `(H, H)`): Of coefficients, in half cycles per side.
    """
    taken = power > 0
    frequency = frequencies.expand_as(power)[taken]
    channel = torch.arange(len(power)).view(-1, 1, 1).expand_as(power)[taken]
    bands = channel * 1000 + (_BANDS_PER_OCTAVE * torch.log2(1 + frequency)).long()
    groups = _groups(frequency)

    pooled, pooled_noise = torch.einsum("k,kij->ij", shares_of(noise), covariances), noise_of_mean(noise)
    spectrum = _fitted(pooled.diagonal(), power[taken], bands, pooled_noise * math.sqrt(2))
    common = torch.diag(spectrum)
    common = common + _filtered((pooled - common)[None], spectrum, noise.new_tensor([pooled_noise]), groups)[0]
    common = _at_least(common, _LEAST_COMMON * spectrum)
    expected = common.diagonal()
    own = _filtered(covariances - pooled, expected, noise, groups)
    return torch.stack([_at_least(common + part, _LEAST_OWN * expected) for part in own])


def _fitted(variances: torch.Tensor, power: torch.Tensor, bands: torch.Tensor, noise: float) -> torch.Tensor:
    """
    The law, times a factor per band by which it adds up to what was released of the band.

    The factor is nearer to that of all bands together where `noise`, the standard deviation of a variance, is large.
    """
    whole = (variances.sum() / power.sum()).clamp_min(1e-3 * noise / power.sum())  # noise alone may add up to nothing
    fitted = torch.zeros_like(variances)
    for band in bands.unique():
        inside = bands == band
        expected = (whole * power[inside].sum()).clamp_min(1e-30)
        uncertainty = noise * math.sqrt(int(inside.sum())) / expected
        kept = _SPREAD_OF_BANDS**2 / (_SPREAD_OF_BANDS**2 + uncertainty**2)
        ratio = 1 + kept * (variances[inside].sum() / expected - 1)
        fitted[inside] = whole * power[inside] * ratio.clamp_min(_LEAST_OF_BAND)
    return fitted


def _groups(frequency: torch.Tensor) -> list[torch.Tensor]:
    """Masks `(D, D)` of entries whose signal is measured together: variances and covariances, by their finer one."""
    finer = torch.maximum(frequency[:, None], frequency)
    same = torch.eye(len(frequency), dtype=torch.bool)
    coarse, middle = finer < _COARSE, finer < _MIDDLE
    return [same & coarse, same & ~coarse, ~same & coarse, ~same & ~coarse & middle, ~same & ~middle]


def _filtered(
    differences: torch.Tensor, variances: torch.Tensor, noise: torch.Tensor, groups: list[torch.Tensor]
) -> torch.Tensor:
    r"""
    Differences `(n, D, D)` of covariances from what is expected, each entry times signal / (signal + noise).

    An entry (i, j) has the signal tau v_i v_j, v being the variances `(D,)`; tau is that of a group of entries, by
    weighted least squares. Of n > 1 differences from their mean, the squares have n - 1 degrees of freedom. `noise`
    `(n,)` is the standard deviation of the noise of what the differences are made of, off the diagonal.
    """
    products = variances[:, None] * variances
    is_twice = 1 + torch.eye(len(variances), dtype=products.dtype)  # the noise of a variance
    usual = (noise_of_differences(noise) if len(noise) > 1 else float(noise) ** 2) * is_twice
    own_noise = noise.square()[:, None, None] * is_twice
    measured = differences.square().sum(0) / max(1, len(differences) - 1)
    kept = torch.zeros_like(differences)
    for group in groups:
        if not group.any():
            continue
        weights = (products / (usual + 0.1 * products).square().clamp_min(1e-300))[group]
        above = ((measured - usual)[group] * weights).sum()
        tau = (above / (products[group] * weights).sum().clamp_min(1e-300)).clamp_min(0)
        signal = tau * products[group]
        kept[:, group] = signal / (signal + own_noise[:, group]).clamp_min(1e-300)
    return differences * kept


def _at_least(covariance: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The covariance, with a variance in each of its directions of at least what variances `least` `(D,)` say."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = vectors.square().T @ least
    return (vectors * torch.maximum(values, floor)) @ vectors.T
