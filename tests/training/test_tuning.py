"""Tuning: what it costs, what is charged of a try, what is kept, and that nothing of the others is heard."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dp_curriculum.audit.frozen import WatchedGenerator
from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.accounting import GaussianEvent, PrivacyBudgetExceeded, compute_epsilon
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.dataset_budget import DatasetBudget
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, create_dataset_ledger
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.mechanism import SCORE, PlannedMechanism
from dp_curriculum.privacy.selection import Tries, merged
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing.export import export_release
from dp_curriculum.sharing.published import check_folder
from dp_curriculum.training import tuning, tuning_plan
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.tuning import correct_images, noisy_count, synthetic_score, tune
from dp_curriculum.training.tuning_plan import TuningOptions, TuningPlan, format_tuning, parse_settings, plan_tuning


ROWS, DELTA = 80, 1e-5
SETTINGS = ({"dp_learning_rate": 1e-3}, {"dp_learning_rate": 3e-3}, {"num_dp_steps": 3})


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return digits_dataset().select(range(ROWS))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    """All rows that are left for training, in each batch: accounted in closed form."""
    return make_config(
        target_epsilon=6.0, public_dataset_size=ROWS, holdout=0.5, expected_batch_size=ROWS // 2, num_dp_steps=2,
        checkpointing_steps=2, pretrain_steps=2, sample_steps=0, num_inference_steps=2, seed=0,
    )  # fmt: skip


def planned(config: CurriculumConfig, **fields: Any) -> TuningPlan:
    options = TuningOptions(**{"settings": SETTINGS, "expected_tries": 3.0, "num_images": 100, **fields})
    return plan_tuning(config, options, dataset_size=config.data.training_size(ROWS), num_classes=10)


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["held_out", "synthetic"])
def test_all_of_it_ends_at_the_target_and_a_try_has_more_than_a_share(config: CurriculumConfig, score: str) -> None:
    plan = planned(config, score=score)
    assert 0.98 * 6 <= plan.epsilon <= 6 and plan.epsilon == plan.charge.epsilon(DELTA, adjacency="add-or-remove-one")
    assert plan.charge.selection is not None and plan.tries == Tries(3.0)
    assert 4 < plan.without_tuning < plan.epsilon
    assert len(plan.charge.selection.alternatives) == 2, "a learning rate changes no mechanism"
    assert (plan.score_event is None) == (score == "synthetic")
    for events in plan.charge.selection.alternatives:
        assert (plan.score_event in events) == (score == "held_out")
    words = format_tuning(config, plan)
    assert "3 on average (geometric)" in words and f"epsilon of all of it: {plan.epsilon:.4f}" in words


def test_the_least_of_the_three_ways_is_taken(config: CurriculumConfig) -> None:
    one = planned(config, settings=SETTINGS[:1], expected_tries=5.0, score="synthetic")
    assert one.tries is None and one.without_tuning == pytest.approx(one.epsilon), "there is nothing to choose"
    events = (GaussianEvent(1.0),)
    assert tuning_plan._cheapest(config, one.options, [events])[0] == Charge(events)
    options = dataclasses.replace(one.options, settings=SETTINGS, expected_tries=3.0)
    charge, epsilon = tuning_plan._cheapest(config, options, [events] * 3)
    assert charge.selection is not None and epsilon < compute_epsilon(events * 3, DELTA)


def test_the_noise_of_the_count_follows_from_public_constants(config: CurriculumConfig) -> None:
    def noise(**fields: Any) -> float:
        size = fields.pop("size", ROWS)
        event = tuning_plan._score_event(config, TuningOptions(SETTINGS, 3.0, **fields), size)
        return event.noise_multiplier if event is not None else math.nan

    assert (noise(), noise(size=60_000), noise(score_noise_multiplier=3.0)) == (10.0, 600.0, 3.0)


def test_settings_are_those_of_the_grid_or_a_public_draw_of_them() -> None:
    grid = parse_settings(["dp_learning_rate=1e-3,0.01", "num_dp_steps=4,8"], None, None)
    assert len(grid) == 4 and grid[1] == {"dp_learning_rate": "1e-3", "num_dp_steps": 8}
    some = parse_settings(["dp_learning_rate=1e-3,0.01", "num_dp_steps=4,8"], 2, 7)
    assert len(some) == 2 and all(setting in grid for setting in some)
    assert some == parse_settings(["dp_learning_rate=1e-3,0.01", "num_dp_steps=4,8"], 2, 7)


@pytest.mark.parametrize(
    ("vary", "count", "said"),
    [
        (["target_epsilon=1,2"], None, "to name a field that may be tuned"),
        (["stages=mean"], None, "to name a field that may be tuned"),
        (["resolution=8"], None, "to name a field that may be tuned"),
        (["num_dp_steps"], None, "of the form name=value,value"),
        (["num_dp_steps=1", "num_dp_steps=2"], None, "each name once"),
        (["num_dp_steps=1,2"], 3, "--random_settings=3 in"),
        ([f"num_dp_steps={','.join(map(str, range(1, 102)))}"], None, "it gives 101"),
    ],
)
def test_a_grid_that_is_none_is_refused(vary: list[str], count: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_settings(vary, count, 0)


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"holdout": None}, {}, "Expected --holdout to be given"),
        ({"non_private": True}, {}, "nothing to account"),
        ({}, {"score": "best"}, "--score=best"),
        ({}, {"num_images": 5}, "--num_images=5"),
        ({}, {"score_noise_multiplier": 0.0}, "--score_noise_multiplier=0"),
        ({}, {"expected_tries": 0.5}, "expected=0.5"),
        ({}, {"settings": ({"num_dp_steps": 0},)}, "num_dp_steps"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    config: CurriculumConfig, fields: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        planned(config.replace(**fields), **options)


def test_a_target_that_leaves_nothing_is_refused(config: CurriculumConfig) -> None:
    with pytest.raises(PrivacyBudgetExceeded):
        planned(config.replace(target_epsilon=0.1), score_noise_multiplier=1.0)


def test_persons_are_not_counted_as_images(config: CurriculumConfig) -> None:
    config = config.replace(person_column="person")
    with pytest.raises(ValueError, match="one person may be many of the images"):
        planned(config)
    assert planned(config, score="synthetic").score_event is None


# --- the score -------------------------------------------------------------------------------------------------------


def held_out_images(count: int) -> PrivateImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return PrivateImages(images, torch.arange(count) % 3, ("a", "b", "c"))


def test_one_image_more_or_less_changes_the_count_by_at_most_one() -> None:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand((60, 1, 8, 8), generator=generator), torch.arange(60) % 3
    rows = held_out_images(30)
    whole, changes = correct_images(images, labels, rows), set()
    for left_out in range(30):
        kept = torch.arange(30) != left_out
        fewer = PrivateImages(rows.images[kept], rows.labels[kept], rows.class_names)
        changes.add(whole - correct_images(images, labels, fewer))
    assert changes == {0, 1} and 0 < whole < 30
    unreadable = PrivateImages(rows.images, torch.full((30,), NO_CONTRIBUTION), rows.class_names)
    assert correct_images(images, labels, unreadable) == 0


def test_the_count_is_charged_before_its_noise_is_drawn(tmp_path: Path) -> None:
    path, mechanism = tmp_path / "ledger.jsonl", PlannedMechanism(SCORE, 1.0, GaussianEvent(7.0))
    PrivacyLedger.open(path).close()
    secret, charged = WatchedGenerator(), []
    draw = secret.gaussian

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        charged.append('"stage": "score"' in path.read_text(encoding="utf-8"))
        return draw(*arguments, **options)

    secret.gaussian = watched  # type: ignore[method-assign]
    found = noisy_count(20, mechanism, path, secret)
    assert charged == [True] and secret.stds == [7.0] and found != 20
    with PrivacyLedger.open(path) as ledger:
        assert ledger.events == (GaussianEvent(7.0),) and ledger.mechanisms[0]["clip_norm"] == 1.0


def test_the_score_of_generated_images_is_higher_where_classes_differ() -> None:
    labels = torch.arange(300) % 3
    noise = torch.rand((300, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    clear = noise.clone()
    clear[:, 0, 0, :3] = torch.nn.functional.one_hot(labels, 3).float() * 5
    assert synthetic_score(clear, labels, 3) > 0.95 > 0.6 > synthetic_score(noise, labels, 3)


# --- a tuning --------------------------------------------------------------------------------------------------------


def test_the_best_try_is_kept_with_one_epsilon_for_all(
    config: CurriculumConfig,
    rows: datasets.Dataset,
    tmp_path: Path,
    capfd: Any,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole way: tries, ledger of the dataset, report, card, export, verify."""
    create_dataset_ledger(tmp_path / "ledger.jsonl", DatasetBudget(epsilon=10.0, delta=DELTA))
    config = config.replace(dataset_ledger=str(tmp_path / "ledger.jsonl"), report_to="tensorboard")
    plan, draws, scores = planned(config), [0, 2, 1], []
    monkeypatch.setattr(tuning, "_draw_settings", lambda plan: draws)
    real = tuning.noisy_count

    def watched(*arguments: Any) -> float:
        with DatasetLedger.open(tmp_path / "ledger.jsonl") as ledger:
            assert ledger.charges == [plan.charge]
        real(*arguments)
        scores.append([1.0, 3.0, 2.0][len(scores)])
        return scores[-1]

    monkeypatch.setattr(tuning, "noisy_count", watched)
    assert {config.runtime.report_to for config in plan.configs} == {"none"}
    capfd.readouterr()
    report = tune(config, plan, rows, output_dir=tmp_path / "out")
    said = "".join(capfd.readouterr())
    assert "lesson" not in caplog.text and "hard stage" not in said and str(len(draws)) + " tries" not in said
    assert len(scores) == 3 and sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]
    kept = CurriculumConfig.from_yaml(RunFolder(tmp_path / "out").config)
    assert kept.dp_sgd.num_dp_steps == 3 and kept.privacy.target_epsilon == 6.0, "the second had the best score"
    assert report.epsilon == plan.epsilon and report.fields["hyperparameter_tuning"]["covered"] is True
    assert report.fields["gdp_mu"] is None and report.fields["mechanisms"][-1]["name"] == SCORE
    with PrivacyLedger.open(RunFolder(tmp_path / "out").ledger) as own:
        assert plan.charge.selection is not None
        assert merged(own.events) in plan.charge.selection.alternatives and own.epsilon(DELTA) == plan.epsilon
    assert [check.name for check in check_folder(tmp_path / "out", local_run=True) if not check.holds] == []
    export_release(tmp_path / "out", tmp_path / "shared")
    checks = check_folder(tmp_path / "shared")
    assert [check.name for check in checks if not check.holds] == []
    assert {"mechanisms of a try", "epsilon of the dataset"} <= {check.name for check in checks}
    with DatasetLedger.open(tmp_path / "ledger.jsonl") as ledger:
        (held,) = ledger.runs
    assert held.settled and held.label == "out (tuning)" and held.shared == (f"export to {tmp_path / 'shared'}",)
    with pytest.raises(ValueError, match="chosen among several tries, and is finished"):
        run_curriculum(kept, rows, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    _forgeries_do_not_hold(report.to_dict(), plan)


def _forgeries_do_not_hold(report: dict[str, Any], plan: TuningPlan) -> None:
    def failing(**changes: Any) -> set[str]:
        return {check.name for check in verify_report({**report, **changes}) if check.fails}

    assert failing() == set()
    tuned = report["hyperparameter_tuning"]
    without = {"covered": True, "note": tuned["note"]}
    assert any("epsilon" in name for name in failing(hyperparameter_tuning=without)), "a choice that is not charged"
    assert plan.charge.selection is not None
    fewer = dataclasses.replace(plan.charge.selection, tries=Tries(1.0))
    cheap = {**tuned, "charge": Charge((), fewer).to_dict()}
    assert any("epsilon" in name for name in failing(hyperparameter_tuning=cheap)), "epsilon is that of more tries"
    rows = [{**row, "noise_multiplier": row["noise_multiplier"] / 2} for row in report["mechanisms"]]
    assert failing(mechanisms=rows) == {"mechanisms of a try"}


def test_a_tuning_that_is_stopped_keeps_nothing_and_stays_charged(
    config: CurriculumConfig, rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_dataset_ledger(tmp_path / "ledger.jsonl", DatasetBudget(epsilon=10.0, delta=DELTA))
    config = config.replace(dataset_ledger=str(tmp_path / "ledger.jsonl"))
    plan, step = planned(config), DPTrainer.step

    def interrupted(self: DPTrainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        step(self)

    monkeypatch.setattr(DPTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="nothing of it is kept"):
        tune(config, plan, rows, output_dir=tmp_path / "out")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    with DatasetLedger.open(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.charges == [plan.charge] and not ledger.runs[0].settled
    with pytest.raises(PrivacyBudgetExceeded):
        tune(config, plan, rows, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_and_the_number_of_tries_are_drawn_from_their_laws(config: CurriculumConfig) -> None:
    plan = planned(config)
    draws = [list(tuning._draw_settings(plan)) for _ in range(4000)]
    lengths = [len(draw) for draw in draws]
    assert sum(lengths) / 4000 == pytest.approx(3, abs=6 * math.sqrt(6 / 4000))
    assert sum(length == 1 for length in lengths) / 4000 == pytest.approx(1 / 3, abs=6 * math.sqrt(2 / 9 / 4000))
    settings = [setting for draw in draws for setting in draw]
    for setting in range(3):
        share = sum(found == setting for found in settings) / len(settings)
        assert share == pytest.approx(1 / 3, abs=6 * math.sqrt(2 / 9 / len(settings)))
    assert list(tuning._draw_settings(dataclasses.replace(plan, tries=None))) == [0, 1, 2]


def test_the_ledger_of_a_run_refuses_to_be_a_try_that_it_is_not(config: CurriculumConfig, tmp_path: Path) -> None:
    plan = planned(config)
    assert plan.charge.selection is not None
    with PrivacyLedger.open(tmp_path / "ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(2.0), stage="easy", clip_norm=1.0)
        with pytest.raises(ValueError, match="to be those of one try"):
            ledger.note_tuning(plan.charge)
    with PrivacyLedger.open(tmp_path / "another.jsonl") as ledger:
        for event in plan.charge.selection.alternatives[0]:
            ledger.reserve(event, stage="easy", clip_norm=1.0)
        ledger.note_tuning(plan.charge)
        with pytest.raises(ValueError, match="to be those of one try"):
            ledger.note_tuning(plan.charge)


def test_the_plan_shows_what_tuning_costs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--resolution", "8", "--holdout", "0.2", "--stages", "dp_sgd", "--expected_batch_size", "1150"]
    options += ["--num_dp_steps", "4"]
    assert main(["plan", *options, "--no_estimate", "--vary", "dp_learning_rate=0.001,0.01"]) == 0
    said = capsys.readouterr().out
    assert "tuning: 2 settings" in said and "in place of 10 without tuning" in said
    assert main(["tune", *options, "--output_dir", "never"]) == 2
    assert "Expected --vary to be given" in capsys.readouterr().err
