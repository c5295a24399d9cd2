"""`dp-curriculum budget`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from dp_curriculum.commands.arguments import CommandParser
from dp_curriculum.privacy.accounting import ADJACENCIES, Adjacency
from dp_curriculum.privacy.dataset_budget import UNITS, DatasetBudget, HeldRun
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, create_dataset_ledger, key_path


_ACTIONS = ("create", "show", "adopt")


def main(args: Sequence[str]) -> int:
    """Makes the ledger of a dataset, or shows what its runs spent, what was shared and what is left. Owner only."""
    parser = CommandParser("budget", main.__doc__)
    parser.add_argument("action", metavar="create|show|adopt", help="adopt: say that a moved ledger is the only one.")
    parser.add_argument("path", help="The ledger.")
    parser.add_argument("--epsilon", type=float, help="create: all that may ever be spent on the dataset.")
    parser.add_argument(
        "--delta", type=float, help="create: delta of the whole; choose it below 1 / number of images."
    )
    parser.add_argument("--unit", default="image", help=f"create: what is protected, {' or '.join(UNITS)}.")
    parser.add_argument("--adjacency", default=ADJACENCIES[0], help=f"create: {' or '.join(ADJACENCIES)}.")
    parser.add_argument("--group_size", type=int, default=1, help="create: units that change together.")
    parser.add_argument("--json", action="store_true", help="show: as JSON.")
    given = parser.parse_args(args)
    if given.action not in _ACTIONS:
        raise ValueError(f"Expected budget {given.action} to be one of {', '.join(_ACTIONS)}.")
    if given.action == "create":
        return _create(given)
    with DatasetLedger.open(given.path, adopt=given.action == "adopt") as ledger:
        budget, runs = ledger.budget, ledger.runs
    facts = describe(budget, runs)
    print(json.dumps(facts, indent=2) if given.json else _table(budget, facts))
    return 0


def _create(given: Any) -> int:
    for name in ("epsilon", "delta"):
        if getattr(given, name) is None:
            raise ValueError(f"Expected --{name} to be given: it is the budget.")
    fields = {name: getattr(given, name) for name in ("epsilon", "delta", "unit", "adjacency", "group_size")}
    budget = DatasetBudget(**fields)
    create_dataset_ledger(given.path, budget)
    print(
        f"{given.path}: epsilon {budget.epsilon:g} at delta {budget.delta:g}, one {budget.unit}, {budget.adjacency}\n"
        f"its key, which stays with you: {key_path(given.path)}\n"
        f"train with: --dataset_ledger {given.path}"
    )
    return 0


def describe(budget: DatasetBudget, runs: Sequence[HeldRun]) -> dict[str, Any]:
    """Contents of the ledger of a dataset, in JSON types: each run, and all of them under both adjacencies."""
    charges = [run.charge for run in runs]
    shared = [run.charge for run in runs if run.shared]
    return {
        "budget": asdict(budget),
        "runs": [
            {
                "run": run.label,
                "holder": run.holder,
                "state": "ended" if run.settled else "under way, or ended by a crash",
                "epsilon": budget.spent([run.charge]),
                "shared": list(run.shared),
                **run.charge.to_dict(),
            }
            for run in runs
        ],
        "spent": {
            "epsilon": budget.spent(charges),
            **{
                f"epsilon_{name.replace('-', '_')}": budget.spent(charges, adjacency=name)
                for name in get_args(Adjacency)
            },
        },
        "shared": {"epsilon": budget.spent(shared), "num_runs": len(shared)},
        "left_for_one_run": budget.left(charges),
    }


def _table(budget: DatasetBudget, facts: dict[str, Any]) -> str:
    rows = [("run", "state", "epsilon alone", "shared")]
    for run in facts["runs"]:
        rows.append((run["run"], run["state"], f"{run['epsilon']:.4f}", "; ".join(run["shared"]) or "nothing"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    spent, shared = facts["spent"], facts["shared"]
    of = "1 run" if shared["num_runs"] == 1 else f"{shared['num_runs']} runs"
    return "\n".join(
        [
            *lines,
            f"spent   epsilon {spent['epsilon']:.4f} of {budget.epsilon:g} at delta {budget.delta:g}, all runs "
            f"together; one {budget.unit}, {budget.adjacency}",
            f"        {spent['epsilon_add_or_remove_one']:.4f} for adding or removing one, "
            f"{spent['epsilon_replace_one']:.4f} for replacing one",
            f"shared  epsilon {shared['epsilon']:.4f}, of {of}, if the choice of what to share did "
            "not depend on the others; else what is spent",
            f"left    about {int(1000 * facts['left_for_one_run']) / 1000:g} for one run",
        ]
    )
