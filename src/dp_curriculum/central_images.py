"""Central images, noisy aggregates of random samples of the private images: their public face."""

from __future__ import annotations

from dp_curriculum.lessons.central_images import (
    CentralImages,
    Statistic,
    central_image_norm,
    query_central_images,
)
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism


__all__ = [
    "CentralImages",
    "GaussianEvent",
    "PlannedMechanism",
    "Statistic",
    "central_image_norm",
    "query_central_images",
]
