"""The lessons of a run, resolved once: each with its number and its mechanisms, in groups that are taught together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.lesson import Lesson
from dp_curriculum.lessons.table import find_lesson
from dp_curriculum.privacy.accounting import calibrate_noise_multiplier, round_up
from dp_curriculum.privacy.mechanism import PlannedMechanism


@dataclass(frozen=True)
class PlannedLesson:
    """
    One lesson of a run.

    Args:
        number (`int`): Its place among the lessons, from 1.
        stage (`str`): Its name in `--stages`.
        lesson ([`Lesson`]): What it does.
        mechanisms (`tuple[PlannedMechanism, ...]`): What it is charged, and what its query draws with.
    """

    number: int
    stage: str
    lesson: Lesson
    mechanisms: tuple[PlannedMechanism, ...]


LessonGroup = tuple[PlannedLesson, ...]


def plan_lessons(config: CurriculumConfig) -> tuple[LessonGroup, ...]:
    """
    Plans the lessons in order; those of one group are taught together. It reads no data.

    Raises:
        ValueError: If a stage is unknown.
    """
    noise_multiplier = lesson_noise_multiplier(config)
    planned = []
    for number, stage in enumerate(config.curriculum.lessons, start=1):
        lesson = find_lesson(stage)
        planned.append(PlannedLesson(number, stage, lesson, lesson.plan(config, noise_multiplier)))
    if config.curriculum.mix_lessons and planned:
        return (tuple(planned),)
    return tuple((lesson,) for lesson in planned)


def lesson_noise_multiplier(config: CurriculumConfig) -> float:
    r"""
    Noise multiplier of all queries of the lessons, such that they spend their share of the budget.

    A Gaussian query of all images with noise multiplier `s` is `1/s`-GDP, and the squares add up (Dong, Roth and Su,
    arXiv 1905.02383). With `mu` that of the one query that would spend the whole target, `k` queries get
    `sqrt(k / share) / mu`: DP-SGD keeps the rest, whatever epsilon, delta and adjacency are. Queries of random samples
    spend less than their share, and DP-SGD gets that too.

    Args:
        config ([`CurriculumConfig`]): The configuration; its `lesson_noise_multiplier` goes before its `lesson_share`.
            Nothing but public constants is read.
    """
    budget = config.privacy
    if budget.lesson_noise_multiplier is not None:
        return budget.lesson_noise_multiplier
    count = sum(
        mechanism.event.num_steps
        for stage in config.curriculum.lessons
        for mechanism in find_lesson(stage).plan(config, 1.0)
    )
    if count == 0:
        return 0.0
    whole = calibrate_noise_multiplier(
        target_epsilon=budget.target_epsilon,
        target_delta=budget.target_delta,
        sample_rate=1.0,
        num_steps=1,
        adjacency=budget.adjacency,
        group_size=budget.group_size,
    )
    return round_up(whole * math.sqrt(count / config.lesson_share))


def mechanisms_of(groups: Sequence[LessonGroup]) -> tuple[PlannedMechanism, ...]:
    """The mechanisms of all lessons, in order."""
    return tuple(mechanism for group in groups for lesson in group for mechanism in lesson.mechanisms)


def group_name(group: LessonGroup) -> str:
    """Name of lessons that are taught together, in trackers and reports."""
    return "_".join(lesson.stage for lesson in group)
