"""Is our epsilon above the exact one, and how far? Epsilon of other accountants as their grid of losses gets finer.

An accountant that rounds losses up to multiples of an interval is above the exact epsilon, and falls towards it with
the square of the interval; the last two intervals give an estimate of that limit (Richardson). Two accountants:

`library`: dp_accounting's own steps, `from_gaussian_mechanism` for one image that is added, removed or replaced, and
`from_mixture_gaussian_mechanism` for a group that is added or removed. For a group that is replaced it has none. On
fine grids it rounds: it takes differences of deltas.

`reference`: a step that is made here, for any of the four, and shares no code with ours or dp_accounting's. It finds
by bisection where the loss passes each multiple, takes the probabilities of the cells between, and gives each to the
two ends of its cell, such that both distributions keep theirs. That is the same rounding as connecting the dots
(Doroshenko et al. 2022, arXiv 2207.04380), without differences of numbers that are nearly the same.

    python benchmarks/accounting_grid.py --output benchmarks/results/accounting_grid.json

`tests/test_accounting_grid.py` computes the coarse intervals anew and reads the fine ones from the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import special, stats

from dp_curriculum.privacy.accounting import Adjacency, GaussianEvent, choose_discretization, compute_epsilon


RESULTS = Path(__file__).parent / "results" / "accounting_grid.json"
INTERVALS = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_TAIL = 10.0  # standard deviations, beyond which 1.5e-23 of a step's outputs lie
_ROWS = 20_000  # losses that are looked for at once

Mixture = tuple[np.ndarray, np.ndarray]  # of normals of variance 1: logarithms of weights, and means


@dataclass(frozen=True)
class Case:
    """What is composed: steps as `(noise_multiplier, sample_rate, num_steps)`."""

    steps: tuple[tuple[float, float, int], ...]
    delta: float
    adjacency: Adjacency = "add-or-remove-one"
    group_size: int = 1

    @property
    def name(self) -> str:
        steps = " + ".join(f"({noise:g}, {rate:g}, {count})" for noise, rate, count in self.steps)
        return f"{steps} at {self.delta:g}, {self.adjacency}, group of {self.group_size}"

    def events(self, *, more_noise: float = 1.0) -> list[GaussianEvent]:
        return [GaussianEvent(noise * more_noise, rate, count) for noise, rate, count in self.steps]

    def ours(self, *, more_noise: float = 1.0) -> float:
        return compute_epsilon(
            self.events(more_noise=more_noise), self.delta, adjacency=self.adjacency, group_size=self.group_size
        )

    @property
    def our_interval(self) -> float:
        return choose_discretization(self.events(), adjacency=self.adjacency, group_size=self.group_size)


_SINGLE = (
    (((1.5, 1e-4, 100_000),), 1e-8),
    (((0.8, 1e-5, 20_000),), 1e-7),
    (((1.0, 1e-3, 30_000),), 1e-7),
    (((20.0, 1.0, 2), (6.3, 0.0683, 2200)), 1e-5),  # lessons, then DP-SGD, as a preset has them
)
_GROUPS = (
    (((20.0, 1e-3, 2000),), 1e-6),
    (((8.0, 1e-4, 5000),), 1e-7),
    (((640.0, 1.0, 2), (400.0, 0.0683, 2200)), 1e-5),
)
CASES = tuple(
    Case(steps, delta, adjacency, group_size)
    for group_size, cases in ((1, _SINGLE), (64, _GROUPS))
    for adjacency in ("add-or-remove-one", "replace-one")
    for steps, delta in cases
)


def library_epsilon(case: Case, interval: float) -> float | None:
    """Epsilon of dp_accounting's own steps on a grid of this interval; `None` where it has no such step."""
    if case.group_size > 1 and case.adjacency == "replace-one":
        return None
    return _compose(case, interval, _library_step)


def reference_epsilon(case: Case, interval: float) -> float:
    """Epsilon of the steps of this file on a grid of this interval."""
    return _compose(case, interval, _reference_step)


def limit(epsilons: Sequence[tuple[float, float]]) -> float:
    """Where the epsilons, by interval, go to: their error falls as the square of the interval."""
    (coarse, before), (fine, last) = sorted(epsilons, reverse=True)[-2:]
    return last - (before - last) / ((coarse / fine) ** 2 - 1)


def _compose(
    case: Case, interval: float, make: Callable[[Case, float, float, float], pld.PrivacyLossDistribution]
) -> float:
    composed = pld.identity(interval)
    for noise, rate, count in case.steps:
        composed = composed.compose(make(case, noise, rate, interval).self_compose(count))
    return float(composed.get_epsilon_for_delta(case.delta))


def _library_step(case: Case, noise: float, rate: float, interval: float) -> pld.PrivacyLossDistribution:
    if case.group_size == 1:
        relation = NeighboringRelation[case.adjacency.upper().replace("-", "_")]
        return pld.from_gaussian_mechanism(
            noise, value_discretization_interval=interval, sampling_prob=rate, neighboring_relation=relation
        )
    sampled = np.arange(case.group_size + 1)
    weights = stats.binom.pmf(sampled, case.group_size, rate)
    return pld.from_mixture_gaussian_mechanism(
        noise, sampled[weights > 0], weights[weights > 0], value_discretization_interval=interval
    )


def _reference_step(case: Case, noise: float, rate: float, interval: float) -> pld.PrivacyLossDistribution:
    """Of k images, j are sampled, with binomial probability: N(j) against N(0), or against N(-j) if replaced."""
    sampled = np.arange(case.group_size + 1)
    log_weights = stats.binom.logpmf(sampled, case.group_size, rate)
    occurs = log_weights > -745  # the least logarithm of a float
    log_weights, means = log_weights[occurs], sampled[occurs] / noise
    with_them, opposite, without = (log_weights, means), (log_weights, -means), (np.zeros(1), np.zeros(1))
    if case.adjacency == "replace-one":
        return pld.PrivacyLossDistribution(_rounded(with_them, opposite, interval))
    return pld.PrivacyLossDistribution(_rounded(with_them, without, interval), _rounded(without, opposite, interval))


def _rounded(upper: Mixture, lower: Mixture, interval: float) -> pld_pmf.PLDPmf:
    """Losses of `upper` against `lower`, whose means are not greater, rounded up to multiples of the interval."""
    ends = np.array([min(lower[1].min(), upper[1].min()) - _TAIL, max(lower[1].max(), upper[1].max()) + _TAIL])
    lowest, highest = _losses(upper, lower, ends)
    multiples = np.arange(math.floor(lowest / interval), math.ceil(highest / interval) + 1)
    losses = multiples * interval
    borders = _in_parts(lambda part: _passes(upper, lower, part, ends), losses)
    # Below the first multiple, between each two, and above the last.
    starts, stops = np.concatenate([[-np.inf], borders]), np.concatenate([borders, [np.inf]])
    log_upper, log_lower = (
        _in_parts(lambda rows, m=mixture: _log_masses(m, starts[rows], stops[rows]), np.arange(len(starts)))
        for mixture in (upper, lower)
    )
    masses = np.exp(log_upper)
    with np.errstate(all="ignore"):  # nothing against nothing
        ratio = np.exp(log_lower[1:-1] - log_upper[1:-1] + losses[:-1])  # from e^-interval, at the upper end, to 1
    to_lower_end = np.clip(np.nan_to_num((ratio - math.exp(-interval)) / -math.expm1(-interval)), 0, 1)
    probabilities = np.zeros(len(losses))
    probabilities[0] = masses[0]
    probabilities[:-1] += masses[1:-1] * to_lower_end
    probabilities[1:] += masses[1:-1] * (1 - to_lower_end)
    return pld_pmf.DensePLDPmf(interval, int(multiples[0]), probabilities, float(masses[-1]), True)


def _in_parts(function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """A function of each row, with few rows at once: there is one column a component."""
    return np.concatenate([function(rows[first : first + _ROWS]) for first in range(0, len(rows), _ROWS)])


def _losses(upper: Mixture, lower: Mixture, y: np.ndarray) -> np.ndarray:
    def log_density(mixture: Mixture) -> np.ndarray:  # against that of N(0)
        log_weights, means = mixture
        return special.logsumexp(log_weights + means * y[:, None] - means**2 / 2, axis=1)

    return log_density(upper) - log_density(lower)


def _passes(upper: Mixture, lower: Mixture, losses: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where the loss, which grows with the output, passes each of these."""
    low, high = np.full(len(losses), ends[0]), np.full(len(losses), ends[1])
    for _ in range(60):
        middle = (low + high) / 2
        is_below = _losses(upper, lower, middle) < losses
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return (low + high) / 2


def _log_masses(mixture: Mixture, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Logarithms of the probability of each cell, from the nearer tail."""
    log_weights, means = mixture
    start, stop = starts[:, None] - means, stops[:, None] - means
    flipped = start + stop > 0
    start, stop = np.where(flipped, -stop, start), np.where(flipped, -start, stop)
    with np.errstate(all="ignore"):
        below, above = special.log_ndtr(start), special.log_ndtr(stop)
        cells = above + np.log(-np.expm1(np.minimum(below - above, 0)))
    return special.logsumexp(log_weights + np.nan_to_num(cells, nan=-np.inf, neginf=-np.inf), axis=1)


def measure(case: Case, intervals: Sequence[float], *, seconds: float) -> dict[str, Any]:
    """Epsilon by interval, from coarse to fine; of each accountant until an interval took it longer than `seconds`."""
    rows: list[dict[str, float | None]] = []
    library_spent = 0.0
    for interval in intervals:
        started = time.process_time()
        reference = reference_epsilon(case, interval)
        reference_spent, started = time.process_time() - started, time.process_time()
        library = library_epsilon(case, interval) if library_spent <= seconds else None
        library_spent = max(library_spent, time.process_time() - started)
        rows.append({"interval": interval, "reference": reference, "library": library})
        rows[-1] |= {"reference_seconds": round(reference_spent, 2), "library_seconds": round(library_spent, 2)}
        print(f"  {interval:g}: {reference:.8f} ({reference_spent:.1f} s), library {library}", flush=True)
        if reference_spent > seconds:
            break
    found = limit([(row["interval"], row["reference"]) for row in rows])  # type: ignore[misc]
    ours = {"ours": case.ours(), "our_interval": case.our_interval}
    return {"name": case.name, **asdict(case), "epsilons": rows, "limit": found, **ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=float, nargs="+", default=INTERVALS)
    parser.add_argument("--seconds", type=float, default=60.0, help="No finer interval after one that took as long.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    cases = []
    for case in CASES:
        print(case.name, flush=True)
        cases.append(measure(case, given.intervals, seconds=given.seconds))
        above = cases[-1]["ours"] / cases[-1]["limit"] - 1
        print(f"  limit {cases[-1]['limit']:.8f}, ours {cases[-1]['ours']:.8f}, {above:.2e} above", flush=True)
        given.output.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
