# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
r"""
Epsilon of a list of Gaussian mechanisms, and the noise that a target epsilon asks for.

The number is the pessimistic estimate by privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049), and
dp_accounting composes them. Two things differ from calling its accountant, with which the tests compare the result:

1. One step is set up here, for any number k of images that change together. A step releases
   sum_i b_i u_i + N(0, sigma^2) with b_i ~ Bernoulli(q) and |u_i| <= 1. Let k images change, from u_i to v_i (0 for an
   absent one). The outputs are mixtures P = sum_S w_S N(u_S) and Q = sum_S w_S N(v_S) over sampled subsets S of the k.
   Move the points along u_i(t) = (sqrt(1-t) u_i, sqrt(t)) and v_i(t) = (sqrt(1-t) v_i, -sqrt(t)): no inner product
   among the u_i and the -v_i falls, for all go to 1. Then no f-divergence of (P, Q) falls, because its derivative in t
   is an integral, with positive weights, of d/dt |sum_i a_i u_i - sum_i c_i v_i|^2, where a_i and c_i >= 0 are the
   posterior inclusion probabilities. So the worst pair lies on a line: N(j) against N(-j) with j ~ Binomial(k, q), or
   against N(0) where images are added or removed (as in Ganesh 2024, arXiv 2401.10294). It bounds every hockey-stick
   divergence, hence every adaptive composition (Zhu, Dong and Wang 2022, arXiv 2106.08567). As u_i and v_i are any
   vectors of the ball, the case of an image that moves from one class' sum to another's is in it.
2. Rounding errors of the Fourier transform are subtracted from delta. Without that, epsilon ends below the exact value
   at small deltas: by 4e-5 at delta 1e-8, and by 2.4 at 1e-14, for 13,500 steps that compose to a Gaussian of mu 4.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from dp_accounting.pld import common
from scipy import optimize, signal, special


Adjacency = Literal["add-or-remove-one", "replace-one"]
ADJACENCIES: tuple[str, ...] = get_args(Adjacency)

DISCRETIZATION = 1e-4  # of privacy losses; finer for tiny losses, coarser where the grid would not fit in memory
_MAX_GRID_POINTS = 2**20
_TRUNCATION = 1e-15  # of the mass, in each composition
_TAIL = 10.0  # standard deviations: 8e-24 of the mass is charged as infinite loss in each step
_FFT_ERROR = 5e-16  # of delta, for each step composed: eight times the largest seen against the Gaussian closed form
_MAX_NOISE_MULTIPLIER = 1e7
_LARGEST_SHIFT = 1e3


class PrivacyBudgetExceeded(ValueError):
    r"""
    What was spent leaves nothing of the target.

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


def compute_epsilon(
    events: Iterable[GaussianEvent],
    delta: float,
    *,
    adjacency: Adjacency = "add-or-remove-one",
    group_size: int = 1,
) -> float:
    r"""
    Computes the epsilon at `delta` of the composition of `events`, never below the exact value.

    Args:
        events (`Iterable[GaussianEvent]`): What was released, in any order. Empty: 0.
        delta (`float`): In `(0, 1)`.
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Or `"replace-one"`: an image becomes another,
            or another class'. Its sum moves by at most twice the sensitivity.
        group_size (`int`, *optional*, defaults to 1): Images of one person that are added, removed or replaced
            together.

    Returns:
        `float`: Infinite for an event without noise. Exact if no event is sampled (Balle and Wang 2018,
        arXiv 1805.06530, Theorem 8).

    Raises:
        ValueError: If a value is out of its range.
    """
    merged = _validated(events, delta, adjacency, group_size)
    return _epsilon(merged, float(delta), adjacency, int(group_size))


def compute_delta(
    events: Iterable[GaussianEvent],
    epsilon: float,
    *,
    adjacency: Adjacency = "add-or-remove-one",
    group_size: int = 1,
) -> float:
    r"""
    Computes the delta at `epsilon`, never below the exact value. At epsilon 0 it is the total variation distance.

    Args:
        events (`Iterable[GaussianEvent]`): As for [`compute_epsilon`], like the other arguments.
        epsilon (`float`): At least 0.
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation.
        group_size (`int`, *optional*, defaults to 1): Images that change together.
    """
    merged = _validated(events, 0.5, adjacency, group_size)
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon={epsilon} to be at least 0.")
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged):
        return 1.0
    mu, sampled = _split(merged, adjacency, group_size)
    if not sampled:
        return _gaussian_delta(mu, epsilon)
    profiles = _profiles(merged, adjacency, group_size, 1)
    return min(1.0, max(profile.delta(epsilon) for profile in profiles) + _fft_error(merged))


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
    and true of every delta, if no event is sampled. A sampled event is mu-GDP for no useful mu in the far tail, hence
    `min_delta`. Between the points of its epsilon grid the number errs upwards.

    Args:
        events (`Iterable[GaussianEvent]`): As for [`compute_epsilon`].
        adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation.
        group_size (`int`, *optional*, defaults to 1): Images that change together.
        min_delta (`float`, *optional*, defaults to 1e-8): Smallest delta for which the statement holds.

    Returns:
        `float` or `None`: `None` if there is no such mu (an event without noise).
    """
    merged = _validated(events, min_delta, adjacency, group_size)
    if not merged:
        return 0.0
    largest = _epsilon(merged, min_delta, adjacency, group_size)
    if math.isinf(largest):
        return None
    mu, sampled = _split(merged, adjacency, group_size)
    if not sampled:
        return mu
    smallest, grid = 0.0, np.linspace(0.0, largest, 4001)
    for start, end in zip(grid[:-1], grid[1:]):
        # delta falls with epsilon: its value at the start of a cell bounds it up to the end.
        delta = compute_delta(merged, start, adjacency=adjacency, group_size=group_size)
        if _gaussian_delta(smallest, end) < delta:
            smallest = _gaussian_mu(end, delta)
    return smallest


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
        target_epsilon (`float`): Of all events together. [`compute_epsilon`] at the result is never above it, and at
            least 99.5 % of it.
        target_delta (`float`): In `(0, 1)`.
        sample_rate (`float`): Of the steps to calibrate.
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
    prior = _validated(prior_events, target_delta, adjacency, group_size)
    GaussianEvent(1.0, sample_rate, num_steps)

    def spent(noise_multiplier: float, coarseness: int = 1) -> float:
        events = (*prior, GaussianEvent(noise_multiplier, sample_rate, num_steps))
        merged = _validated(events, target_delta, adjacency, group_size)
        return _epsilon(merged, float(target_delta), adjacency, int(group_size), coarseness)

    if spent(_MAX_NOISE_MULTIPLIER) > target_epsilon:
        before = _epsilon(prior, target_delta, adjacency, group_size)
        smallest = round_up(spent(_MAX_NOISE_MULTIPLIER)) if math.isfinite(before) else math.inf
        raise PrivacyBudgetExceeded(
            f"Expected target_epsilon={target_epsilon} to exceed the {before:.6g} that earlier stages spend at delta "
            f"{target_delta:g}: set target_epsilon to {smallest:g} or more, or spend less on them.",
            spent_epsilon=before,
            smallest_target_epsilon=smallest,
        )
    guess = _guess_noise(target_epsilon, target_delta, sample_rate, num_steps) * group_size
    if target_epsilon > 20:  # large losses make long grids: come close on a coarse one first
        guess = _largest_spend_within(functools.partial(spent, coarseness=8), target_epsilon, guess)
    return _largest_spend_within(spent, target_epsilon, guess)


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _validated(
    events: Iterable[GaussianEvent], delta: float, adjacency: str, group_size: int
) -> tuple[GaussianEvent, ...]:
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


@functools.lru_cache(maxsize=256)
def _epsilon(
    events: tuple[GaussianEvent, ...], delta: float, adjacency: str, group_size: int, coarseness: int = 1
) -> float:
    if not events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    mu, sampled = _split(events, adjacency, group_size)
    if not sampled:
        return _gaussian_epsilon(mu, delta)
    error = _fft_error(events)
    bounds = [math.inf]
    if delta > 2 * error:
        profiles = _profiles(events, adjacency, group_size, coarseness)
        bounds.append(max(profile.epsilon(delta - error) for profile in profiles))
    if delta < 1000 * error:
        bounds.append(_moment_epsilon(events, delta, adjacency, group_size))
    return min(bounds)


def _split(
    events: tuple[GaussianEvent, ...], adjacency: str, group_size: int
) -> tuple[float, tuple[GaussianEvent, ...]]:
    """The events at rate 1 as one Gaussian shift mu (they compose exactly), and the sampled ones."""
    distance = group_size * (2 if adjacency == "replace-one" else 1)

    def shift(full: Iterable[GaussianEvent]) -> float:
        return distance * math.hypot(*(math.sqrt(event.num_steps) / event.noise_multiplier for event in full))

    full, sampled = [tuple(e for e in events if (e.sample_rate == 1) is flag) for flag in (True, False)]
    if max([shift(full), *(distance / event.noise_multiplier for event in sampled)]) > _LARGEST_SHIFT:
        # Losses of millions fit no grid. Leaving sampling out is a bound, for mixtures diverge at most as their worst
        # components do, and loses nothing that matters: there is no privacy to speak of.
        return shift(events), ()
    return shift(full), sampled


@dataclass(frozen=True)
class _Step:
    """Worst pair of one step, in units of its noise: mixtures of N(upper, 1) and N(lower, 1), of equal weights."""

    log_weights: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    num_steps: int

    @property
    def ends(self) -> tuple[float, float]:
        return float(self.lower.min()) - _TAIL, float(self.upper.max()) + _TAIL

    def loss(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Privacy loss at y, and its slope; it grows with y."""
        upper, upper_slope = _log_mixture(self.log_weights, self.upper, y)
        lower, lower_slope = _log_mixture(self.log_weights, self.lower, y)
        return upper - lower, upper_slope - lower_slope

    def masses(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mass of both mixtures between consecutive y."""
        return _mixture_masses(self.log_weights, self.upper, y), _mixture_masses(self.log_weights, self.lower, y)


def _worst_steps(events: tuple[GaussianEvent, ...], adjacency: str, group_size: int) -> tuple[tuple[_Step, ...], ...]:
    """For each direction (one where both are alike), the steps to compose; the events at rate 1 are one of them."""
    mu, sampled = _split(events, adjacency, group_size)
    moved = np.arange(group_size + 1.0)
    forward, backward = [], []
    for event in sampled:
        log_binomial = special.gammaln(group_size + 1) - special.gammaln(moved + 1) - special.gammaln(moved[::-1] + 1)
        log_weights = log_binomial + special.xlogy(moved, event.sample_rate)
        log_weights += special.xlog1py(moved[::-1], -event.sample_rate)
        shift, still = moved / event.noise_multiplier, 0 * moved
        forward.append(_Step(log_weights, shift, -shift if adjacency == "replace-one" else still, event.num_steps))
        backward.append(_Step(log_weights, still, -shift, event.num_steps))
    if mu > 0:
        forward.append(_Step(np.zeros(1), np.array([mu]), np.zeros(1), 1))
        backward.append(forward[-1])
    return (tuple(forward),) if adjacency == "replace-one" else (tuple(forward), tuple(backward))


def choose_discretization(
    events: Iterable[GaussianEvent], *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1
) -> float:
    """The interval of the privacy-loss grid that [`compute_epsilon`] uses: 1e-4 wherever that is fine and fits."""
    merged = _validated(events, 0.5, adjacency, group_size)
    if not merged or any(event.noise_multiplier == 0 for event in merged):
        return DISCRETIZATION
    return _interval(merged, adjacency, group_size) if _split(merged, adjacency, group_size)[1] else DISCRETIZATION


@functools.lru_cache(maxsize=64)
def _interval(events: tuple[GaussianEvent, ...], adjacency: str, group_size: int) -> float:
    span, variance, num_steps = 0.0, 0.0, 0
    for step in _worst_steps(events, adjacency, group_size)[0]:
        y = np.linspace(*step.ends, 4097)
        loss, mass = step.loss(y)[0], step.masses(y)[0]
        middle = (loss[1:] + loss[:-1]) / 2
        span = max(span, loss[-1] - loss[0])
        variance += step.num_steps * float(mass @ middle**2 - (mass @ middle) ** 2)
        num_steps += step.num_steps
    # Rounding adds about interval^2 / 6 to the variance of a step's loss: keep the sum below 1e-4 of the variance.
    fine = math.sqrt(max(6e-4 * variance / num_steps, 1e-16))
    # The Chernoff window that dp_accounting composes in, with orders from 1 to 20 over the span of a step.
    window = min(variance * order / span + 70 * span / order for order in range(1, 21))
    coarse = max(span, window / 4) / _MAX_GRID_POINTS
    finer, coarser = math.floor(math.log2(fine / DISCRETIZATION)), math.ceil(math.log2(coarse / DISCRETIZATION))
    return DISCRETIZATION * 2.0 ** max(coarser, min(finer, 0))


@dataclass(frozen=True)
class _Profile:
    """The hockey-stick divergences of a grid of privacy losses, at its points from 0 up."""

    losses: np.ndarray
    upper: np.ndarray  # mass of greater losses under the upper distribution, infinite ones included
    lower: np.ndarray  # the same under the lower distribution, times e^loss

    def delta(self, epsilon: float) -> float:
        point = int(np.searchsorted(self.losses, epsilon, side="right")) - 1
        if point == len(self.losses) - 1:
            return float(self.upper[-1])
        return float(self.upper[point] - math.exp(epsilon - self.losses[point]) * self.lower[point])

    def epsilon(self, delta: float) -> float:
        if self.upper[-1] > delta:
            return math.inf
        above = np.flatnonzero(self.upper - self.lower > delta)  # the divergence falls along the grid
        if not len(above):
            return 0.0
        point = above[-1]
        return float(self.losses[point] + math.log((self.upper[point] - delta) / self.lower[point]))


@functools.lru_cache(maxsize=4)
def _profiles(
    events: tuple[GaussianEvent, ...], adjacency: str, group_size: int, coarseness: int
) -> tuple[_Profile, ...]:
    """The composition, for each direction."""
    interval = _interval(events, adjacency, group_size) * coarseness
    profiles = []
    for steps in _worst_steps(events, adjacency, group_size):
        first, masses, survival = 0, np.ones(1), 1.0
        for step in steps:
            step_first, step_masses, infinite = _discretize(step, interval)
            with np.errstate(all="ignore"):  # masses near the smallest float
                offset, step_masses = common.self_convolve(step_masses, step.num_steps, _TRUNCATION)
            first += step_first * step.num_steps + offset
            masses = signal.fftconvolve(masses, step_masses)
            survival *= (1 - infinite) ** step.num_steps * (1 - _TRUNCATION)
        profiles.append(_profile(interval, first, masses, 1 - survival))
    return tuple(profiles)


def _profile(interval: float, first: int, masses: np.ndarray, infinite: float) -> _Profile:
    masses = np.concatenate((np.zeros(max(first, 0)), masses, np.zeros(1)))[max(-first, 0) :]
    greater = masses[:0:-1]
    upper = infinite + np.cumsum(greater)
    decay = math.exp(-interval)
    lower = signal.lfilter([decay], [1, -decay], greater)
    return _Profile(np.arange(len(masses)) * interval, np.append(upper[::-1], infinite), np.append(lower[::-1], 0.0))


def _discretize(step: _Step, interval: float) -> tuple[int, np.ndarray, float]:
    """
    Rounds the privacy loss to a grid, from above, by "connecting the dots" (Doroshenko et al. 2022, arXiv 2207.04380).

    Returns the number of the first grid point, the mass of each, and the mass of infinite loss.

    What lies between two points of the grid is split over them such that both its masses, under the upper and under
    the lower distribution, stay what they are. Done with masses rather than with differences of deltas, as there, it
    keeps its relative precision in the tails.
    """
    low, high = (float(step.loss(np.array([end]))[0][0]) / interval for end in step.ends)
    first, last = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    losses = np.arange(first, last + 1) * interval
    y = _inverse_loss(step, losses)
    upper, lower = step.masses(y)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = (1 - np.exp(losses[:-1]) * (lower / upper)) / -math.expm1(-interval)
    share = np.where((upper > 0) & (lower > 0), np.clip(share, 0, 1), 1.0)  # underflow: all of it goes up
    probabilities = np.zeros(len(losses))
    probabilities[:-1] += upper * (1 - share)
    probabilities[1:] += upper * share
    probabilities[1] += _mixture_masses(step.log_weights, step.upper, np.array([-np.inf, y[0]]))[0]
    infinite = float(_mixture_masses(step.log_weights, step.upper, np.array([y[-1], np.inf]))[0])
    return first, probabilities, infinite


def _inverse_loss(step: _Step, losses: np.ndarray) -> np.ndarray:
    """Where the privacy loss takes these values: from a table, then by Newton's method inside the table's cells."""
    table = np.linspace(*step.ends, 2**14 + 1)
    values = step.loss(table)[0]
    cell = np.clip(np.searchsorted(values, losses) - 1, 0, len(table) - 2)
    y = np.interp(losses, values, table)
    for start in range(0, len(y), 2**15):
        part = slice(start, start + 2**15)
        for _ in range(8):
            value, slope = step.loss(y[part])
            move = (value - losses[part]) / np.maximum(slope, 1e-300)
            y[part] = np.clip(y[part] - move, table[cell[part]], table[cell[part] + 1])
            if np.max(np.abs(move)) < 1e-13:
                break
    y[0], y[-1] = table[0], table[-1]
    return np.maximum.accumulate(y)


def _log_mixture(log_weights: np.ndarray, means: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log density of a mixture of N(mean, 1) over that of N(0, 1), and its derivative, the posterior mean."""
    terms = log_weights[:, None] + means[:, None] * y - means[:, None] ** 2 / 2
    largest = terms.max(axis=0)
    weights = np.exp(terms - largest)
    total = weights.sum(axis=0)
    return largest + np.log(total), means @ weights / total


def _mixture_masses(log_weights: np.ndarray, means: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mass of a mixture of N(mean, 1) between consecutive y, each difference taken in the lighter tail."""
    masses = np.zeros(len(y) - 1)
    for weight, mean in zip(np.exp(log_weights), means):
        below, above = special.ndtr(y - mean), special.ndtr(mean - y)
        masses += weight * np.where(y[:-1] > mean, above[:-1] - above[1:], below[1:] - below[:-1])
    return masses


def _moment_epsilon(events: tuple[GaussianEvent, ...], delta: float, adjacency: str, group_size: int) -> float:
    """Epsilon from moments of the same grids (Renyi DP), for deltas that a Fourier transform does not resolve."""
    interval = _interval(events, adjacency, group_size)
    epsilons = []
    for steps in _worst_steps(events, adjacency, group_size):
        grids, left = [], delta
        for step in steps:
            first, masses, infinite = _discretize(step, interval)
            grids.append(((np.arange(len(masses)) + first) * interval, masses, step.num_steps))
            left -= step.num_steps * infinite
        epsilons.append(_best_moment(grids, left) if left > 0 else math.inf)
    return max(epsilons)


def _best_moment(grids: list[tuple[np.ndarray, np.ndarray, int]], delta: float) -> float:
    def epsilon(log_order: float) -> float:
        # A moment bounds delta by the largest of (1 - e^(epsilon - loss)) e^(-order (loss - epsilon)) over losses.
        order = math.exp(log_order)
        with np.errstate(all="ignore"):  # masses near the smallest float
            moment = sum(steps * special.logsumexp(order * losses, b=masses) for losses, masses, steps in grids)
        return float(moment - math.log(delta) + order * log_order - (order + 1) * math.log1p(order)) / order

    return max(0.0, float(optimize.minimize_scalar(epsilon, bounds=(-7.0, 12.0), method="bounded").fun))


def _fft_error(events: tuple[GaussianEvent, ...]) -> float:
    """Bound on the rounding error of a delta from `_profiles`."""
    return _FFT_ERROR * (10 + sum(event.num_steps for event in events if event.sample_rate < 1))


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of N(mu, 1) against N(0, 1) (Balle and Wang 2018, arXiv 1805.06530, Theorem 8), rounded up."""
    return min(1.0, _gaussian_delta_at(mu, mu / 2 - epsilon / mu) * (1 + 1e-12)) if mu > 0 else 0.0


def _gaussian_delta_at(mu: float, a: float) -> float:
    """That delta at epsilon = mu (mu / 2 - a), without overflow: Phi(a) - e^epsilon Phi(a - mu)."""
    scale = math.exp(-a * a / 2) / 2
    other = special.erfcx((mu - a) / math.sqrt(2))
    if a > 0:
        return float(special.ndtr(a) - scale * other)
    return float(scale * (special.erfcx(-a / math.sqrt(2)) - other))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon >= 0 of N(mu, 1) against N(0, 1) at delta, rounded up."""
    if math.isinf(mu * mu):
        return math.inf
    if mu == 0 or _gaussian_delta_at(mu, mu / 2) <= delta:
        return 0.0
    low, high = -39.0, mu / 2  # delta grows with a; below -39 it underflows
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta_at(mu, middle) <= delta else (low, middle)
    return mu * (mu / 2 - low) * (1 + 1e-12)


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """Smallest mu for which the delta of N(mu, 1) against N(0, 1) at epsilon is at least `delta`, rounded up."""
    low, high = 0.0, 1.0
    while _gaussian_delta(high, epsilon) < delta and high < 1e150:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(middle, epsilon) < delta else (low, middle)
    return high


def _guess_noise(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Noise of the central limit mu = q sqrt(T (exp(1 / sigma^2) - 1)) (Bu et al. 2020, arXiv 1911.11607)."""
    mu = _gaussian_mu(epsilon, delta)
    return 1 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / num_steps))


def _largest_spend_within(spent: Callable[[float], float], target: float, guess: float) -> float:
    """A noise that spends 99.95 % to 100 % of the target: secant steps on logarithms inside a bracket."""
    over: tuple[float, float] | None = None  # logarithms of a noise that overspends, and of what it spends
    under: tuple[float, float] | None = None
    aim, x = math.log(0.9998 * target), math.log(guess)
    for attempt in range(100):
        value = spent(math.exp(x))
        if 0.9995 * target <= value <= target:
            return math.exp(x)
        point = (x, math.log(value) if 0 < value < math.inf else math.nan)
        over, under = (point, under) if value > target else (over, point)
        if over is None or under is None:
            step = min(max(abs(point[1] - aim), 1e-3), 2.0) * 1.2 if math.isfinite(point[1]) else 2.0
            x += step if value > target else -step
            continue
        if under[0] - over[0] < 1e-13:
            break
        share = (over[1] - aim) / (over[1] - under[1])
        usable = attempt % 4 != 3 and math.isfinite(share)
        x = over[0] + (under[0] - over[0]) * (min(max(share, 0.01), 0.99) if usable else 0.5)
    if under is None:
        raise ValueError(f"Expected target_epsilon={target} to be within reach: no noise in range spends that little.")
    return math.exp(under[0])


def round_up(value: float, *, digits: int = 4) -> float:
    """Rounds a positive `value` to that many significant digits, upwards; 0 stays 0."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.12g}")
