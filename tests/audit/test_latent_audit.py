"""The audit of a configuration that trains on latents works on what the network sees, and whole runs encode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from autoencoders import save_vae
from planning import planned_lesson

from dp_curriculum.audit.canary import lesson_scores
from dp_curriculum.audit.laws import audit_noise_of_lesson
from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_audit import StepAudit, tiny_model
from dp_curriculum.audit.step_replay import audit_steps
from dp_curriculum.audit.whole_run import audit_whole_run
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.training.encoding import settle_autoencoder


@pytest.fixture
def settled(make_config: Callable[..., CurriculumConfig], tmp_path: Path) -> Callable[..., CurriculumConfig]:
    """A configuration on the 8x8 latents of a tiny autoencoder."""
    folder = save_vae(tmp_path / "vae")

    def make(**fields: Any) -> CurriculumConfig:
        options = {"resolution": 32, "num_channels": 3, "vae_name_or_path": str(folder), **fields}
        config, _ = settle_autoencoder(make_config(**options))
        return config

    return make


@pytest.mark.parametrize("stage", [stage for stage in LESSONS if stage != "mode"])
def test_every_lesson_passes_on_latents(stage: str, settled: Callable[..., CurriculumConfig]) -> None:
    config = settled(central_images_per_class=2, central_sample_rate=0.5)
    planned = planned_lesson(LESSONS[stage], config)
    findings = audit_lesson("lesson", planned, config, num_classes=3, dataset_size=20)
    findings += audit_noise_of_lesson("lesson", planned, config, "secure", num_classes=3, num_draws=2000)[:1]
    assert [finding.claim for finding in findings if not finding.holds] == []
    if planned.mechanisms:
        scores = lesson_scores(planned, config, "secure", num_trials=4, noise_multiplier=1.0)
        assert all(len(side) >= 4 for side in scores)


def test_a_step_passes_on_latents(settled: Callable[..., CurriculumConfig]) -> None:
    config = settled(noise_multiplicity=4, dp_max_grad_norm=0.37)
    audit = StepAudit(config, GaussianEvent(2.0, 0.25, 10), 3, 16.0)
    assert audit.images(2).images.shape == (2, 4, 8, 8)
    pairs = neighbours(num_channels=4, side=8, num_classes=3, gradients=True)
    some = [pair for pair in pairs if pair.name in ("ordinary, replace", "huge gradient, add", "not a number, add")]
    findings = audit_steps(audit, some)
    assert len(some) == 3 and all(finding.holds for finding in findings)


def test_whole_runs_on_neighbours_encode_and_leave_equal_traces(settled: Callable[..., CurriculumConfig]) -> None:
    config = settled(resolution=64, stages=["moments", "dp_sgd"])
    tiny = tiny_model(config)
    assert tiny.input_shape == (4, 8, 8) and tiny.data.resolution == 32
    finding = audit_whole_run(tiny)
    assert finding.holds, finding.measured
