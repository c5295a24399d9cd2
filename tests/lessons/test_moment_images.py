"""Moments: exact without noise, bounded contributions, and a spectrum without its noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from summing import Summing
from torch.nn import functional as F

from dp_curriculum import closed_form_prior
from dp_curriculum.closed_form_prior import lowest
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons import moment_denoising, moment_images
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.lessons.lesson import LATENT_DEVIATION
from dp_curriculum.lessons.moment_denoising import (
    covariance_factors,
    denoised_counts,
    denoised_means,
    noise_of_differences,
    shrink_spectrum,
)
from dp_curriculum.lessons.moment_images import (
    MOMENTS,
    Moments,
    check_released,
    coefficient_weights,
    covariance_radius,
    query_moments,
    to_frequencies,
    to_pixels,
)
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism


SIDE = 6
RADIUS = 2.0 * SIDE  # all frequencies


def class_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of 6x6 images that vary along a few directions of their own."""
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


def released(images: torch.Tensor, labels: torch.Tensor, *mechanisms: PlannedMechanism, **options: Any) -> Moments:
    options = {"num_classes": 2, "public_dataset_size": len(images), **options}
    mean, covariance = mechanisms or planned()
    return query_moments(images, labels, (mean, covariance), **options)


def test_without_noise_the_moments_are_those_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moment_denoising, "shrink_spectrum", lambda values, edge: values.clamp_min(0))
    images, labels = class_images(400)
    moments = released(images, labels, *planned(), generator=Summing(), radius=RADIUS)
    for label in range(2):
        rows = images[labels == label].flatten(1)
        covariance = torch.cov(rows.T, correction=0)
        assert torch.allclose(moments.means[label].flatten(), rows.mean(0), atol=1e-4)
        factor = moments.factors[label]
        assert torch.allclose(factor @ factor.T, covariance, atol=1e-4)
        assert moments.variances[label].item() == pytest.approx(covariance.trace().item(), rel=1e-3)


@pytest.mark.parametrize("is_photo", [False, True])
def test_classes_of_unequal_size_have_their_own_moments(is_photo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image in ten is of the second class, and twice as many were expected: the released counts say so."""
    if is_photo:
        monkeypatch.setattr(closed_form_prior, "MAX_CLAMPED_VALUES", 1)
    images, labels = class_images(4000)
    rows = torch.cat([(labels == 0).nonzero()[:1800], (labels == 1).nonzero()[:200]]).flatten()
    images, labels = images[rows], labels[rows]
    images[labels == 1] = (images[labels == 1] + 0.1).clamp(0, 1)
    moments = released(images, labels, public_dataset_size=4000, radius=RADIUS)
    for label in range(2):
        own = images[labels == label].flatten(1)
        covariance = torch.cov(own.T, correction=0)
        assert torch.allclose(moments.means[label].flatten(), own.mean(0), atol=0.005)
        assert moments.variances[label].item() == pytest.approx(covariance.trace().item(), rel=0.05)
        if not is_photo:
            factor = moments.factors[label]
            assert (factor @ factor.T - covariance).norm() < 0.2 * covariance.norm()


def test_counts_hidden_by_noise_are_the_expected_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(10, generator=generator, dtype=torch.float64)
    assert (denoised_counts(1 + noise, 0.3) - 1).abs().max() < 0.2 * noise.abs().max()
    counts = torch.tensor([0.2, 1.8], dtype=torch.float64)
    assert torch.allclose(denoised_counts(counts, 0.01), counts, atol=1e-3)
    # A class without images: what is divided by its count must not become large.
    assert denoised_counts(torch.tensor([0.0, 2.0], dtype=torch.float64), 0.1).min() == pytest.approx(0.3)


def noisy_covariances(true: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Covariances `(k, D, D)` plus symmetric noise, of standard deviation `noise` `(k,)` off the diagonal."""
    square = torch.randn(true.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return true + (square + square.transpose(1, 2)) * (noise / math.sqrt(2))[:, None, None]


def test_noise_of_differences_is_what_noise_alone_shows() -> None:
    noise = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    drawn = noise[:, None] * torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = (1 / noise) / (1 / noise).sum()
    shown = (drawn - shares @ drawn).square().sum(0).mean() / 3
    assert noise_of_differences(noise) == pytest.approx(shown.item(), rel=0.02)
    assert noise_of_differences(torch.full((5,), 0.3, dtype=torch.float64)) == pytest.approx(0.09)


def test_a_small_class_is_freed_of_its_larger_noise() -> None:
    """Of noise alone nothing is left, in no class; what is larger than the noise of its own class is kept."""
    size, noise = 40, torch.tensor([0.1, 0.1, 1.0], dtype=torch.float64)
    nothing = torch.zeros(3, size, size, dtype=torch.float64)
    left = covariance_factors(noisy_covariances(nothing, noise), noise, max_rank=size)
    assert (left @ left.transpose(1, 2)).norm(dim=(1, 2)).max() < 0.5  # the noise of the small class has a norm of 40
    true = nothing.clone()
    for label, place in enumerate((0, 1, 2)):
        true[label, place, place] = 100.0
    found = covariance_factors(noisy_covariances(true, noise), noise, max_rank=size)
    errors = (found @ found.transpose(1, 2) - true).norm(dim=(1, 2))
    assert (errors < torch.tensor([5.0, 5.0, 25.0])).all()


def test_the_noise_of_the_smallest_class_is_not_that_of_all() -> None:
    """The broken twin: a little more noise in one class, assumed of all of them, hides what is theirs."""
    size, generator = 40, torch.Generator().manual_seed(1)
    noise = torch.tensor([0.05, 0.05, 0.05, 0.1], dtype=torch.float64)
    roots = torch.randn(4, size, 12, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.2, 12)
    true = roots @ roots.transpose(1, 2) / 4
    noisy = noisy_covariances(true, noise)

    def error(assumed: torch.Tensor) -> float:
        factors = covariance_factors(noisy, assumed, max_rank=size)
        return float((factors @ factors.transpose(1, 2) - true)[:3].square().sum())

    assert error(noise) < 0.8 * error(noise.amax().expand(4))


def test_long_residuals_are_scaled_to_one_norm_and_the_energy_keeps_their_size() -> None:
    images, labels = class_images(4000)
    moments = released(images, labels, *planned(residual_norm=0.05), radius=RADIUS)
    for label in range(2):
        covariance = torch.cov(images[labels == label].flatten(1).T, correction=0)
        factor = moments.factors[label]
        assert moments.variances[label].item() == pytest.approx(covariance.trace().item(), rel=0.02)
        overlap = (factor @ factor.T * covariance).sum() / ((factor @ factor.T).norm() * covariance.norm())
        assert overlap > 0.97


def test_drawn_images_have_the_released_moments() -> None:
    images, labels = class_images(400)
    moments = released(images, labels, radius=RADIUS)
    generator = torch.Generator().manual_seed(1)
    drawn = moments.draw(torch.zeros(20_000, dtype=torch.long), SIDE, generator).flatten(1)
    factor = moments.factors[0]
    assert torch.allclose(drawn.mean(0), moments.means[0].flatten(), atol=0.01)
    assert torch.allclose(torch.cov(drawn.T), factor @ factor.T, atol=0.003)
    large = moments.draw(torch.tensor([0, 1]), 4 * SIDE, generator)
    assert large.shape == (2, 1, 4 * SIDE, 4 * SIDE) and large.min() >= 0 and large.max() <= 1


@pytest.mark.parametrize("is_photo", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("radius", [2.5, RADIUS])
@pytest.mark.parametrize("extreme", [0.0, 1.0, math.nan, 1e30])
def test_an_image_moves_each_sum_by_its_bound_at_most(
    extreme: float, radius: float, channels: int, is_photo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that differ by one image far from its class. The second query is compared at equal released means."""
    if is_photo:
        monkeypatch.setattr(closed_form_prior, "MAX_CLAMPED_VALUES", 1)
    mechanisms = planned(3.0, residual_norm=0.4)
    images, labels = class_images(40)
    images = images.expand(-1, channels, -1, -1)
    more_images = torch.cat([images, torch.full((1, channels, SIDE, SIDE), extreme)])
    more_labels = torch.cat([labels, torch.tensor([1])])
    sums: list[torch.Tensor] = []

    def first_released(*args: Any, **kwargs: Any) -> torch.Tensor:
        sums.append(noisy_class_sums(*args, **kwargs))
        return sums[(len(sums) - 1) % 2]

    monkeypatch.setattr(moment_images, "noisy_class_sums", first_released)
    generator = Summing()
    for rows, classes in ((images, labels), (more_images, more_labels)):
        released(rows, classes, *mechanisms, public_dataset_size=40, radius=radius, generator=generator)
    mean_norm, covariance_norm = (mechanism.clip_norm for mechanism in mechanisms)
    assert generator.stds == [3.0 * mean_norm, 3.0 * covariance_norm] * 2
    assert (sums[0] - sums[2]).norm().item() <= mean_norm * (1 + 1e-9)
    moved = (sums[1] - sums[3]).norm().item()
    assert moved <= covariance_norm * (1 + 1e-9)
    if math.isfinite(extreme):  # reached, and not only respected: the image is far from its class
        assert moved > 0.9 * covariance_norm


@pytest.mark.parametrize("channels", [1, 3])
def test_frequencies_are_an_orthonormal_basis(channels: int) -> None:
    images = torch.rand(5, channels, SIDE, SIDE, dtype=torch.float64)
    coefficients = to_frequencies(images)
    assert torch.allclose(to_pixels(coefficients), images)
    assert torch.allclose(coefficients.square().sum((1, 2, 3)), images.square().sum((1, 2, 3)))
    grey = images[:, :1].expand(-1, channels, -1, -1)
    assert to_frequencies(grey)[:, 1:].abs().max().item() < 1e-9 if channels == 3 else True


def test_more_images_over_noise_give_finer_frequencies() -> None:
    radii = [covariance_radius((1, 28, 28), planned(noise)[1], 6000.0) for noise in (100.0, 20.0, 2.0)]
    assert radii[0] < radii[1] < radii[2] and radii[1] == pytest.approx(14.0)
    assert covariance_radius((1, 8, 8), planned(1e-9)[1], 6000.0) == 16, "no more than there are"


def test_noise_of_means_is_taken_away_where_nothing_stands_out_of_it() -> None:
    """Released means of images without structure: what is left of the noise is far smaller than it was."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(4, 1, 16, 16, generator=generator, dtype=torch.float64)
    frequencies = closed_form_prior.frequencies(16)

    def cleaned(means: torch.Tensor) -> torch.Tensor:
        noise = torch.full((4,), 0.1, dtype=torch.float64)
        return to_pixels(denoised_means(to_frequencies(means), noise, frequencies=frequencies)[0])

    left = cleaned(noise)
    assert left.square().mean() < 0.1 * noise.square().mean()
    signal = torch.zeros(4, 1, 16, 16, dtype=torch.float64)
    signal[:2] += 0.3
    kept = cleaned(signal + noise)
    assert (kept[:2].mean() - kept[2:].mean()).item() == pytest.approx(0.3, abs=0.03)


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
@pytest.mark.parametrize("channels", [1, 3])
def test_a_class_without_images_releases_noise_like_any_other(classes: int, channels: int) -> None:
    images, _ = class_images(10)
    moments = query_moments(
        images.expand(-1, channels, -1, -1),
        torch.zeros(10, dtype=torch.long),
        planned(1.0),
        num_classes=classes,
        public_dataset_size=10,
    )
    assert moments.means.shape == (classes, channels, SIDE, SIDE)
    assert all(tensor.isfinite().all() for tensor in (moments.means, moments.factors, moments.variances))
    drawn = moments.draw(torch.arange(classes), SIDE, torch.Generator().manual_seed(0))
    assert drawn.isfinite().all() and drawn.shape == (classes, channels, SIDE, SIDE)


def test_weights_come_from_public_constants_and_keep_the_energy() -> None:
    """Fine coefficients are made larger; the energy of an image with the public spectrum is what it was."""
    weights = coefficient_weights((3, 32, 32))
    power = moment_images._public_power((3, 32, 32))
    assert (weights[0].diagonal().diff() > 0).all()
    assert (weights[1] > weights[0]).all() and (weights[2] > weights[1]).all()
    assert (power * weights.square()).sum().item() == pytest.approx(power.sum().item())


def test_photos_release_the_moments_of_their_classes() -> None:
    """With little noise; the second class has half of the contrast of the first."""
    generator = torch.Generator().manual_seed(0)
    shape, count = (3, 19, 19), 2000
    power = moment_images._public_power(shape)
    labels = torch.arange(count) % 2
    contrast = torch.where(labels.bool(), 0.04, 0.08).view(-1, 1, 1, 1)
    normals = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    images = 0.5 + contrast * to_pixels(power.sqrt() * normals) * 6
    assert (images - 0.5).abs().max() < 0.5, "nothing is clamped"
    event = GaussianEvent(1e-3)
    mechanisms = PlannedMechanism("mean", 20.0, event), PlannedMechanism("covariance", 1.0, event)
    moments = query_moments(images, labels, mechanisms, num_classes=2, public_dataset_size=count, radius=9.0)
    block = lowest(shape, moments.factors.shape[1])
    for label in range(2):
        rows = images[labels == label]
        low = to_frequencies(rows - rows.mean(0)).flatten(1)[:, block]
        covariance, factor = torch.cov(low.T, correction=0), moments.factors[label].double()
        found = factor @ factor.T
        assert torch.allclose(moments.means[label].double(), rows.mean(0), atol=0.02)
        assert moments.variances[label].item() == pytest.approx(rows.var(0).sum().item(), rel=0.05)
        assert (found - covariance).norm() < 0.1 * covariance.norm()
    drawn = moments.draw(torch.zeros(4000, dtype=torch.long), 19, torch.Generator().manual_seed(1))
    assert drawn.var(0).sum().item() == pytest.approx(moments.variances[0].item(), rel=0.03)


def test_latents_release_the_moments_of_their_classes_under_their_default_norms() -> None:
    """With little noise. Latents of the scale that an autoencoder states are hardly clipped, and those far off are."""
    config = CurriculumConfig().replace(
        resolution=128, num_channels=3, vae_name_or_path="org/vae", vae_latent_channels=4, vae_downsampling=8
    )
    shape, count = config.input_shape, 4000
    generator = torch.Generator().manual_seed(0)
    power = moment_images._public_power(shape)
    spread = power.sqrt() * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    latents = 0.5 + 0.8 * LATENT_DEVIATION * to_pixels(spread) / power.mean().sqrt()
    labels = torch.arange(count) % 2
    latents[labels == 1, 0] += 0.6 * LATENT_DEVIATION
    mechanisms = MOMENTS.plan(config, 1e-3)
    assert mechanisms[0].clip_norm == pytest.approx(LATENT_DEVIATION * math.sqrt(1024))
    moments = query_moments(latents, labels, mechanisms, num_classes=2, public_dataset_size=count)
    block = lowest(shape, moments.factors.shape[1])
    assert 100 < len(block) <= 1024
    for label in range(2):
        rows = latents[labels == label]
        assert (moments.means[label].double() - rows.mean(0)).abs().max() < 0.15 * LATENT_DEVIATION
        assert moments.variances[label].item() == pytest.approx(rows.var(0).sum().item(), rel=0.05)
        low = to_frequencies(rows - rows.mean(0)).flatten(1)[:, block]
        factor = moments.factors[label].double()
        assert (factor @ factor.T).trace().item() == pytest.approx(low.var(0).sum().item(), rel=0.1)


@pytest.mark.parametrize("noise_multiplier", [1.0, 1e3])
def test_photos_without_images_or_under_much_noise_can_be_drawn(noise_multiplier: float) -> None:
    images = torch.rand(4, 3, 19, 19, generator=torch.Generator().manual_seed(0))
    mechanisms = planned(noise_multiplier)
    moments = query_moments(
        images, torch.zeros(4, dtype=torch.long), mechanisms, num_classes=2, public_dataset_size=4, radius=8.0
    )
    drawn = moments.draw(torch.tensor([0, 1]), 19, torch.Generator().manual_seed(0))
    assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1


@pytest.mark.parametrize("missing", ["variances", "square factors"])
def test_moments_of_an_earlier_version_are_refused_by_name(missing: str) -> None:
    tensors = {
        "means": torch.full((2, 3, 19, 19), 0.5), "factors": torch.zeros(2, 9, 9), "variances": torch.ones(2)
    }  # fmt: skip
    check_released(tensors)
    old = {**tensors, "factors": torch.zeros(2, 1083, 9)}
    if missing == "variances":
        old = {name: tensor for name, tensor in tensors.items() if name != "variances"}
    with pytest.raises(ValueError, match="an earlier version released them"):
        check_released(old)
