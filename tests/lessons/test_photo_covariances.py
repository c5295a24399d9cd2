"""Covariances of photos: exact without noise, and nearer to the truth than what was released."""

from __future__ import annotations

import math

import pytest
import torch

from dp_curriculum.closed_form_prior import frequencies
from dp_curriculum.lessons import photo_covariances
from dp_curriculum.lessons.moment_denoising import covariance_factors
from dp_curriculum.lessons.moment_images import _public_power
from dp_curriculum.lessons.photo_covariances import denoised_covariances


SIDE, CLASSES = 6, 5
SHAPE = (3, SIDE, SIDE)


def photo_like(classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariances `(classes, D, D)` with the public spectrum, some correlation, and classes that differ; the law."""
    generator = torch.Generator().manual_seed(0)
    power = _public_power(SHAPE)
    root = power.flatten().sqrt()
    size = len(root)
    mixing = 0.06 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    own = 0.04 * torch.randn(classes, size, size, generator=generator, dtype=torch.float64)
    factor = root[:, None] * (torch.eye(size, dtype=torch.float64) + mixing + own)
    covariances = factor @ factor.transpose(1, 2)
    return covariances / covariances.diagonal(dim1=1, dim2=2).sum(1)[:, None, None], power


def with_noise(covariances: torch.Tensor, noise: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(covariances.shape, generator=generator, dtype=torch.float64)
    return covariances + noise * (square + square.transpose(1, 2)) / math.sqrt(2)


def of_each(covariances: torch.Tensor, noise: float) -> torch.Tensor:
    """The same noise in all classes."""
    return torch.full((len(covariances),), noise, dtype=torch.float64)


def estimated(noisy: torch.Tensor, noise: float, power: torch.Tensor) -> torch.Tensor:
    return denoised_covariances(noisy, of_each(noisy, noise), power=power, frequencies=frequencies(SIDE))


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """In units of the variances of each entry, so that fine coefficients count as coarse ones do."""
    root = true.diagonal(dim1=1, dim2=2).sqrt()
    return ((found - true) / root[:, :, None] / root[:, None]).square().mean().item()


def denoising_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Mean squared error of the Wiener filter that believes in the covariances found."""
    level = 0.2 * true.diagonal(dim1=1, dim2=2).mean()
    identity = torch.eye(true.shape[1], dtype=torch.float64)
    gain = torch.linalg.solve(found + level * identity, found, left=False)
    missed = identity - gain
    left = missed @ true @ missed.transpose(1, 2) + level * gain @ gain.transpose(1, 2)
    return left.diagonal(dim1=1, dim2=2).sum(1).mean().item()


def test_without_noise_it_is_the_covariance() -> None:
    true, power = photo_like()
    assert torch.allclose(estimated(true, 1e-9, power), true, atol=1e-5)


@pytest.mark.parametrize("noise", [1e-3, 5e-3, 2e-2])
def test_it_is_nearer_than_what_was_released_and_than_what_an_edge_leaves(noise: float) -> None:
    true, power = photo_like()
    noisy = with_noise(true, noise)
    found = estimated(noisy, noise, power)
    cut = covariance_factors(noisy, of_each(noisy, noise), max_rank=true.shape[1])
    assert error(found, true) < 0.5 * error(noisy, true)
    best = denoising_error(true, true)
    assert denoising_error(found, true) - best < 0.5 * (denoising_error(cut @ cut.transpose(1, 2), true) - best)


def test_a_filter_that_knows_no_noise_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: what is filtered is left as it is."""
    true, power = photo_like()
    noisy = with_noise(true, 5e-3)
    right = error(estimated(noisy, 5e-3, power), true)
    monkeypatch.setattr(photo_covariances, "_filtered", lambda differences, *_: differences)
    assert error(estimated(noisy, 5e-3, power), true) > 2 * right


def test_noise_alone_leaves_the_public_law() -> None:
    _, power = photo_like()
    law = (power / power.sum()).flatten()
    found = estimated(with_noise(torch.diag(law).expand(CLASSES, -1, -1), 0.01), 0.01, power)
    variances = found.diagonal(dim1=1, dim2=2)
    coarse = law > law.median()
    assert ((variances / law)[:, coarse] - 1).abs().mean() < 0.5
    assert (torch.linalg.eigvalsh(found) > 0).all()


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(classes: int) -> None:
    true, power = photo_like(classes)
    noisy = with_noise(true, 2e-3)
    assert error(estimated(noisy, 2e-3, power), true) < error(noisy, true)


def test_coefficients_that_were_not_taken_are_left_out() -> None:
    true, power = photo_like()
    taken = frequencies(SIDE).expand(SHAPE) < 3
    part = taken.flatten()
    found = denoised_covariances(
        true[:, part][:, :, part],
        of_each(true, 1e-9),
        power=power.where(taken, 0.0),
        frequencies=frequencies(SIDE),
    )
    assert found.shape == (CLASSES, int(part.sum()), int(part.sum()))
    assert torch.allclose(found, true[:, part][:, :, part], atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_nothing_but_noise_has_a_covariance_all_the_same(sign: int) -> None:
    """Also where the variances that were released add up to less than nothing."""
    _, power = photo_like()
    noisy = with_noise(torch.zeros(CLASSES, power.numel(), power.numel(), dtype=torch.float64), 1.0)
    noisy = noisy + sign * 0.5 * torch.eye(power.numel(), dtype=torch.float64)
    found = estimated(noisy, 1.0, power)
    assert found.isfinite().all() and (torch.linalg.eigvalsh(found) > 0).all()


def test_a_small_class_is_filtered_by_its_own_noise() -> None:
    """The broken twin: the noise of a usual class, assumed of all, leaves the small one noisy."""
    true, power = photo_like()
    noise = of_each(true, 2e-3)
    noise[0] *= 8
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(true.shape, generator=generator, dtype=torch.float64)
    noisy = true + (square + square.transpose(1, 2)) * (noise / math.sqrt(2))[:, None, None]
    found = denoised_covariances(noisy, noise, power=power, frequencies=frequencies(SIDE))
    blind = estimated(noisy, 2e-3, power)
    assert error(found[:1], true[:1]) < 0.5 * error(blind[:1], true[:1])
    assert error(found[1:], true[1:]) < 1.05 * error(blind[1:], true[1:])
