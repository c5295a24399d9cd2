"""Ways to a guarantee for a person with several images, at one epsilon: the person, one image of each, or a group."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
from dp_curriculum.training.plan import BudgetPlan, plan_budget


GROUP_SIZES = (4, 16)
_HEADS = (
    "guarantee for a person by",
    "rows that are used",
    "noise multiplier",
    "signal of a step",
    "of the lessons, beside planned",
)


def compare_units(config: CurriculumConfig, plan: BudgetPlan, num_parameters: int | None) -> Iterator[str]:
    """
    A table of ways to a guarantee for persons at equal epsilon, from public constants; nothing for images.

    The computation per step is the same in each row. The number of images per person is private, so `--group_size k`
    has a range: from most persons having one image to all of them having k.

    Args:
        config ([`CurriculumConfig`]): The configuration, with persons.
        plan ([`BudgetPlan`]): Its plan.
        num_parameters (`int`, *optional*): Parameters of the network; without them, noise is given and no signal.
    """
    if plan.unit == "image" or config.privacy.non_private or plan.dp_sgd is None or config.privacy.group_size > 1:
        return
    rows: list[tuple[str, ...]] = [
        _HEADS,
        ("persons, as planned", "all of every person", *_strength(plan, plan, num_parameters)),
    ]
    # The same numbers: what one image of each loses is the other images.
    rows.append(("one image of each person", "one per person", *_strength(plan, plan, num_parameters)))
    for size in GROUP_SIZES:
        used = f"at most {size} per person"
        rows.append((f"--group_size {size}", used, *_of_group(config, plan, size, num_parameters)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    yield "Ways to a guarantee for persons at this epsilon; signals are over noise:"
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _of_group(config: CurriculumConfig, plan: BudgetPlan, size: int, num_parameters: int | None) -> tuple[str, ...]:
    images = config.replace(person_column=None, person_from=None, public_dataset_size=None, group_size=size)
    found = []
    for num_images in (plan.dataset_size, size * plan.dataset_size):
        try:
            grouped = plan_budget(images, dataset_size=num_images, num_classes=plan.num_classes)
        except PrivacyBudgetExceeded:
            return "the lessons alone would spend more", "", ""
        found.append(_strength(plan, grouped, num_parameters))
    fewest, most = found
    return tuple(" to ".join(dict.fromkeys(ends)) for ends in zip(fewest, most))


def _strength(plan: BudgetPlan, other: BudgetPlan, num_parameters: int | None) -> tuple[str, str, str]:
    """Noise multiplier of the steps, and signal over noise of steps and lessons, each unit adding the same."""
    assert plan.dp_sgd is not None and other.dp_sgd is not None, "both have a hard stage"
    event = other.dp_sgd.event
    expected = event.sample_rate * other.dataset_size
    step = "" if num_parameters is None else f"{expected / (event.noise_multiplier * math.sqrt(num_parameters)):.2g}"
    pairs = zip(plan.lessons, other.lessons)
    ratios = [
        other.dataset_size / theirs.event.noise_multiplier * ours.event.noise_multiplier / plan.dataset_size
        for mine, them in pairs
        for ours, theirs in zip(mine.mechanisms, them.mechanisms)
    ]
    return f"{event.noise_multiplier:.4g}", step, f"{min(ratios):.2f}" if ratios else ""
