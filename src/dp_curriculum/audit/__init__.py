"""
An audit that tries to break the guarantee of a configuration, with a tiny network and made-up images.

The guarantee is taken apart: how far one image moves what is released (record and replay on neighbours), the law of
the noise, the law of the masks, what is charged. Each part is checked with near-perfect power. Canaries then confirm
that the parts are wired together. An audit can find a fault; it proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dp_curriculum.audit.canary import (
    AUDIT_NOISE_MULTIPLIER,
    audit_gaussian,
    audit_subsampled,
    lesson_scores,
    step_scores,
)
from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.laws import audit_masks, audit_noise_of_lesson, audit_noise_of_steps
from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.step_audit import StepAudit, tiny_model
from dp_curriculum.audit.step_replay import audit_steps
from dp_curriculum.audit.whole_run import audit_whole_run
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.planned import PlannedLesson
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.randomness import Mode, SecretGenerator
from dp_curriculum.training.plan import BudgetPlan


_CANARY_COPIES = 4
_AUDIT_SAMPLE_RATE = 0.25


@dataclass(frozen=True)
class AuditSize:
    """
    Amount of work of an audit.

    Args:
        noise_draws (`int`): Coordinates of noise of each stage.
        mask_coins (`int`): Rows times steps.
        lesson_trials, step_trials, sampled_trials (`int`): Canary trials in each of two worlds.
    """

    noise_draws: int
    mask_coins: int
    lesson_trials: int
    step_trials: int
    sampled_trials: int


QUICK = AuditSize(1_300_000, 3_000_000, 5_000, 1_500, 2_000)
FULL = AuditSize(10_000_000, 30_000_000, 100_000, 7_000, 20_000)


def run_audit(config: CurriculumConfig, plan: BudgetPlan, size: AuditSize = QUICK) -> Iterator[Finding]:
    """
    Audits the stages of a configuration, one finding after the other.

    Args:
        config ([`CurriculumConfig`]): The configuration. Its private data is not read.
        plan ([`~plan.BudgetPlan`]): Its mechanisms, as a run would be charged for them.
        size ([`AuditSize`], *optional*): [`QUICK`] or [`FULL`].
    """
    mode: Mode = "fast" if config.runtime.secret_randomness == "fast" else "secure"
    for planned in plan.lessons:
        yield from _audit_lesson(planned, config, plan, mode, size)
    if plan.dp_sgd is not None:
        yield from _audit_dp_sgd(config, plan, plan.dp_sgd.event, mode, size)
    yield audit_whole_run(tiny_model(config))


def _audit_lesson(
    planned: PlannedLesson, config: CurriculumConfig, plan: BudgetPlan, mode: Mode, size: AuditSize
) -> Iterator[Finding]:
    name, lesson = f"Lesson {planned.stage}", planned.lesson
    yield from audit_lesson(name, planned, config, num_classes=plan.num_classes, dataset_size=plan.dataset_size)
    yield from audit_noise_of_lesson(
        name, planned, config, mode, num_classes=plan.num_classes, num_draws=size.noise_draws
    )
    if planned.mechanisms and lesson.noises_sums:
        trials = size.lesson_trials if lesson.repeats else size.step_trials
        scores = lesson_scores(planned, config, mode, num_trials=trials, noise_multiplier=AUDIT_NOISE_MULTIPLIER)
        yield audit_gaussian(name, *scores, mu=math.sqrt(len(planned.mechanisms)) / AUDIT_NOISE_MULTIPLIER)


def _audit_dp_sgd(
    config: CurriculumConfig, plan: BudgetPlan, event: GaussianEvent, mode: Mode, size: AuditSize
) -> Iterator[Finding]:
    tiny = tiny_model(config)
    divisor = event.sample_rate * plan.dataset_size
    audit = StepAudit(tiny, event, plan.num_classes, divisor)
    yield from audit_steps(audit)
    yield from audit_noise_of_steps(audit, SecretGenerator(mode), num_draws=size.noise_draws)
    yield from audit_masks(audit, SecretGenerator(mode), num_coins=size.mask_coins)
    copies = min(_CANARY_COPIES, config.dp_sgd.noise_multiplicity)
    audit = StepAudit(tiny.replace(noise_multiplicity=copies), event, plan.num_classes, divisor)
    scores = step_scores(
        audit, SecretGenerator(mode), num_trials=size.step_trials, noise_multiplier=AUDIT_NOISE_MULTIPLIER
    )
    yield audit_gaussian("DP-SGD", *scores, mu=1 / AUDIT_NOISE_MULTIPLIER)
    scores = step_scores(
        audit,
        SecretGenerator(mode),
        num_trials=size.sampled_trials,
        noise_multiplier=AUDIT_NOISE_MULTIPLIER,
        sample_rate=_AUDIT_SAMPLE_RATE,
    )
    yield audit_subsampled("DP-SGD", *scores, noise_multiplier=AUDIT_NOISE_MULTIPLIER, sample_rate=_AUDIT_SAMPLE_RATE)
