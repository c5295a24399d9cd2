"""The comparison is fair: methods spend the same epsilon on the same number of network inputs."""

from __future__ import annotations

from types import ModuleType

import pytest
from scripts import load_script

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.planned import mechanisms_of, plan_lessons
from dp_curriculum.privacy.accounting import compute_epsilon
from dp_curriculum.training.plan import plan_budget


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    return load_script("benchmarks/curriculum_vs_plain.py")


def config_of(
    harness: ModuleType, method: str, dataset: str = "mnist", epsilon: str = "1", size: str = "preset"
) -> CurriculumConfig:
    """The configuration that the command line of a cell gives."""
    cell = harness.Cell(dataset, epsilon, method, 0, size)
    arguments = ["--config", str(cell.preset), *harness.training_options(cell)]
    return parse_config(config_parser("train", None), arguments)[1]


def network_inputs(config: CurriculumConfig) -> int:
    pretraining, hard = config.pretraining, config.dp_sgd
    easy = (
        pretraining.pretrain_steps
        * pretraining.pretrain_batch_size
        * (len(config.curriculum.lessons) - config.has_prior)
    )
    steps = hard.num_dp_steps if "dp_sgd" in config.curriculum.stages else 0
    return easy + steps * hard.expected_batch_size * hard.noise_multiplicity


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("epsilon", ["1", "10"])
@pytest.mark.parametrize("size", ["preset", "small"])
def test_methods_cost_the_same_compute_and_lessons_the_same_privacy(
    harness: ModuleType, dataset: str, epsilon: str, size: str
) -> None:
    methods = (*harness.WITH_LESSONS, "plain", "non-private")
    configs = {method: config_of(harness, method, dataset, epsilon, size) for method in methods}
    inputs = {method: network_inputs(config) for method, config in configs.items()}
    assert all(abs(count / inputs["curriculum"] - 1) < 0.01 for count in inputs.values()), inputs
    spent = {
        method: compute_epsilon(
            [row.event for row in mechanisms_of(plan_lessons(configs[method]))],
            1e-5,
        )
        for method in harness.WITH_LESSONS
    }
    assert all(epsilon == pytest.approx(spent["curriculum"], rel=1e-3) for epsilon in spent.values()), spent
    assert configs["plain"].privacy == configs["curriculum"].privacy
    assert configs["non-private"].privacy.non_private and not configs["plain"].privacy.non_private
    assert config_of(harness, "curriculum-alone", dataset, epsilon, size).curriculum.stages == ["moments"]
    mixed = config_of(harness, "mix", dataset, epsilon, size)
    assert mixed.curriculum.mix_lessons and mixed.curriculum.stages == ["moments", "frequency", "dp_sgd"]


def test_another_epsilon_changes_the_preset_of_epsilon_1(harness: ModuleType) -> None:
    config = config_of(harness, "curriculum", epsilon="0.2", size="small")
    assert config.privacy.target_epsilon == 0.2
    assert compute_epsilon(plan_budget(config, dataset_size=60_000, num_classes=10).events, 1e-5) <= 0.2


def test_plain_spends_the_target_on_its_longer_hard_stage(harness: ModuleType) -> None:
    config = config_of(harness, "plain")
    plan = plan_budget(config, dataset_size=60_000, num_classes=10)
    assert [mechanism.name for mechanism in plan.mechanisms] == ["dp-sgd"]
    assert 0.995 <= compute_epsilon(plan.events, 1e-5) <= 1


def test_the_table_shows_mean_and_spread_over_seeds(harness: ModuleType) -> None:
    def cell(seed: int, accuracy: float) -> dict[str, object]:
        values = {"accuracy_cnn": accuracy, "accuracy_logistic": 0.5, "fd_classifier": 10.0 + seed}
        metrics = {name: {"value": value} for name, value in values.items()}
        return {"dataset": "mnist", "epsilon": "1", "method": "plain", "seed": seed, "metrics": metrics}

    lines = list(harness.table({"a": cell(0, 0.8), "b": cell(2, 0.9)}))
    assert lines[2:] == ["| mnist | 1 | plain | 2 | 85.0 ± 7.1 | 50.0 ± 0.0 | 11.0 ± 1.4 |"]


def test_the_table_shows_what_lessons_left(harness: ModuleType) -> None:
    values = {"accuracy_cnn": 0.8, "accuracy_logistic": 0.5, "fd_classifier": 10.0}
    stages = [
        {"stage": name, "epsilon": 0.1, "accuracy": accuracy, "fd_classifier": distance}
        for name, accuracy, distance in (("mean", 0.3, 90.0), ("frequency", 0.6, 40.0), ("dp_sgd", 0.8, 10.0))
    ]
    cell = {"dataset": "mnist", "epsilon": "1", "method": "means-frequency", "seed": 0, "stages": stages}
    cell["metrics"] = {name: {"value": value} for name, value in values.items()}
    left = {"accuracy_cnn": {"value": 0.6}, "fd_classifier": {"value": 40.0}}
    alone = {**cell, "method": "means-frequency-alone", "stages": [], "metrics": left}
    for cells in ({"a": cell}, {"a": cell, "b": alone}):
        assert list(harness.table(cells))[2:] == [
            "| mnist | 1 | means-frequency | 1 | 80.0 | 50.0 | 10.0 |",
            "| mnist | 1 | means-frequency-alone | 1 | 60.0 |  | 40.0 |",
        ]
