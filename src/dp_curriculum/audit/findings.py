"""Findings of an audit: one claim per line, how it was measured, and the smallest fault that would have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats


ALPHA = 1e-6  # chance of a false alarm of a statistical check
POWER = 0.999  # chance with which a check catches the smallest fault that it names


@dataclass(frozen=True)
class Finding:
    """
    One claim that was put to the test.

    Args:
        claim (`str`): What must hold, in words.
        holds (`bool`): Whether it did.
        measured (`str`): What was seen.
        allowed (`str`): What would have been acceptable.
        power (`str`): How much was looked at, and the smallest fault that this catches.
    """

    claim: str
    holds: bool
    measured: str
    allowed: str
    power: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_hold(findings: Sequence[Finding]) -> bool:
    """True if there are findings, and all of them hold."""
    return bool(findings) and all(finding.holds for finding in findings)


def failed(findings: Sequence[Finding]) -> list[str]:
    """The claims that do not hold, with what was measured instead."""
    return [f"{finding.claim}: {finding.measured}" for finding in findings if not finding.holds]


def two_sided() -> float:
    """Number of standard errors that a true claim exceeds, on either side, with probability `ALPHA`."""
    return float(stats.norm.isf(ALPHA / 2))


def detectable() -> float:
    """Number of standard errors by which a fault must move a statistic to be caught with probability `POWER`."""
    return two_sided() + float(stats.norm.ppf(POWER))


def chi_square_score(ratio: float, count: float) -> float:
    """A mean of `count` squared normals as a standard normal, also far out (Wilson and Hilferty 1931)."""
    return float((ratio ** (1 / 3) - (1 - 2 / (9 * count))) / math.sqrt(2 / (9 * count)))


def variance(claim: str, ratio: float, error: float, *, count: int) -> Finding:
    """
    A variance over what it must be.

    Args:
        claim (`str`): The claim.
        ratio (`float`): The variance that was found, over the one that was claimed.
        error (`float`): Its standard error under the claim.
        count (`int`): Number of draws behind it.
    """
    freedom = 2 / error**2  # a mean of that many squared normals has this standard error
    low, high = (float(stats.chi2.ppf(share, freedom)) / freedom for share in (ALPHA / 2, 1 - ALPHA / 2))
    # What is larger by this factor ends above `high` with probability `POWER`.
    fault = high / (float(stats.chi2.ppf(1 - POWER, freedom)) / freedom) - 1
    return Finding(
        claim,
        holds=low <= ratio <= high,
        measured=f"variance {ratio:.4f} of what it must be",
        allowed=f"{low:.4f} to {high:.4f}",
        power=f"n = {count:,}, alpha = {ALPHA:g}; catches a variance that is {fault:.2g} too large",
    )


def statistical(claim: str, value: float, error: float, *, unit: str, count: int) -> Finding:
    """
    A statistic whose mean is 0 under the claim, with standard error `error`.

    Args:
        claim (`str`): The claim.
        value (`float`): The statistic.
        error (`float`): Its standard error under the claim.
        unit (`str`): What the statistic measures, e.g. "correlation".
        count (`int`): Number of draws behind it.
    """
    limit = two_sided() * error
    return Finding(
        claim,
        holds=math.isfinite(value) and abs(value) <= limit,
        measured=f"{unit} {value:+.2g}",
        allowed=f"within {limit:.2g}",
        power=f"n = {count:,}, alpha = {ALPHA:g}; catches {detectable() * error:.2g}",
    )
