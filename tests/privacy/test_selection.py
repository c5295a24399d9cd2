"""Private selection: the bound is compared with exact divergences, which are computed in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from dp_curriculum.privacy.accounting import GaussianEvent, compute_delta, compute_epsilon
from dp_curriculum.privacy.selection import Selection, Tries


DELTA = 1e-5
LAWS = [
    Tries(4.0),
    Tries(1.5),
    Tries(30.0),
    Tries(4.0, shape=0.0),
    Tries(4.0, shape=-0.5),
    Tries(4.0, shape=3.0),
    Tries(4.0, "poisson"),
    Tries(1.2, "poisson"),
]


def pmf(tries: Tries, length: int = 20_000) -> np.ndarray:
    """Probabilities of 1, 2, ... tries, from scipy alone: a law on 0, 1, ... without its zero."""
    counts = np.arange(1, length + 1)
    if tries.law == "poisson":
        mean = optimize.brentq(lambda m: m / (1 - math.exp(-m)) - tries.expected, 1e-9, tries.expected)
        return stats.poisson.pmf(counts, mean) / stats.poisson.sf(0, mean)
    if tries.shape > 0:

        def mean_of(p: float) -> float:
            return stats.nbinom.mean(tries.shape, p) / stats.nbinom.sf(0, tries.shape, p)

        p = optimize.brentq(lambda p: mean_of(p) - tries.expected, 1e-6, 1 - 1e-12)
        return stats.nbinom.pmf(counts, tries.shape, p) / stats.nbinom.sf(0, tries.shape, p)
    if tries.shape == 0:
        p = optimize.brentq(lambda p: stats.logser.mean(p) - tries.expected, 1e-9, 1 - 1e-9)
        return stats.logser.pmf(counts, p)

    # Below zero there is no such law to truncate: the weights by their recursion.
    def weights(gamma: float) -> np.ndarray:
        ratios = (1 - gamma) * (counts[:-1] + tries.shape) / (counts[:-1] + 1)
        found = np.concatenate([[1.0], np.cumprod(ratios)])
        return found / found.sum()

    gamma = optimize.brentq(lambda g: counts @ weights(g) - tries.expected, 1e-3, 1 - 1e-9)
    return weights(gamma)


def chosen(tries: Tries, outputs: np.ndarray) -> np.ndarray:
    """Law of the best of K outputs, from that of one, in the order of their scores."""
    below = np.clip(np.concatenate([[0.0], np.cumsum(outputs)]), 0, 1)
    probabilities = pmf(tries)
    generating = np.zeros(len(below))
    for count in np.nonzero(probabilities > 1e-18)[0]:
        generating += probabilities[count] * below ** (count + 1.0)
    return np.diff(generating)


def exact_delta(one: np.ndarray, other: np.ndarray, epsilon: float) -> float:
    """The larger of both directions."""
    return max(float(np.maximum(p - math.exp(epsilon) * q, 0).sum()) for p, q in ((one, other), (other, one)))


def gaussian(mu: float, cells: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """N(0, 1) and N(mu, 1) in cells: what a score that tells the datasets apart best makes of a Gaussian release."""
    edges = np.concatenate([[-np.inf], np.linspace(-8, 8 + mu, cells - 1), [np.inf]])
    return np.diff(stats.norm.cdf(edges)), np.diff(stats.norm.cdf(edges - mu))


@pytest.mark.parametrize("tries", LAWS, ids=str)
def test_the_number_of_tries_has_its_law(tries: Tries) -> None:
    expected = pmf(tries)
    found = np.array([tries.probability(count) for count in range(1, 60)])
    np.testing.assert_allclose(found, expected[:59], rtol=1e-4, atol=1e-12)
    assert expected @ np.arange(1, len(expected) + 1) == pytest.approx(tries.expected, rel=1e-6)
    borders = np.cumsum(found)
    for count in range(1, 6):
        assert tries.count(borders[count - 1] - 1e-9) == count and tries.count(borders[count - 1] + 1e-9) == count + 1
    assert tries.count(0.0) == 1


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("tries", LAWS, ids=str)
def test_the_bound_is_above_the_exact_divergence_whatever_the_score(tries: Tries, mu: float) -> None:
    selection = Selection(tries, ((GaussianEvent(1 / mu),),))
    for delta in (1e-6, 1e-3, 0.05):
        epsilon = selection.epsilon(delta)
        for order in (slice(None), slice(None, None, -1)):
            one, other = (chosen(tries, law[order]) for law in gaussian(mu))
            assert exact_delta(one, other, epsilon) <= delta
    assert selection.epsilon(DELTA) > compute_epsilon([GaussianEvent(1 / mu)], DELTA)


@pytest.mark.parametrize("tries", LAWS, ids=str)
def test_it_holds_for_an_answer_that_is_sometimes_given_away(tries: Tries) -> None:
    """Randomised response that fails with probability 0.01, as a release whose accounting is of events."""
    epsilon0, delta0 = 0.7, 0.01
    truth = (1 - delta0) * math.exp(epsilon0) / (1 + math.exp(epsilon0))
    lie = 1 - delta0 - truth
    one, other = np.array([0.0, lie, truth, delta0]), np.array([delta0, truth, lie, 0.0])

    def delta_of(epsilon: float) -> float:
        return exact_delta(one, other, epsilon)

    ratio = tries.log_ratio(delta_of)
    for order in ([0, 1, 2, 3], [3, 0, 1, 2], [1, 2, 0, 3], [2, 3, 0, 1]):
        for epsilon in (0.0, 0.2, 0.7, 1.5):
            exact = exact_delta(chosen(tries, one[order]), chosen(tries, other[order]), epsilon + ratio)
            assert exact <= tries.expected * delta_of(epsilon) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("tries", [Tries(8.0), Tries(8.0, "poisson"), Tries(8.0, shape=0.0)], ids=str)
def test_a_selection_that_is_charged_as_one_try_is_noticed(tries: Tries) -> None:
    """The broken twin of the best of several: epsilon of one of them."""
    one, other = (chosen(tries, law) for law in gaussian(1.0, 4000))
    assert exact_delta(one, other, compute_epsilon([GaussianEvent(1.0)], DELTA)) > 4 * DELTA


@pytest.mark.parametrize("tries", [Tries(20.0), Tries(20.0, "poisson"), Tries(20.0, shape=0.0)], ids=str)
def test_a_selection_without_the_factor_of_its_law_is_noticed(tries: Tries) -> None:
    """The other broken twin, r = 0: an output that is likelier where a better one is rarer."""
    epsilon, top, middle = 0.7, 0.3, 0.01
    more = math.exp(epsilon)
    one = np.array([1 - top - more * middle, more * middle, top])
    other = np.array([1 - more * top - middle, middle, more * top])
    assert exact_delta(one, other, epsilon) == pytest.approx(0, abs=1e-12)
    ratio = tries.log_ratio(lambda x: exact_delta(one, other, x))
    chosen_one, chosen_other = chosen(tries, one), chosen(tries, other)
    assert exact_delta(chosen_one, chosen_other, epsilon) > 1e-4, "the bound would be 0"
    assert exact_delta(chosen_one, chosen_other, epsilon + ratio) <= 1e-12


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("shape", [0.0, 1.0])
def test_it_is_not_above_the_published_bound_in_renyi_divergences(shape: float, mu: float) -> None:
    """Theorem 2 of arXiv 2110.03620, for a Gaussian try, and the usual conversion (arXiv 2004.00010)."""
    tries = Tries(4.0, shape=shape)
    gamma = tries.parameter

    def published(order: float, other: float) -> float:
        renyi = order * mu**2 / 2 + (1 + shape) * (1 - 1 / other) * other * mu**2 / 2
        renyi += (1 + shape) * math.log(1 / gamma) / other + math.log(tries.expected) / (order - 1)
        return renyi + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)

    orders = np.geomspace(1.05, 200, 200)
    best = min(published(order, other) for order in orders for other in orders)
    assert Selection(tries, ((GaussianEvent(1 / mu),),)).epsilon(DELTA) <= best


def test_one_expected_try_costs_one_try_and_more_cost_more() -> None:
    events = (GaussianEvent(1.0), GaussianEvent(4.0, 0.1, 10))
    one = compute_epsilon(events, DELTA)
    assert Selection(Tries(1.0), (events,)).epsilon(DELTA) == pytest.approx(one, rel=1e-9)
    costs = [Selection(Tries(expected), (events,)).epsilon(DELTA) for expected in (2.0, 4.0, 8.0)]
    assert one < costs[0] < costs[1] < costs[2] < compute_epsilon(events * 4, DELTA)


def test_the_worst_setting_counts() -> None:
    loud, quiet = (GaussianEvent(1.0),), (GaussianEvent(3.0),)
    both, alone = Selection(Tries(4.0), (loud, quiet)), Selection(Tries(4.0), (loud,))
    assert both.epsilon(DELTA) == alone.epsilon(DELTA) > Selection(Tries(4.0), (quiet,)).epsilon(DELTA)
    assert Selection(Tries(4.0), ((GaussianEvent(0.0),),)).epsilon(DELTA) == math.inf
    assert both.epsilon(DELTA, adjacency="replace-one") > both.epsilon(DELTA)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0.5,), "expected=0.5"),
        ((2000.0,), "expected=2000.0"),
        ((2.0, "fixed"), "law='fixed'"),
        ((2.0, "negative-binomial", -1.0), "shape=-1.0"),
        ((math.nan,), "expected=nan"),
    ],
)
def test_a_law_out_of_range_is_refused(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tries(*arguments)  # type: ignore[arg-type]


def test_the_profile_that_the_ratio_uses_is_the_accountants() -> None:
    """A try that never differs costs nothing, and one that always does is bounded by the law alone."""
    for tries in LAWS:
        assert tries.log_ratio(lambda epsilon: 0.0) == pytest.approx(0, abs=1e-9)
        assert tries.log_ratio(lambda epsilon: compute_delta([GaussianEvent(1.0)], epsilon)) < tries.log_ratio(
            lambda epsilon: 1.0
        )
