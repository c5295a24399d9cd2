"""Attacks: a model that copies is found out, an honest one is not, and the intervals say how sure that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dp_curriculum.diffusion.edm import build_unet, edm_loss
from dp_curriculum.evaluation import leakage
from dp_curriculum.evaluation.leakage import (
    denoising_losses,
    membership_auc,
    nearest_neighbor_ratio,
    nearest_training_share,
)


def images(count: int, seed: int, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


# --- nearest neighbours --------------------------------------------------------------------------------------------


def test_copies_of_training_images_are_flagged() -> None:
    training, held_out = images(200, 0), images(200, 1)
    copies = training[:80] + 0.01 * images(80, 2)
    found = nearest_neighbor_ratio(copies, training, held_out)
    assert found.low <= found.value <= found.high < 0.1


def test_exact_copies_have_ratio_zero_and_copies_of_held_out_images_a_large_one() -> None:
    training, held_out = images(50, 0), images(50, 1)
    assert nearest_neighbor_ratio(training, training, held_out).high < 1e-6
    assert np.isfinite(nearest_neighbor_ratio(held_out, training, held_out).low)
    assert nearest_neighbor_ratio(held_out, training, held_out).low > 1e3


def test_a_model_that_copies_half_of_the_time_is_flagged() -> None:
    training, held_out = images(200, 0), images(200, 1)
    generated = np.concatenate([training[:60] + 0.01 * images(60, 2), images(40, 3)])
    assert nearest_neighbor_ratio(generated, training, held_out).high < 0.5


def test_an_honest_generator_is_not_flagged_and_its_interval_covers_one() -> None:
    """The interval has 95 %: of forty honest generators, at most seven may be missed (chance of more: 1e-3)."""
    found = [
        nearest_neighbor_ratio(images(100, 3 * seed), images(100, 3 * seed + 1), images(100, 3 * seed + 2))
        for seed in range(40)
    ]
    assert np.mean([bounded.value for bounded in found]) == pytest.approx(1, abs=0.02)
    assert sum(not bounded.low <= 1 <= bounded.high for bounded in found) <= 7


def test_more_images_narrow_the_interval_and_a_seed_repeats_it() -> None:
    training, held_out = images(200, 0), images(200, 1)
    few, many = (nearest_neighbor_ratio(images(count, 2), training, held_out) for count in (40, 400))
    assert many.high - many.low < few.high - few.low
    assert nearest_neighbor_ratio(images(40, 2), training, held_out) == few


def test_sets_of_unequal_size_are_refused() -> None:
    """A larger set has nearer neighbours: every model would look like a copier of it."""
    with pytest.raises(ValueError, match="as many training images as held-out ones: there are 10 and 9"):
        nearest_neighbor_ratio(images(5, 0), images(10, 1), images(9, 2))


def test_the_share_sees_copies_of_any_training_image_and_no_fault_in_an_honest_generator() -> None:
    """Ten times as many training images as held-out ones: an honest share is 10 / 11."""
    training, held_out = images(1000, 0), images(100, 1)
    copies = nearest_training_share(training[:300] + 0.01 * images(300, 2), training, held_out)
    assert copies.value == copies.high == 1 and copies.low > 0.98
    found = [
        nearest_training_share(images(150, 3 * seed), images(500, 3 * seed + 1), images(50, 3 * seed + 2))
        for seed in range(40)
    ]
    assert np.mean([bounded.value for bounded in found]) == pytest.approx(10 / 11, abs=0.02)
    assert all(bounded.low <= bounded.value <= bounded.high for bounded in found)
    assert nearest_training_share(held_out, training, held_out).value == 0


# --- membership ----------------------------------------------------------------------------------------------------


def test_planted_losses_give_an_auc_near_one_and_blind_ones_a_half() -> None:
    generator = np.random.default_rng(0)
    blind = generator.normal(size=(2, 400))
    found = membership_auc(blind[0], blind[1])
    assert found.low < 0.5 < found.high and found.value == pytest.approx(0.5, abs=0.05)
    planted = membership_auc(blind[0] - 3, blind[1])
    assert planted.value > 0.97 and 0.95 < planted.low < planted.high <= 1
    assert membership_auc(np.zeros(5), np.ones(5)).value == 1
    assert membership_auc(np.ones(5), np.zeros(5)).value == 0
    assert membership_auc(np.ones(5), np.ones(5)).value == 0.5


def test_auc_is_the_share_of_pairs_that_are_told_apart() -> None:
    generator = np.random.default_rng(1)
    training, held_out = generator.integers(0, 9, 30).astype(float), generator.integers(0, 9, 20).astype(float)
    smaller = (training[:, None] < held_out).mean() + 0.5 * (training[:, None] == held_out).mean()
    assert membership_auc(training, held_out).value == pytest.approx(smaller, rel=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize(("shift", "auc"), [(0.0, 0.5), (0.5, 0.638163), (2.0, 0.921350)])
def test_the_interval_covers_the_true_auc(shift: float, auc: float) -> None:
    """Normals a shift apart have the AUC Phi(shift / 2^0.5). Of 200 intervals of 95 %, at most 21 may miss it.

    Chance of more: 1e-3. Half the width misses it some 60 times.
    """
    generator = np.random.default_rng(2)
    missed, missed_by_half = 0, 0
    for _ in range(200):
        training, held_out = generator.normal(size=(2, 150))
        found = membership_auc(training - shift, held_out)
        missed += not found.low <= auc <= found.high
        missed_by_half += abs(found.value - auc) > (found.high - found.low) / 4
    assert missed <= 21 < missed_by_half


# --- losses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unet(make_config: Any) -> Any:
    return build_unet(make_config().model, resolution=8, num_channels=1, num_classes=3).eval()


def pixels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def test_the_loss_of_an_image_does_not_hang_on_its_neighbours(unet: Any) -> None:
    rows, labels = pixels(300)  # more than are computed at once
    together = denoising_losses(unet, rows, labels, sigma_data=0.5)
    assert together.shape == (300,) and (together > 0).all()
    for index in (0, 255, 256, 299):
        part = slice(index, index + 1)
        alone = denoising_losses(unet, rows[part], labels[part], sigma_data=0.5)
        assert alone == pytest.approx(together[part], rel=1e-5)
    backwards = denoising_losses(unet, rows.flip(0), labels.flip(0), sigma_data=0.5)
    assert backwards[::-1] == pytest.approx(together, rel=1e-5)


def test_losses_are_means_over_levels_and_draws(unet: Any) -> None:
    rows, labels = pixels(4)
    options: dict[str, Any] = {"sigma_data": 0.5, "num_draws": 3}
    noises = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [
            edm_loss(unet, rows * 2 - 1, noise.expand_as(rows), torch.full((4,), sigma), labels, sigma_data=0.5)
            for sigma in (0.1, 0.7)
            for noise in noises
        ]
    found = denoising_losses(unet, rows, labels, sigmas=(0.1, 0.7), **options)
    assert found == pytest.approx(torch.stack(expected).mean(0).numpy(), rel=1e-5)


def test_a_seed_repeats_the_losses_and_global_state_is_left_alone(unet: Any) -> None:
    rows, labels = pixels(3)
    before = torch.get_rng_state()
    first, again, other = (denoising_losses(unet, rows, labels, sigma_data=0.5, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.slow
def test_a_model_that_learned_its_images_by_heart_is_found_out(unet: Any) -> None:
    """Eight random images, nothing in common with eight others; trained on without privacy."""
    rows, labels = pixels(16)
    unet.train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(250):
        noise = torch.randn(8, 1, 8, 8, generator=generator)
        sigma = 0.2 + 0.8 * torch.rand(8, generator=generator)
        loss = edm_loss(unet, rows[:8] * 2 - 1, noise, sigma, labels[:8], sigma_data=0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = denoising_losses(unet.eval(), rows, labels, sigma_data=0.5)
    assert membership_auc(losses[:8], losses[8:]).value > 0.95


def test_bounds_are_ordered() -> None:
    generator = np.random.default_rng(3)
    for shift in (-4, 0, 4):
        found = membership_auc(generator.normal(size=30) - shift, generator.normal(size=30))
        assert isinstance(found, leakage.Bounded) and 0 <= found.low <= found.value <= found.high <= 1
