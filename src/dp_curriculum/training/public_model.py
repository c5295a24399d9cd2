"""A run without private images: a model of public ones alone, which others can start from. It spends nothing."""

from __future__ import annotations

import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.places import settle_channels
from dp_curriculum.lessons.public_images import public_source
from dp_curriculum.runtime.processes import get_logger
from dp_curriculum.training.encoding import Encoder
from dp_curriculum.training.plan import BudgetPlan, plan_budget
from dp_curriculum.training.starting import Start


logger = get_logger(__name__)


def without_private_images(
    config: CurriculumConfig, start: Start | None, encoder: Encoder | None = None
) -> tuple[CurriculumConfig, PrivateImages, BudgetPlan]:
    """
    Configuration, images and plan of a run with `--dataset_name=none`: the classes of its public images, and no row.

    Raises:
        ValueError: If the public images cannot be opened, or do not fit the model to start from, or the autoencoder.
    """
    source = public_source(config)
    config = settle_channels(config, source.num_channels)
    for model in (encoder, start):
        if model is not None:
            model.check_channels(config)
    data = config.data
    none = torch.zeros(0, data.channels, data.resolution, data.resolution, dtype=torch.uint8)
    private = PrivateImages(none, torch.zeros(0, dtype=torch.int64), source.class_names)
    plan = plan_budget(config, dataset_size=1, num_classes=private.num_classes)  # no mechanism reads the size
    for planned in plan.lessons:
        planned.lesson.check(config, private.class_names)
    logger.info(f"no private images: {source.place} is public, {private.num_classes} classes; epsilon is 0")
    return config, private, plan
