"""What a plan says of ways to a guarantee for persons, at equal epsilon."""

from __future__ import annotations

from typing import Any

import pytest

from dp_curriculum.privacy.accounting import compute_epsilon
from dp_curriculum.training.plan import plan_budget
from dp_curriculum.training.unit_comparison import GROUP_SIZES, compare_units


def lines(config: Any, num_parameters: int | None = 10_000) -> list[str]:
    return list(compare_units(config, plan_budget(config, dataset_size=400, num_classes=3), num_parameters))


def test_a_group_takes_more_noise_than_the_person_and_each_number_is_of_a_plan(make_config: Any) -> None:
    fields = {"person_column": "person", "expected_batch_size": 40, "lesson_budget_share": 0.05}
    config = make_config(**fields)
    title, heads, native, one, *groups = lines(config)
    assert "at this epsilon" in title and heads.split()[0] == "guarantee" and len(groups) == len(GROUP_SIZES)
    planned = plan_budget(config, dataset_size=400, num_classes=3)
    assert planned.dp_sgd is not None
    assert f"{planned.dp_sgd.event.noise_multiplier:.4g}" in native and native.split()[-1] == "1.00"
    assert "one per person" in one and one.split()[-3:] == native.split()[-3:]
    few = plan_budget(
        make_config(**{**fields, "person_column": None, "group_size": 4}), dataset_size=400, num_classes=3
    )
    assert few.dp_sgd is not None
    assert f"{few.dp_sgd.event.noise_multiplier:.4g} to " in groups[0] and groups[0].endswith("0.25 to 1.00")
    assert few.dp_sgd.event.noise_multiplier > 2 * planned.dp_sgd.event.noise_multiplier
    spent = compute_epsilon(few.events, 1e-5, group_size=4)
    assert 0.99 * config.privacy.target_epsilon <= spent <= config.privacy.target_epsilon


@pytest.mark.parametrize(
    "fields", [{}, {"person_column": "p", "group_size": 2}, {"person_column": "p", "stages": ["mean"]},
               {"person_column": "p", "non_private": True}],
)  # fmt: skip
def test_there_is_nothing_to_compare_for_images_groups_and_without_steps(make_config: Any, fields: Any) -> None:
    assert lines(make_config(**fields)) == []
