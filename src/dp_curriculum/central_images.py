"""Central images, noisy aggregates of random samples of the private images: their public face."""

from __future__ import annotations

from dp_curriculum.lessons.central_images import (
    CentralImages,
    Statistic,
    central_image_event,
    central_image_norm,
    query_central_images,
)


__all__ = [
    "CentralImages",
    "Statistic",
    "central_image_event",
    "central_image_norm",
    "query_central_images",
]
