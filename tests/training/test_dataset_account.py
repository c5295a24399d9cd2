"""Runs on a ledger of their dataset: what they reserve, spend, settle for and share, and how they end without it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded, compute_epsilon
from dp_curriculum.privacy.dataset_budget import DatasetBudget, HeldRun
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, create_dataset_ledger
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger, PrivacyReport
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.stopping import StopRequest
from dp_curriculum.sharing.export import export_release, not_private_reasons
from dp_curriculum.sharing.published import check_folder
from dp_curriculum.training import curriculum
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.dataset_account import DatasetAccount


ROWS, STEPS = 61, 4
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return digits_dataset().select(range(ROWS))


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    create_dataset_ledger(tmp_path / "ledger.jsonl", DatasetBudget(epsilon=6.0, delta=1e-5))
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def config(make_config: Any, ledger: Path) -> CurriculumConfig:
    """Batches of all rows are accounted in closed form."""
    return make_config(
        target_epsilon=4.0, expected_batch_size=ROWS, num_dp_steps=STEPS, checkpointing_steps=2, pretrain_steps=2,
        sample_steps=0, num_inference_steps=2, seed=0, dataset_ledger=str(ledger),
    )  # fmt: skip


@pytest.fixture
def train(config: CurriculumConfig, rows: datasets.Dataset, tmp_path: Path) -> Train:
    def run(name: str, data: datasets.Dataset = rows, resume: bool = False, **fields: Any) -> Any:
        options = {"resume_from_checkpoint": "latest"} if resume else {}
        return run_curriculum(config.replace(**fields), data, output_dir=tmp_path / name, **options)

    return run


def held(ledger: Path) -> list[HeldRun]:
    with DatasetLedger.open(ledger) as dataset:
        return dataset.runs


def spent(ledger: Path) -> float:
    with DatasetLedger.open(ledger) as dataset:
        return dataset.budget.spent(dataset.charges)


def released(*folders: Path) -> float:
    """Epsilon of everything that the ledgers of these runs charge, by the accountant alone."""
    events = []
    for folder in folders:
        with PrivacyLedger.open(RunFolder(folder).ledger, create=False) as own:
            events += own.events
    return compute_epsilon(events, 1e-5)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[], None]) -> None:
    step = DPTrainer.step

    def interrupted(self: DPTrainer) -> None:
        if self.num_steps_taken == number:
            what()
        step(self)

    monkeypatch.setattr(DPTrainer, "step", interrupted)


def power_cut() -> None:
    raise RuntimeError("power cut")


def break_off(train: Train, **fields: Any) -> None:
    """A run that loses its power in the step after its first checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train("a", **fields)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_reserves_its_plan_before_it_spends_and_settles_for_what_it_spent(
    train: Train, ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    reserve = PrivacyLedger.reserve

    def watched(self: PrivacyLedger, event: Any, **options: Any) -> int:
        if tmp_path / "a" in self.path.parents and "rehearsal" not in str(self.path):
            seen.append((spent(ledger), held(ledger)[0].settled))
        return reserve(self, event, **options)

    monkeypatch.setattr(PrivacyLedger, "reserve", watched)
    result = train("a")
    assert [settled for _, settled in seen] == [False] * 3 and {epsilon for epsilon, _ in seen} == {spent(ledger)}
    assert held(ledger)[0].settled and spent(ledger) == pytest.approx(result.report.epsilon, rel=1e-9)
    assert spent(ledger) == pytest.approx(released(tmp_path / "a"), rel=1e-9)


def test_what_does_not_fit_is_refused_before_a_folder_is_made(train: Train, ledger: Path, tmp_path: Path) -> None:
    train("a")
    before = ledger.read_bytes()
    with pytest.raises(
        PrivacyBudgetExceeded, match=r"About 4\.\d+ is left for one run with --target_delta=1e-05: set"
    ):
        train("b", target_epsilon=5.0)
    assert not (tmp_path / "b").exists() and ledger.read_bytes() == before
    train("b", target_epsilon=3.0)
    assert released(tmp_path / "a", tmp_path / "b") == pytest.approx(spent(ledger), rel=1e-9)


def test_a_crash_stays_charged_with_the_whole_plan_until_it_is_resumed(
    train: Train, ledger: Path, tmp_path: Path
) -> None:
    break_off(train)
    whole = spent(ledger)
    assert not held(ledger)[0].settled and whole > 3.9
    train("a", resume=True)
    assert held(ledger)[0].settled and len(held(ledger)) == 1 and spent(ledger) <= whole
    assert spent(ledger) == pytest.approx(released(tmp_path / "a"), rel=1e-9)


def test_ctrl_c_frees_what_was_not_spent_and_the_run_goes_on_while_there_is_room(train: Train, ledger: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, ctrl_c)
        assert not train("a").finished
    some = spent(ledger)
    assert held(ledger)[0].settled and some < 3.5
    assert train("a", resume=True).finished and spent(ledger) > some


def test_a_run_ends_with_what_it_has_where_another_one_used_the_budget_up(
    train: Train, ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, ctrl_c)
        first = train("a")
    train("b", target_epsilon=5.0)
    total, weights = spent(ledger), (tmp_path / "a/unet/diffusion_pytorch_model.safetensors").read_bytes()
    at_step(monkeypatch, 2, lambda: pytest.fail("a step that the dataset has no budget for"))
    with pytest.raises(PrivacyBudgetExceeded, match=r"cannot be resumed, and stays as it is. What it has is in"):
        train("a", resume=True)
    assert spent(ledger) == total >= released(tmp_path / "a", tmp_path / "b") - 1e-9
    report = PrivacyReport.from_file(tmp_path / "a/privacy.json")
    assert report.fields["mechanisms"] == first.report.fields["mechanisms"]
    assert (tmp_path / "a/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
    config = CurriculumConfig.from_yaml(RunFolder(tmp_path / "a").config)
    assert not_private_reasons(RunFolder(tmp_path / "a"), config, report) == []


def test_a_stop_before_anything_was_spent_frees_everything(
    train: Train, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = curriculum.run_stages

    def stopped(run: Any) -> None:
        run.stop.requested = True
        stages(run)

    assert hasattr(StopRequest(), "requested")
    monkeypatch.setattr(curriculum, "run_stages", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("a")
    assert held(ledger)[0].settled and spent(ledger) == 0


def test_a_copied_folder_is_charged_for_itself(train: Train, ledger: Path, tmp_path: Path, caplog: Any) -> None:
    break_off(train, target_epsilon=2.0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        train(name, target_epsilon=2.0, resume=True)
    assert "this folder was copied" in caplog.text and len(held(ledger)) == 2
    assert spent(ledger) >= released(tmp_path / "a", tmp_path / "b") - 1e-9


def test_a_replaced_run_stays_charged(train: Train, ledger: Path, config: Any, rows: Any, tmp_path: Path) -> None:
    train("a", target_epsilon=2.0)
    one = spent(ledger)
    run_curriculum(config.replace(target_epsilon=2.0), rows, output_dir=tmp_path / "a", overwrite_output_dir=True)
    assert len(held(ledger)) == 2 and spent(ledger) > one


def test_a_run_belongs_to_its_ledger(train: Train, ledger: Path, tmp_path: Path) -> None:
    break_off(train)
    with pytest.raises(ValueError, match="it is charged to the ledger of its dataset. Name that with"):
        train("a", resume=True, dataset_ledger=None)
    create_dataset_ledger(tmp_path / "another.jsonl", DatasetBudget(epsilon=6.0, delta=1e-5))
    with pytest.raises(LedgerTamperedError, match="charged to another ledger"):
        train("a", resume=True, dataset_ledger=str(tmp_path / "another.jsonl"))
    assert train("a", resume=True).finished


def test_other_images_are_refused_and_nothing_is_spent(train: Train, rows: Any, ledger: Path, tmp_path: Path) -> None:
    train("a", target_epsilon=2.0)
    before = ledger.read_bytes()
    with pytest.raises(ValueError, match="it is the ledger of other images"):
        train("b", digits_dataset().select(range(1, ROWS + 1)), target_epsilon=2.0)
    assert not (tmp_path / "b").exists() and ledger.read_bytes() == before
    train("b", rows.select(range(ROWS - 1, -1, -1)), target_epsilon=2.0, resolution=12)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"unit": "person"}, "it counts in unit person, and this run in unit image"),
        ({"adjacency": "replace-one"}, "it counts in adjacency replace-one"),
        ({"group_size": 3}, "it counts in group_size 3, and this run in group_size 1"),
    ],
)
def test_a_run_in_other_terms_is_refused(train: Train, tmp_path: Path, budget: dict[str, Any], said: str) -> None:
    create_dataset_ledger(tmp_path / "terms.jsonl", DatasetBudget(**{"epsilon": 6.0, "delta": 1e-5, **budget}))
    with pytest.raises(ValueError, match=said):
        train("a", dataset_ledger=str(tmp_path / "terms.jsonl"))


def test_training_without_noise_is_refused(train: Train) -> None:
    with pytest.raises(ValueError, match="to come without --non_private"):
        train("a", non_private=True)


def test_a_run_that_did_not_reserve_cannot_charge(train: Train, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DatasetAccount, "reserve", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="to hold a charge of GaussianEvent"):
        train("a")
    assert spent(ledger) == 0


def test_what_is_shared_is_noted_and_the_card_tells_the_whole(
    train: Train, ledger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        train(name, target_epsilon=2.0)
    export_release(tmp_path / "a", tmp_path / "shared")
    shared = PrivacyReport.from_file(tmp_path / "shared/privacy.json")
    facts = shared.fields["dataset_spending"]
    assert facts["epsilon"] == pytest.approx(released(tmp_path / "a", tmp_path / "b"), rel=1e-9)
    assert (facts["num_runs"], facts["num_shared"]) == (2, 1) and shared.epsilon < facts["epsilon"]
    checks = check_folder(tmp_path / "shared")
    assert [check.name for check in checks if not check.holds] == []
    assert {"epsilon of the dataset", "mechanisms"} <= {check.name for check in checks}
    card = (tmp_path / "shared/README.md").read_text(encoding="utf-8")
    assert "everything from this dataset so far" in card and "2 runs, 1 shared" in card
    _forged_totals_do_not_hold(shared.to_dict())
    options = ["--num_images", "20", "--output_dir", str(tmp_path / "images")]
    assert main(["synthesize", str(tmp_path / "b"), *options]) == 0
    assert [check.name for check in check_folder(tmp_path / "images") if check.fails] == []
    capsys.readouterr()
    assert main(["budget", "show", str(ledger), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["shared"] for run in told["runs"]] == [
        [f"export to {tmp_path / 'shared'}"],
        [f"synthesize to {tmp_path / 'images'}"],
    ]
    assert told["spent"]["epsilon"] == told["shared"]["epsilon"] == facts["epsilon"]
    assert told["spent"]["epsilon_replace_one"] > told["spent"]["epsilon_add_or_remove_one"]
    assert main(["budget", "show", str(ledger)]) == 0
    table = capsys.readouterr().out
    assert f"{facts['epsilon']:.4f} of 6" in table and "left    about" in table and "images" in table
    # moved
    moved = tmp_path / "moved.jsonl"
    for suffix in ("", ".head", ".key"):
        Path(f"{ledger}{suffix}").rename(f"{moved}{suffix}")
    push = ["push", str(tmp_path / "b"), "--export_dir", str(tmp_path / "again")]
    assert main(push) == 2 and main([*push, "--dataset_ledger", str(moved)]) == 4
    assert main(["budget", "adopt", str(moved)]) == 0 and main([*push, "--dataset_ledger", str(moved)]) == 0
    assert len(held(moved)[1].shared) == 2


def _forged_totals_do_not_hold(report: dict[str, Any]) -> None:
    """One that is too low, or of other runs."""

    def failing(**changes: Any) -> set[str]:
        forged = {**report, "dataset_spending": {**report["dataset_spending"], **changes}}
        return {check.name for check in verify_report(forged) if check.fails}

    assert failing() == set()
    assert failing(epsilon=report["epsilon"]) == {"epsilon of the dataset"}
    others = [{**row, "noise_multiplier": 1.5 * row["noise_multiplier"]} for row in report["mechanisms"]]
    events = [{name: row[name] for name in ("noise_multiplier", "sample_rate", "num_steps")} for row in others]
    assert "mechanisms" in failing(mechanisms=events)


def test_a_run_without_a_ledger_of_its_dataset_has_nothing_of_it(train: Train, tmp_path: Path) -> None:
    train("a", dataset_ledger=None)
    assert "dataset" not in RunFolder(tmp_path / "a").ledger.read_text(encoding="utf-8")
    report = export_release(tmp_path / "a", tmp_path / "shared")
    assert "dataset_spending" not in report.fields
    with pytest.raises(ValueError, match="does not say which run of --dataset_ledger it is"):
        export_release(tmp_path / "a", tmp_path / "again", dataset_ledger=str(tmp_path / "ledger.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["create", "{new}", "--epsilon", "10"], 2, "Expected --delta to be given"),
        (["create", "{new}", "--epsilon", "10", "--delta", "2"], 2, "Expected delta=2.0 in"),
        (["create", "{old}", "--epsilon", "10", "--delta", "1e-6"], 2, "A dataset has one ledger"),
        (["show", "{new}"], 2, "its owner makes it once"),
        (["spend", "{old}"], 2, "Expected budget spend to be one of create, show, adopt"),
        (["show", "{old}"], 0, ""),
        (["create", "{new}", "--epsilon", "10", "--delta", "1e-6", "--unit", "person"], 0, ""),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    arguments: list[str], status: int, said: str, ledger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(new=tmp_path / "new.jsonl", old=ledger) for argument in arguments]
    assert main(["budget", *filled]) == status
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == (status > 0)
