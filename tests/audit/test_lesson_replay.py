"""Every lesson passes record and replay; twins that move too far, or tell something beside their sums, fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import RELATIONS, neighbours
from dp_curriculum.data import to_unit_range
from dp_curriculum.lessons.lesson import Lesson, draw_rows
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.accounting import GaussianEvent


OPTIONS = {"central_images_per_class": 2, "central_sample_rate": 0.5, "num_frequencies": 50}


def failures(lesson: Lesson, config: Any, **options: int) -> list[str]:
    findings = audit_lesson("lesson", lesson, config, **{"num_classes": 3, "dataset_size": 20, **options})
    return [finding.claim.removeprefix("lesson: ") for finding in findings if not finding.holds]


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("stage", LESSONS)
def test_every_lesson_passes(stage: str, num_channels: int, make_config: Any) -> None:
    config = make_config(num_channels=num_channels, **OPTIONS)
    assert failures(LESSONS[stage], config) == []
    assert failures(LESSONS[stage], config, num_classes=1) == []


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
    """The lesson of means, whose release `change(tensors, events, private, config, size, secret)` makes another."""

    def release(private: Any, config: Any, size: int, secret: Any) -> Any:
        tensors, events = LESSONS["mean"].release(private, config, size, secret)
        return change(dict(tensors), events, private, config, size, secret)

    return Lesson(plan=plan, release=release, draw=draw_rows)


def moves_one_percent_too_far(private: Any, config: Any, size: int, secret: Any) -> Any:
    """Images a hundredth farther from the centre than their noise is for."""
    far = replace(private, images=0.5 + 1.01 * (to_unit_range(private.images) - 0.5))
    bound = config.central_images.central_max_image_norm or 2.0
    larger = config.replace(central_max_image_norm=1.01 * bound, central_noise_multiplier=20 / 1.01)
    tensors, _ = LESSONS["mean"].release(far, larger, size, secret)
    return tensors, tuple(planned.event for planned in LESSONS["mean"].plan(config))


def test_one_percent_too_far_fails(make_config: Any) -> None:
    """Noise of the right size, for a bound that is 1 % larger than the one it is scaled to."""
    config = make_config(central_max_image_norm=1.0)
    lesson = Lesson(plan=LESSONS["mean"].plan, release=moves_one_percent_too_far, draw=draw_rows)
    assert "one image moves the sums by no more than their noise is for" in failures(lesson, config)


def without_noise(tensors: Any, events: Any, private: Any, *_: Any) -> Any:
    """A thumbnail beside the release."""
    return {**tensors, "extra": to_unit_range(private.images).sum(0)}, events


def row_count(tensors: Any, events: Any, private: Any, *_: Any) -> Any:
    return {**tensors, "size": torch.tensor([len(private)])}, events


def classes_that_occur(tensors: Any, events: Any, private: Any, *_: Any) -> Any:
    """Only classes that have images are released."""
    kept = [row for row, label in enumerate(tensors["labels"]) if (private.labels == label).any()]
    return {name: tensor[kept] for name, tensor in tensors.items()}, events


def not_a_number(tensors: Any, events: Any, private: Any, *_: Any) -> Any:
    """A class without images is NaN."""
    images = tensors["images"].clone()
    for row, label in enumerate(tensors["labels"]):
        if not (private.labels == label).any():
            images[row] = torch.nan
    return {**tensors, "images": images}, events


def events_of_the_data(tensors: Any, events: Any, private: Any, *_: Any) -> Any:
    return tensors, (GaussianEvent(20.0, 0.5, len(private)),)


@pytest.mark.parametrize("change", [without_noise, row_count, classes_that_occur, not_a_number, events_of_the_data])
def test_what_is_told_beside_the_sums_fails(change: Callable[..., Any], make_config: Any) -> None:
    assert "with equal noised sums, all that is released is equal" in failures(twin(change), make_config(**OPTIONS))


def one_more_mask(tensors: Any, events: Any, private: Any, config: Any, size: int, secret: Any) -> Any:
    secret.poisson_sample(len(private), 0.5)
    return tensors, events


def less_in_the_ledger(tensors: Any, events: Any, *_: Any) -> Any:
    """One round fewer is charged than is drawn."""
    return tensors, tuple(replace(event, num_steps=event.num_steps - 1) for event in events)


def one_round_less(config: Any) -> Any:
    (stage,) = LESSONS["mean"].plan(config)
    return (replace(stage, event=replace(stage.event, num_steps=stage.event.num_steps - 1)),)


@pytest.mark.parametrize(
    "lesson", [twin(one_more_mask), twin(less_in_the_ledger), twin(less_in_the_ledger, one_round_less)]
)
def test_what_is_drawn_and_not_charged_fails(lesson: Lesson, make_config: Any) -> None:
    claim = "noise, sample rates and number of draws are those that are charged"
    assert claim in failures(lesson, make_config(**OPTIONS))
