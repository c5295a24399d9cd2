"""Every lesson passes record and replay; twins that move too far, or tell something beside their sums, fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from planning import planned_lesson, with_noise_times

from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import RELATIONS, neighbours
from dp_curriculum.data import to_unit_range
from dp_curriculum.lessons import moment_components, moment_images
from dp_curriculum.lessons.lesson import Lesson, draw_rows
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.mechanism import PlannedMechanism


OPTIONS = {"central_images_per_class": 2, "central_sample_rate": 0.5}


def failures(lesson: Lesson, config: Any, *, noise_multiplier: float = 20.0, **options: int) -> list[str]:
    planned = planned_lesson(lesson, config, noise_multiplier)
    findings = audit_lesson("lesson", planned, config, **{"num_classes": 3, "dataset_size": 20, **options})
    return [finding.claim.removeprefix("lesson: ") for finding in findings if not finding.holds]


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("stage", LESSONS)
def test_every_lesson_passes(stage: str, num_channels: int, make_config: Any) -> None:
    config = make_config(num_channels=num_channels, **OPTIONS)
    assert failures(LESSONS[stage], config) == []
    assert failures(LESSONS[stage], config, num_classes=1) == []


@pytest.mark.parametrize("num_channels", [1, 3])
def test_components_pass_and_parts_that_depend_on_other_images_do_not(
    num_channels: int, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The twin cuts each class into thirds of its images, by their brightness. There are parts only with so little noise,
    and each image reaches so small a bound.
    """
    monkeypatch.setattr(moment_images, "_COMPONENTS_NORM", 0.2)
    config = make_config(stages=["moments", "dp_sgd"], num_channels=num_channels, moment_components=3)
    found = functools.partial(failures, LESSONS["moments"], config, noise_multiplier=1e-3)
    monkeypatch.setattr(moment_components, "_DRAWS", 500)
    assert found() == [] and found(num_classes=1) == []

    def thirds(cut: Any, images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
        order = to_unit_range(images).flatten(1).sum(1).argsort().argsort()
        return labels * 3 + (3 * order) // max(1, len(images))

    monkeypatch.setattr(moment_components, "_all_parts", thirds)
    assert "one image moves the sums by no more than their noise is for" in found()


def test_pairs_differ_in_one_image_and_hold_every_kind_and_relation() -> None:
    pairs = list(neighbours(num_channels=1, side=8, num_classes=3, gradients=True))
    assert len(pairs) == len({pair.name for pair in pairs}) == 11 * len(RELATIONS)
    for pair in pairs:
        first, second = (set(map(bytes, data.images.numpy())) for data in (pair.first, pair.second))
        assert len(pair.first) - len(pair.second) == {"add": -1, "remove": 1, "replace": 0}[pair.name.split(", ")[1]]
        assert len(first ^ second) == pair.distance
        rest = slice(0, pair.changed)
        assert torch.equal(pair.first.labels[rest], pair.second.labels[rest])
        assert max(len(pair.first), len(pair.second)) == pair.changed + 1


# --- twins -----------------------------------------------------------------------------------------------------------


def twin(change: Callable[..., Any], plan: Any = LESSONS["mean"].plan) -> Lesson:
    """The lesson of means, whose release `change(tensors, private, secret)` makes another."""

    def release(private: Any, config: Any, mechanisms: Any, size: int, secret: Any) -> Any:
        tensors = LESSONS["mean"].release(private, config, mechanisms, size, secret)
        return change(dict(tensors), private, secret)

    return Lesson(plan=plan, release=release, draw=draw_rows)


def moves_one_percent_too_far(private: Any, config: Any, mechanisms: Any, size: int, secret: Any) -> Any:
    """Images a hundredth farther from the centre than their noise is for."""
    far = replace(private, images=0.5 + 1.01 * (to_unit_range(private.images) - 0.5))
    larger = [replace(row, clip_norm=1.01 * row.clip_norm) for row in with_noise_times(1 / 1.01, mechanisms)]
    return LESSONS["mean"].release(far, config, tuple(larger), size, secret)


def test_one_percent_too_far_fails(make_config: Any) -> None:
    """Noise of the right size, for a bound that is 1 % larger than the one it is scaled to."""
    config = make_config(lesson_max_image_norm=1.0)
    lesson = Lesson(plan=LESSONS["mean"].plan, release=moves_one_percent_too_far, draw=draw_rows)
    assert "one image moves the sums by no more than their noise is for" in failures(lesson, config)


def without_noise(tensors: Any, private: Any, *_: Any) -> Any:
    """A thumbnail beside the release."""
    return {**tensors, "extra": to_unit_range(private.images).sum(0)}


def row_count(tensors: Any, private: Any, *_: Any) -> Any:
    return {**tensors, "size": torch.tensor([len(private)])}


def classes_that_occur(tensors: Any, private: Any, *_: Any) -> Any:
    """Only classes that have images are released."""
    kept = [row for row, label in enumerate(tensors["labels"]) if (private.labels == label).any()]
    return {name: tensor[kept] for name, tensor in tensors.items()}


def not_a_number(tensors: Any, private: Any, *_: Any) -> Any:
    """A class without images is NaN."""
    images = tensors["images"].clone()
    for row, label in enumerate(tensors["labels"]):
        if not (private.labels == label).any():
            images[row] = torch.nan
    return {**tensors, "images": images}


@pytest.mark.parametrize("change", [without_noise, row_count, classes_that_occur, not_a_number])
def test_what_is_told_beside_the_sums_fails(change: Callable[..., Any], make_config: Any) -> None:
    assert "with equal noised sums, all that is released is equal" in failures(twin(change), make_config(**OPTIONS))


def one_more_mask(tensors: Any, private: Any, secret: Any) -> Any:
    secret.poisson_sample(len(private), 0.5)
    return tensors


def drawn_with(change: Callable[[Any], Any]) -> Lesson:
    """The lesson of means, whose query takes other numbers than those that it is charged."""

    def release(private: Any, config: Any, mechanisms: Any, size: int, secret: Any) -> Any:
        return LESSONS["mean"].release(private, config, tuple(map(change, mechanisms)), size, secret)

    return replace(LESSONS["mean"], release=release)


def one_round_more(row: PlannedMechanism) -> PlannedMechanism:
    return replace(row, event=replace(row.event, num_steps=row.event.num_steps + 1))


def larger_sample(row: PlannedMechanism) -> PlannedMechanism:
    return replace(row, event=replace(row.event, sample_rate=1.0))


def less_noise(row: PlannedMechanism) -> PlannedMechanism:
    return with_noise_times(0.99, [row])[0]


def larger_norm(row: PlannedMechanism) -> PlannedMechanism:
    return replace(row, clip_norm=1.01 * row.clip_norm)


DRAWN_OTHERWISE = [drawn_with(change) for change in (one_round_more, larger_sample, less_noise, larger_norm)]


@pytest.mark.parametrize("lesson", [twin(one_more_mask), *DRAWN_OTHERWISE])
def test_what_is_drawn_and_not_charged_fails(lesson: Lesson, make_config: Any) -> None:
    claim = "noise, sample rates and number of draws are those that are charged"
    assert claim in failures(lesson, make_config(**OPTIONS))
