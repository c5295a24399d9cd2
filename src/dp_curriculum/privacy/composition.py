# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""The cost of several runs on one dataset, together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dp_curriculum.privacy.accounting import (
    Adjacency,
    Events,
    GaussianEvent,
    compute_delta,
    compute_epsilon,
    compute_gdp_mu,
)
from dp_curriculum.privacy.selection import Selection, events_from_dicts, events_to_dicts, merged


@dataclass(frozen=True)
class Charge:
    """
    The cost of a run: mechanisms, or a selection among tries.

    Args:
        events (`tuple[GaussianEvent, ...]`): Mechanisms, composed in sequence.
        selection ([`Selection`], *optional*): A choice among tries, beside them.
    """

    events: Events = ()
    selection: Selection | None = None

    def epsilon(self, delta: float, *, adjacency: Adjacency, group_size: int = 1) -> float:
        """Epsilon of this charge alone."""
        return total_epsilon([self], delta, adjacency=adjacency, group_size=group_size)

    def gdp_mu(self, *, adjacency: Adjacency, group_size: int = 1) -> float | None:
        """As [`~accounting.compute_gdp_mu`]; `None` of a selection, whose profile has none."""
        if self.selection is not None:
            return None
        return compute_gdp_mu(self.events, adjacency=adjacency, group_size=group_size)

    def distance(self, epsilon: float, delta: float, *, adjacency: Adjacency, group_size: int = 1) -> float:
        """Total variation distance of neighbours; of a selection, the most that its epsilon and delta allow."""
        if self.selection is None:
            return compute_delta(self.events, 0.0, adjacency=adjacency, group_size=group_size)
        # Kairouz, Oh and Viswanath 2015, arXiv 1311.0776: the region of errors of (epsilon, delta).
        return min(1.0, math.tanh(epsilon / 2) + 2 * delta / (1 + math.exp(min(epsilon, 700.0))))

    def holds(self, events: Iterable[GaussianEvent]) -> bool:
        """True if these are all that one try spends, of a charge for tries."""
        if self.selection is None:
            return self.covers(events)
        return merged(events) in [merged(alternative) for alternative in self.selection.alternatives]

    def covers(self, events: Iterable[GaussianEvent]) -> bool:
        """True if all of these steps are among those of `events`."""
        held = {(event.noise_multiplier, event.sample_rate): event.num_steps for event in merged(self.events)}
        return all(
            held.get((event.noise_multiplier, event.sample_rate), 0) >= event.num_steps for event in merged(events)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        selection = None if self.selection is None else self.selection.to_dict()
        return {"mechanisms": events_to_dicts(merged(self.events)), "selection": selection}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Charge:
        """
        The inverse of [`~Charge.to_dict`].

        Raises:
            ValueError: If `values` is no charge.
        """
        try:
            events, selection = events_from_dicts(values["mechanisms"]), values["selection"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a charge: {type(error).__name__} {error}.") from None
        return cls(events, None if selection is None else Selection.from_dict(selection))


def total_epsilon(charges: Iterable[Charge], delta: float, *, adjacency: Adjacency, group_size: int = 1) -> float:
    """
    Epsilon at `delta` of all charges together, never below the exact value.

    All mechanisms of all runs are one composition of privacy loss distributions. The epsilon of each selection is
    added to that, and each takes an equal part of `delta`.
    """
    charges = list(charges)
    selections = [charge.selection for charge in charges if charge.selection is not None]
    events = [event for charge in charges for event in charge.events]
    part = delta / (len(selections) + bool(events)) if selections else delta
    # A delta that a part cannot resolve, of which there is none without selections, is refused by the accountant.
    total = compute_epsilon(events, part, adjacency=adjacency, group_size=group_size)
    return total + sum(choice.epsilon(part, adjacency=adjacency, group_size=group_size) for choice in selections)
