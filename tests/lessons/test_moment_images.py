"""Moments: exact without noise, bounded contributions, and a spectrum without its noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from summing import Summing
from torch.nn import functional as F

from dp_curriculum.lessons import moment_images
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.lessons.moment_images import draw_moment_images, query_moments, shrink_spectrum
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism


SIDE = 4


def class_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of 4x4 images that vary along a few directions of their own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    directions = torch.randn(2, 2, SIDE * SIDE, generator=generator) * 0.06
    weights = torch.randn(count, 1, 2, generator=generator)
    images = 0.5 + (weights @ directions[labels]).squeeze(1)
    return images.view(count, 1, SIDE, SIDE).clamp(0, 1), labels


def planned(noise_multiplier: float = 1e-3, residual_norm: float = 4.0) -> tuple[PlannedMechanism, PlannedMechanism]:
    # A huge residual bound clips nothing; with so little noise to take away, moments stay as they are.
    event = GaussianEvent(noise_multiplier)
    return PlannedMechanism("mean", 0.5 * SIDE, event), PlannedMechanism("covariance", residual_norm**2, event)


def test_without_noise_the_moments_are_those_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moment_images, "shrink_spectrum", lambda values, edge: values.clamp_min(0))
    images, labels = class_images(400)
    options: dict[str, Any] = {"num_classes": 2, "public_dataset_size": 400, "resolution": SIDE}
    moments = query_moments(images, labels, planned(), own_share=1.0, generator=Summing(), **options)
    for label in range(2):
        rows = images[labels == label].flatten(1)
        assert torch.allclose(moments.means[label].flatten(), rows.mean(0), atol=1e-5)
        factor = moments.factors[label]
        assert torch.allclose(factor @ factor.T, torch.cov(rows.T, correction=0), atol=1e-5)


def test_drawn_images_have_the_released_moments() -> None:
    images, labels = class_images(400)
    moments = query_moments(images, labels, planned(), num_classes=2, public_dataset_size=400, resolution=SIDE)
    generator = torch.Generator().manual_seed(1)
    drawn = moments.draw(torch.zeros(20_000, dtype=torch.long), SIDE, generator).flatten(1)
    factor = moments.factors[0]
    assert torch.allclose(drawn.mean(0), moments.means[0].flatten(), atol=0.01)
    assert torch.allclose(torch.cov(drawn.T), factor @ factor.T, atol=0.002)
    large = draw_moment_images(moments.means, moments.factors, torch.tensor([0, 1]), 4 * SIDE, generator)
    assert large.shape == (2, 1, 4 * SIDE, 4 * SIDE) and large.min() >= 0 and large.max() <= 1


@pytest.mark.parametrize("extreme", [0.0, 1.0, math.nan, 1e30])
def test_an_image_moves_each_sum_by_its_bound_at_most(extreme: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours that differ by one image far from its class. The second query is compared at equal released means."""
    mechanisms = planned(3.0, residual_norm=0.4)
    images, labels = class_images(40)
    more_images = torch.cat([images, torch.full((1, 1, SIDE, SIDE), extreme)])
    more_labels = torch.cat([labels, torch.tensor([1])])
    sums: list[torch.Tensor] = []

    def first_released(*args: Any, **kwargs: Any) -> torch.Tensor:
        sums.append(noisy_class_sums(*args, **kwargs))
        return sums[(len(sums) - 1) % 2]

    monkeypatch.setattr(moment_images, "noisy_class_sums", first_released)
    generator = Summing()
    for rows, classes in ((images, labels), (more_images, more_labels)):
        query_moments(
            rows, classes, mechanisms, num_classes=2, public_dataset_size=40, resolution=SIDE, generator=generator
        )
    mean_norm, covariance_norm = (mechanism.clip_norm for mechanism in mechanisms)
    assert generator.stds == [3.0 * mean_norm, 3.0 * covariance_norm] * 2
    assert (sums[0] - sums[2]).norm().item() <= mean_norm * (1 + 1e-9)
    # Reached, and not only respected: the image is far from its class.
    assert (sums[1] - sums[3]).norm().item() == pytest.approx(covariance_norm)


def test_an_outer_product_has_the_norm_of_its_matrix() -> None:
    residual = torch.randn(9, dtype=torch.float64)
    upper = torch.triu_indices(9, 9)
    scale = torch.where(upper[0] == upper[1], 1.0, math.sqrt(2)).double()
    packed = residual[upper[0]] * residual[upper[1]] * scale
    assert packed.norm().item() == pytest.approx(residual.norm().item() ** 2)


def test_the_spectrum_of_pure_noise_is_dropped_and_a_signal_above_it_is_found() -> None:
    size, signal = 120, 5.0
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    noise = (square + square.T) / 2 * math.sqrt(2)  # off-diagonal standard deviation 1
    edge = 2 * math.sqrt(size)
    assert (shrink_spectrum(torch.linalg.eigvalsh(noise), edge * 1.1) == 0).all()
    vector = F.normalize(torch.randn(size, 1, generator=generator, dtype=torch.float64), dim=0)
    values = torch.linalg.eigvalsh(noise + signal * edge * vector @ vector.T)
    shrunk = shrink_spectrum(values, edge)
    assert (shrunk > 0.5 * edge).sum() == 1
    # l (1 - (edge/2)^2 / l^2) for a true value l = 5 edges
    assert shrunk.max().item() == pytest.approx(signal * edge * (1 - 1 / (2 * signal) ** 2), rel=0.05)
    assert shrink_spectrum(values, 0.0).max() == values.max()


@pytest.mark.parametrize("classes", [1, 3])
def test_a_class_without_images_releases_noise_like_any_other(classes: int) -> None:
    images, _ = class_images(10)
    moments = query_moments(
        images,
        torch.zeros(10, dtype=torch.long),
        planned(1.0),
        num_classes=classes,
        public_dataset_size=10,
        resolution=SIDE,
    )
    assert moments.means.shape == (classes, 1, SIDE, SIDE)
    assert all(mean.unique().numel() > 1 for mean in moments.means)
