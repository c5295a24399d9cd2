"""Lessons of persons: each adds the average of what an image adds, bounded whatever their images are."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from planning import planned_lesson
from summing import Summing
from torch import Tensor

from dp_curriculum.data.images import PrivateImages, contributing
from dp_curriculum.data.units import NO_PERSON, Units
from dp_curriculum.lessons import central_images, class_sums, frequency_images, moment_images
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism


PERSONS = [0, 1, 1, 2, 1, NO_PERSON, 2, 3, 2, 2]
LABELS = [0, 1, 0, 1, 1, 0, 1, -1, 0, 1]


def sums_of(vectors: Tensor, labels: list[int], persons: list[int] | None, *, norm: float, **options: Any) -> Tensor:
    """Noiseless sums of two classes, where image i contributes row i of `vectors`."""
    rows = torch.arange(len(vectors), dtype=torch.float64).view(-1, 1, 1, 1) / 255
    classes = torch.tensor(labels)
    units = None if persons is None else Units(classes, 2, torch.tensor(persons))
    event = GaussianEvent(1.0, options.pop("sample_rate", 1.0))
    return noisy_class_sums(
        rows, classes, lambda pixels, _: vectors[(pixels.flatten() * 255).round().long()], vectors.shape[1:],
        num_classes=2, mechanism=PlannedMechanism("sums", norm, event), units=units,
        generator=options.pop("secret", Summing()), **options,
    )  # fmt: skip


def one_by_one(vectors: Tensor, *, norm: float, outer: bool) -> Tensor:
    """The slow reference: a loop over persons, each the average of the clipped contributions of their images."""
    width = vectors.shape[1] * (vectors.shape[1] + 1) // 2 if outer else vectors.shape[1]
    total = torch.zeros(2, width, dtype=torch.float64)
    for person in set(PERSONS) - {NO_PERSON}:
        own = [row for row in range(len(PERSONS)) if PERSONS[row] == person and LABELS[row] >= 0]
        added = torch.zeros_like(total)
        for row in own:
            value = vectors[row]
            if outer:
                value = class_sums.pack_symmetric(torch.outer(value, value)[None])[0]
            added[LABELS[row]] += value * min(1.0, norm / float(value.norm())) / len(own)
        assert float(added.norm()) <= norm * (1 + 1e-12)
        total += added
    return total


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("values", [2**24, 12])
def test_a_person_adds_the_average_of_their_clipped_images(
    outer: bool, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the images of a person are read in several parts."""
    monkeypatch.setattr(class_sums, "CHUNK_VALUES", values)
    vectors = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sums_of(vectors, LABELS, PERSONS, norm=1.3, outer_products=outer)
    torch.testing.assert_close(found, one_by_one(vectors, norm=1.3, outer=outer))


def test_an_average_over_classes_beats_parallel_composition() -> None:
    """A person in two classes would move two sums by the bound each, sqrt(2) in all, if each class took a share."""
    vectors = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    together = sums_of(vectors, [0, 1], [0, 0], norm=1.0)
    apart = sums_of(vectors, [0, 1], None, norm=1.0)
    assert float(together.norm()) == pytest.approx(0.5**0.5) and float(apart.norm()) == pytest.approx(2**0.5)


def test_a_broken_image_of_a_person_adds_zero_and_takes_its_share() -> None:
    """What cannot be read is no image of theirs; what is not finite is one, of zero."""
    vectors = torch.tensor([[0.6, 0.8], [float("nan"), 0.0], [0.6, 0.8]], dtype=torch.float64)
    half = sums_of(vectors, [0, 0, -1], [0, 0, 0], norm=1.0)
    torch.testing.assert_close(half[0], torch.tensor([0.3, 0.4], dtype=torch.float64))


@pytest.mark.statistical
def test_persons_are_sampled_and_not_their_images() -> None:
    """2,000 samples at rate 0.3 of one person with three images: all of them or none."""
    vectors = torch.ones(3, 1, dtype=torch.float64)
    found = [float(sums_of(vectors, [0, 0, 1], [0] * 3, norm=1.0, sample_rate=0.3).sum()) for _ in range(2000)]
    assert {round(value, 12) for value in found} == {0.0, 1.0}
    assert abs(sum(found) / 2000 - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


# --- lessons ---------------------------------------------------------------------------------------------------------


def private_images(persons: list[int] | None, count: int = 12) -> PrivateImages:
    images = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    numbers = None if persons is None else torch.tensor(persons)
    return PrivateImages(images, torch.arange(count) % 3, ("a", "b", "c"), numbers)


def release(stage: str, private: PrivateImages, config: Any, size: int) -> Any:
    planned = planned_lesson(LESSONS[stage], config)
    secret = Summing()
    return planned.lesson.release(private, config, planned.mechanisms, size, secret), secret


@pytest.mark.parametrize("stage", ["mean", "mode", "moments", "frequency"])
def test_persons_with_one_image_each_are_images(stage: str, make_config: Any) -> None:
    config = make_config(stages=[stage])
    images, persons = (release(stage, private_images(given), config, 12)[0] for given in (None, [*range(12)]))
    assert all(torch.equal(images[name], persons[name]) for name in images)


def test_persons_with_one_image_each_are_images_in_parts_of_classes_too(make_config: Any) -> None:
    config = make_config(stages=["moments", "dp_sgd"], moment_components=2)
    images, persons = (release("moments", private_images(given), config, 12)[0] for given in (None, [*range(12)]))
    assert len(images) == 6 and all(torch.equal(images[name], persons[name]) for name in images)


@pytest.mark.parametrize("stage", ["mean", "mode", "moments", "frequency"])
def test_copies_of_an_image_are_no_more_than_the_image(stage: str, make_config: Any) -> None:
    """Persons whose images are copies release what images do: a divisor in images would not."""
    config, one = make_config(stages=[stage]), private_images(None)
    copied = PrivateImages(
        one.images.repeat_interleave(4, 0), one.labels.repeat_interleave(4), one.class_names,
        torch.arange(12).repeat_interleave(4),
    )  # fmt: skip
    found, expected = (release(stage, given, config, 12)[0] for given in (copied, one))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


# --- images are what they were ---------------------------------------------------------------------------------------


def before_persons(
    images: Tensor, labels: Tensor, contribute: Any, shape: Any, *, num_classes: int, mechanism: PlannedMechanism,
    generator: Any, outer_products: bool = False, num_extras: int = 0, units: Any = None,
) -> Tensor:  # fmt: skip
    """The query as it was: a mask of rows, their sums, one noise."""
    indices = generator.poisson_sample(len(images), mechanism.event.sample_rate)
    indices = indices[contributing(labels[indices], num_classes)]
    width = [*shape, *shape] if outer_products else shape
    sums = torch.zeros(num_classes, *width, dtype=torch.float64)
    extra_sums = torch.zeros(num_classes, num_extras, dtype=torch.float64)
    made = contribute(class_sums.to_unit_range(images[indices], dtype=torch.float64), labels[indices])
    vectors, extras = made if isinstance(made, tuple) else (made, torch.zeros(len(indices), 0, dtype=torch.float64))
    if outer_products:
        squared = vectors.square().sum(dim=1)
        factors = class_sums._clip_factors(torch.hypot(squared, extras.norm(dim=1)), mechanism.clip_norm)
        extra_sums.index_add_(0, labels[indices], extras * factors[:, None])
        for label in labels[indices].unique():
            own = labels[indices] == label
            sums[label].addmm_((vectors[own] * factors[own, None]).T, vectors[own])
        sums = torch.cat([class_sums.pack_symmetric(sums), extra_sums], dim=1)
    else:
        factors = class_sums._clip_factors(vectors.flatten(1).norm(dim=1), mechanism.clip_norm)
        sums.index_add_(0, labels[indices], vectors * factors.view(-1, *[1] * (vectors.ndim - 1)))
    return sums + generator.gaussian(sums.shape, std=mechanism.noise_std, dtype=torch.float64).to(sums)


class Replayed(Summing):
    """Keys that are counted up in place of secret ones: the same draws in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = 0

    def _fresh_key(self, num_bytes: int) -> bytes:
        self.keys += 1
        return self.keys.to_bytes(num_bytes, "little")

    gaussian = functools.partialmethod(Summing.__mro__[1].gaussian)  # type: ignore[assignment]


@pytest.mark.parametrize("stage", ["mean", "mode", "moments", "frequency"])
def test_without_persons_a_release_is_what_it_was_to_the_bit(
    stage: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, private = make_config(stages=[stage], central_sample_rate=0.5), private_images(None, 40)
    private.labels[::7] = -1
    planned = planned_lesson(LESSONS[stage], config)
    now, before = Replayed(), Replayed()
    found = planned.lesson.release(private, config, planned.mechanisms, 40, now)
    for module in (central_images, moment_images, frequency_images):
        monkeypatch.setattr(module, "noisy_class_sums", before_persons)
    expected = planned.lesson.release(private, config, planned.mechanisms, 40, before)
    assert now.keys == before.keys > 0
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
