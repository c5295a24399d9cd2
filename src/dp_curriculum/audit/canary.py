"""White-box canaries: can an adversary find out if one image, or one person, was there, better than is allowed?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy import stats

from dp_curriculum.audit.findings import ALPHA, Finding, detectable, two_sided
from dp_curriculum.audit.frozen import FrozenGenerator, WatchedGenerator
from dp_curriculum.audit.neighbours import dataset
from dp_curriculum.audit.step_audit import StepAudit, watch_gradients
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.lessons.planned import PlannedLesson
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import Mode, SecretGenerator


Array = np.ndarray

AUDIT_NOISE_MULTIPLIER = 0.5  # little, so that a few trials show much: mu = 2
CONFIDENCE = 0.999
_ROUNDS = 500  # at once, of a lesson that repeats its query
_IMAGES_OF_PERSON = 3
_LOUD = 1e3  # factor on the loss of the canary: its gradient is clipped to C whatever C is
_REMOVE_EPSILONS, _ADD_SHARES = (0.3, 0.6, 1.0), (0.4, 0.8)


def lesson_scores(
    planned: PlannedLesson, config: CurriculumConfig, mode: Mode, *, num_trials: int, noise_multiplier: float
) -> tuple[Array, Array]:
    """
    Scores of the noisy sums of a lesson on no image, and on a white one, along what the white one adds. Where the unit
    is a person, the canary is one with a few white images.

    Args:
        planned ([`~lessons.PlannedLesson`]): The lesson under test, whose noise must be added to sums.
        config ([`CurriculumConfig`]): As a run would have it. What comes after the noise is not looked at.
        mode (`str`): Mode of the secret generator.
        num_trials (`int`): For each of the two.
        noise_multiplier (`float`): Noise of each audited mechanism, in place of the planned one; all images take part.

    Returns:
        `tuple` of two `numpy.ndarray` of shape `(num_trials,)`, standard normal but for their means. With k mechanisms
        a score takes all of their outputs together: the means may differ by `sqrt(k) / noise_multiplier`, as their
        composition allows (Dong, Roth and Su 2022, arXiv 1905.02383, corollary 2).
    """
    lesson, data = planned.lesson, config.data
    if lesson.repeats:
        config = config.replace(central_post_process=False)  # takes its time, of some hundred rounds

    def audited(rounds: int) -> tuple[PlannedMechanism, ...]:
        event = GaussianEvent(noise_multiplier, num_steps=rounds)
        return tuple(replace(mechanism, event=event) for mechanism in planned.mechanisms)

    count = _IMAGES_OF_PERSON if data.unit == "person" else 1
    white, persons = torch.ones(count, *config.input_shape), [0] * count
    owned = data.unit == "person"
    with_it = dataset(white, [0] * count, 1, persons if owned else None)
    without = dataset(white[:0], [], 1, [] if owned else None)
    frozen = FrozenGenerator()
    lesson.release(with_it, config, audited(1), 1000, frozen)
    axes = [
        total.flatten() / (total.norm() * mechanism.noise_std)
        for total, mechanism in zip(frozen.sums, audited(1), strict=True)
    ]

    def scores(private: PrivateImages) -> Array:
        found = np.zeros((0, len(axes)))
        while len(found) < num_trials:
            secret = WatchedGenerator(mode)
            rounds = min(_ROUNDS, num_trials - len(found)) if lesson.repeats else 1
            lesson.release(private, config, audited(rounds), 1000, secret)
            along = [float(output.double().flatten() @ axis) for output, axis in zip(secret.outputs, cycle(axes))]
            found = np.concatenate([found, np.reshape(along, (-1, len(axes)))])
        return np.asarray(found.sum(axis=1) / math.sqrt(len(axes)))

    return scores(without), scores(with_it)


def step_scores(
    audit: StepAudit,
    secret: SecretGenerator,
    *,
    num_trials: int,
    noise_multiplier: float,
    sample_rate: float = 1.0,
) -> tuple[Array, Array]:
    """
    Scores of single DP-SGD steps on no unit, and on the canary, along the canary's clipped gradient.

    Every trial is a whole step, but for the update of the weights: all start from the same ones.
    """
    canary = audit.canary()
    without = audit.images(0)
    loud = torch.full((len(canary),), _LOUD)
    frozen = FrozenGenerator(always=0)
    audit.build(canary, frozen, loss_scale=loud).step()
    direction = (frozen.sums[0] / frozen.sums[0].norm()).float()
    scale = audit.divisor / (noise_multiplier * audit.bound)

    def scores(private: PrivateImages) -> Array:
        trainer = audit.build(
            private, secret, loss_scale=loud, noise_multiplier=noise_multiplier, sample_rate=sample_rate
        )
        gradients, result = watch_gradients(trainer, apply=False), np.zeros(num_trials)
        for trial in range(num_trials):
            trainer.step()
            result[trial] = float(gradients.pop().flatten() @ direction) * scale
        return result

    return scores(without), scores(canary)


def audit_gaussian(name: str, without: Array, with_it: Array, *, mu: float) -> Finding:
    r"""
    Tests that two sets of scores are no easier to tell apart than N(0, 1) and N(mu, 1).

    Two tests, and both must pass. The first fixes its threshold at mu / 2 beforehand and bounds its error rates from
    the safe side (Clopper and Pearson 1934), in the form of Gaussian differential privacy (Dong, Roth and Su 2022,
    arXiv 1905.02383). The second compares the means, given that the variance is that of the noise, which
    [`laws.audit_noise`] sees to.
    """
    threshold = mu / 2
    false_positives, true_positives = int((without > threshold).sum()), int((with_it > threshold).sum())
    upper = _upper(false_positives, len(without))
    lower = 1 - _upper(len(with_it) - true_positives, len(with_it))
    certain = float(stats.norm.ppf(lower) - stats.norm.ppf(upper))
    error = math.sqrt(1 / len(without) + 1 / len(with_it))
    shift = float(with_it.mean() - without.mean())
    limit = mu + two_sided() * error
    return Finding(
        f"{name}: a canary is told apart no better than mu = {mu:g} allows",
        holds=bool(certain <= mu and shift <= limit),
        measured=f"mu {shift:.3f}; at least {certain:.3f} with {CONFIDENCE:.1%} confidence",
        allowed=f"mu at most {limit:.3f}, and nothing above {mu:g} for certain",
        power=f"{len(without):,} trials per world, noise multiplier {AUDIT_NOISE_MULTIPLIER:g}, alpha = {ALPHA:g}; "
        f"catches a sensitivity {detectable() * error / mu:.0%} too large",
    )


def audit_subsampled(
    name: str, without: Array, with_it: Array, *, noise_multiplier: float, sample_rate: float
) -> Finding:
    r"""
    Tests that a Poisson-sampled step is told apart, in both directions, no better than its privacy loss allows.

    For a few epsilons that are fixed beforehand, the best event of each direction has a probability of at most
    e^epsilon times that in the other world, plus delta(epsilon) (dp_accounting, one step). Removing and adding an
    image have different curves (cf. arXiv 2405.20769).
    """
    tests = _subsampled_tests(noise_multiplier, sample_rate)
    worst, margin = -math.inf, 0.0
    for epsilon, threshold, is_removal in tests:
        adjacency = AdjacencyType.REMOVE if is_removal else AdjacencyType.ADD
        loss = GaussianPrivacyLoss(noise_multiplier, sampling_prob=sample_rate, adjacency_type=adjacency)
        delta = float(loss.get_delta_for_epsilon(epsilon))
        likely = with_it > threshold if is_removal else without <= threshold
        unlikely = without > threshold if is_removal else with_it <= threshold
        lower = 1 - _upper(int((~likely).sum()), len(likely))
        worst = max(worst, lower - math.exp(epsilon) * _upper(int(unlikely.sum()), len(unlikely)) - delta)
        rates = float(likely.mean()), float(unlikely.mean())
        margin = max(margin, _margin(rates, epsilon, len(likely)))
    return Finding(
        f"{name}: with Poisson sampling, adding and removing the canary stay within their privacy loss",
        holds=bool(worst <= 0),
        measured=f"largest certain excess over delta {worst:+.4f}",
        allowed="none",
        power=f"{len(without):,} trials per world, sample rate {sample_rate:g}, {len(tests)} events, confidence "
        f"{CONFIDENCE:.1%}; catches a delta that is {margin:.3f} too small",
    )


def _subsampled_tests(noise_multiplier: float, rate: float) -> list[tuple[float, float, bool]]:
    """Epsilon, threshold of the score where the likelihood ratio is e^epsilon, and whether the image is removed."""
    mu = 1 / noise_multiplier

    def threshold(ratio: float) -> float:
        # (1 - q) + q exp(mu t - mu^2 / 2) = ratio
        return (math.log((ratio - 1 + rate) / rate) + mu**2 / 2) / mu

    removals = [(epsilon, threshold(math.exp(epsilon)), True) for epsilon in _REMOVE_EPSILONS]
    # Without the image, no score is more than 1 / (1 - q) times as likely.
    additions = [share * -math.log1p(-rate) for share in _ADD_SHARES]
    return removals + [(epsilon, threshold(math.exp(-epsilon)), False) for epsilon in additions]


def _upper(count: int, trials: int) -> float:
    """Upper confidence bound of a probability, from `count` of `trials`."""
    return 1.0 if count == trials else float(stats.beta.ppf(CONFIDENCE, count + 1, trials - count))


def _margin(rates: Sequence[float], epsilon: float, trials: int) -> float:
    """Smallest excess that is nearly always certain."""
    errors = [math.sqrt(max(rate * (1 - rate), 1 / trials) / trials) for rate in rates]
    bounds = float(stats.norm.ppf(CONFIDENCE)) * (errors[0] + math.exp(epsilon) * errors[1])
    return bounds + float(stats.norm.ppf(CONFIDENCE)) * math.hypot(errors[0], math.exp(epsilon) * errors[1])
