"""Frequency images: features of norm 1, a bounded query, and a generator that finds what was released."""

from __future__ import annotations

import math

import pytest
import torch
from summing import Summing

from dp_curriculum.data import open_rows, read_images, to_unit_range
from dp_curriculum.lessons.frequency_images import (
    FREQUENCY_NORM,
    draw_frequencies,
    draw_frequency_images,
    fourier_features,
    query_frequencies,
)
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism


SIDE = 6


def mechanism(noise_multiplier: float = 25.0) -> PlannedMechanism:
    return PlannedMechanism("frequency", FREQUENCY_NORM, GaussianEvent(noise_multiplier))


def random_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, SIDE, SIDE, generator=generator), torch.arange(count) % 2


def query(
    images: torch.Tensor, labels: torch.Tensor, planned: PlannedMechanism | None = None, **others: object
) -> torch.Tensor:
    arguments = {"num_classes": 2, "public_dataset_size": 40, "resolution": SIDE, "generator": Summing(), **others}
    return query_frequencies(
        images,
        labels,
        planned or mechanism(),
        **{"num_frequencies": 200, **arguments},  # type: ignore[arg-type]
    )


def test_without_noise_the_release_is_the_mean_of_the_features_image_by_image() -> None:
    """An exact slow twin: one cosine and one sine a frequency, in a loop."""
    images, labels = random_images(40)
    directions = draw_frequencies(SIDE * SIDE, num_frequencies=3)
    expected = torch.zeros(2, 6)
    for image, label in zip(images, labels):
        for column in range(3):
            phase = sum(float(w * x) for w, x in zip(directions[:, column], image.flatten()))
            expected[label, column] += math.cos(phase) / math.sqrt(3) / 20
            expected[label, 3 + column] += math.sin(phase) / math.sqrt(3) / 20
    torch.testing.assert_close(query(images, labels, num_frequencies=3), expected, atol=1e-5, rtol=0)


def test_products_of_features_stand_for_gaussian_kernels_of_several_length_scales() -> None:
    images, _ = random_images(30)
    features = fourier_features(images, draw_frequencies(SIDE * SIDE, 1.5, 20_000))
    squares = torch.cdist(images.flatten(1), images.flatten(1)).square()
    scales = 1.5 * 2 ** torch.linspace(0, -1.5, 100)
    kernel = torch.stack([torch.exp(-squares / (2 * scale**2)) for scale in scales]).mean(0)
    assert (features @ features.T - kernel).abs().max() < 6 / math.sqrt(20_000)


@pytest.mark.parametrize("extreme", [0.0, 1.0, math.nan, 1e30])
@pytest.mark.parametrize("change", ["add", "replace"])
def test_an_image_moves_the_sums_by_its_norm_at_most(extreme: float, change: str) -> None:
    images, labels = random_images(40)
    image, label = torch.full((1, 1, SIDE, SIDE), extreme), torch.tensor([1])
    others = (torch.cat([images, image]), torch.cat([labels, label]))
    if change == "replace":
        others = (torch.cat([images[1:], image]), torch.cat([labels[1:], label]))
    first, second = (query(*rows) * 20 for rows in ((images, labels), others))
    allowed = FREQUENCY_NORM * (1 if change == "add" else 2)
    distance = (first - second).norm().item()
    assert distance <= allowed * (1 + 1e-5)
    if change == "add":  # reached, and not only respected: features have this norm
        assert distance == pytest.approx(allowed, rel=1e-4)


def test_noise_is_that_of_the_mechanism_and_directions_are_public_constants() -> None:
    generator = Summing()
    query(*random_images(40), mechanism(7.0), generator=generator)
    assert generator.stds == [7.0 * FREQUENCY_NORM]
    state = torch.random.get_rng_state()
    first = draw_frequencies(9).clone()
    draw_frequencies.cache_clear()
    assert torch.equal(draw_frequencies(9), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_generator_finds_the_classes_from_their_noisy_features() -> None:
    """8x8 digits: images lie near the mean of their class, and differ."""
    from dp_curriculum.config import DataConfig
    from dp_curriculum.data import digits_dataset

    digits = read_images(open_rows(digits_dataset(), DataConfig(resolution=8)), DataConfig(resolution=8))
    scale = 5.0  # 144 images of a class are too few for the finest of the default ones
    features = query_frequencies(
        digits.images,
        digits.labels,
        mechanism(3.0),
        num_classes=10,
        public_dataset_size=1437,
        resolution=8,
        length_scale=scale,
        num_frequencies=500,
    )
    drawn = draw_frequency_images(
        features,
        shape=(1, 8, 8),
        length_scale=scale,
        num_steps=250,
        images_per_class=20,
        generator=torch.Generator().manual_seed(0),
    )
    images, labels = drawn["images"], drawn["labels"]
    assert images.shape == (200, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(labels.bincount(), torch.full((10,), 20))
    real = to_unit_range(digits.images).flatten(1)
    means = torch.stack([real[digits.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(images.flatten(1), means).argmin(dim=1)
    assert (nearest == labels).float().mean() > 0.8
    spread = torch.stack([images[labels == label].flatten(1).std(dim=0).mean() for label in range(10)])
    assert spread.min() > 0.01


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 5), (1, 1, 1)])
def test_images_have_the_shape_that_was_asked_for(shape: tuple[int, int, int]) -> None:
    drawn = draw_frequency_images(
        torch.zeros(2, 400), shape=shape, num_steps=1, images_per_class=3, generator=torch.Generator().manual_seed(0)
    )
    assert drawn["images"].shape == (6, *shape)
