"""The audits fail on faithful ports of published mistakes (pitfalls 1, 7, 10, 12, 19, 25-27, 30-32), and pass ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning import planned_lesson
from published_mistakes import (
    AutogradTrainer,
    ClipsEachCopy,
    CrashesOnEmptyDraws,
    DividesByTheDraw,
    LetsNaNThrough,
    SeededNoise,
    SkipsEmptyDraws,
    hand_copied_plan,
    lesson,
    mean_of_unbounded_pixels,
    mean_over_the_realised_count,
    plan_from_the_configuration,
    seeded_mean,
)

from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.frozen import WatchedGenerator
from dp_curriculum.audit.laws import audit_noise_of_lesson, audit_secrecy
from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_audit import StepAudit, watch_gradients
from dp_curriculum.audit.step_replay import audit_charges, audit_steps
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import open_rows, read_images
from dp_curriculum.lessons.lesson import Lesson
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.accounting import GaussianEvent, compute_epsilon
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training import teaching
from dp_curriculum.training.plan import plan_budget
from dp_curriculum.training.run import Run


Build = Callable[..., StepAudit]


def failing(findings: list[Finding], word: str) -> bool:
    """Whether the one claim with that word fails."""
    (finding,) = [finding for finding in findings if word in finding.claim]
    return not finding.holds


# --- the hard stage --------------------------------------------------------------------------------------------------

PAIRS = ("ordinary, add", "huge gradient, remove", "gradient not finite, add", "not a number, replace")


def replay(audit: StepAudit) -> list[Finding]:
    pairs = neighbours(num_channels=1, side=8, num_classes=audit.num_classes, gradients=True)
    return audit_steps(audit, [pair for pair in pairs if pair.name in PAIRS])


def test_the_reference_by_autograd_passes_and_sums_what_ours_sums(step_audit: Build) -> None:
    for audit in (step_audit(), step_audit(trainer=AutogradTrainer)):
        assert [finding.claim for finding in replay(audit) if not finding.holds] == []


@pytest.mark.parametrize(
    ("trainer", "word"),
    [
        (LetsNaNThrough, "moves the gradient sum by at most C"),
        (ClipsEachCopy, "moves the gradient sum by at most C"),
        (DividesByTheDraw, "over the public divisor"),
        (DividesByTheDraw, "with equal noised sums"),
    ],
)
def test_a_published_clip_or_divisor_fails(trainer: type[AutogradTrainer], word: str, step_audit: Build) -> None:
    """Pitfalls 10, 12 and 19."""
    assert failing(replay(step_audit(trainer=trainer)), word)


def test_a_step_that_is_skipped_where_no_image_was_drawn_fails(step_audit: Build) -> None:
    """Pitfall 7."""
    assert audit_charges(step_audit()).holds and audit_charges(step_audit(trainer=AutogradTrainer)).holds
    assert not audit_charges(step_audit(trainer=SkipsEmptyDraws)).holds
    with pytest.raises(RuntimeError, match="reshape"):
        audit_charges(step_audit(trainer=CrashesOnEmptyDraws))


def test_noise_from_a_seed_fails(step_audit: Build) -> None:
    """Pitfall 1, in both stages."""

    def first_noise(audit: StepAudit) -> Callable[[], torch.Tensor]:
        def draw() -> torch.Tensor:
            trainer = audit.build(audit.images(0), SecretGenerator())
            gradients = watch_gradients(trainer)
            trainer.step()
            return gradients[0]

        return draw

    assert audit_secrecy("ours", first_noise(step_audit())).holds
    assert not audit_secrecy("published", first_noise(step_audit(trainer=SeededNoise))).holds


def test_noise_of_a_lesson_from_a_seed_fails(make_config: Any) -> None:
    config = make_config()
    for taught, is_caught in ((LESSONS["mean"], False), (lesson(seeded_mean), True)):
        findings = audit_noise_of_lesson(
            "mean", planned_lesson(taught, config), config, "secure", num_classes=3, num_draws=100
        )
        assert failing(findings[:1], "the same configuration and seed twice") is is_caught


# --- the easy stage --------------------------------------------------------------------------------------------------


def replay_lesson(taught: Lesson, config: CurriculumConfig, dataset_size: int = 60) -> list[Finding]:
    return audit_lesson("mean", planned_lesson(taught, config), config, num_classes=3, dataset_size=dataset_size)


@pytest.mark.parametrize(
    ("release", "seen"),
    [
        (mean_over_the_realised_count, "inf of it"),  # pitfall 31: the mean of an empty class is no number
        (mean_of_unbounded_pixels, "inf of it"),
    ],
)
def test_a_mean_over_the_realised_count_fails(release: Any, seen: str, make_config: Any) -> None:
    config = make_config()
    assert all(finding.holds for finding in replay_lesson(LESSONS["mean"], config))
    (finding,) = [found for found in replay_lesson(lesson(release), config) if "one image moves" in found.claim]
    assert not finding.holds and seen in finding.measured


@pytest.mark.parametrize(
    ("release", "kinds", "at_least"),
    [
        # Pitfall 30: of twenty that are assumed in a class, three are there: a white one moves their mean sevenfold.
        (mean_over_the_realised_count, ("all white, add", "all white, remove"), 3.0),
        # Pitfall 32: a pixel of 1000 moves it as far as it likes.
        (mean_of_unbounded_pixels, ("out of range, add",), 100.0),
    ],
)
def test_the_realised_count_and_the_assumed_range_fail_each_by_itself(
    release: Any, kinds: tuple[str, ...], at_least: float, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs in which every class has images, and no pixel but that of the second kind is out of range."""
    from dp_curriculum.audit import lesson_replay

    def chosen(*, num_channels: int, side: int, num_classes: int, unit: str) -> list[Any]:
        # One class more than the others use would be empty: two classes, and both have images.
        return [pair for pair in neighbours(num_channels=1, side=8, num_classes=1) if pair.name in kinds]

    monkeypatch.setattr(lesson_replay, "neighbours", chosen)
    config = make_config()
    (finding,) = [found for found in replay_lesson(lesson(release), config) if "one image moves" in found.claim]
    assert not finding.holds and float(finding.measured.split()[0]) > at_least
    assert all(found.holds for found in replay_lesson(LESSONS["mean"], config))


# --- what is charged and reported ------------------------------------------------------------------------------------


def test_an_accounting_that_was_copied_by_hand_fails(make_config: Any) -> None:
    """Pitfall 26."""
    config = make_config()
    assert not failing(replay_lesson(lesson(LESSONS["mean"].release, hand_copied_plan), config), "that are charged")
    taught = lesson(plan_from_the_configuration, hand_copied_plan)
    assert failing(replay_lesson(taught, config), "those that are charged")


def test_a_reported_epsilon_without_the_easy_stage_fails(tmp_path: Path) -> None:
    """Pitfall 25: the engine of the hard stage is asked for its epsilon, and knows of nothing else."""
    with PrivacyLedger.open(tmp_path / "ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(5.0, 0.1, 5), stage="central-images-mean", clip_norm=2.0)
        ledger.reserve(GaussianEvent(2.0, 0.1, 100), stage="dp-sgd", clip_norm=1.0)
        report = PrivacyReport.from_ledger(ledger, target_delta=1e-5).to_dict()
    assert all(check.holds for check in verify_report(report))
    published = {**report, "epsilon": compute_epsilon([GaussianEvent(2.0, 0.1, 100)], 1e-5)}
    assert not all(check.holds for check in verify_report(published))


def run_lesson_on_ranks(
    release: Callable[[Run, int], None], config: CurriculumConfig, folder: Path
) -> tuple[int, int]:
    """Runs the mean lesson on two processes in turn: how many noises were drawn, and how many were charged."""
    from dp_curriculum.data import digits_dataset

    private = read_images(open_rows(digits_dataset().select(range(20)), config.data), config.data)
    drawn, ledger = 0, PrivacyLedger.open(folder / "ledger.jsonl")
    for rank in range(2):
        accelerator: Any = SimpleNamespace(
            is_main_process=rank == 0, num_processes=2, device=torch.device("cpu"), wait_for_everyone=lambda: None
        )
        secret, anything = WatchedGenerator(), cast_any(None)
        run = Run(
            config, RunFolder(folder), accelerator, private, plan_budget(config, dataset_size=20, num_classes=10),
            ledger if rank == 0 else None, secret, anything, anything,
        )  # fmt: skip
        release(run, rank)
        drawn += len(secret.stds)
    charged = sum(event.num_steps for event in ledger.events)
    ledger.close()
    return drawn, charged


def cast_any(value: object) -> Any:
    return value


def test_a_query_that_every_process_runs_and_one_charges_fails(make_config: Any, tmp_path: Path) -> None:
    """Pitfall 27."""

    def ours(run: Run, rank: int) -> None:
        teaching._released(run, run.plan.lessons[0])

    def published(run: Run, rank: int) -> None:
        if rank == 0:
            (mechanism,) = run.plan.lessons[0].mechanisms
            run.reserve(mechanism, mechanism.event.num_steps)
        planned = run.plan.lessons[0]
        planned.lesson.release(run.private, run.config, planned.mechanisms, run.plan.dataset_size, run.secret)

    results = {}
    for name, release in (("ours", ours), ("published", published)):
        (tmp_path / name).mkdir()
        config = make_config(public_dataset_size=20, central_images_per_class=3)
        results[name] = run_lesson_on_ranks(release, config, tmp_path / name)
    assert results == {"ours": (3, 3), "published": (6, 3)}
