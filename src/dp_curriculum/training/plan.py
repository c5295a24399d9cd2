"""The whole budget before anything is spent: mechanisms, noise, epsilon of each stage and in all. It reads no data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dp_curriculum.config import CurriculumConfig, PrivacyBudget
from dp_curriculum.lessons.planned import LessonGroup, PlannedLesson, mechanisms_of, plan_lessons
from dp_curriculum.privacy.accounting import (
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
    compute_epsilon,
    round_up,
)
from dp_curriculum.privacy.limits import check_mechanism
from dp_curriculum.privacy.mechanism import DP_SGD, PlannedMechanism


@dataclass(frozen=True)
class BudgetPlan:
    """
    The curriculum, resolved: its stages in order, with the mechanisms that are charged and drawn with.

    Args:
        groups (`tuple[LessonGroup, ...]`): The lessons; those of one group are taught together.
        dp_sgd ([`PlannedMechanism`], *optional*): The hard stage; `None` where lessons are all there is.
        dataset_size (`int`): Number of images that sample rate and divisors assume; of persons if those are the unit.
        num_classes (`int`): Number of classes.
        unit (`"image"` or `"person"`): What the guarantee is for.
    """

    groups: tuple[LessonGroup, ...]
    dp_sgd: PlannedMechanism | None
    dataset_size: int
    num_classes: int
    unit: Literal["image", "person"] = "image"

    @property
    def lessons(self) -> tuple[PlannedLesson, ...]:
        return tuple(lesson for group in self.groups for lesson in group)

    @property
    def mechanisms(self) -> tuple[PlannedMechanism, ...]:
        """Mechanisms of all stages, in order."""
        return (*mechanisms_of(self.groups), *([] if self.dp_sgd is None else [self.dp_sgd]))

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        return tuple(mechanism.event for mechanism in self.mechanisms)


def plan_budget(
    config: CurriculumConfig,
    *,
    dataset_size: int,
    num_classes: int,
    prior_events: Iterable[GaussianEvent] | None = None,
) -> BudgetPlan:
    """
    Calibrates the hard stage on the composition of all stages to the target epsilon.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        dataset_size (`int`): Number of images, or of persons if those are the unit, that training assumes, without
            those that are held out; `public_dataset_size` goes before it.
        num_classes (`int`): Number of classes.
        prior_events (`Iterable[GaussianEvent]`, *optional*): What a resumed run has spent and will spend before its
            hard stage, in place of the planned lessons.

    Raises:
        PrivacyBudgetExceeded: If the lessons alone spend the target; it says how much, and what would do.
        ValueError: If a stage is unknown, the dataset is empty, or the batch is larger than it.
    """
    budget = config.privacy
    if budget.public_dataset_size is not None:
        dataset_size = config.data.training_size(budget.public_dataset_size)
    if dataset_size < 1:
        raise ValueError(
            "Expected the dataset to hold images: it is empty; declare --public_dataset_size to train anyway."
        )
    groups = plan_lessons(config)
    lessons = mechanisms_of(groups)
    easy = tuple(planned.event for planned in lessons) if prior_events is None else tuple(prior_events)
    _check_ranges(lessons)
    if not budget.non_private:
        _check_lessons(budget, lessons, easy, begun=prior_events is not None)
    if "dp_sgd" not in config.curriculum.stages:
        return BudgetPlan(groups, None, dataset_size, num_classes, config.data.unit)
    hard = PlannedMechanism(DP_SGD, config.dp_sgd.dp_max_grad_norm, _dp_sgd_event(config, dataset_size, easy))
    _check_ranges([hard])
    return BudgetPlan(groups, hard, dataset_size, num_classes, config.data.unit)


def _check_ranges(mechanisms: Sequence[PlannedMechanism]) -> None:
    """Refuses, before anything is spent, what the ledger would refuse when its turn came."""
    for mechanism in mechanisms:
        event = mechanism.event
        try:
            check_mechanism(
                clip_norm=mechanism.clip_norm,
                noise_multiplier=event.noise_multiplier,
                sample_rate=event.sample_rate,
                num_steps=event.num_steps,
            )
        except ValueError as error:
            raise ValueError(f"{error} It is the planned value of the stage {mechanism.name}.") from None


def _check_lessons(
    budget: PrivacyBudget, lessons: Sequence[PlannedMechanism], easy: Sequence[GaussianEvent], *, begun: bool
) -> None:
    def epsilon(events: Sequence[GaussianEvent]) -> float:
        return compute_epsilon(events, budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)

    spent = epsilon(easy)
    if spent >= budget.target_epsilon:
        smallest = round_up(spent * 1.01)
        cure = f"set --target_epsilon to {smallest:g} or more, or more noise in the lessons"
        if begun:  # neither can be changed any more
            cure = "a lesson was lost and is paid again; what is spent stays spent, so start another run"
        alone = ", ".join(f"{planned.name} {epsilon([planned.event]):.3g}" for planned in lessons)
        raise PrivacyBudgetExceeded(
            f"Expected --target_epsilon={budget.target_epsilon} to exceed the {spent:.6g} that the lessons spend at "
            f"--target_delta={budget.target_delta:g} (alone: {alone}), {spent - budget.target_epsilon:.3g} above it: "
            f"{cure}.",
            spent_epsilon=spent,
            smallest_target_epsilon=smallest,
        )


def _dp_sgd_event(config: CurriculumConfig, dataset_size: int, easy: tuple[GaussianEvent, ...]) -> GaussianEvent:
    """The hard stage, with the noise that spends what the lessons leave."""
    budget, options = config.privacy, config.dp_sgd
    if options.expected_batch_size > dataset_size:
        raise ValueError(
            f"Expected --expected_batch_size={options.expected_batch_size} to be at most the number of "
            f"{config.data.unit}s, {dataset_size}: make it smaller."
        )
    sample_rate = options.expected_batch_size / dataset_size
    if budget.non_private:
        return GaussianEvent(0.0, sample_rate, options.num_dp_steps)
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=budget.target_epsilon,
        target_delta=budget.target_delta,
        sample_rate=sample_rate,
        num_steps=options.num_dp_steps,
        prior_events=easy,
        adjacency=budget.adjacency,
        group_size=budget.group_size,
    )
    return GaussianEvent(noise_multiplier, sample_rate, options.num_dp_steps)
