# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""The budget of a dataset, and what its runs spend of it together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dp_curriculum.privacy.accounting import (
    ADJACENCIES,
    Adjacency,
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
)
from dp_curriculum.privacy.composition import Charge, total_epsilon
from dp_curriculum.privacy.limits import DELTA, GROUP_SIZE, TARGET_EPSILON, check_range


UNITS = ("image", "person")


@dataclass(frozen=True, kw_only=True)
class DatasetBudget:
    """
    All that may ever be spent on a dataset.

    Args:
        epsilon (`float`): Of all runs together.
        delta (`float`): At which they are composed; that of a run may differ.
        unit (`str`, *optional*, defaults to `"image"`): What is protected: `"image"` or `"person"`.
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation.
        group_size (`int`, *optional*, defaults to 1): Units that change together.

    Raises:
        ValueError: If a value is out of its range.
    """

    epsilon: float
    delta: float
    unit: str = "image"
    adjacency: Adjacency = "add-or-remove-one"
    group_size: int = 1

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, TARGET_EPSILON)
        check_range("delta", self.delta, DELTA)
        check_range("group_size", self.group_size, GROUP_SIZE)
        if self.unit not in UNITS:
            raise ValueError(f"Expected unit={self.unit} to be one of {', '.join(UNITS)}.")
        if self.adjacency not in ADJACENCIES:
            raise ValueError(f"Expected adjacency={self.adjacency} to be one of {', '.join(ADJACENCIES)}.")

    def spent(self, charges: Sequence[Charge], *, adjacency: Adjacency | None = None) -> float:
        """Epsilon of charges together, in the terms of this budget or under another adjacency."""
        return total_epsilon(charges, self.delta, adjacency=adjacency or self.adjacency, group_size=self.group_size)

    def left(self, charges: Sequence[Charge]) -> float:
        """
        Epsilon, at the delta of the budget, of the largest single release that still fits; 0 if none does.

        It is more than the difference of two epsilons, because composition is. A run with many steps may fit a little
        less.
        """
        spent = self.spent(charges)
        if any(charge.selection is not None for charge in charges):  # added, not composed
            return max(0.0, self.epsilon - spent)
        events = tuple(event for charge in charges for event in charge.events)
        try:
            noise = calibrate_noise_multiplier(
                target_epsilon=self.epsilon,
                target_delta=self.delta,
                sample_rate=1.0,
                num_steps=1,
                prior_events=events,
                adjacency=self.adjacency,
                group_size=self.group_size,
            )
        except PrivacyBudgetExceeded:
            return 0.0
        return self.spent([Charge((GaussianEvent(noise),))])


@dataclass(frozen=True)
class HeldRun:
    """
    A run as the ledger of its dataset holds it.

    Args:
        holder (`str`): Name of the run and its folder.
        label (`str`): Name of its folder, for people.
        charge ([`Charge`]): What it is charged with now.
        settled (`bool`): Whether it ended in order, and is charged with what it spent; else with all that it may
            spend.
        shared (`tuple[str, ...]`): What was shared of it, in order.
    """

    holder: str
    label: str
    charge: Charge
    settled: bool
    shared: tuple[str, ...]


def release_facts(budget: DatasetBudget, runs: Sequence[HeldRun]) -> dict[str, Any]:
    """
    Facts on everything that was spent on the dataset so far, for a report that is shared: numbers of runs, the
    mechanisms of all of them, and their epsilon.

    All runs count, also those that were not shared: which one is shared may depend on the others.
    """
    events = [event for run in runs for event in run.charge.events]
    selections = [run.charge.selection.to_dict() for run in runs if run.charge.selection is not None]
    facts = {
        **asdict(budget),
        "limit": budget.epsilon,
        "epsilon": budget.spent([run.charge for run in runs]),
        "num_runs": len(runs),
        "num_shared": sum(bool(run.shared) for run in runs),
        "mechanisms": Charge(tuple(events)).to_dict()["mechanisms"],
        "selections": selections,
    }
    return dict(json.loads(json.dumps(facts, allow_nan=False)))
