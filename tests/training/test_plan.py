"""The plan: all stages on one budget, every constant from public numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.planned import group_name, lesson_noise_multiplier, mechanisms_of, plan_lessons
from dp_curriculum.privacy.accounting import (
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
    compute_epsilon,
)
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.training.plan import BudgetPlan, plan_budget


# Where sampling is not the question, batches of all rows: those are accounted in closed form, at once.
ALL_ROWS = 16
MakeConfig = Callable[..., CurriculumConfig]
DELTA = 1e-5


def plan(config: CurriculumConfig, dataset_size: int = ALL_ROWS, **options: Any) -> BudgetPlan:
    return plan_budget(config, dataset_size=dataset_size, num_classes=10, **options)


def epsilon_of(plan: BudgetPlan, **options: Any) -> float:
    return compute_epsilon(plan.events, DELTA, **options)


@pytest.mark.parametrize(
    ("dataset_size", "stages"),
    [
        (ALL_ROWS, ["dp_sgd"]),
        (ALL_ROWS, ["mean", "dp_sgd"]),
        (ALL_ROWS, ["mode", "dp_sgd"]),
        (ALL_ROWS, ["mode", "mean", "dp_sgd"]),
        (64, ["mean", "dp_sgd"]),
    ],
)
def test_all_stages_together_end_just_below_the_target(
    dataset_size: int, stages: list[str], make_config: MakeConfig
) -> None:
    """At least 99 % of it. The hard stage alone would be below: what the lessons spend is in the number."""
    config = make_config(stages=stages, target_epsilon=1.0, lesson_noise_multiplier=12.0)
    planned = plan(config, dataset_size)
    names = {"mean": "central-images-mean", "mode": "central-images-mode", "dp_sgd": DP_SGD}
    assert [mechanism.name for mechanism in planned.mechanisms] == [names[stage] for stage in stages]
    assert 0.99 <= epsilon_of(planned) <= 1.0
    alone = calibrate_noise_multiplier(
        target_epsilon=1.0, target_delta=DELTA, sample_rate=16 / dataset_size, num_steps=config.dp_sgd.num_dp_steps
    )
    assert planned.dp_sgd is not None
    if stages == ["dp_sgd"]:
        assert planned.dp_sgd.event.noise_multiplier == alone
    else:
        assert planned.dp_sgd.event.noise_multiplier > 1.01 * alone


def test_the_hard_stage_is_what_the_configuration_says(make_config: MakeConfig) -> None:
    config = make_config(num_dp_steps=7, expected_batch_size=100, dp_max_grad_norm=0.3, non_private=True)
    planned = plan(config, dataset_size=400)
    assert planned.dp_sgd is planned.mechanisms[-1]
    assert planned.dp_sgd.clip_norm == 0.3
    assert (planned.dp_sgd.event.sample_rate, planned.dp_sgd.event.num_steps) == (0.25, 7)
    assert planned.events == tuple(mechanism.event for mechanism in planned.mechanisms)


def test_lessons_alone_are_a_plan(make_config: MakeConfig) -> None:
    planned = plan(make_config(stages=["mean"], lesson_noise_multiplier=5.0))
    assert planned.dp_sgd is None and planned.events == (GaussianEvent(5.0, 1.0, 1),)


@pytest.mark.parametrize(
    ("fields", "begun", "cure"),
    [
        ({"lesson_noise_multiplier": 2.0}, True, "start another run"),
        ({"lesson_noise_multiplier": 2.0}, False, "or more, or more noise in the lessons"),
        ({"lesson_noise_multiplier": 1e-3}, False, r"--target_epsilon to 50\d{4} or more, or more noise"),
    ],
)
def test_what_would_do_is_what_can_still_be_changed(
    fields: dict[str, Any], begun: bool, cure: str, make_config: MakeConfig
) -> None:
    config = make_config(target_epsilon=1.0, **fields)
    prior = [GaussianEvent(2.0)] if begun else None
    with pytest.raises(PrivacyBudgetExceeded, match=cure):
        plan(config, prior_events=prior)


@pytest.mark.parametrize("stages", [["mean"], ["mean", "mode", "dp_sgd"]], ids="-".join)
def test_lessons_that_overspend_are_refused_with_a_target_that_would_do(
    stages: list[str], make_config: MakeConfig
) -> None:
    config = make_config(stages=stages, target_epsilon=1.0, lesson_noise_multiplier=2.0)
    with pytest.raises(PrivacyBudgetExceeded) as caught:
        plan(config)
    lessons = [GaussianEvent(2.0)] * (len(stages) - (stages[-1] == "dp_sgd"))
    spent = compute_epsilon(lessons, DELTA)
    message, error = str(caught.value), caught.value
    assert error.spent_epsilon == spent > 1.0
    assert "--target_epsilon=1.0" in message and "--target_delta=1e-05" in message and "\n" not in message
    assert f"{spent:.6g}" in message and f"{error.smallest_target_epsilon:g}" in message
    alone = f"central-images-mean {compute_epsilon(lessons[:1], DELTA):.3g}"
    assert f"(alone: {alone}" in message and f", {spent - 1:.3g} above it" in message
    assert spent < error.smallest_target_epsilon < 1.02 * spent
    planned = plan(config.replace(target_epsilon=error.smallest_target_epsilon))
    assert epsilon_of(planned) <= error.smallest_target_epsilon


def test_a_batch_larger_than_the_dataset_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"--expected_batch_size=16 to be at most the number of images, 15: make it"):
        plan(make_config(), dataset_size=15)
    assert plan(make_config(), dataset_size=16).events[-1].sample_rate == 1.0


def test_an_unknown_stage_is_refused_with_the_known_ones(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="--stages=median to be one of public, mean, mode, .*, dp_sgd"):
        plan(make_config(stages=["median", "dp_sgd"]))


def test_replacing_an_image_needs_more_noise(make_config: MakeConfig) -> None:
    """The target holds under the adjacency that was asked for, group size included."""
    plain = plan(make_config(target_epsilon=4.0))
    replaced = plan(make_config(target_epsilon=4.0, adjacency="replace-one"))
    group = plan(make_config(target_epsilon=4.0, group_size=2))
    assert 0.99 * 4 <= epsilon_of(replaced, adjacency="replace-one") <= 4.0
    assert 0.99 * 4 <= epsilon_of(group, group_size=2) <= 4.0
    noise = [planned.events[-1].noise_multiplier for planned in (plain, replaced, group)]
    assert noise[0] < noise[1] and noise[0] < noise[2]
    assert epsilon_of(plain, adjacency="replace-one") > 4.0
    spent = compute_epsilon([GaussianEvent(15.0)], DELTA)
    overspent = make_config(target_epsilon=1.2 * spent, lesson_noise_multiplier=15.0)
    plan(overspent)
    with pytest.raises(PrivacyBudgetExceeded):
        plan(overspent.replace(adjacency="replace-one"))


def test_what_was_spent_before_takes_the_place_of_the_lessons(make_config: MakeConfig) -> None:
    """A lesson that crashed and is run again is paid twice; the hard stage makes room for it."""
    config = make_config(target_epsilon=3.0, lesson_noise_multiplier=5.0)
    twice = plan(config, prior_events=(GaussianEvent(5.0), GaussianEvent(5.0)))
    once = plan(config, prior_events=iter([GaussianEvent(5.0)]))
    assert once == plan(config)
    assert twice.dp_sgd is not None and once.dp_sgd is not None
    assert twice.dp_sgd.event.noise_multiplier > once.dp_sgd.event.noise_multiplier
    everything = (GaussianEvent(5.0), GaussianEvent(5.0), twice.dp_sgd.event)
    assert 0.99 * 3 <= compute_epsilon(everything, DELTA) <= 3.0
    with pytest.raises(PrivacyBudgetExceeded):
        plan(config, prior_events=(GaussianEvent(0.5),))
    nothing = plan(config, prior_events=())
    assert nothing.dp_sgd is not None
    assert nothing.dp_sgd.event == plan(config.replace(stages=["dp_sgd"])).events[0]


def test_a_run_without_noise_says_so_in_its_events(make_config: MakeConfig) -> None:
    """Sampling and steps are as planned; the hard stage has no noise, and lessons may spend what they like."""
    config = make_config(non_private=True, target_epsilon=0.001, lesson_noise_multiplier=0.1)
    planned = plan(config)
    assert planned.dp_sgd is not None and planned.dp_sgd.event == GaussianEvent(0.0, 1.0, 4)
    assert epsilon_of(planned) == float("inf")
    with pytest.raises(ValueError, match="--expected_batch_size=16"):
        plan(config, dataset_size=15)


def test_with_a_public_size_no_constant_depends_on_the_number_of_rows(make_config: MakeConfig) -> None:
    """Sample rate, divisor, steps, noise and bounds are equal for neighbours, and for datasets of any other size."""
    config = make_config(public_dataset_size=64, target_epsilon=1.0)
    plans = [plan(config, dataset_size=count) for count in (64, 63, 1, 5000)]
    assert all(planned == plans[0] for planned in plans)
    assert plans[0].dataset_size == 64 and plans[0].events[-1].sample_rate == 0.25


def test_without_a_public_size_the_number_of_rows_is_used(make_config: MakeConfig) -> None:
    planned = plan(make_config(non_private=True), dataset_size=64)
    assert planned.dataset_size == 64 and planned.events[-1].sample_rate == 0.25


# --- the lessons' share --------------------------------------------------------------------------------------------


def gaussian_dp(epsilon: float) -> float:
    """The mu of the Gaussian mechanism with this epsilon: its privacy curve (arXiv 1805.06530, eq. 6), bisected."""
    normal = NormalDist()

    def delta(mu: float) -> float:
        return normal.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * normal.cdf(-epsilon / mu - mu / 2)

    low, high = 1e-3, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) < DELTA else (low, middle)
    return low


@pytest.mark.parametrize(
    "stages", [["mean"], ["moments"], ["mean", "moments", "frequency"], ["mode", "mean"]], ids=len
)
@pytest.mark.parametrize("epsilon", [0.5, 10.0])
def test_lessons_get_their_share_of_the_budget_and_dp_sgd_the_rest(
    stages: list[str], epsilon: float, make_config: MakeConfig
) -> None:
    config = make_config(stages=[*stages, "dp_sgd"], target_epsilon=epsilon, lesson_budget_share=0.1)
    planned = plan(config)
    *lessons, hard = planned.events
    noise = {event.noise_multiplier for event in lessons}
    assert len(noise) == 1, "all queries alike"
    spent = len(lessons) / noise.pop() ** 2
    assert 0.99 * 0.1 < spent / gaussian_dp(epsilon) ** 2 <= 0.1 * (1 + 1e-6)
    assert 0.995 * epsilon < epsilon_of(planned) <= epsilon
    alone = plan(config.replace(stages=["dp_sgd"])).events[-1]
    assert hard.noise_multiplier > alone.noise_multiplier


@pytest.mark.parametrize("stages", [["mean"], ["moments"], ["mean", "moments"]], ids=len)
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 10.0])
def test_lessons_without_noisy_steps_spend_the_whole_budget(
    stages: list[str], epsilon: float, make_config: MakeConfig
) -> None:
    config = make_config(stages=stages, target_epsilon=epsilon, lesson_noise_multiplier=None)
    planned = plan(config)
    assert planned.dp_sgd is None
    assert 0.999 * epsilon < epsilon_of(planned) <= epsilon
    shared = plan(config.replace(lesson_budget_share=0.05))
    assert epsilon_of(shared) < 0.5 * epsilon, "a share that is given is kept"


def test_a_share_adapts_to_the_promise(make_config: MakeConfig) -> None:
    """More noise where neighbours are further apart, or less may be spent; none that depends on anything else."""

    def noise(**fields: Any) -> float:
        config = make_config(**{"stages": ["mean", "dp_sgd"], "lesson_budget_share": 0.05, **fields})
        return lesson_noise_multiplier(config)

    base = noise()
    assert noise(target_epsilon=1.0) > base and noise(adjacency="replace-one") > base and noise(group_size=2) > base
    assert noise(lesson_budget_share=0.2) == pytest.approx(base / 2, rel=1e-3)
    assert noise(central_images_per_class=4) == pytest.approx(base * 2, rel=1e-3)
    assert noise(public_dataset_size=10_000) == base


def test_noise_that_is_given_holds_and_the_share_is_a_twentieth_without(make_config: MakeConfig) -> None:
    config = make_config(stages=["mean", "moments", "dp_sgd"], lesson_noise_multiplier=7.0)
    assert [row.event.noise_multiplier for row in mechanisms_of(plan_lessons(config))] == [7.0] * 3
    unset = config.replace(lesson_noise_multiplier=None)
    assert lesson_noise_multiplier(unset) == lesson_noise_multiplier(unset.replace(lesson_budget_share=0.05))


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"stages": ["moments", "dp_sgd"]}, 0.2),
        ({"stages": ["moments", "dp_sgd"], "shortcut": "pretrain"}, 0.05),
        ({"stages": ["mean", "dp_sgd"]}, 0.05),
        ({"stages": ["moments"]}, 1.0),
    ],
)
def test_moments_in_closed_form_get_more_by_default(
    make_config: MakeConfig, fields: dict[str, Any], share: float
) -> None:
    config = make_config(**fields, lesson_noise_multiplier=None)
    assert config.lesson_share == share
    almost_all = config.replace(lesson_budget_share=min(share, 0.9999999))
    assert lesson_noise_multiplier(config) == pytest.approx(lesson_noise_multiplier(almost_all), abs=2e-3)


def test_a_share_beside_a_noise_that_is_given_is_refused(make_config: MakeConfig) -> None:
    """One follows from the other: neither is ignored."""
    with pytest.raises(ValueError, match="--lesson_budget_share=0.05 to come without --lesson_noise_multiplier=7.0"):
        make_config(lesson_budget_share=0.05, lesson_noise_multiplier=7.0)


def test_a_free_lesson_takes_nothing_of_the_share(make_config: MakeConfig) -> None:
    fields = {"lesson_budget_share": 0.05, "pretrain_dataset_name": "digits"}
    with_public = make_config(stages=["public", "mean", "dp_sgd"], **fields)
    without = make_config(stages=["mean", "dp_sgd"], lesson_budget_share=0.05)
    assert mechanisms_of(plan_lessons(with_public)) == mechanisms_of(plan_lessons(without))


def test_lessons_are_planned_in_order_alone_or_together(make_config: MakeConfig) -> None:
    config = make_config(stages=["mean", "mode", "dp_sgd"])
    alone, together = plan_lessons(config), plan_lessons(config.replace(mix_lessons=True))
    assert [[(lesson.number, lesson.stage) for lesson in group] for group in alone] == [[(1, "mean")], [(2, "mode")]]
    assert [[lesson.stage for lesson in group] for group in together] == [["mean", "mode"]]
    assert mechanisms_of(alone) == mechanisms_of(together) and group_name(together[0]) == "mean_mode"
    assert plan_lessons(config.replace(stages=["dp_sgd"], mix_lessons=True)) == ()
