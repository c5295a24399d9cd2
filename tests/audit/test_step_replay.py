"""Real steps pass record and replay. Their twins are in `tests/faults` and among the published mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dp_curriculum.audit.frozen import FrozenGenerator, WatchedGenerator
from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_audit import StepAudit, tiny_model, watch_gradients
from dp_curriculum.audit.step_replay import audit_charges, audit_one_step, audit_steps


Build = Callable[..., StepAudit]


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_a_step_of_either_engine_passes(mode: str, step_audit: Build) -> None:
    audit = step_audit(per_image_gradients=mode)
    findings = [*audit_one_step(audit), audit_charges(audit)]
    assert len(findings) == 5 and all(finding.holds for finding in findings)


IN_PART: dict[str, dict[str, Any]] = {
    "lora": {"trainable": "lora", "lora_rank": 2, "lora_alpha": 4.0},
    "attention": {"trainable": "attention"},
    "bias_norm": {"trainable": "bias_norm"},
}
in_part = pytest.mark.parametrize("fields", IN_PART.values(), ids=IN_PART)
FROZEN = "weights that are not trained"


@in_part
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_a_step_of_a_part_of_the_weights_passes(fields: dict[str, Any], mode: str, step_audit: Build) -> None:
    """One image moves the sum over what is trained by at most C, also where LoRA has moved."""
    audit = step_audit(per_image_gradients=mode, **fields)
    pairs = neighbours(num_channels=1, side=8, num_classes=3, gradients=True)
    some = [pair for pair in pairs if pair.name in ("ordinary, replace", "huge gradient, add", "not a number, add")]
    findings = audit_steps(audit, some)
    assert len(some) == 3 and len(findings) == 9 and all(finding.holds for finding in findings)
    assert sum(FROZEN in finding.claim for finding in findings) == 1


def test_the_tiny_model_keeps_the_mechanism(make_config: Any) -> None:
    config = make_config(resolution=32, num_channels=3, block_out_channels=[32, 64], attention_resolutions=[8])
    tiny = tiny_model(config)
    assert tiny.data.resolution == 8 and tiny.data.channels == 3
    for section in ("privacy", "curriculum", "dp_sgd", "pretraining", "runtime"):
        assert getattr(tiny, section) == getattr(config, section)


def test_frozen_noise_and_masks_belong_to_the_step_and_the_row() -> None:
    first, second = FrozenGenerator(always=3), FrozenGenerator(always=3)
    masks = [generator.poisson_sample(rows, 0.1) for generator, rows in ((first, 20), (second, 15))]
    assert set(masks[0].tolist()) - set(range(15, 20)) == set(masks[1].tolist()) and 3 in masks[0]
    draws = [generator.gaussian(4, 1.0).as_subclass(torch.Tensor) for generator in (first, second, first)]  # type: ignore[attr-defined]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("add", [lambda sums, noise: sums + noise, lambda sums, noise: noise + sums])
def test_what_noise_is_added_to_is_seen(add: Callable[[Any, Any], Any]) -> None:
    secret, sums = WatchedGenerator(), torch.full((3,), 5.0, dtype=torch.float64)
    released = add(sums, secret.gaussian(3, 2.0, dtype=torch.float64))
    assert torch.equal(secret.sums[0], sums) and torch.equal(secret.outputs[0], released)
    assert type(released) is torch.Tensor and secret.stds == [2.0]
    sums += secret.gaussian(3, 0.5).double()
    assert torch.equal(secret.outputs[1], sums) and secret.stds == [2.0, 0.5]


def test_generators_of_an_audit_say_that_they_are_not_private() -> None:
    """A run that was given one is marked not private."""
    assert not WatchedGenerator().is_private and not FrozenGenerator().is_private


def test_an_update_can_be_watched_and_held_back(step_audit: Build) -> None:
    audit = step_audit()
    for apply in (True, False):
        trainer = audit.build(audit.images(2), FrozenGenerator())
        before = [parameter.detach().clone() for parameter in trainer.unet.parameters()]
        gradients = watch_gradients(trainer, apply=apply)
        trainer.step()
        moved = any(not torch.equal(old, new) for old, new in zip(before, trainer.unet.parameters()))
        assert len(gradients) == 1 and moved is apply
