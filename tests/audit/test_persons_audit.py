"""Audits of persons: neighbours that differ by one, both engines, all lessons; canaries, masks and a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planning import planned_lesson

from dp_curriculum.audit import AUDIT_NOISE_MULTIPLIER
from dp_curriculum.audit.canary import audit_gaussian, lesson_scores, step_scores
from dp_curriculum.audit.laws import audit_masks
from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import PERSONS, RELATIONS, neighbours
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.audit.step_replay import audit_charges, audit_one_step, audit_steps
from dp_curriculum.audit.whole_run import audit_whole_run
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.randomness import SecretGenerator


Build = Callable[..., StepAudit]
OPTIONS = {"central_images_per_class": 2, "central_sample_rate": 0.5, "person_column": "person"}


def test_pairs_differ_in_one_person_and_hold_every_kind_and_relation() -> None:
    pairs = list(neighbours(num_channels=1, side=8, num_classes=3, gradients=True, unit="person"))
    assert len(pairs) == len({pair.name for pair in pairs}) == (len(PERSONS) + 4) * len(RELATIONS)
    for pair in pairs:
        first, second = pair.first, pair.second
        assert first.persons is not None and second.persons is not None
        relation = pair.name.rsplit(", ", 1)[1]
        assert len(first.units) - len(second.units) == {"add": -1, "remove": 1, "replace": 0}[relation]
        others = slice(0, pair.num_others)
        for name in ("images", "labels", "persons"):
            assert torch.equal(getattr(first, name)[others], getattr(second, name)[others])
        assert {int(p) for one in (first, second) for p in one.persons[pair.num_others :]} == {pair.changed}  # type: ignore[index]
    counts = {pair.name: len(pair.second) - len(pair.first) for pair in pairs}
    assert counts["500 images of several classes, add"] == 500 and counts["one image, add"] == 1


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("stage", LESSONS)
def test_every_lesson_passes(stage: str, num_classes: int, make_config: Any) -> None:
    config = make_config(**OPTIONS)
    findings = audit_lesson(
        "lesson", planned_lesson(LESSONS[stage], config), config, num_classes=num_classes, dataset_size=20
    )
    assert [finding.claim for finding in findings if not finding.holds] == []
    assert findings[0].claim.startswith("lesson: one person moves the sums")
    if stage in ("mean", "frequency"):  # of equal white images the bound is reached, by one and by five hundred
        assert float(findings[0].measured.split()[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_steps_pass(mode: str, step_audit: Build) -> None:
    audit = step_audit(per_image_gradients=mode, person_column="person")
    findings = [*audit_steps(audit), *audit_one_step(audit), audit_charges(audit)]
    assert [finding.claim for finding in findings if not finding.holds] == []
    assert findings[0].claim.startswith("DP-SGD: one person moves the gradient sum")
    assert float(findings[0].measured.split()[0]) > 0.5, "two persons who change places move it by more than one"


@pytest.mark.statistical
def test_the_coins_of_persons_have_their_law(step_audit: Build) -> None:
    findings = list(audit_masks(step_audit(person_column="person"), SecretGenerator(), num_coins=200_000))
    assert len(findings) == 4 and all(finding.holds for finding in findings)
    assert findings[0].claim == "Masks: a person enters with the charged sample rate"


@pytest.mark.statistical
def test_canaries_are_persons(step_audit: Build, make_config: Any) -> None:
    mu = 1 / AUDIT_NOISE_MULTIPLIER
    audit = step_audit(person_column="person")
    scores = step_scores(audit, SecretGenerator(), num_trials=300, noise_multiplier=AUDIT_NOISE_MULTIPLIER)
    found = audit_gaussian("DP-SGD", *scores, mu=mu)
    assert found.holds and float(found.measured.split()[1].rstrip(";")) > 1.5, "a canary that is seen"
    config = make_config(**OPTIONS)
    planned = planned_lesson(LESSONS["mean"], config)
    scores = lesson_scores(planned, config, "fast", num_trials=600, noise_multiplier=AUDIT_NOISE_MULTIPLIER)
    assert audit_gaussian("mean", *scores, mu=math.sqrt(len(planned.mechanisms)) * mu).holds
    three_times = scores[0], scores[1] + 2 * mu  # a person who counts as their three images
    assert not audit_gaussian("mean", *three_times, mu=mu).holds


@pytest.mark.slow
def test_a_run_of_persons_leaves_the_same_on_neighbours(make_config: Any) -> None:
    finding = audit_whole_run(make_config(person_from="folder"))
    assert finding.holds, finding.measured
