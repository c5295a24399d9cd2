"""One gradient per image of any PyTorch module, and the check that they are right: the public face of the engine.

`docs/per_image_gradients.md` shows both on a module of one's own.
"""

from __future__ import annotations

from dp_curriculum.dp_sgd.gradient_check import check_per_image_gradients
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradientError, PerImageGradients
from dp_curriculum.dp_sgd.layer_gradients import UnsupportedModelError


__all__ = ["PerImageGradientError", "PerImageGradients", "UnsupportedModelError", "check_per_image_gradients"]
