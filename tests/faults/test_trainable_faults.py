"""Faults of training a part of the weights, planted one at a time: the audit of steps notices each."""

from __future__ import annotations

from typing import Any

import pytest
from planting import Change, plant

from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.audit.step_replay import audit_one_step, audit_steps
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradients
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.accounting import GaussianEvent


WAYS: dict[str, dict[str, Any]] = {
    "lora": {"trainable": "lora", "lora_rank": 2, "lora_alpha": 4.0},
    "attention": {"trainable": "attention"},
    "bias_norm": {"trainable": "bias_norm"},
}
in_each_way = pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS)
FROZEN, ONE_IMAGE = "weights that are not trained stay", "one image moves the gradient sum by at most C"
STEP, CHOSEN = "self.optimizer.step()", "seed=config.runtime.seed)\n"
MOVED: dict[str, tuple[str, Change]] = {
    "learns": ("step", (STEP, f"{STEP}\n    self.unet.conv_in.weight.data.add_(1e-6)")),
    "gets noise": (
        "step",
        (STEP, f"{STEP}\n    self.unet.conv_in.weight.data += 1e-3 * torch.randn(self.unet.conv_in.weight.shape)"),
    ),
    "is not frozen": (
        "__init__",
        (CHOSEN, f"{CHOSEN}    unet.requires_grad_(True)\n    self.trained = list(unet.parameters())\n"),
    ),
}


def the(findings: Any, words: str) -> Finding:
    (finding,) = [finding for finding in findings if words in finding.claim]
    return finding


def audit(make_config: Any, fields: dict[str, Any]) -> StepAudit:
    config = make_config(noise_multiplicity=4, dp_max_grad_norm=0.37, **fields)
    return StepAudit(config, GaussianEvent(2.0, 0.25, 10), 3, 16.0)


@in_each_way
@pytest.mark.parametrize("fault", MOVED)
def test_a_frozen_weight_that_moves_is_noticed(
    fault: str, fields: dict[str, Any], make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert the(audit_one_step(audit(make_config, fields)), FROZEN).holds
    name, change = MOVED[fault]
    plant(monkeypatch, DPTrainer, name, change)
    finding = the(audit_one_step(audit(make_config, fields)), FROZEN)
    assert not finding.holds and "conv_in.weight" in finding.measured


@in_each_way
def test_norms_of_a_part_of_what_is_trained_are_noticed(
    fields: dict[str, Any], make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped by the norm of some columns of a gradient, an image adds more than C."""
    pairs = [
        pair
        for pair in neighbours(num_channels=1, side=8, num_classes=3, gradients=True)
        if pair.name == "huge gradient, add"
    ]
    assert pairs and the(audit_steps(audit(make_config, fields), pairs), ONE_IMAGE).holds
    plant(
        monkeypatch,
        PerImageGradients,
        "_norms",
        ("return norm_per_image(self._flat.rows)", "return norm_per_image(self._flat.rows[:, ::2])"),
    )
    assert not the(audit_steps(audit(make_config, fields), pairs), ONE_IMAGE).holds
