"""Canaries: scores that are told apart no better than the guarantee allows pass, and twins that leak more fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planning import planned_lesson, with_noise_times

from dp_curriculum.audit.canary import audit_gaussian, audit_subsampled, lesson_scores, step_scores
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.lesson import Lesson
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.randomness import SecretGenerator


pytestmark = pytest.mark.statistical
Build = Callable[..., StepAudit]


def gaussian_worlds(mu: float, trials: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(1)
    return source.standard_normal(trials), source.standard_normal(trials) + mu


def sampled_worlds(mu: float, rate: float, trials: int) -> tuple[np.ndarray, np.ndarray]:
    without, with_it = gaussian_worlds(0, trials)
    return without, with_it + mu * (np.random.default_rng(2).random(trials) < rate)


@pytest.mark.parametrize(("leak", "holds"), [(0.5, True), (1.0, True), (1.25, False), (2.0, False)])
def test_a_canary_of_a_gaussian_is_held_to_its_mu(leak: float, holds: bool) -> None:
    """1,500 trials: a sensitivity that is a quarter too large is caught."""
    assert audit_gaussian("", *gaussian_worlds(2 * leak, 1500), mu=2.0).holds is holds


def test_the_certain_bound_fails_by_itself_where_the_leak_is_large() -> None:
    """Where scores differ in more than their mean, the mean alone would not tell."""
    without, with_it = gaussian_worlds(2.0, 5000)
    assert not audit_gaussian("", without * 0.4, 1 + (with_it - 1) * 0.4, mu=2.0).holds


@pytest.mark.parametrize(
    ("mu", "rate", "holds"), [(2.0, 0.25, True), (2.0, 0.1, True), (2.0, 0.4, False), (3.0, 0.25, False)]
)
def test_a_canary_of_a_sampled_step_is_held_to_its_privacy_loss(mu: float, rate: float, holds: bool) -> None:
    scores = sampled_worlds(mu, rate, 20_000)
    assert audit_subsampled("", *scores, noise_multiplier=0.5, sample_rate=0.25).holds is holds


def test_adding_is_looked_at_beside_removing() -> None:
    """Low scores that only occur without the image tell that it is missing; high ones are as they must be."""
    without, with_it = sampled_worlds(2.0, 0.25, 20_000)
    telling = np.where(without < 0.5, without - 1, without)
    finding = audit_subsampled("", telling, with_it, noise_multiplier=0.5, sample_rate=0.25)
    assert not finding.holds


def doubled(lesson: Lesson) -> Lesson:
    """Half the noise that is asked for: one image moves twice as much as it may."""

    def release(private: Any, config: Any, mechanisms: Any, size: int, secret: Any) -> Any:
        return lesson.release(private, config, with_noise_times(0.5, mechanisms), size, secret)

    return replace(lesson, release=release)


@pytest.mark.parametrize(("stage", "mu"), [("mean", 2.0), ("moments", 2 * 2**0.5), ("frequency", 2.0)])
def test_the_canary_of_a_lesson(stage: str, mu: float, make_config: Any) -> None:
    for lesson, holds in ((LESSONS[stage], True), (doubled(LESSONS[stage]), False)):
        planned = planned_lesson(lesson, make_config())
        scores = lesson_scores(planned, make_config(), "secure", num_trials=1000, noise_multiplier=0.5)
        assert scores[0].std() == pytest.approx(1 if holds else 0.5, rel=0.1)
        if holds:  # the canary moves every query as far as one image may
            assert scores[1].mean() - scores[0].mean() == pytest.approx(mu, abs=0.2)
        assert audit_gaussian("", *scores, mu=mu).holds is holds


def test_the_canary_of_moments_sees_both_queries(make_config: Any) -> None:
    """Half the noise in the covariances alone, whose sums are rows of a triangle, is caught."""

    def release(private: Any, config: Any, mechanisms: Any, size: int, secret: Any) -> Any:
        draw = secret.gaussian
        secret.gaussian = lambda shape, std, **options: draw(shape, std / (2 if len(shape) == 2 else 1), **options)
        return LESSONS["moments"].release(private, config, mechanisms, size, secret)

    leaky = replace(LESSONS["moments"], release=release)
    scores = lesson_scores(
        planned_lesson(leaky, make_config()), make_config(), "secure", num_trials=1000, noise_multiplier=0.5
    )
    assert not audit_gaussian("", *scores, mu=2 * 2**0.5).holds


class ClipsAtTwice(DPTrainer):
    """The bound of the clip is twice the one that noise is scaled to."""

    def step(self) -> None:
        accumulate = self.gradients.accumulate_clipped
        self.gradients.accumulate_clipped = lambda bound, **given: accumulate(2 * bound, **given)  # type: ignore
        try:
            super().step()
        finally:
            self.gradients.accumulate_clipped = accumulate  # type: ignore[method-assign]


def test_the_canary_of_a_step_of_a_real_network(step_audit: Build) -> None:
    """A hundred and twenty steps a world tell a sensitivity that is twice too large."""
    for trainer, leak in ((DPTrainer, 1), (ClipsAtTwice, 2)):
        audit = step_audit(trainer=trainer, noise_multiplicity=2)
        scores = step_scores(audit, SecretGenerator(), num_trials=120, noise_multiplier=0.5)
        assert scores[1].mean() - scores[0].mean() == pytest.approx(2 * leak, abs=0.8)
        assert audit_gaussian("", *scores, mu=2.0).holds is (leak == 1)


def test_a_sampled_step_holds_the_canary_as_often_as_its_rate_says(step_audit: Build) -> None:
    audit = step_audit(noise_multiplicity=1)
    scores = step_scores(audit, SecretGenerator(), num_trials=200, noise_multiplier=0.1, sample_rate=0.25)
    assert 0.1 < float((scores[1] > 5).mean()) < 0.42 and float((scores[0] > 5).mean()) == 0
