"""A tiny hard stage to audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.privacy.accounting import GaussianEvent


@pytest.fixture
def step_audit(make_config: Any) -> Callable[..., StepAudit]:
    """Builds a [`StepAudit`] of 8x8 images of three classes, with a clip bound that is not 1; fields can change."""

    def build(trainer: Any = None, event: GaussianEvent | None = None, **fields: Any) -> StepAudit:
        config = make_config(**{"noise_multiplicity": 4, "dp_max_grad_norm": 0.37, **fields})
        options = {} if trainer is None else {"trainer": trainer}
        return StepAudit(config, event or GaussianEvent(2.0, 0.25, 10), 3, 16.0, **options)

    return build
