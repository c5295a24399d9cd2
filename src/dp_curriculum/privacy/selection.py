# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
r"""
Private selection: the best of a random number of private tries, at little more than the price of one.

Each try draws a setting at random, trains, and scores itself; all of that is one private mechanism Q, whose output is
its model and its score. K tries are made, K at random, and the best alone is released (Liu and Talwar 2018,
arXiv 1811.07971; Papernot and Steinke 2021, arXiv 2110.03620). They bound pure epsilon and Renyi divergences. This
file has the same in privacy profiles, which is the form of our accountant.

Let f be the generating function E[x^K], and u the probability that Q does worse than y. A release is better than the
others, so its density at y is Q(y) f'(u). On the neighbour it is Q'(y) f'(u'). If f'(u) <= e^r f'(u') for all u and u'
that can occur, then the hockey-stick divergence of the selection is

    delta(epsilon) <= integral of f'(u) max(Q(y) - e^(epsilon - r) Q'(y), 0) <= E[K] delta_Q(epsilon - r),

because f' grows and f'(1) = E[K]. So epsilon(delta) <= epsilon_Q(delta / E[K]) + r. The factor e^r:

* Truncated negative binomial K: f'(u) is proportional to (gamma + (1 - gamma) v)^-(shape + 1) with v = 1 - u. Since
  v' <= e^x v + delta_Q(x), r = (shape + 1) x where (1 - gamma) delta_Q(x) <= gamma (e^x - 1).
* Poisson K, of at least one: f'(u) is proportional to e^(-mean v), and v' - v is at most the total variation distance
  delta_Q(0). So r = mean * delta_Q(0).

Scores that are equal change nothing: order them at random, and v is the probability of a random event.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dp_curriculum.privacy.accounting import Adjacency, Events, GaussianEvent, compute_delta, compute_epsilon


MOST_EXPECTED_TRIES = 1000
_BISECTIONS = 60


@dataclass(frozen=True)
class Tries:
    """
    Law of the number of tries, of which there is at least one.

    Args:
        expected (`float`): The mean, at least 1. One means that there is no choice.
        law (`str`, *optional*, defaults to `"negative-binomial"`): Truncated at one; or `"poisson"`, truncated too.
        shape (`float`, *optional*, defaults to 1.0): Of the negative binomial, above -1. One is the geometric law.

    Raises:
        ValueError: If a value is out of its range.
    """

    expected: float
    law: Literal["negative-binomial", "poisson"] = "negative-binomial"
    shape: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.expected <= MOST_EXPECTED_TRIES:
            raise ValueError(f"Expected expected={self.expected} tries in [1, {MOST_EXPECTED_TRIES}].")
        if self.law not in ("negative-binomial", "poisson"):
            raise ValueError(f"Expected law={self.law!r} to be negative-binomial or poisson.")
        if not (math.isfinite(self.shape) and self.shape > -1):
            raise ValueError(f"Expected shape={self.shape} to be above -1.")

    @functools.cached_property
    def parameter(self) -> float:
        """Gamma of the negative binomial, or the mean of the Poisson law before it is truncated."""
        if self.law == "poisson":
            return _bisect(lambda mean: mean / -math.expm1(-mean), self.expected, 1e-12, self.expected, grows=True)
        return _bisect(lambda gamma: _mean_tries(gamma, self.shape), self.expected, 1e-9, 1 - 1e-12, grows=False)

    def probability(self, count: int) -> float:
        """Probability of that many tries."""
        value = self.parameter
        if self.law == "poisson":
            return math.exp(count * math.log(value) - math.lgamma(count + 1) - value) / -math.expm1(-value)
        log_products = sum(math.log(abs((k + self.shape) / (k + 1))) for k in range(1, count))
        first = 1.0 / math.log(1 / value) if self.shape == 0 else self.shape / (value**-self.shape - 1)
        return first * math.exp(log_products + count * math.log1p(-value))

    def count(self, uniform: float) -> int:
        """The number of tries that a uniform draw from `[0, 1)` stands for. It is as secret as the draw."""
        number, below = 1, self.probability(1)
        while below <= uniform and self.probability(number + 1) > 0:
            number += 1
            below += self.probability(number)
        return number

    def log_ratio(self, delta_of: Callable[[float], float]) -> float:
        """A bound on r (see above), from the privacy profile of one try."""
        if self.expected == 1:
            return 0.0
        if self.law == "poisson":
            return self.parameter * delta_of(0.0)
        gamma = self.parameter

        def suffices(x: float) -> bool:
            return (1 - gamma) * delta_of(x) <= gamma * math.expm1(x)

        low, high = 0.0, math.log(1 / gamma)  # delta is at most 1
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if suffices(middle) else (middle, high)
        return (self.shape + 1) * high

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"law": self.law, "expected": float(self.expected), "shape": float(self.shape)}


@dataclass(frozen=True)
class Selection:
    """
    The cost of choosing among tries.

    Args:
        tries ([`Tries`]): Law of their number.
        alternatives (`tuple[tuple[GaussianEvent, ...], ...]`): Everything that a try spends, its score included, for
            each setting that it may draw.

    Privacy:
        Released is the best try. The other tries, and how many there were, stay secret.
    """

    tries: Tries
    alternatives: tuple[Events, ...]

    def epsilon(self, delta: float, *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1) -> float:
        """Epsilon at `delta` of the choice, never below the exact value."""
        # A setting is drawn without a look at the images: the profile of a try is at most that of the worst setting.
        one = max(
            compute_epsilon(events, delta / self.tries.expected, adjacency=adjacency, group_size=group_size)
            for events in self.alternatives
        )
        if math.isinf(one):
            return one
        return one + max(
            self.tries.log_ratio(functools.partial(compute_delta, events, adjacency=adjacency, group_size=group_size))
            for events in self.alternatives
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**self.tries.to_dict(), "alternatives": [events_to_dicts(events) for events in self.alternatives]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """
        The inverse of [`~Selection.to_dict`].

        Raises:
            ValueError: If `values` is no selection.
        """
        try:
            tries = Tries(float(values["expected"]), values["law"], float(values["shape"]))
            alternatives = tuple(events_from_dicts(rows) for rows in values["alternatives"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a selection among tries: {type(error).__name__} {error}.") from None
        if not alternatives:
            raise ValueError("Expected a selection to list its alternatives.")
        return cls(tries, alternatives)


def events_to_dicts(events: Iterable[GaussianEvent]) -> list[dict[str, Any]]:
    """Events as JSON has them."""
    return [
        {"noise_multiplier": e.noise_multiplier, "sample_rate": e.sample_rate, "num_steps": e.num_steps}
        for e in events
    ]


def events_from_dicts(rows: Iterable[Mapping[str, Any]]) -> Events:
    """Events from rows that hold their three numbers, such as those of a report; other fields are passed over."""
    return tuple(GaussianEvent(row["noise_multiplier"], row["sample_rate"], row["num_steps"]) for row in rows)


def merged(events: Iterable[GaussianEvent]) -> Events:
    """The same events, those that differ in their number of steps alone as one, in a fixed order."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        steps[key] = steps.get(key, 0) + event.num_steps
    return tuple(GaussianEvent(*key, num_steps) for key, num_steps in sorted(steps.items()))


def _mean_tries(gamma: float, shape: float) -> float:
    if shape == 0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return shape * (1 - gamma) / (gamma * (1 - gamma**shape))


def _bisect(value: Callable[[float], float], target: float, low: float, high: float, *, grows: bool) -> float:
    """Point in `[low, high]` where a monotone function has a value; the nearer end if it is not reached."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (value(middle) < target) == grows else (low, middle)
    return (low + high) / 2
