# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
r"""
Epsilon of a list of Gaussian mechanisms, and the noise that a target epsilon asks for.

dp_accounting composes the privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049), rounded up to a
grid of losses ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380). This file adds:

* Events at sample rate 1 compose exactly and need no grid.
* The grid is fine enough for the events and fits in memory.
* A step is computed at all points of the grid at once, for one image or for a group that changes together.
  dp_accounting takes one point after the other, for one image.
* The rounding errors of the Fourier transform, by which a result could end below the exact value, are subtracted from
  delta.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian, get_sigma_gaussian
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import special, stats


Adjacency = Literal["add-or-remove-one", "replace-one"]
ADJACENCIES: tuple[str, ...] = get_args(Adjacency)
DISCRETIZATION = 1e-4  # of privacy losses; finer for tiny losses, coarser where the grid would not fit in memory
_MAX_POINTS, _MAX_COMPOSED_POINTS = 2**17, 2**20
_THRESHOLDS = 2**15  # of the output, between which that of an epsilon is interpolated
_MAX_SHIFT = 50.0  # in units of the noise; above it, losses pass 1000 and there is no privacy to measure
_NO_PRIVACY = 700.0  # of epsilon; e^700 is about all that a float holds
_ROUNDING_ERROR = 5e-16  # of delta, for each sampled step: seven times the largest seen against closed forms
_RELATIVE_ERROR = 1e-12  # of delta, beside it: five times the largest seen, of single steps whose delta is near one


class PrivacyBudgetExceeded(ValueError):
    r"""
    Raised if what was spent leaves nothing of the target.

    Args:
        message (`str`): One line.
        spent_epsilon (`float`): Epsilon of the prior events at the target delta.
        smallest_target_epsilon (`float`): A target that is feasible, rounded up.
    """

    def __init__(self, message: str, *, spent_epsilon: float, smallest_target_epsilon: float) -> None:
        super().__init__(message)
        self.spent_epsilon = spent_epsilon
        self.smallest_target_epsilon = smallest_target_epsilon


@dataclass(frozen=True)
class GaussianEvent:
    r"""
    `num_steps` sequential releases of a noisy sum over a Poisson sample of the images.

    Args:
        noise_multiplier (`float`): Standard deviation of the noise over the sensitivity of the sum (the L2 norm that
            one image can add to it). 0 is no privacy: epsilon is infinite.
        sample_rate (`float`, *optional*, defaults to 1.0): Probability in `(0, 1]` that an image enters a step,
            independently of others and of other steps.
        num_steps (`int`, *optional*, defaults to 1): Sequential compositions. Classes that partition the images
            compose in parallel and count once.

    Raises:
        ValueError: If a value is out of its range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    num_steps: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"Expected noise_multiplier={self.noise_multiplier} to be finite and at least 0.")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"Expected sample_rate={self.sample_rate} in (0, 1]: an image's chance to be in a step.")
        if not _is_count(self.num_steps):
            raise ValueError(f"Expected num_steps={self.num_steps} to be an integer of at least 1.")
        # Plain numbers: they end up in YAML and JSON, where NumPy scalars become Python objects.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))
        object.__setattr__(self, "num_steps", int(self.num_steps))


Events = tuple[GaussianEvent, ...]
_Mixture = tuple[np.ndarray, np.ndarray]  # of normals of variance 1: logarithms of weights, and means


def compute_epsilon(
    events: Iterable[GaussianEvent], delta: float, *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1
) -> float:
    r"""
    Computes the epsilon at `delta` of the composition of `events`, never below the exact value.

    Args:
        events (`Iterable[GaussianEvent]`): What was released, in any order. Empty: 0.
        delta (`float`): In `(0, 1)`.
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Or `"replace-one"`: an image becomes any
            other, or another class', and moves the sum by at most twice the sensitivity.
        group_size (`int`, *optional*, defaults to 1): Images of one person that are added, removed or replaced
            together.

    Returns:
        `float`: Infinite for an event without noise. Exact if no event is sampled (Balle and Wang 2018,
        arXiv 1805.06530, Theorem 8). Where the group moves a sum by more than fifty times its noise, the epsilon of
        the events without sampling: far above the exact one, but no privacy is left to measure there.

    Raises:
        ValueError: If a value is out of its range, or `delta` is so small that rounding errors swamp it.
    """
    return _epsilon(_merge(events, delta, adjacency, group_size), float(delta), adjacency, int(group_size))


def compute_delta(
    events: Iterable[GaussianEvent], epsilon: float, *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1
) -> float:
    r"""
    Computes the delta at `epsilon`, never below the exact value. At epsilon 0 it is the total variation distance.

    Args:
        events (`Iterable[GaussianEvent]`): As for [`compute_epsilon`], like the other arguments.
        epsilon (`float`): At least 0.
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation.
        group_size (`int`, *optional*, defaults to 1): Images that change together.
    """
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon={epsilon} to be at least 0.")
    return _delta(_merge(events, 0.5, adjacency, group_size), float(epsilon), adjacency, int(group_size))


def compute_gdp_mu(
    events: Iterable[GaussianEvent],
    *,
    adjacency: Adjacency = "add-or-remove-one",
    group_size: int = 1,
    min_delta: float = 1e-8,
) -> float | None:
    r"""
    Computes the smallest mu whose Gaussian privacy profile lies on or above that of `events` for delta >= `min_delta`.

    One number that stands for the whole profile (Dong, Roth and Su 2022, arXiv 1905.02383): at every epsilon whose
    delta is at least `min_delta`, telling the datasets apart is no easier than telling N(0, 1) from N(mu, 1). Exact,
    and true of every delta, if no event is sampled; in the far tail of sampled ones no useful mu exists.

    Args:
        events (`Iterable[GaussianEvent]`): As for [`compute_epsilon`].
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation.
        group_size (`int`, *optional*, defaults to 1): Images that change together.
        min_delta (`float`, *optional*, defaults to 1e-8): Smallest delta for which the statement holds.

    Returns:
        `float` or `None`: `None` if there is no such mu (an event without noise), or rounding errors hide it (more
        than a million steps for each 1e-9 of `min_delta`). That of the events without sampling, which is above, where
        epsilon at `min_delta` exceeds 700.
    """
    return _gdp_mu(_merge(events, min_delta, adjacency, group_size), float(min_delta), adjacency, int(group_size))


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    num_steps: int,
    prior_events: Sequence[GaussianEvent] = (),
    adjacency: Adjacency = "add-or-remove-one",
    group_size: int = 1,
) -> float:
    r"""
    Finds the noise multiplier with which `prior_events` and `num_steps` more steps end at the target.

    Args:
        target_epsilon (`float`): Target of all events together. [`compute_epsilon`] at the result is never above it,
            and at least 99.95 % of it (less only where the result jumps, at an epsilon of hundreds).
        target_delta (`float`): In `(0, 1)`.
        sample_rate (`float`): Sample rate of the steps to calibrate.
        num_steps (`int`): Number of steps to calibrate.
        prior_events (`Sequence[GaussianEvent]`, *optional*): What is spent beside them.
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): As for [`compute_epsilon`].
        group_size (`int`, *optional*, defaults to 1): As for [`compute_epsilon`].

    Raises:
        PrivacyBudgetExceeded: If the prior events alone spend the target.
        ValueError: If a value is out of its range.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"Expected target_epsilon={target_epsilon} to be finite and above 0.")

    def spent(noise_multiplier: float) -> float:
        events = (*prior_events, GaussianEvent(noise_multiplier, sample_rate, num_steps))
        return compute_epsilon(events, target_delta, adjacency=adjacency, group_size=group_size)

    GaussianEvent(1.0, sample_rate, num_steps)  # checks them before anything is computed
    before = compute_epsilon(prior_events, target_delta, adjacency=adjacency, group_size=group_size)
    if before >= target_epsilon * (1 - 1e-6):
        smallest = round_up(1.001 * before) if math.isfinite(before) else math.inf
        raise PrivacyBudgetExceeded(
            f"Expected --target_epsilon={target_epsilon:g} to exceed the {before:.6g} that earlier stages spend at "
            f"delta {target_delta:g}: set it to {smallest:g} or more, or add more noise to them.",
            spent_epsilon=before,
            smallest_target_epsilon=smallest,
        )
    # Central limit: mu = q sqrt(T (exp(1 / sigma^2) - 1)) (Bu et al. 2020, arXiv 1911.11607).
    mu = _gaussian_mu(target_epsilon, target_delta)
    guess = _distance(adjacency, group_size) / math.sqrt(math.log1p((mu / sample_rate) ** 2 / num_steps))
    return _largest_spend_within(spent, target_epsilon, guess)


def choose_discretization(
    events: Iterable[GaussianEvent], *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1
) -> float:
    """The interval of the privacy-loss grid that [`compute_epsilon`] uses: 1e-4 wherever that is fine and fits."""
    merged = _merge(events, 0.5, adjacency, group_size)
    if any(event.noise_multiplier == 0 for event in merged) or not _split(merged, adjacency, group_size)[1]:
        return DISCRETIZATION
    return _interval(merged, adjacency, int(group_size))


def round_up(value: float, *, digits: int = 4) -> float:
    """Rounds a positive `value` to that many significant digits, upwards; 0 and infinity stay what they are."""
    if value == 0 or math.isinf(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.12g}")


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _merge(events: Iterable[GaussianEvent], delta: float, adjacency: str, group_size: int) -> Events:
    """Checks the arguments; merges events that differ in their number of steps only."""
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta} in (0, 1): well below one over the number of images.")
    if adjacency not in ADJACENCIES:
        raise ValueError(f"Expected adjacency={adjacency!r} in {ADJACENCIES}: choose one of them.")
    if not _is_count(group_size):
        raise ValueError(f"Expected group_size={group_size} to be an integer of at least 1.")
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        steps[key] = steps.get(key, 0) + event.num_steps
    return tuple(GaussianEvent(*key, num_steps) for key, num_steps in steps.items())


@functools.lru_cache(maxsize=512)
def _epsilon(events: Events, delta: float, adjacency: str, group_size: int) -> float:
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    mu, sampled = _split(events, adjacency, group_size)
    if not sampled:
        return _gaussian_epsilon(mu, delta)
    error = _error(sampled)
    if delta <= 2 * error:
        raise ValueError(
            f"Expected delta={delta:g} above {2 * error:.2g}, the smallest that so many steps can resolve: raise it."
        )
    unsampled = _gaussian_epsilon(_shift(events, adjacency, group_size), delta)
    safe = delta * (1 - _RELATIVE_ERROR) - error
    with np.errstate(all="ignore"):  # losses above 700 overflow, in the safe direction
        return float(min(unsampled, _compose(events, adjacency, group_size).get_epsilon_for_delta(safe)))


def _delta(events: Events, epsilon: float, adjacency: str, group_size: int) -> float:
    if any(event.noise_multiplier == 0 for event in events):
        return 1.0
    mu, sampled = _split(events, adjacency, group_size)
    if not sampled:
        return float(_gaussian_delta(mu, np.array([epsilon]))[0])
    unsampled = float(_gaussian_delta(_shift(events, adjacency, group_size), np.array([epsilon]))[0])
    with np.errstate(all="ignore"):
        delta = float(_compose(events, adjacency, group_size).get_delta_for_epsilon(float(epsilon)))
    return float(np.fmin(delta * (1 + _RELATIVE_ERROR) + _error(sampled), unsampled))


@functools.lru_cache(maxsize=512)
def _gdp_mu(events: Events, min_delta: float, adjacency: str, group_size: int) -> float | None:
    if any(event.noise_multiplier == 0 for event in events):
        return None
    mu, sampled = _split(events, adjacency, group_size)
    if not sampled:
        return mu
    if min_delta <= 2 * _error(sampled):
        return None
    largest, unsampled = _epsilon(events, min_delta, adjacency, group_size), _shift(events, adjacency, group_size)
    if largest > _NO_PRIVACY:
        return unsampled
    # delta falls with epsilon: its value at the start of a cell bounds it up to the end. Values are slow to get, so
    # chords between a few bound the others, which are computed only where that decides.
    starts, ends = (grid := np.linspace(0.0, largest, 2001))[:-1], grid[1:]
    known = np.zeros(len(starts), dtype=bool)
    some = grid[::20]
    deltas = _below_chords(starts, some, np.array([_delta(events, start, adjacency, group_size) for start in some]))
    mu = 0.0
    while mu < unsampled and np.any(deltas > (reached := _gaussian_delta(mu, ends))):
        worst = np.argmax(deltas / np.maximum(reached, 1e-300))
        if known[worst]:
            mu = max(mu, _gaussian_mu(ends[worst], min(deltas[worst], 1 - 1e-15))) * (1 + 1e-9)
        else:
            deltas[worst], known[worst] = _delta(events, starts[worst], adjacency, group_size), True
    return min(mu, unsampled)


def _error(sampled: Events) -> float:
    """Bound on the rounding error of a delta."""
    return _ROUNDING_ERROR * (10 + sum(event.num_steps for event in sampled))


def _distance(adjacency: str, group_size: int) -> int:
    return group_size * (2 if adjacency == "replace-one" else 1)


def _shift(events: Iterable[GaussianEvent], adjacency: str, group_size: int) -> float:
    """Mu of the Gaussian that `events` compose to without sampling; with it, a bound."""
    mus = (math.sqrt(event.num_steps) / event.noise_multiplier for event in events)
    return _distance(adjacency, group_size) * math.hypot(*mus)


def _split(events: Events, adjacency: str, group_size: int) -> tuple[float, Events]:
    """The events at rate 1 as one Gaussian shift mu, and the sampled ones; all as one shift if the noise is tiny."""
    sampled = tuple(event for event in events if event.sample_rate < 1)
    mu = _shift((event for event in events if event.sample_rate == 1), adjacency, group_size)
    if max([mu, *(group_size / event.noise_multiplier for event in sampled)]) > _MAX_SHIFT:
        return _shift(events, adjacency, group_size), ()
    return mu, sampled


def _interval(events: Events, adjacency: str, group_size: int) -> float:
    """Spacing of the privacy-loss grid. Any spacing gives a valid upper bound; this one is tight and fits memory."""
    mu, sampled = _split(events, adjacency, group_size)
    span, variance = mu * (mu + 20), mu**2  # of the losses: of one step, and of all
    sides, moves = _distance(adjacency, 1), np.arange(group_size + 1)
    for event in sampled:
        mus, weights = moves / event.noise_multiplier, stats.binom.pmf(moves, group_size, event.sample_rate)
        highest = special.logsumexp(mus * (mus[-1] + 10) - mus**2 / 2, b=weights)
        span = max(span, sides * (highest - math.log(max(weights[0], 1e-300))))
        divergence = weights @ np.expm1(np.minimum(np.outer(mus, mus), 50)) @ weights  # chi^2
        variance += event.num_steps * sides**2 * min(divergence, weights @ (mus**2 + mus**4 / 4))
    # Rounding adds about interval^2 / 6 to the variance of a step's loss: keep the sum below 3e-5 of the variance.
    fine = math.sqrt(2e-4 * variance / sum(event.num_steps for event in sampled))
    coarse = max(span / _MAX_POINTS, (2 * span + 18 * math.sqrt(variance)) / _MAX_COMPOSED_POINTS)
    return float(max(min(fine, DISCRETIZATION), coarse, 1e-8))


@functools.lru_cache(maxsize=4)
def _compose(events: Events, adjacency: str, group_size: int) -> pld.PrivacyLossDistribution:
    interval = _interval(events, adjacency, group_size)
    mu, sampled = _split(events, adjacency, group_size)
    composed = pld.identity(interval)
    if mu > 0:
        composed = pld.from_gaussian_mechanism(1 / mu, value_discretization_interval=interval)
    for event in sampled:
        step = _step(event, adjacency, group_size, interval)
        composed = composed.compose(step.self_compose(event.num_steps))
    return composed


def _step(event: GaussianEvent, adjacency: str, group_size: int, interval: float) -> pld.PrivacyLossDistribution:
    # Of k images, the sampled ones move the sum by at most their number j, along one line: N(j) against N(0), or
    # against N(-j) if they are replaced. Bringing images u_i and replacements v_i onto that line lowers none of the
    # inner products among the u_i and -v_i. So it lowers no f-divergence: its derivative is an integral, with positive
    # weights, of that of |sum_i a_i u_i - sum_i c_i v_i|^2, where a_i and c_i are posterior probabilities that image i
    # was sampled (cf. Ganesh 2024, arXiv 2401.10294).
    sampled = np.arange(group_size + 1)
    log_weights = stats.binom.logpmf(sampled, group_size, event.sample_rate)
    with_them = log_weights, sampled / event.noise_multiplier
    opposite = log_weights, -sampled / event.noise_multiplier
    without = np.zeros(1), np.zeros(1)
    if adjacency == "replace-one":
        return pld.PrivacyLossDistribution(_discretize(with_them, opposite, interval))
    return pld.PrivacyLossDistribution(
        _discretize(with_them, without, interval), _discretize(without, opposite, interval)
    )


def _discretize(upper: _Mixture, lower: _Mixture, interval: float) -> pld_pmf.PLDPmf:
    """Losses, rounded up to the grid, of one mixture of N(mean, 1) against another whose means are not greater."""

    def at(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The loss, and the logarithms of both masses above."""
        densities, masses = (
            [_log_sum(mixture, term) for mixture in (upper, lower)]
            for term in (lambda mean: mean * y - mean**2 / 2, lambda mean: special.log_ndtr(mean - y))
        )
        return densities[0] - densities[1], *masses

    y = np.linspace(min(lower[1]) - 10, max(upper[1]) + 10, _THRESHOLDS)
    loss, _, log_lower = at(y)
    loss = np.maximum.accumulate(loss)  # grows with y: delta is the excess mass above a threshold
    first, last = math.floor(loss[0] / interval), math.ceil(loss[-1] / interval)
    epsilons = np.minimum(np.arange(first, last + 1) * interval, loss[-1])
    found, log_upper_above, log_lower_above = at(np.interp(epsilons, loss, y))
    # The threshold is not quite where the loss is epsilon. Between the two lies less than the mass of their cell of y,
    # and there the densities' ratio is no farther from e^epsilon than at the threshold.
    start = np.clip(np.searchsorted(loss, epsilons, side="right") - 1, 0, len(loss) - 2)
    cell = np.exp(epsilons + log_lower[start]) * -np.expm1(log_lower[start + 1] - log_lower[start])
    deltas = np.exp(log_upper_above) - np.exp(epsilons + log_lower_above) + cell * np.abs(np.expm1(found - epsilons))
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, np.clip(deltas, 0, 1))


def _log_sum(mixture: _Mixture, term: Callable[[float], np.ndarray]) -> np.ndarray:
    """Logarithm of the weighted sum of a term of each component, itself a logarithm."""
    return functools.reduce(np.logaddexp, (weight + term(mean) for weight, mean in zip(*mixture)))


def _below_chords(epsilons: np.ndarray, known: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """A bound on delta between the known epsilons: it is convex in e^epsilon, and so below its chords."""
    start = np.clip(np.searchsorted(known, epsilons, side="right") - 1, 0, len(known) - 2)
    with np.errstate(all="ignore"):
        share = np.expm1(epsilons - known[start]) / np.expm1(known[start + 1] - known[start])
    share = np.nan_to_num(share, nan=0.0)  # of nothing: delta falls, and is not above that at the start
    return deltas[start] + np.clip(share, 0, 1) * (deltas[start + 1] - deltas[start])


def _gaussian_delta(mu: float, epsilons: np.ndarray) -> np.ndarray:
    """Delta of N(mu, 1) against N(0, 1) (Balle and Wang 2018, arXiv 1805.06530, Theorem 8), rounded up."""
    if mu == 0:
        return np.zeros(len(epsilons))
    above = special.log_ndtr(mu / 2 - epsilons / mu)
    ratio = np.minimum(epsilons + special.log_ndtr(-mu / 2 - epsilons / mu) - above, 0.0)
    return np.minimum(-np.exp(above) * np.expm1(ratio) * (1 + 1e-9), 1.0)


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of N(mu, 1) against N(0, 1), rounded up."""
    if mu == 0:
        return 0.0
    if mu > 1e4:  # a tail bound on the loss, near enough here
        return mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))
    with np.errstate(divide="ignore"):
        epsilon = float(get_epsilon_gaussian(1 / mu, delta))
    return epsilon * (1 + 1e-12) + 4e-12 if epsilon > 0 else 0.0


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """Mu for which N(mu, 1) against N(0, 1) has this epsilon and delta."""
    with np.errstate(divide="ignore"):
        return 1 / float(get_sigma_gaussian(epsilon, delta))


def _largest_spend_within(spent: Callable[[float], float], target: float, guess: float) -> float:
    """A noise that spends 99.95 % to 100 % of the target: secant steps on logarithms, inside a bracket."""
    aim, x, slope = math.log(0.9998 * target), math.log(guess), -2.0
    low, high = -math.inf, math.inf  # logarithms of noises that overspend, and that do not
    last: tuple[float, float] | None = None
    for attempt in range(60):
        value = spent(math.exp(x))
        if 0.9995 * target <= value <= target:
            return math.exp(x)
        low, high = (x, high) if value > target else (low, x)
        y = math.log(min(max(value, 1e-300), 1e300))
        if last is not None:
            slope = min((y - last[1]) / (x - last[0]), -1e-3)
        last = x, y
        x += min(max((aim - y) / slope, -2.0), 2.0)
        if attempt > 20 or not low < x < high:
            x = (max(low, x - 9) + min(high, x + 9)) / 2
        if x in (low, high):  # a jump between two neighbouring numbers
            break
    if math.isinf(high):
        raise ValueError(f"Expected target_epsilon={target} to be within reach: no noise in range spends that little.")
    return math.exp(high)
