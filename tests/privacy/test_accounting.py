"""Epsilon against closed forms, quadrature, dp_accounting, and Opacus' accountants; calibration; bad arguments."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import stats

from dp_curriculum.privacy import accounting
from dp_curriculum.privacy.accounting import (
    ADJACENCIES,
    DISCRETIZATION,
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
    choose_discretization,
    compute_delta,
    compute_epsilon,
    compute_gdp_mu,
    round_up,
)


Mixture = Sequence[tuple[float, float]]  # (weight, mean) of each component; means in units of the sensitivity
QUADRATURE_ERROR = {1: 1e-9, 2: 3e-7}  # by number of steps
fixed = settings(derandomize=True, deadline=None)


def events(*rows: tuple[float, float, int]) -> list[GaussianEvent]:
    return [GaussianEvent(*row) for row in rows]


def exact_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """Balle and Wang 2018, Theorem 8, with 50 digits."""
    with mpmath.workdps(50):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


def exact_epsilon(mu: float, delta: float) -> float:
    low, high = 0.0, mu * mu / 2 + 40 * mu
    if exact_delta(mu, 0.0) <= delta:
        return 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(mu, middle) > delta else (low, middle)
    return high


def library_epsilon(rows: Sequence[GaussianEvent], delta: float) -> float:
    """dp_accounting's own accountant, event by event; it merges nothing and knows no closed form of a list."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for row in rows:
        step = dp_event.PoissonSampledDpEvent(row.sample_rate, dp_event.GaussianDpEvent(row.noise_multiplier))
        accountant.compose(dp_event.SelfComposedDpEvent(step, row.num_steps))
    return float(accountant.get_epsilon(delta))


def opacus_epsilon(accountant: Any, row: tuple[float, float, int], delta: float) -> float:
    accountant.history = [row]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def quadrature_delta(upper: Mixture, lower: Mixture, noise: float, epsilon: float, steps: int = 1) -> float:
    """Hockey-stick divergence of one or two steps, integrated on a grid of their outputs."""
    x = np.linspace(-5 - 10 * noise, 5 + 10 * noise, 100_001 if steps == 1 else 1501)
    p, q = (sum(w * stats.norm.pdf(x, m, noise) for w, m in mixture) for mixture in (upper, lower))
    if steps == 2:
        p, q = np.outer(p, p), np.outer(q, q)
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * (x[1] - x[0]) ** steps)


# Reference vectors: name, events, delta, epsilon of dp_accounting's PLD, and how precisely it is known.
PLD_VECTORS = [
    ("V1", (1.5, 0.04, 2250), 1e-5, 6.76879, 1e-3),
    ("V4", (1.3, 0.0025, 6000), 1e-5, 0.64011, 1e-3),
    ("V5", (1.0, 0.001, 30000), 1e-7, 1.0982, 1e-3),
    ("V7", (0.7, 0.01, 120), 1e-5, 2.4612381, 1e-5),
    ("V7 micro-batched", (0.35, 0.01, 120), 1e-5, 18.6977407, 1e-4),
    ("V8", (1.0, 0.0064, 782), 1e-6, 1.199, 1e-3),
    ("V8 one step less", (1.0, 0.0064, 781), 1e-6, 1.198, 1e-3),
    ("V8 full batch", (1.0, 1.0, 5), 1e-6, 12.595, 1e-3),
    ("V10", (4.530877117, 1.0, 1), 1e-6, 0.92739, 1e-5),
    ("V17", (4.0, 0.01, 10000), 1e-5, 0.94700, 1e-3),
]
RDP_VECTORS = [
    ("V1", (1.5, 0.04, 2250), 1e-5, 7.32911117143),
    ("V4", (1.3, 0.0025, 6000), 1e-5, 0.7242234026),
    ("V5", (1.0, 0.001, 30000), 1e-7, 1.4154988495),
    ("V6", (0.1, 1024e-8, 976563), 1e-7, 5907982.3114),
    ("V7", (0.7, 0.01, 120), 1e-5, 3.2392676),
    ("V7 micro-batched", (0.35, 0.01, 120), 1e-5, 22.6248601),
    ("V8", (1.0, 0.0064, 782), 1e-6, 1.616),
    ("V8 full batch", (1.0, 1.0, 5), 1e-6, 13.376),
    ("V10", (4.530877117, 1.0, 1), 1e-6, 1.0),
    ("V17", (4.0, 0.01, 10000), 1e-5, 1.03549),
]
PRV_VECTORS = [
    ("V1", (1.5, 0.04, 2249), 1e-5, 6.777395712150674),
    ("V3 a", (0.8, 0.001, 100), 1e-6, 0.270403364),
    ("V3 b", (1.5, 0.05, 1000), 1e-6, 6.209969247),
    ("V3 c", (3.0, 0.05, 50000), 1e-6, 24.94200564),
    ("V3 d", (2.0, 0.2, 100), 1e-6, 5.672055609),
    ("V3 e", (1.5, 0.001, 20000), 1e-6, 0.437005109),
]


@pytest.mark.parametrize(("row", "delta", "expected", "places"), [v[1:] for v in PLD_VECTORS], ids=lambda v: str(v))
def test_epsilon_is_that_of_dp_accounting(row: tuple, delta: float, expected: float, places: float) -> None:
    assert compute_epsilon(events(row), delta) == pytest.approx(expected, abs=places)


@pytest.mark.parametrize(("row", "delta", "expected"), [v[1:] for v in RDP_VECTORS], ids=lambda v: str(v))
def test_epsilon_is_at_most_that_of_renyi_accountants(row: tuple, delta: float, expected: float) -> None:
    assert 0 < compute_epsilon(events(row), delta) < expected


@pytest.mark.parametrize(("row", "delta", "expected"), [v[1:] for v in PRV_VECTORS], ids=lambda v: str(v))
def test_epsilon_is_within_the_error_that_the_prv_accountant_allows_itself(
    row: tuple, delta: float, expected: float
) -> None:
    """Its number is an upper bound, 0.01 above its estimate and up to 0.02 above the exact value."""
    assert expected - 0.021 <= compute_epsilon(events(row), delta) <= expected + 1e-3


@pytest.mark.parametrize("row", [(1.5, 0.04, 2249), (2.0, 0.2, 100), (4.0, 0.01, 10000)], ids=str)
def test_opacus_accountants_of_today_bound_epsilon_from_above(row: tuple[float, float, int]) -> None:
    ours = compute_epsilon(events(row), 1e-5)
    assert ours <= opacus_epsilon(RDPAccountant(), row, 1e-5)
    assert ours - 1e-3 <= opacus_epsilon(PRVAccountant(), row, 1e-5) <= ours + 0.021


def test_calibrated_noise_is_that_of_the_prv_search_and_below_the_renyi_one() -> None:
    """V2. The search stops up to 0.01 below the target, its accountant lies up to 0.02 above the exact value."""
    steps, prv, rdp = 2000, 1.2915, 1.3562
    assert 8 - 0.031 <= compute_epsilon(events((1.34765625, 0.04, 2249)), 1e-5) <= 8
    noise = calibrate_noise_multiplier(target_epsilon=8.0, target_delta=1e-5, sample_rate=0.04, num_steps=steps)
    assert prv - 0.01 < noise <= prv < rdp
    assert 8 - 0.031 <= compute_epsilon(events((prv, 0.04, steps)), 1e-5) <= 8


def test_epsilon_is_at_most_what_published_renyi_divergences_give() -> None:
    """V9: divergences of (2.5, 0.01, 50), turned into epsilon by Canonne et al. 2020 (arXiv 2004.00010)."""
    divergences = {1.5: 6.70579741e-4, 2.5: 1.08548710e-3, 5: 2.18075656e-3, 50: 2.38460375e-2, 100: 167.416308}
    ours = compute_epsilon(events((2.5, 0.01, 50)), 1e-5)
    for order, divergence in divergences.items():
        assert ours <= divergence + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1)


def test_delta_of_full_batches_is_that_of_one_gaussian() -> None:
    """V11 and V13."""
    three = events((math.sqrt(3), 1.0, 1), (math.sqrt(3), 1.0, 2))
    assert compute_delta(three, 1.0) == pytest.approx(0.126936, abs=1e-6)
    assert compute_gdp_mu(three) == pytest.approx(1.0, abs=1e-12)
    hundred = events((10.0, 1.0, 50), (5.0, 1.0, 50))
    assert compute_delta(hundred, 4.0) == pytest.approx(0.0164556729, abs=1e-10)


def test_delta_of_split_steps_is_that_of_their_sum() -> None:
    """V12."""
    split = compute_delta(events((0.5, 0.2, 1), (0.5, 0.2, 2)), 1.0)
    assert split == compute_delta(events((0.5, 0.2, 3)), 1.0)
    assert split == pytest.approx(0.15594, abs=1e-3)


@pytest.mark.parametrize("row", [(0.67379294682, 0.01, 1), (3.20956502598 / 6, 0.001, 25)], ids=str)
def test_the_noise_that_dp_accounting_finds_for_epsilon_one_spends_one(row: tuple[float, float, int]) -> None:
    """V14; the second is for a sensitivity of 6."""
    assert compute_epsilon(events(row), 1e-5) == pytest.approx(1.0, abs=2e-3)


def test_epsilon_of_sampled_and_full_batches_together_is_below_the_prv_bound() -> None:
    """V15, less its Laplace mechanisms, which this package does not have."""
    mixed = events((0.8, 5e-3, 100), (8.0, 1.0, 200))
    assert compute_epsilon(mixed, 1e-6) == pytest.approx(library_epsilon(mixed, 1e-6), abs=1e-3)
    assert compute_epsilon(mixed, 1e-6) < 11.158692


def test_no_noise_is_infinite_and_no_event_is_free() -> None:
    """V16."""
    bare = events((1.0, 0.1, 10), (0.0, 0.1, 1))
    assert compute_epsilon(bare, 1e-5) == math.inf
    assert compute_delta(bare, 100.0) == 1.0
    assert compute_gdp_mu(bare) is None
    assert (compute_epsilon([], 1e-5), compute_delta([], 0.0), compute_gdp_mu([])) == (0.0, 0.0, 0.0)


@given(
    st.lists(st.tuples(st.floats(0.05, 1e6), st.integers(1, 10**6)), min_size=1, max_size=5),
    st.floats(-12, -0.5).map(lambda x: 10**x),
    st.sampled_from(ADJACENCIES),
    st.integers(1, 4),
)
@settings(fixed, max_examples=25)
def test_full_batches_have_the_exact_epsilon_rounded_up(
    rows: list[tuple[float, int]], delta: float, adjacency: Any, group_size: int
) -> None:
    distance = group_size * (2 if adjacency == "replace-one" else 1)
    mu = distance * math.sqrt(sum(steps / noise**2 for noise, steps in rows))
    full = events(*((noise, 1.0, steps) for noise, steps in rows))
    ours = compute_epsilon(full, delta, adjacency=adjacency, group_size=group_size)
    assert exact_epsilon(mu, delta) <= ours * (1 + 1e-15)
    if mu < 1e4:
        assert ours <= exact_epsilon(mu, delta) * (1 + 1e-9) + 1e-9


@given(
    st.lists(
        st.builds(
            GaussianEvent, st.floats(1.5, 6.0), st.sampled_from([1.0, 0.3, 0.1, 0.05, 0.01]), st.integers(1, 300)
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([1e-3, 1e-5, 1e-7]),
)
@settings(fixed, max_examples=4)
def test_any_list_of_events_has_the_epsilon_that_dp_accounting_composes(
    rows: list[GaussianEvent], delta: float
) -> None:
    reference = library_epsilon(rows, delta)
    assert compute_epsilon(rows, delta) == pytest.approx(reference, rel=2e-4, abs=1e-3)


def _both_ways(upper: Mixture, lower: Mixture, noise: float, epsilon: float, steps: int) -> float:
    return max(quadrature_delta(*pair, noise, epsilon, steps) for pair in ((upper, lower), (lower, upper)))


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.2, 1), (0.8, 0.2, 2), (2.0, 0.05, 2)])
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_sampled_steps_have_the_delta_of_the_worst_pair_of_images(
    noise: float, rate: float, steps: int, adjacency: Any
) -> None:
    """Quadrature of N(0) or N(1) against N(0), or against N(0) or N(-1) for an image replaced by its opposite."""
    upper = [(1 - rate, 0.0), (rate, 1.0)]
    lower = [(1 - rate, 0.0), (rate, -1.0)] if adjacency == "replace-one" else [(1.0, 0.0)]
    for epsilon in (0.0, 0.5):
        expected = _both_ways(upper, lower, noise, epsilon, steps)
        ours = compute_delta(events((noise, rate, steps)), epsilon, adjacency=adjacency)
        assert -QUADRATURE_ERROR[steps] <= ours - expected <= 1e-5
    if adjacency == "replace-one":  # the twin that forgets the second image is caught
        assert compute_delta(events((noise, rate, steps)), 0.1) < _both_ways(upper, lower, noise, 0.1, steps) - 1e-3


def test_an_image_that_moves_to_another_class_spends_no_more_than_one_that_is_replaced() -> None:
    """Its two sums lie on different axes: N((1, 0)) against N((0, 1)), integrated in the plane."""
    noise, rate, epsilon = 0.7, 0.3, 0.2
    x = np.linspace(-7, 8, 1001)
    still, moved = stats.norm.pdf(x, 0, noise), stats.norm.pdf(x, 1, noise)
    background = (1 - rate) * np.outer(still, still)
    p, q = background + rate * np.outer(moved, still), background + rate * np.outer(still, moved)
    delta = np.maximum(p - math.exp(epsilon) * q, 0).sum() * (x[1] - x[0]) ** 2
    event = events((noise, rate, 1))
    assert compute_delta(event, epsilon) < delta < compute_delta(event, epsilon, adjacency="replace-one")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_group_of_images_has_the_delta_of_a_binomial_mixture(steps: int) -> None:
    noise, rate, size = 1.2, 0.15, 3
    weights = stats.binom.pmf(range(size + 1), size, rate)
    upper, lower = list(zip(weights, range(size + 1))), [(1.0, 0.0)]
    opposite = [(weight, -mean) for weight, mean in upper]
    for epsilon in (0.3, 1.0):
        expected = _both_ways(upper, lower, noise, epsilon, steps)
        ours = compute_delta(events((noise, rate, steps)), epsilon, group_size=size)
        assert -QUADRATURE_ERROR[steps] <= ours - expected <= 1e-5
        expected = _both_ways(upper, opposite, noise, epsilon, steps)
        ours = compute_delta(events((noise, rate, steps)), epsilon, adjacency="replace-one", group_size=size)
        assert -QUADRATURE_ERROR[steps] <= ours - expected <= 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_no_two_images_spend_more_together_than_two_alike_replaced_by_their_opposite(seed: int) -> None:
    """Images and replacements anywhere on the unit circle, or inside; integrated in the plane."""
    rng = np.random.default_rng(seed)
    noise, rate, epsilon = 0.8, 0.3, (0.1, 0.7)[seed % 2]
    points = rng.standard_normal((2, 2, 2))  # images and replacements, first and second, coordinates
    points *= rng.uniform(0.2 if seed > 3 else 1, 1, (2, 2, 1)) / np.linalg.norm(points, axis=-1, keepdims=True)
    x = np.linspace(-7, 7, 401)
    densities = []
    for first, second in points:
        sums = [((1 - rate) ** 2, 0 * first), (rate - rate**2, first), (rate - rate**2, second)]
        sums.append((rate**2, first + second))
        densities.append(sum(w * np.outer(*(stats.norm.pdf(x, m, noise) for m in mean)) for w, mean in sums))
    delta = np.maximum(densities[0] - math.exp(epsilon) * densities[1], 0).sum() * (x[1] - x[0]) ** 2
    assert delta <= compute_delta(events((noise, rate, 1)), epsilon, adjacency="replace-one", group_size=2)


@pytest.mark.parametrize(("noise", "rate"), [(1.2, 0.15), (0.35, 0.01), (30.0, 0.001), (0.1, 0.5), (2.0, 0.999)])
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_a_step_is_discretised_as_dp_accounting_does_it(noise: float, rate: float, adjacency: Any) -> None:
    """Its own loop over the grid, an epsilon at a time, is the slow reference: for one step, and for many of them."""
    event = GaussianEvent(noise, rate)
    interval = max(accounting._interval((event,), adjacency, 1), 1e-3)
    reference = pld.from_gaussian_mechanism(
        noise,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation[adjacency.upper().replace("-", "_")],
    )
    ours = accounting._step(event, adjacency, 1, interval)
    for steps in (1, 50):
        one, other = (step.self_compose(steps) for step in (ours, reference))
        largest = other.get_epsilon_for_delta(1e-8)
        for epsilon in np.linspace(-largest, largest, 9):  # below 0, adding an image tells more than removing one
            delta = other.get_delta_for_epsilon(epsilon)
            assert one.get_delta_for_epsilon(epsilon) == pytest.approx(delta, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_a_threshold_that_is_not_quite_right_is_paid_for(adjacency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between few thresholds interpolation is far off, and delta still not too small."""
    event = GaussianEvent(0.8, 0.2)
    exact = accounting._step(event, adjacency, 1, 1e-2)
    monkeypatch.setattr(accounting, "_THRESHOLDS", 64)
    coarse = accounting._step(event, adjacency, 1, 1e-2)
    excess = [coarse.get_delta_for_epsilon(e) - exact.get_delta_for_epsilon(e) for e in np.arange(0, 1, 1e-2)]
    assert min(excess) >= -1e-12 and 1e-8 < max(excess) < 1e-3


@pytest.mark.parametrize(
    ("noise", "rate", "group_size"),
    [(3.3434908910622383, 0.5, 3), (0.18870730656898302, 0.5, 1), (0.3629944145288683, 0.13139556314927434, 1)],
)
def test_a_delta_of_any_size_is_not_below_the_exact_one(noise: float, rate: float, group_size: int) -> None:
    """Total variation of a group and its opposite, whose sums are told apart best at 0, with 50 digits."""
    with mpmath.workdps(50):
        exact = mpmath.mpf(0)
        for count in range(group_size + 1):
            weight = mpmath.binomial(group_size, count) * mpmath.mpf(rate) ** count
            weight *= (1 - mpmath.mpf(rate)) ** (group_size - count)
            exact += weight * (2 * mpmath.ncdf(count / mpmath.mpf(noise)) - 1)
    event = events((noise, rate, 1))
    ours = compute_delta(event, 0.0, adjacency="replace-one", group_size=group_size)
    assert exact <= ours <= exact * (1 + 1e-8)


MANY_STEPS = GaussianEvent(math.sqrt(13500) / 4, 1 - 1e-12, 13500)  # all but a Gaussian of mu 4, by Fourier transforms


@pytest.mark.parametrize("delta", [1e-8, 1e-10, 2e-11])
def test_rounding_errors_of_many_steps_do_not_reach_below_the_exact_epsilon(
    delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a transform rounds depends on the machine, so an error of half the allowance is planted beside its own."""
    exact = exact_epsilon(4.0, delta)
    assert exact - 1e-9 <= compute_epsilon([MANY_STEPS], delta) <= exact + 1e-2
    compose, planted = accounting._compose, accounting._error((MANY_STEPS,)) / 2

    class Rounded:
        def __init__(self, *args: Any) -> None:
            self.exact = compose(*args)

        def get_epsilon_for_delta(self, delta: float) -> float:
            return float(self.exact.get_epsilon_for_delta(delta + planted))

    monkeypatch.setattr(accounting, "_compose", Rounded)
    accounting._epsilon.cache_clear()
    assert compute_epsilon([MANY_STEPS], delta) >= exact - 1e-9
    monkeypatch.setattr(accounting, "_ROUNDING_ERROR", 0.0)  # the twin that takes the transform at its word
    accounting._epsilon.cache_clear()
    assert compute_epsilon([MANY_STEPS], delta) < exact - 1e-5
    accounting._epsilon.cache_clear()


def test_the_allowance_for_rounding_errors_is_above_those_of_this_machine() -> None:
    epsilons = np.linspace(20.0, 34.0, 15)
    deltas = accounting._compose((MANY_STEPS,), "add-or-remove-one", 1).get_delta_for_epsilon(epsilons)
    exact = np.array([exact_delta(4.0, epsilon) for epsilon in epsilons])
    # What is not rounding is pessimism of the grid, which is on the safe side.
    assert (deltas - exact).min() > -accounting._error((MANY_STEPS,)) / 2


def test_a_delta_that_rounding_errors_swamp_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected delta=1e-14 above 1.4e-11"):
        compute_epsilon(events((30.0, 0.1, 13500)), 1e-14)
    assert compute_epsilon(events((30.0, 1.0, 13500)), 1e-14) < 100  # a closed form has no such limit


@pytest.mark.parametrize(
    "row", [(0.1, 0.01, 100), (0.3, 0.1, 1000), (0.02, 0.1, 10), (1e-6, 0.5, 10**6), (1e-200, 0.5, 1)], ids=str
)
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_tiny_noise_answers_in_seconds_and_never_below_a_single_step(
    row: tuple[float, float, int], adjacency: Any
) -> None:
    start = time.perf_counter()
    epsilon = compute_epsilon(events(row), 1e-5, adjacency=adjacency)
    delta = compute_delta(events(row), 50.0, adjacency=adjacency)
    assert time.perf_counter() - start < 10
    noise, rate, _ = row
    tail = 0.9 * rate  # nearly always, a sampled image moves the sum by many standard deviations
    assert epsilon > 1 / (8 * noise**2) + math.log(rate) if noise > 1e-100 else epsilon == math.inf
    assert delta >= tail


def test_the_grid_is_standard_finer_for_tiny_losses_and_coarser_for_huge_ones() -> None:
    assert choose_discretization(events((1.0, 0.05, 1000))) == DISCRETIZATION
    assert choose_discretization(events((50.0, 0.001, 1000))) < DISCRETIZATION / 10
    assert choose_discretization(events((0.1, 0.1, 1000))) > DISCRETIZATION
    assert choose_discretization([]) == choose_discretization(events((0.0, 0.1, 1))) == DISCRETIZATION
    assert choose_discretization(events((1.0, 1.0, 10))) == DISCRETIZATION


def test_tiny_losses_are_composed_far_more_precisely_than_on_the_standard_grid() -> None:
    """(50, 0.001, 10^5) all but is a Gaussian of mu q sqrt(T) / sigma; the standard grid doubles its epsilon."""
    limit = exact_epsilon(0.001 * math.sqrt(1e5) / 50, 1e-6)
    assert compute_epsilon(events((50.0, 0.001, 10**5)), 1e-6) == pytest.approx(limit, rel=2e-3)
    assert library_epsilon(events((50.0, 0.001, 10**5)), 1e-6) > 1.3 * limit


BASE: dict[str, Any] = {
    "noise": 2.0,
    "rate": 0.05,
    "steps": 500,
    "delta": 1e-5,
    "adjacency": "add-or-remove-one",
    "group": 1,
}


def _epsilon(**changes: Any) -> float:
    p = {**BASE, **changes}
    event = events((p["noise"], p["rate"], p["steps"]))
    return compute_epsilon(event, p["delta"], adjacency=p["adjacency"], group_size=p["group"])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("noise", (10.0, 3.0, 2.0)),
        ("rate", (0.01, 0.05, 0.5, 1.0)),
        ("steps", (1, 499, 500, 5000)),
        ("delta", (0.1, 1e-3, 1e-5, 1e-9)),
        ("adjacency", ADJACENCIES),
        ("group", (1, 2, 3)),
    ],
)
def test_epsilon_grows_with_everything_that_weakens_privacy(name: str, values: tuple) -> None:
    spent = [_epsilon(**{name: value}) for value in values]
    assert all(a < b for a, b in itertools.pairwise(spent))


def test_order_and_splits_of_events_change_nothing() -> None:
    first = events((2.5, 0.1, 3), (2.0, 1.0, 4), (3.0, 0.2, 5))
    again = events((3.0, 0.2, 2), (2.0, 1.0, 1), (2.5, 0.1, 3), (2.0, 1.0, 3), (3.0, 0.2, 3))
    assert compute_epsilon(first, 1e-5) == pytest.approx(compute_epsilon(again, 1e-5), abs=1e-9)


def test_delta_and_epsilon_are_inverse() -> None:
    event = events((2.0, 0.1, 100))
    for delta in (1e-2, 1e-5, 1e-8):
        assert compute_delta(event, compute_epsilon(event, delta)) == pytest.approx(delta, rel=1e-6)


def test_a_repeated_question_is_answered_from_memory() -> None:
    compute_epsilon(events((2.1, 0.1, 100)), 1e-5)
    misses = accounting._epsilon.cache_info().misses
    compute_epsilon(events((2.1, 0.1, 60), (2.1, 0.1, 40)), 1e-5)
    assert accounting._epsilon.cache_info().misses == misses


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_gdp_mu_is_the_smallest_gaussian_above_the_profile(adjacency: Any) -> None:
    event = events((2.0, 0.05, 400), (5.0, 1.0, 5))
    mu = compute_gdp_mu(event, adjacency=adjacency)
    assert mu is not None
    epsilons = np.linspace(0, compute_epsilon(event, 1e-8, adjacency=adjacency), 15)
    deltas = [compute_delta(event, epsilon, adjacency=adjacency) for epsilon in epsilons]
    assert all(exact_delta(mu, e) >= d * (1 - 1e-9) for e, d in zip(epsilons, deltas))
    assert any(exact_delta(0.99 * mu, e) < d for e, d in zip(epsilons, deltas))


@pytest.mark.parametrize(
    ("row", "group_size"), [((3.0, 0.05, 4), 1), ((3.0, 0.05, 4), 2), ((1.0, 0.01, 30), 1), ((6.0, 0.5, 20), 1)]
)
def test_gdp_mu_is_that_of_all_cells(row: tuple, group_size: int) -> None:
    """The slow way: delta at the start of each of 2000 cells, and the mu that reaches it at the cell's end."""
    event = events(row)
    grid = np.linspace(0, compute_epsilon(event, 1e-8, group_size=group_size), 2001)
    deltas = np.array([compute_delta(event, start, group_size=group_size) for start in grid[:-1]])
    mu = compute_gdp_mu(event, group_size=group_size)
    assert mu is not None and np.all(accounting._gaussian_delta(mu, grid[1:]) >= deltas)
    assert np.any(accounting._gaussian_delta(mu * (1 - 1e-7), grid[1:]) < deltas)


def test_chords_are_above_the_profile_and_near_it() -> None:
    epsilons = np.linspace(0, 3, 201)
    exact, some = accounting._gaussian_delta(1.0, epsilons), slice(None, None, 20)
    bound = accounting._below_chords(epsilons, epsilons[some], exact[some])
    assert np.all(bound >= exact * (1 - 1e-12))
    assert bound[some] == pytest.approx(exact[some], rel=1e-12)
    assert 1e-4 < (bound - exact).max() < 2e-2


def test_gdp_mu_of_next_to_nothing_is_above_its_delta() -> None:
    """Epsilon is 0 at delta 1e-8."""
    event = events((1000.0, 1e-6, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mu = compute_gdp_mu(event)
    assert mu is not None and 0 < compute_delta(event, 0.0) <= exact_delta(mu, 0.0)


def test_gdp_mu_is_not_told_where_rounding_errors_hide_it() -> None:
    assert compute_gdp_mu(events((30.0, 0.1, 10**7))) is None
    assert compute_gdp_mu(events((30.0, 1.0, 10**7))) == pytest.approx(math.sqrt(1e7) / 30)


def test_gdp_mu_exists_where_delta_is_one_and_is_at_most_that_of_full_batches() -> None:
    assert compute_gdp_mu(events((0.04, 0.9, 3))) == pytest.approx(math.sqrt(3) / 0.04)


@given(
    st.floats(-1.5, 1.5).map(lambda x: 10**x),
    st.sampled_from([1.0, 0.3, 0.05, 1 / 15]),
    st.integers(1, 3000),
    st.booleans(),
    st.sampled_from(ADJACENCIES),
)
@settings(fixed, max_examples=6)
def test_calibration_never_overspends_and_leaves_little(
    target: float, rate: float, steps: int, after_easy_stage: bool, adjacency: Any
) -> None:
    prior: list[GaussianEvent] = []
    if after_easy_stage:
        easy = calibrate_noise_multiplier(
            target_epsilon=target / 3, target_delta=1e-5, sample_rate=1.0, num_steps=5, adjacency=adjacency
        )
        prior = events((easy, 1.0, 5))
    noise = calibrate_noise_multiplier(
        target_epsilon=target,
        target_delta=1e-5,
        sample_rate=rate,
        num_steps=steps,
        prior_events=prior,
        adjacency=adjacency,
    )
    spent = compute_epsilon([*prior, GaussianEvent(noise, rate, steps)], 1e-5, adjacency=adjacency)
    assert 0.9995 * target <= spent <= target


def test_calibration_pays_for_the_easy_stage() -> None:
    """DP-FETA on MNIST at epsilon 1; its own accountant, by Renyi divergences, asks for 13.084."""
    options: dict[str, Any] = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 1 / 15, "num_steps": 2250}
    noise = calibrate_noise_multiplier(**options, prior_events=events((5.0, 0.1, 5)))
    assert 12.0 < noise <= 12.062  # what a search with dp_accounting stops at
    forgotten = calibrate_noise_multiplier(**options)
    assert forgotten < 0.99 * noise
    assert compute_epsilon(events((forgotten, 1 / 15, 2250), (5.0, 0.1, 5)), 1e-5) > 1.0


def test_calibration_works_for_groups() -> None:
    noise = calibrate_noise_multiplier(
        target_epsilon=1.0, target_delta=1e-5, sample_rate=0.05, num_steps=100, group_size=2
    )
    assert 0.9995 <= compute_epsilon(events((noise, 0.05, 100)), 1e-5, group_size=2) <= 1


@pytest.mark.parametrize("target", [0.5, 2.0])
def test_a_budget_that_the_prior_events_spend_is_refused_with_one_that_suffices(target: float) -> None:
    prior = events((1.0, 1.0, 1))
    options: dict[str, Any] = {"target_delta": 1e-5, "sample_rate": 1.0, "num_steps": 10, "prior_events": prior}
    with pytest.raises(PrivacyBudgetExceeded, match=f"^Expected --target_epsilon={target:g} to exceed") as caught:
        calibrate_noise_multiplier(target_epsilon=target, **options)
    error = caught.value
    assert "\n" not in str(error) and f"{error.smallest_target_epsilon:g}" in str(error)
    assert error.spent_epsilon == compute_epsilon(prior, 1e-5) < error.smallest_target_epsilon
    noise = calibrate_noise_multiplier(target_epsilon=error.smallest_target_epsilon, **options)
    assert compute_epsilon([*prior, GaussianEvent(noise, 1.0, 10)], 1e-5) <= error.smallest_target_epsilon


def test_a_prior_event_without_noise_leaves_no_budget() -> None:
    with pytest.raises(PrivacyBudgetExceeded) as caught:
        calibrate_noise_multiplier(
            target_epsilon=10.0, target_delta=1e-5, sample_rate=0.1, num_steps=10, prior_events=events((0.0, 1.0, 1))
        )
    assert caught.value.spent_epsilon == caught.value.smallest_target_epsilon == math.inf


def test_round_up_keeps_digits_and_never_falls() -> None:
    assert [round_up(x) for x in (0.0, 1.0, 1.00001, 9.9999, 12345.0, 3.2e-7)] == [0, 1, 1.001, 10, 12350, 3.2e-7]
    assert round_up(math.inf) == math.inf
    assert all(round_up(x) >= x for x in np.random.default_rng(0).lognormal(0, 5, 1000))


def test_events_hold_plain_numbers() -> None:
    event = GaussianEvent(np.float64(1), np.float32(0.5), np.int64(3))  # type: ignore[arg-type]
    assert (type(event.noise_multiplier), type(event.sample_rate), type(event.num_steps)) == (float, float, int)


GOOD = events((1.0, 0.1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianEvent(-1.0), "noise_multiplier=-1.0"),
        (lambda: GaussianEvent(math.nan), "noise_multiplier=nan"),
        (lambda: GaussianEvent(math.inf), "noise_multiplier=inf"),
        (lambda: GaussianEvent(1.0, 0.0), "sample_rate=0.0"),
        (lambda: GaussianEvent(1.0, 1.4), r"sample_rate=1.4 in \(0, 1\]"),
        (lambda: GaussianEvent(1.0, math.nan), "sample_rate=nan"),
        (lambda: GaussianEvent(1.0, 0.5, 0), "num_steps=0"),
        (lambda: GaussianEvent(1.0, 0.5, 2.0), "num_steps=2.0"),  # type: ignore[arg-type]
        (lambda: GaussianEvent(1.0, 0.5, True), "num_steps=True"),
        (lambda: compute_epsilon(GOOD, 0.0), "delta=0.0"),
        (lambda: compute_epsilon(GOOD, 1.0), "delta=1.0"),
        (lambda: compute_epsilon(GOOD, math.nan), "delta=nan"),
        (lambda: compute_epsilon(GOOD, 1e-5, adjacency="replace"), "adjacency='replace'"),  # type: ignore[arg-type]
        (lambda: compute_epsilon(GOOD, 1e-5, group_size=0), "group_size=0"),
        (lambda: compute_delta(GOOD, -0.1), "epsilon=-0.1"),
        (lambda: compute_delta(GOOD, math.nan), "epsilon=nan"),
        (lambda: _calibrate(target_epsilon=0.0), "target_epsilon=0.0"),
        (lambda: _calibrate(target_epsilon=math.inf), "target_epsilon=inf"),
        (lambda: _calibrate(target_epsilon=math.nan), "target_epsilon=nan"),
        (lambda: _calibrate(sample_rate=2.0), "sample_rate=2.0"),
        (lambda: _calibrate(num_steps=-1), "num_steps=-1"),
        (lambda: _calibrate(target_delta=2.0), "delta=2.0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        call()


def _calibrate(**changes: Any) -> float:
    options: dict[str, Any] = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "num_steps": 10}
    return calibrate_noise_multiplier(**{**options, **changes})


@pytest.mark.parametrize("delta", [1e-3, 1e-9])
def test_next_to_no_noise_has_a_bound_that_is_near_and_never_below(delta: float) -> None:
    """Losses of 2e8: delta of N(mu, 1) at the epsilon that is told is at most delta, and far above it 0.1 % below."""
    epsilon, mu = compute_epsilon(events((1 / 20_000, 1.0, 1)), delta), 20_000.0
    log_delta = [stats.norm.logcdf(mu / 2 - value / mu) for value in (epsilon, 0.999 * epsilon)]  # of its larger term
    assert log_delta[0] <= math.log(delta) and log_delta[1] > math.log(0.5)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("guess", [0.03, 1.0, 40.0])
def test_the_search_for_noise_takes_few_steps(power: float, guess: float) -> None:
    """Of a spend that is a power of the noise, its logarithm is a line: a secant is on it at once."""
    asked: list[float] = []

    def spent(noise: float) -> float:
        asked.append(noise)
        return float(5.0 * noise**-power)

    noise = accounting._largest_spend_within(spent, 2.0, guess)
    assert 0.9995 * 2 <= spent(noise) <= 2 and len(asked) <= 7


def test_the_search_ends_at_a_jump_on_its_safe_side() -> None:
    asked: list[float] = []

    def spent(noise: float) -> float:
        asked.append(noise)
        return 10.0 / noise if noise < 3.0 else 0.5 / noise

    noise = accounting._largest_spend_within(spent, 2.0, 0.5)
    assert spent(noise) <= 2 and noise == pytest.approx(3.0, rel=1e-9) and len(asked) <= 61


def test_calibration_begins_near_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the central limit, at most five epsilons have to be computed."""
    asked: list[int] = []
    compute = accounting.compute_epsilon
    monkeypatch.setattr(
        accounting, "compute_epsilon", lambda *args, **options: asked.append(1) or compute(*args, **options)
    )
    for epsilon, rate, steps in ((10.0, 0.2, 100), (1.0, 0.05, 300)):
        asked.clear()
        calibrate_noise_multiplier(target_epsilon=epsilon, target_delta=1e-5, sample_rate=rate, num_steps=steps)
        assert len(asked) <= 6  # one of them is of what was spent before


def test_a_budget_of_which_nothing_is_left_but_rounding_is_refused() -> None:
    prior = events((5.0, 1.0, 1))
    target = compute_epsilon(prior, 1e-5) * (1 + 1e-7)
    with pytest.raises(PrivacyBudgetExceeded):
        calibrate_noise_multiplier(
            target_epsilon=target, target_delta=1e-5, sample_rate=0.1, num_steps=10, prior_events=prior
        )
