"""Differentially private image synthesis for diffusers: from easy central images to hard DP-SGD."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dp_curriculum.closed_form_prior import ClosedFormPrior as ClosedFormPrior
    from dp_curriculum.commands.evaluate import evaluate as evaluate
    from dp_curriculum.config import CurriculumConfig as CurriculumConfig
    from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline as DPCurriculumPipeline
    from dp_curriculum.sharing.hub import push_to_hub as push_to_hub
    from dp_curriculum.training.curriculum import CurriculumResult as CurriculumResult
    from dp_curriculum.training.curriculum import run_curriculum as run_curriculum

__version__ = "0.1.0"

# Imported when first used: the accountant and the ledger work without torch, and a command answers at once.
_MODULE_OF = {
    "ClosedFormPrior": "closed_form_prior",
    "CurriculumConfig": "config",
    "CurriculumResult": "training.curriculum",
    "DPCurriculumPipeline": "pipeline_dp_curriculum",
    "evaluate": "commands.evaluate",
    "push_to_hub": "sharing.hub",
    "run_curriculum": "training.curriculum",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
