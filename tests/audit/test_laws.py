"""Noise and masks of the right law pass; each law has twins that break it by little more than the audit names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import planning
import pytest
import torch

from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.laws import (
    audit_masks,
    audit_noise,
    audit_noise_of_lesson,
    audit_noise_of_steps,
    audit_parameters,
    audit_precision,
    audit_secrecy,
)
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.lessons.lesson import Lesson, draw_rows
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.randomness import SecretGenerator


pytestmark = pytest.mark.statistical
Build = Callable[..., StepAudit]
Array = np.ndarray


def broken(findings: Any) -> list[str]:
    """The claims that fail, without their subject."""
    return [finding.claim.split(": ", 1)[1] for finding in findings if not finding.holds]


# --- noise, as numbers -----------------------------------------------------------------------------------------------


def normals(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal(shape)


def autoregressive(steps: Array, correlation: float) -> Array:
    mixed = steps.copy()
    mixed[1:] = correlation * steps[:-1] + (1 - correlation**2) ** 0.5 * steps[1:]
    return mixed


def test_normals_pass() -> None:
    assert broken(audit_noise("", normals(13, 100_000))) == []


@pytest.mark.parametrize(
    ("twin", "claim"),
    [
        (lambda draws: draws * 0.99, "variance that is charged"),
        (lambda draws: draws * 1.01, "variance that is charged"),
        (lambda draws: draws + 0.01, "mean zero"),
        (lambda draws: np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, draws.shape), "is Gaussian"),
        (lambda draws: np.random.default_rng(0).laplace(0, 2**-0.5, draws.shape), "is Gaussian"),
        (lambda draws: np.random.default_rng(0).standard_t(20, draws.shape) * 0.9**0.5, "tails of a Gaussian"),
        (partial(autoregressive, correlation=0.01), "successive draws"),
        (lambda draws: np.repeat(draws[:1], len(draws), axis=0), "successive draws"),
    ],
)
def test_noise_of_another_law_fails(twin: Callable[[Array], Array], claim: str) -> None:
    assert any(claim in failure for failure in broken(audit_noise("", twin(normals(13, 100_000)))))


def test_a_parameter_without_noise_of_its_own_fails() -> None:
    shapes, steps = [torch.Size([50]), torch.Size([30]), torch.Size([5, 10])], normals(10, 130)
    assert audit_parameters(steps, shapes).holds
    for twin in (slice(80, 130), slice(0, 50)):
        shared = steps.copy()
        shared[:, twin] = steps[:, 0:50] if twin.start else 0
        assert not audit_parameters(shared, shapes).holds
    small = steps.copy()
    small[:, 50:80] *= 0.5
    assert not audit_parameters(small, shapes).holds


def test_noise_that_was_rounded_first_fails() -> None:
    noise = torch.from_numpy(normals(1000))
    assert audit_precision("", noise).holds
    assert not audit_precision("", noise.float()).holds
    assert not audit_precision("", torch.zeros(0)).holds


def test_a_draw_that_a_seed_repeats_fails_and_the_global_generators_are_left_as_they_were() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    assert audit_secrecy("", lambda: SecretGenerator().gaussian(100, 1.0)).holds
    for twin in (
        lambda: torch.randn(100),
        lambda: torch.from_numpy(np.random.standard_normal(100)),
        lambda: torch.randn(100, generator=torch.Generator()),
        lambda: torch.randn(100, generator=torch.Generator().manual_seed(3)),
    ):
        assert not audit_secrecy("", twin).holds
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]


# --- noise of real steps and real lessons ----------------------------------------------------------------------------


class Scaled(SecretGenerator):
    """Noise that is a little smaller than it was asked for."""

    factor = 0.98

    def gaussian(self, shape: Any, std: float, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return super().gaussian(shape, std * self.factor, dtype=dtype)


def test_noise_of_steps_passes_and_two_percent_less_fails(step_audit: Build) -> None:
    assert broken(audit_noise_of_steps(step_audit(), SecretGenerator(), num_draws=300_000)) == []
    failures = broken(audit_noise_of_steps(step_audit(), Scaled(), num_draws=300_000))
    # The distance from a standard normal grows with the variance, too, and is over its limit in some draws.
    assert {"noise has the variance that is charged"} <= set(failures) <= {
        "noise has the variance that is charged", "noise is Gaussian"
    }  # fmt: skip


def with_noise_times(factor: float, lesson: Lesson) -> Lesson:
    """The lesson with less noise than its plan says."""

    def release(private: Any, config: Any, mechanisms: Any, size: int, secret: Any) -> Any:
        return lesson.release(private, config, planning.with_noise_times(factor, mechanisms), size, secret)

    return Lesson(plan=lesson.plan, release=release, draw=draw_rows)


def test_a_lesson_that_is_charged_for_nothing_may_release_nothing(make_config: Any) -> None:
    def audit(lesson: Lesson) -> list[str]:
        planned = planning.planned_lesson(lesson, make_config())
        return broken(audit_noise_of_lesson("", planned, make_config(), "secure", num_classes=3, num_draws=10))

    public = LESSONS["public"]
    assert audit(public) == []
    for release in (
        lambda private, *_: {"images": private.images},
        lambda private, config, mechanisms, size, secret: {} if secret.gaussian(3, 1.0).isnan().all() else {},
    ):
        assert audit(replace(public, release=release)) == ["it is charged for nothing, and releases nothing"]


@pytest.mark.parametrize("stage", [stage for stage in LESSONS if stage != "public"])
def test_noise_of_lessons_passes_and_two_percent_less_fails(stage: str, make_config: Any) -> None:
    def audit(lesson: Lesson) -> list[Finding]:
        config = make_config(central_images_per_class=20, lesson_resolution=8)
        planned = planning.planned_lesson(lesson, config)
        return audit_noise_of_lesson(stage, planned, config, "secure", num_classes=3, num_draws=200_000)

    assert broken(audit(LESSONS[stage])) == []
    assert "noise has the variance that is charged" in broken(audit(with_noise_times(0.98, LESSONS[stage])))


def test_a_lesson_with_a_draw_more_or_less_than_planned_fails(make_config: Any) -> None:
    """Two draws are planned, one is taken."""
    planned = planning.planned_lesson(LESSONS["mean"], make_config())
    twice = replace(planned, mechanisms=planned.mechanisms * 2)
    assert broken(audit_noise_of_lesson("", twice, make_config(), "secure", num_classes=3, num_draws=10)) == ["noise"]


# --- masks -----------------------------------------------------------------------------------------------------------


class Shuffled(SecretGenerator):
    """Batches of a constant size, in random order."""

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        return torch.randperm(num_rows)[: round(num_rows * sample_rate)].sort().values


class Sticky(SecretGenerator):
    """Every tenth mask is used twice."""

    calls, last = 0, torch.zeros(0)

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        self.calls += 1
        if self.calls % 10:
            self.last = super().poisson_sample(num_rows, sample_rate)
        return self.last


class Biased(SecretGenerator):
    """The rate is a little too large."""

    factor = 1.02

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        return super().poisson_sample(num_rows, sample_rate * self.factor)


class Favoured(SecretGenerator):
    """One half of the rows enters more often than the other; the mean rate is right."""

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        half = num_rows // 2
        parts = (
            super().poisson_sample(half, sample_rate * 1.1),
            super().poisson_sample(num_rows - half, sample_rate * 0.9) + half,
        )
        return torch.cat(parts)


class Together(SecretGenerator):
    """Neighbouring rows share their coin."""

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        pairs = super().poisson_sample(num_rows // 2, sample_rate)
        return torch.stack([2 * pairs, 2 * pairs + 1]).T.flatten()


@pytest.mark.parametrize(
    ("secret", "claim"),
    [
        (SecretGenerator, None),
        (Shuffled, "the size of a draw varies as that of a Poisson sample"),
        (Together, "the size of a draw varies as that of a Poisson sample"),
        (Sticky, "successive draws are independent"),
        (Biased, "a row enters with the charged sample rate"),
        (Favoured, "no row is favoured"),
    ],
)
def test_masks_of_another_law_fail(secret: type[SecretGenerator], claim: str | None, step_audit: Build) -> None:
    failures = broken(audit_masks(step_audit(), secret(), num_coins=500_000))
    assert claim in failures if claim else failures == []


def test_full_batches_have_nothing_but_a_rate(step_audit: Build) -> None:
    from dp_curriculum.privacy.accounting import GaussianEvent

    findings = list(audit_masks(step_audit(event=GaussianEvent(2.0, 1.0, 10)), SecretGenerator(), num_coins=100_000))
    assert len(findings) == 1 and findings[0].holds
