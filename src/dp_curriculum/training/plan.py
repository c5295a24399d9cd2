"""The whole budget before anything is spent: mechanisms, noise, epsilon of each stage and in all. It reads no data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dp_curriculum.config import CurriculumConfig, PrivacyBudget
from dp_curriculum.lessons.table import find_lesson, planned_queries
from dp_curriculum.privacy.accounting import (
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
    compute_epsilon,
    round_up,
)
from dp_curriculum.privacy.limits import check_mechanism
from dp_curriculum.privacy.mechanism import DP_SGD, PlannedStage


@dataclass(frozen=True)
class BudgetPlan:
    """
    The private mechanisms in order, with every constant that the run will use.

    Args:
        stages (`tuple[PlannedStage, ...]`): The mechanisms.
        dataset_size (`int`): Number of images that sample rate and divisors assume.
        num_classes (`int`): Number of classes.
    """

    stages: tuple[PlannedStage, ...]
    dataset_size: int
    num_classes: int

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        return tuple(stage.event for stage in self.stages)

    @property
    def dp_sgd(self) -> PlannedStage | None:
        """The hard stage; `None` where lessons are all there is."""
        return next((stage for stage in self.stages if stage.name == DP_SGD), None)


def split_budget(config: CurriculumConfig) -> CurriculumConfig:
    r"""
    Gives all queries of the lessons one noise multiplier, such that they spend `lesson_budget_share` of the budget.

    A Gaussian query of all images with noise multiplier `s` is `1/s`-GDP, and the squares add up (Dong, Roth and Su,
    arXiv 1905.02383). With `mu` that of the one query that would spend the whole target, `k` queries get
    `sqrt(k / share) / mu`: DP-SGD keeps the rest, whatever epsilon, delta and adjacency are. Queries of random samples
    spend less than their share, and DP-SGD gets that too.

    Args:
        config ([`CurriculumConfig`]): The configuration; it comes back as it is where no share is set, or nothing is
            spent. Nothing but public constants is read.

    Raises:
        ValueError: If a lesson with a query has no option for its noise.
    """
    share, lessons = config.curriculum.lesson_budget_share, config.curriculum.lessons
    if share is None or config.privacy.non_private:
        return config
    asking = {stage: find_lesson(stage) for stage in lessons if find_lesson(stage).plan(config)}
    for stage, lesson in asking.items():
        if lesson.noise is None:
            raise ValueError(
                f"Expected --lesson_budget_share={share:g} to come without the lesson {stage}: its noise is its own."
            )
    count = sum(mechanism.event.num_steps for lesson in asking.values() for mechanism in lesson.plan(config))
    whole = calibrate_noise_multiplier(
        target_epsilon=config.privacy.target_epsilon,
        target_delta=config.privacy.target_delta,
        sample_rate=1.0,
        num_steps=1,
        adjacency=config.privacy.adjacency,
        group_size=config.privacy.group_size,
    )
    noise = round_up(whole * math.sqrt(count / share))
    return config.replace(**{str(lesson.noise): noise for lesson in asking.values()})


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
        config ([`CurriculumConfig`]): The configuration; lessons get their share, if there is one.
        dataset_size (`int`): Number of images; `public_dataset_size` goes before it.
        num_classes (`int`): Number of classes.
        prior_events (`Iterable[GaussianEvent]`, *optional*): What a resumed run has spent and will spend before its
            hard stage, in place of the planned lessons.

    Raises:
        PrivacyBudgetExceeded: If the lessons alone spend the target; it says how much, and what would do.
        ValueError: If a stage is unknown, the dataset is empty, or the batch is larger than it.
    """
    config = split_budget(config)
    budget = config.privacy
    dataset_size = budget.public_dataset_size or dataset_size
    if dataset_size < 1:
        raise ValueError("Expected the dataset to hold images: it is empty; declare --public_dataset_size to go on.")
    lessons = planned_queries(config)
    easy = tuple(planned.event for planned in lessons) if prior_events is None else tuple(prior_events)
    _check_ranges(lessons)
    if not budget.non_private:
        _check_lessons(budget, lessons, easy, begun=prior_events is not None)
    if "dp_sgd" not in config.curriculum.stages:
        return BudgetPlan(lessons, dataset_size, num_classes)
    hard = PlannedStage(DP_SGD, config.dp_sgd.dp_max_grad_norm, _dp_sgd_event(config, dataset_size, easy))
    _check_ranges([hard])
    return BudgetPlan((*lessons, hard), dataset_size, num_classes)


def _check_ranges(stages: Sequence[PlannedStage]) -> None:
    """Refuses, before anything is spent, what the ledger would refuse when its turn came."""
    for stage in stages:
        event = stage.event
        try:
            check_mechanism(
                clip_norm=stage.clip_norm,
                noise_multiplier=event.noise_multiplier,
                sample_rate=event.sample_rate,
                num_steps=event.num_steps,
            )
        except ValueError as error:
            raise ValueError(f"{error} It is that of the stage {stage.name}, as planned.") from None


def _check_lessons(
    budget: PrivacyBudget, lessons: Sequence[PlannedStage], easy: Sequence[GaussianEvent], *, begun: bool
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
            f"Expected --expected_batch_size={options.expected_batch_size} to be at most the number of images, "
            f"{dataset_size}: make it smaller."
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
