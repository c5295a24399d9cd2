"""A private mechanism before it is spent: what the plan calibrates, the ledger charges, and the query draws with."""

from __future__ import annotations

from dataclasses import dataclass

from dp_curriculum.privacy.accounting import GaussianEvent


DP_SGD = "dp-sgd"  # the hard stage's name in the ledger


@dataclass(frozen=True)
class PlannedStage:
    """
    One private mechanism of a run, before it is spent.

    Args:
        name (`str`): Its name in the ledger and on the card.
        clip_norm (`float`): L2 bound of what one image adds to a released sum.
        event ([`~accounting.GaussianEvent`]): What it spends.
    """

    name: str
    clip_norm: float
    event: GaussianEvent
