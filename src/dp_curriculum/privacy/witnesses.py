"""Second opinions on an epsilon: Opacus' PRV and RDP accountants, other code and other mathematics than ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from opacus.accountants import PRVAccountant, RDPAccountant

from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.verification import Check, not_checked


PRV_ERROR = 0.01  # of epsilon, either way, as Opacus is asked for
logger = logging.getLogger(__name__)


def ask_witnesses(events: Sequence[GaussianEvent], delta: float, epsilon: float) -> list[Check]:
    """
    Compares an epsilon for adding or removing one image with what Opacus computes from the same events.

    Args:
        events (`Sequence[GaussianEvent]`): What was released, with noise.
        delta (`float`): In `(0, 1)`.
        epsilon (`float`): Ours.

    Returns:
        `list[Check]`: PRV holds if it agrees within its error; RDP, a looser bound, if it is not below. If a witness
        cannot compute, its claim is not checked.
    """
    prv, rdp = _epsilon_of(PRVAccountant(), events, delta), _epsilon_of(RDPAccountant(), events, delta)
    agrees = prv is not None and -PRV_ERROR <= prv - epsilon <= 2 * PRV_ERROR + 1e-2 * epsilon
    return [
        _check("witness PRV (Opacus)", epsilon, prv, agrees),
        _check("witness RDP (Opacus), looser", epsilon, rdp, rdp is not None and rdp >= epsilon - 1e-6),
    ]


def _check(name: str, claimed: float, computed: float | None, holds: bool) -> Check:
    if computed is None:
        return not_checked(name, f"{claimed:.6f}", "not computable")
    return Check(name, f"{claimed:.6f}", f"{computed:.6f}", holds)


def _epsilon_of(
    accountant: PRVAccountant | RDPAccountant, events: Sequence[GaussianEvent], delta: float
) -> float | None:
    if not events:
        return 0.0
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.num_steps) for event in events]
    options = {"eps_error": PRV_ERROR} if isinstance(accountant, PRVAccountant) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the order at which RDP is best: it is a bound at any
        try:
            return float(accountant.get_epsilon(delta, **options))
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            # Known for some inputs (opacus issues 601 and 604).
            logger.info(f"{type(accountant).__name__} could not compute: {type(error).__name__} {error}")
            return None
