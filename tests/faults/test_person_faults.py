"""Faults that would break the guarantee for a person, planted one at a time: a check that is named notices each."""

from __future__ import annotations

from typing import Any

import pytest
from planning import planned_lesson
from planting import plant
from test_seeded_faults import Check, Fault, Tools, _nothing_remembered, holds, passes, step_audit  # noqa: F401

from dp_curriculum.audit.laws import audit_masks
from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_replay import audit_one_step, audit_steps
from dp_curriculum.data import holdout
from dp_curriculum.data.units import Units
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons import central_images, class_sums
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training import validation


PERSONS = {"person_column": "person"}


def replayed(*names: str) -> Check:
    """The claim that one person moves the gradient sum by at most C, on these pairs of neighbours."""

    def check(tools: Tools) -> bool:
        pairs = neighbours(num_channels=1, side=8, num_classes=3, gradients=True, unit="person")
        findings = audit_steps(step_audit(tools, **PERSONS), [pair for pair in pairs if pair.name in names])
        return holds(findings, "one person moves the gradient sum by at most C")

    return check


def lesson(words: str, stage: str = "mean") -> Check:
    def check(tools: Tools) -> bool:
        config = tools.make_config(**PERSONS)
        planned = planned_lesson(LESSONS[stage], config)
        return holds(audit_lesson(stage, planned, config, num_classes=3, dataset_size=20), words)

    return check


def divided(tools: Tools) -> bool:
    return holds(audit_one_step(step_audit(tools, **PERSONS)), "the noised sum over the public divisor")


def masks(tools: Tools) -> bool:
    findings = audit_masks(step_audit(tools, **PERSONS), SecretGenerator(), num_coins=200_000)
    return holds(findings, "a person enters with the charged sample rate")


ONE_PERSON = "one person moves the sums by no more than their noise is for"
SHARES = "return rows, (1 / counts.double()).repeat_interleave(counts)"

FAULTS = [
    Fault("P1", "a bound that is counted per image, in lessons", Units, "rows_of",
          [(SHARES, "return rows, None")], lesson(ONE_PERSON)),
    Fault("P2", "a bound that is counted per image, in steps", DPTrainer, "_draw_share",
          [("return units.draw_rows(", "return units.rows_of(share)[0] if units else units.draw_rows(")],
          replayed("3 images of one class, add")),
    Fault("P3", "a divisor in images, in lessons", central_images, "query_central_images",
          [("event.sample_rate * public_dataset_size", "event.sample_rate * len(images)")],
          lesson("with equal noised sums, all that is released is equal")),
    Fault("P4", "a sample rate and divisors in images", validation, "validate_data",
          [("training_size(len(private.units))", "training_size(len(private))")],
          passes("test_person_runs::test_numbers_are_of_persons", make_config=lambda tools: tools.make_config)),
    Fault("P5", "a mean over the persons that were drawn", DPTrainer, "step",
          [("self.optimizer.step()\n",
            "self.optimizer.expected_batch_size = max(1, len(share))\n    self.optimizer.step()\n")], divided),
    Fault("P6", "a mean over the images of a class, not of the person", class_sums, "noisy_class_sums",
          [("    summed_shape = ",
            "    persons, classes = units.persons[indices], labels[indices]\n"
            "    same = (persons[:, None] == persons) & (classes[:, None] == classes)\n"
            "    weights = 1 / same.double().sum(1)\n    summed_shape = ")],
          lesson(ONE_PERSON)),
    Fault("P7", "one clip per row of a person", DPTrainer, "_add_clipped",
          [("self.gradients.backward(", "self.gradients.noise_multiplicity = 1\n    self.gradients.backward("),
           ("counted=first != FILLER", "counted=batch.t().flatten() != FILLER")],
          replayed("huge gradient, add")),
    Fault("P8", "a coin per image: who has more enters more often", DPTrainer, "_draw_share",
          [("drawn = draw_indices(self.secret, num_rows=len(units), sample_rate=self.sample_rate)",
            "drawn = draw_indices(self.secret, num_rows=len(self.private), sample_rate=self.sample_rate)\n"
            "    drawn = self.private.persons[drawn].unique()")], masks),
    Fault("P9", "images are held out, not persons", holdout, "_held_out_rows",
          [("if private.persons is not None:", "if False:")],
          passes("test_holdout::test_persons_are_held_out_whole", bytes(32))),
    Fault("P10", "the order of a person's images hangs on the others", Units, "draw_rows",
          [("turns = torch.arange(count) %", "turns = (len(rows) + torch.arange(count)) %")],
          passes("test_units::test_what_is_made_of_a_person_does_not_depend_on_another")),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.number}: {fault.what}" for fault in FAULTS])
def test_a_planted_fault_is_noticed(
    fault: Fault, make_config: Any, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    assert fault.check(Tools(make_config, tmp_path / "honest", request))
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, fault.owner, fault.name, *fault.changes)
        assert not fault.check(Tools(make_config, tmp_path / "broken", request))
