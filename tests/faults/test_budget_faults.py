"""
Faults in the budget of a dataset and in tuning, planted one at a time: a check that is named here notices each.

As in `test_seeded_faults`: a check holds before the fault is planted, and does not after.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from planting import Change, plant

from dp_curriculum.data import digits_dataset, open_rows, read_images
from dp_curriculum.data.fingerprint import Fingerprint
from dp_curriculum.privacy import composition, selection
from dp_curriculum.privacy.accounting import GaussianEvent, compute_epsilon
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.dataset_budget import DatasetBudget
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, create_dataset_ledger
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.selection import Selection, Tries
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training import tuning, tuning_plan
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.dataset_account import DatasetAccount
from dp_curriculum.training.tuning import tune
from dp_curriculum.training.tuning_plan import TuningOptions, plan_tuning


ROWS, DELTA = 40, 1e-5
Check = Callable[[Any, Path], bool]


class Fault(NamedTuple):
    """One fault: what it is, where it is planted, and who notices."""

    what: str
    owner: Any
    name: str
    changes: list[Change]
    check: Check


def _config(make_config: Any, folder: Path, **fields: Any) -> Any:
    if not (folder / "ledger.jsonl").exists():
        create_dataset_ledger(folder / "ledger.jsonl", DatasetBudget(epsilon=8.0, delta=DELTA))
    return make_config(
        target_epsilon=3.0, public_dataset_size=ROWS, expected_batch_size=ROWS, num_dp_steps=2, checkpointing_steps=1,
        pretrain_steps=1, sample_steps=0, num_inference_steps=2, dataset_ledger=str(folder / "ledger.jsonl"), **fields,
    )  # fmt: skip


def _spent(folder: Path) -> float:
    with DatasetLedger.open(folder / "ledger.jsonl") as ledger:
        return ledger.budget.spent(ledger.charges)


def released_is_held(make_config: Any, folder: Path) -> bool:
    """What the ledger of a run charges, by the accountant alone, is no more than that of its dataset has."""
    try:
        run_curriculum(_config(make_config, folder), digits_dataset().select(range(ROWS)), output_dir=folder / "a")
    except (RuntimeError, ValueError):  # what is not held cannot be charged, nor settled for
        return False
    with PrivacyLedger.open(RunFolder(folder / "a").ledger, create=False) as own:
        return _spent(folder) >= compute_epsilon(own.events, DELTA) - 1e-9


def nothing_passes_the_budget(make_config: Any, folder: Path) -> bool:
    """Runs reserve until they are refused: the composition of all that was reserved is within the budget."""
    create_dataset_ledger(folder / "ledger.jsonl", DatasetBudget(epsilon=8.0, delta=DELTA))
    reserved = []
    for number in range(30):
        charge = Charge((GaussianEvent(2.0 + number / 10),))
        with (
            PrivacyLedger.open(folder / f"{number}.jsonl") as own,
            DatasetLedger.open(folder / "ledger.jsonl") as all_,
        ):
            try:
                all_.reserve(own, charge, label="run", data="data")
            except ValueError:
                break
        reserved += charge.events
    return compute_epsilon(reserved, DELTA) <= 8.0


def other_data_are_told(make_config: Any, folder: Path) -> bool:
    """The second run reads one other image."""
    create_dataset_ledger(folder / "ledger.jsonl", DatasetBudget(epsilon=8.0, delta=DELTA))
    for first in (0, 1):
        with DatasetLedger.open(folder / "ledger.jsonl") as dataset:
            config = make_config()
            fingerprint = Fingerprint(dataset.key)
            rows = digits_dataset().select(range(first, first + ROWS))
            read_images(fingerprint.watch(open_rows(rows, config.data)), config.data)
            with PrivacyLedger.open(folder / f"{first}.jsonl") as own:
                try:
                    dataset.reserve(own, Charge((GaussianEvent(9.0),)), label="run", data=fingerprint.digest())
                except ValueError:
                    return first == 1
    return False


def tries_are_charged(make_config: Any, folder: Path) -> bool:
    """Every training that is made is among the alternatives that were charged before, with its score."""
    config = _config(make_config, folder, holdout=0.5).replace(expected_batch_size=ROWS // 2, target_epsilon=6.0)
    options = TuningOptions(({"dp_learning_rate": 1e-3}, {"num_dp_steps": 3}), 4.0, num_images=100)
    plan = plan_tuning(config, options, dataset_size=ROWS // 2, num_classes=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_draw_settings", lambda plan: [0, 1])
        try:
            report = tune(config, plan, digits_dataset().select(range(ROWS)), output_dir=folder / "out")
        except RuntimeError:  # a try whose ledger is not that of one that was reserved
            return False
    return report.epsilon <= _spent(folder) + 1e-9


def choice_is_charged(make_config: Any, folder: Path) -> bool:
    """Epsilon of the best of four tries is above that of one."""
    charge = Charge((), Selection(Tries(4.0), ((GaussianEvent(1.0),),)))
    one = compute_epsilon([GaussianEvent(1.0)], DELTA / 4)
    return charge.epsilon(DELTA, adjacency="add-or-remove-one") > one + 0.1


def tries_are_drawn_anew(make_config: Any, folder: Path) -> bool:
    """Not all of the grid every time: the number of tries is random, and so is what each of them is."""
    config = _config(make_config, folder, holdout=0.5).replace(expected_batch_size=ROWS // 2, target_epsilon=6.0)
    options = TuningOptions(tuple({"num_dp_steps": steps} for steps in (2, 3, 4, 5)), 4.0, num_images=100)
    plan = plan_tuning(config, options, dataset_size=ROWS // 2, num_classes=10)
    draws = [tuple(tuning._draw_settings(plan)) for _ in range(40)]
    return len({len(draw) for draw in draws}) > 1 and any(len(set(draw)) < len(draw) for draw in draws)


FAULTS = [
    Fault("a run that does not reserve", DatasetAccount, "reserve",
          [("dataset.reserve(", "(lambda *arguments, **options: None)("),
           ("if holder_of(ledger) not in before", "if False")], released_is_held),
    Fault("a run that reserves its first stage alone", DatasetAccount, "reserve",
          [("*events_left(plan, ledger, folder)", "*events_left(plan, ledger, folder)[:1]")], released_is_held),
    Fault("a run that settles for nothing", DatasetAccount, "settle",
          [("Charge(ledger.events)", "Charge()")], released_is_held),
    Fault("runs that are not composed", DatasetLedger, "check_fits",
          [("self.budget.spent([*others, charge])", "self.budget.spent([charge])")], nothing_passes_the_budget),
    Fault("the largest run in place of the composition", composition, "total_epsilon",
          [("    total = compute_epsilon(events, part, adjacency=adjacency, group_size=group_size)\n",
            "    total = max([0.0, *(compute_epsilon([e], part, adjacency=adjacency) for e in events)])\n")],
          nothing_passes_the_budget),
    Fault("a fingerprint that is not compared", DatasetLedger, "check_data",
          [("if not hmac.compare_digest(known, fingerprint):", "if False:")], other_data_are_told),
    Fault("a try that is not charged", tuning_plan, "_cheapest",
          [("different = tuple(", "different = tuple(list("),
           (":= list(alternatives)))", ":= list(alternatives)))[:1])")], tries_are_charged),
    Fault("a score that is not charged", tuning, "noisy_count",
          [("        own.reserve(mechanism.event, stage=mechanism.name, clip_norm=mechanism.clip_norm, "
            "execution=execution)\n", "        _ = own, execution\n")], tries_are_charged),
    Fault("the best of several, charged as one", Selection, "epsilon",
          [("return one + max(", "return one + 0 * max(")], choice_is_charged),
    Fault("the best of the whole grid on private data", tuning, "_draw_settings",
          [("if plan.tries is None:", "if True:")], tries_are_drawn_anew),
    Fault("a law of tries that costs nothing", selection.Tries, "log_ratio",
          [("return (self.shape + 1) * high", "return 0.0")], choice_is_charged),
]  # fmt: skip


HOLDS: dict[Check, bool] = {}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_a_planted_fault_is_noticed(fault: Fault, make_config: Any, tmp_path: Path) -> None:
    honest, broken = tmp_path / "honest", tmp_path / "broken"
    honest.mkdir()
    broken.mkdir()
    if fault.check not in HOLDS:  # once for all faults that it is to notice
        HOLDS[fault.check] = fault.check(make_config, honest)
    assert HOLDS[fault.check]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, fault.owner, fault.name, *fault.changes)
        assert not fault.check(make_config, broken)
