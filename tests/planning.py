"""Lessons as a plan has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.lesson import Lesson
from dp_curriculum.lessons.planned import PlannedLesson
from dp_curriculum.privacy.mechanism import PlannedMechanism


def planned_lesson(lesson: Lesson, config: CurriculumConfig, noise_multiplier: float = 20.0) -> PlannedLesson:
    """The lesson alone, with mechanisms of this noise multiplier."""
    return PlannedLesson(1, "lesson", lesson, lesson.plan(config, noise_multiplier))


def with_noise_times(factor: float, mechanisms: Sequence[PlannedMechanism]) -> tuple[PlannedMechanism, ...]:
    """Mechanisms of more or less noise, and the same bound."""
    return tuple(
        replace(row, event=replace(row.event, noise_multiplier=factor * row.event.noise_multiplier))
        for row in mechanisms
    )
