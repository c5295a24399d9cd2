"""Signal over noise of a planned run, before anything is spent, from public constants and typical images alone.

It is a rule of thumb: no image is read, so what it says of yours is a guess. Below 1, the noise is the larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
from dp_curriculum.training.plan import BudgetPlan, plan_budget


CLEAR_LESSON, FAINT_LESSON = 3.0, 1.0
CLEAR_STEP, FAINT_STEP = 1.0, 0.1


@dataclass(frozen=True)
class Prospect:
    """
    Prospect of one lesson, or of a noisy step.

    Args:
        name (`str`): "lesson mean", for example, or "noisy step".
        signal_to_noise (`float`): What is expected of typical images over the noise.
        is_step (`bool`): Whether it is a step, of which many are averaged.
    """

    name: str
    signal_to_noise: float
    is_step: bool = False

    @property
    def is_clear(self) -> bool:
        return self.signal_to_noise >= (CLEAR_STEP if self.is_step else CLEAR_LESSON)

    @property
    def is_noise(self) -> bool:
        """True if nothing but noise is to be expected."""
        return self.signal_to_noise < (FAINT_STEP if self.is_step else FAINT_LESSON)


def prospects(config: CurriculumConfig, plan: BudgetPlan, num_parameters: int | None) -> list[Prospect]:
    """
    Prospects of all lessons that spend something, and of a noisy step.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        plan ([`BudgetPlan`]): Its plan.
        num_parameters (`int`, *optional*): Parameters of the network; without them, the step is left out.
    """
    found = []
    for planned in plan.lessons:
        if planned.lesson.signal_to_noise is not None:
            ratio = planned.lesson.signal_to_noise(config, planned.mechanisms, plan.dataset_size / plan.num_classes)
            found.append(Prospect(f"lesson {planned.stage}", ratio))
    hard = plan.dp_sgd
    if hard is not None and hard.event.noise_multiplier > 0 and num_parameters is not None:
        # At most: if the clipped gradients of all images pointed the same way.
        images = hard.event.sample_rate * plan.dataset_size
        found.append(
            Prospect("noisy step", images / (hard.event.noise_multiplier * math.sqrt(num_parameters)), is_step=True)
        )
    return found


def describe_prospects(config: CurriculumConfig, plan: BudgetPlan, found: Sequence[Prospect]) -> Iterator[str]:
    """Lines that say in words what to expect."""
    if not found:
        return
    yield "What to expect: signal over noise, guessed from public constants; below 1, the noise is the larger."
    width = max(len(prospect.name) for prospect in found)
    for prospect in found:
        yield f"  {prospect.name:<{width}}  {prospect.signal_to_noise:<6.2g}  {_in_words(config, plan, prospect)}"
    yield from (f"  {line}" for line in _of_photos(config, plan))


def _of_photos(config: CurriculumConfig, plan: BudgetPlan) -> Iterator[str]:
    """A line on photos in closed form with noisy steps after it, as measured in docs/experiments.md."""
    hard = plan.dp_sgd
    if hard is not None and hard.event.noise_multiplier > 0 and config.has_photos and config.has_prior:
        yield (
            "photos: noisy steps after the lesson have not made their images better within hours of two CPU cores; "
            "without dp_sgd in --stages the lesson can have the whole budget, as plan --suggest has it"
        )


def _in_words(config: CurriculumConfig, plan: BudgetPlan, prospect: Prospect) -> str:
    size = f"{plan.dataset_size:,} {plan.unit}s"
    where = f"at {size}, {plan.num_classes} classes and epsilon {config.privacy.target_epsilon:g}"
    if prospect.is_step:
        if prospect.is_clear:
            return "each step follows the images"
        if prospect.is_noise:
            return (
                f"{where} the hard stage will learn almost nothing: use a smaller network, fewer steps, or a larger "
                "epsilon"
            )
        return "each step is mostly noise, and the average of all steps follows the images"
    if prospect.is_clear and prospect.name == "lesson moments" and (config.has_photos or config.has_latents):
        things = "no things"
        if plan.dp_sgd is not None:
            things = f"things {'would be' if config.has_photos else 'are'} for the noisy steps to show"
        return f"this lesson will show the colours and textures of the classes; {things}"
    if prospect.is_clear:
        return "this lesson will show the classes"
    enough = _rounded(plan.dataset_size * CLEAR_LESSON / prospect.signal_to_noise)
    if prospect.is_noise:
        return f"{where} this lesson will be noise: it takes {', '.join(_cures(config, plan, prospect, enough))}"
    return f"{where} this lesson will be faint; with about {enough:,} {plan.unit}s it would be clear"


def _cures(config: CurriculumConfig, plan: BudgetPlan, prospect: Prospect, enough: int) -> Iterator[str]:
    """Ways to make a lesson clear, of those that act on it."""
    yield f"about {enough:,} {plan.unit}s"
    if plan.num_classes > 1:
        yield "fewer classes"
    if prospect.name in ("lesson mean", "lesson mode"):
        yield "a smaller --lesson_resolution"
    fixed = config.privacy.lesson_noise_multiplier is not None
    yield "a smaller --lesson_noise_multiplier" if fixed else "a larger --lesson_budget_share"
    yield "or the stage public in its place"


def warn_of_noise(config: CurriculumConfig, plan: BudgetPlan, num_parameters: int) -> Iterator[str]:
    """A line for each lesson, and for the noisy steps, of which nothing good is to be expected."""
    yield from _of_photos(config, plan)
    for prospect in prospects(config, plan, num_parameters):
        if prospect.is_noise:
            yield f"{prospect.name}: {_in_words(config, plan, prospect)}"


def compare_budgets(
    config: CurriculumConfig, plan: BudgetPlan, num_parameters: int, epsilons: Sequence[float] = (1.0, 3.0, 10.0)
) -> Iterator[str]:
    """A table of what other epsilons would change, everything else being equal."""
    if config.privacy.non_private:
        return
    rows: list[tuple[str, ...]] = []
    for epsilon in epsilons:
        other = config.replace(target_epsilon=epsilon)
        try:
            changed = plan_budget(other, dataset_size=plan.dataset_size, num_classes=plan.num_classes)
        except PrivacyBudgetExceeded:
            rows.append((f"{epsilon:g}", "the lessons alone would spend more"))
            continue
        found = prospects(other, changed, num_parameters)
        heads = ("epsilon", *(prospect.name for prospect in found))
        if not rows or len(rows[0]) < len(heads):
            rows.insert(0, heads)
        rows.append((f"{epsilon:g}", *(f"{prospect.signal_to_noise:.2g}{_sign(prospect)}" for prospect in found)))
    if len(rows) > 1 and len(rows[0]) > 1:
        yield "The same signal over noise at other budgets:"
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
        for row in rows:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _sign(prospect: Prospect) -> str:
    return " (noise)" if prospect.is_noise else " (clear)" if prospect.is_clear else " (faint)"


def _rounded(count: float) -> int:
    """Two digits of a number of images: more would promise too much."""
    digits = max(0, math.floor(math.log10(count)) - 1)
    return int(math.ceil(count / 10**digits) * 10**digits)
