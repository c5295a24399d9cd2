"""The table of lessons, `LESSONS`. `docs/extending.md` shows how to add one."""

from __future__ import annotations

from dp_curriculum.lessons.central_images import MEAN, MODE
from dp_curriculum.lessons.frequency_images import FREQUENCY
from dp_curriculum.lessons.lesson import Lesson
from dp_curriculum.lessons.moment_images import MOMENTS
from dp_curriculum.lessons.public_images import PUBLIC


# A lesson reads the private images once, in its query. What it released is saved; all that follows is post-processing.
LESSONS: dict[str, Lesson] = {
    "public": PUBLIC,
    "mean": MEAN,
    "mode": MODE,
    "moments": MOMENTS,
    "frequency": FREQUENCY,
}


def find_lesson(stage: str) -> Lesson:
    """
    The lesson of that name.

    Raises:
        ValueError: If there is none; the message lists the stages that there are.
    """
    if stage not in LESSONS:
        raise ValueError(f"Expected --stages={stage} to be one of {', '.join(LESSONS)}, dp_sgd.")
    return LESSONS[stage]
