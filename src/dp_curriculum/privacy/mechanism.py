"""A private mechanism before it is spent: what the plan calibrates, the ledger charges, and the query draws with."""

from __future__ import annotations

from dataclasses import dataclass

from dp_curriculum.privacy.accounting import GaussianEvent


DP_SGD = "dp-sgd"  # name of the hard stage in the ledger
SCORE = "score"  # name of the count by which a try is chosen


@dataclass(frozen=True)
class PlannedMechanism:
    """
    One private mechanism of a run. What is charged is what is drawn: ledger and query get this one value.

    Args:
        name (`str`): Its name in the ledger and on the card.
        clip_norm (`float`): L2 bound of what one unit, an image or a person, adds to a released sum.
        event ([`~accounting.GaussianEvent`]): What it spends: noise multiplier, sample rate and number of steps.
    """

    name: str
    clip_norm: float
    event: GaussianEvent

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that is added to the sum of one step."""
        return self.event.noise_multiplier * self.clip_norm
