"""The easy part of the curriculum: the table of its lessons, `LESSONS`.

A lesson reads the private images once, in its query; what it released is saved, and all that follows is
post-processing. docs/extending.md shows how to add one.
"""

from __future__ import annotations

import functools

import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.lessons.central_images import (
    Statistic,
    central_image_event,
    central_image_norm,
    query_central_images,
)
from dp_curriculum.lessons.frequency_images import (
    FREQUENCY_NORM,
    draw_frequency_images,
    frequency_event,
    query_frequencies,
)
from dp_curriculum.lessons.lesson import Lesson, Tensors, draw_rows
from dp_curriculum.lessons.moment_images import draw_moment_images, moment_event, moment_norms, query_moments
from dp_curriculum.lessons.public_images import check_public_dataset, read_public_images
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedStage
from dp_curriculum.privacy.randomness import SecretGenerator


def _central_image_plan(statistic: Statistic, config: CurriculumConfig) -> tuple[PlannedStage, ...]:
    options = config.central_images
    norm = central_image_norm(options, statistic, num_values=config.data.num_channels * config.central_resolution**2)
    return (PlannedStage(f"central-images-{statistic}", norm, central_image_event(options)),)


def _release_central_images(
    statistic: Statistic,
    private: PrivateImages,
    config: CurriculumConfig,
    public_dataset_size: int,
    generator: SecretGenerator,
) -> tuple[Tensors, tuple[GaussianEvent, ...]]:
    released = query_central_images(
        private.images,
        private.labels,
        config.central_images,
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        statistic=statistic,
        resolution=config.central_resolution,
        generator=generator,
    )
    return {"images": released.images, "labels": released.labels}, released.events


def _central_images(statistic: Statistic) -> Lesson:
    return Lesson(
        plan=functools.partial(_central_image_plan, statistic),
        release=functools.partial(_release_central_images, statistic),
        draw=draw_rows,
        noise="central_noise_multiplier",
    )


def _moment_plan(config: CurriculumConfig) -> tuple[PlannedStage, ...]:
    num_values = config.data.num_channels * config.moment_resolution**2
    norms = moment_norms(config.moment_images, num_values=num_values)
    event = moment_event(config.moment_images)
    return (PlannedStage("moments-mean", norms[0], event), PlannedStage("moments-covariance", norms[1], event))


def _release_moments(
    private: PrivateImages, config: CurriculumConfig, public_dataset_size: int, generator: SecretGenerator
) -> tuple[Tensors, tuple[GaussianEvent, ...]]:
    released = query_moments(
        private.images,
        private.labels,
        config.moment_images,
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        resolution=config.moment_resolution,
        generator=generator,
    )
    return {"means": released.means, "factors": released.factors}, released.events


def _draw_moments(
    tensors: Tensors, count: int, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    means, factors = tensors["means"], tensors["factors"]
    labels = torch.randint(len(means), (count,), generator=generator, device=means.device)
    return draw_moment_images(means, factors, labels, resolution, generator), labels


def _frequency_plan(config: CurriculumConfig) -> tuple[PlannedStage, ...]:
    return (PlannedStage("frequency", FREQUENCY_NORM, frequency_event(config.frequency_images)),)


def _release_frequencies(
    private: PrivateImages, config: CurriculumConfig, public_dataset_size: int, generator: SecretGenerator
) -> tuple[Tensors, tuple[GaussianEvent, ...]]:
    features = query_frequencies(
        private.images,
        private.labels,
        config.frequency_images,
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        resolution=config.frequency_resolution,
        generator=generator,
    )
    return {"features": features}, (frequency_event(config.frequency_images),)


def _fit_frequencies(
    tensors: Tensors, config: CurriculumConfig, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensors:
    side = config.frequency_resolution
    shape = (config.data.num_channels, side, side)
    return draw_frequency_images(tensors["features"], config.frequency_images, shape=shape, generator=generator)


def _read_public(
    tensors: Tensors, config: CurriculumConfig, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensors:
    public = read_public_images(config, class_names)
    return {"images": public.images, "labels": public.labels}


LESSONS: dict[str, Lesson] = {
    "public": Lesson(
        plan=lambda config: (),
        release=lambda *private: ({}, ()),
        prepare=_read_public,
        draw=draw_rows,
        check=check_public_dataset,
    ),
    "mean": _central_images("mean"),
    "mode": _central_images("mode"),
    "moments": Lesson(
        plan=_moment_plan, release=_release_moments, draw=_draw_moments, noise="moment_noise_multiplier"
    ),
    "frequency": Lesson(
        plan=_frequency_plan,
        release=_release_frequencies,
        prepare=_fit_frequencies,
        draw=draw_rows,
        noise="frequency_noise_multiplier",
    ),
}


def find_lesson(stage: str) -> Lesson:
    """
    The lesson of that name.

    Raises:
        ValueError: If there is none; the message lists the stages that there are.
    """
    if stage not in LESSONS:
        raise ValueError(f"Expected --stages={stage} to be one of {', '.join(LESSONS)}, dp_sgd.")
    return LESSONS[stage]


def planned_queries(config: CurriculumConfig) -> tuple[PlannedStage, ...]:
    """The mechanisms of all lessons of a configuration, in order."""
    return tuple(planned for stage in config.curriculum.lessons for planned in find_lesson(stage).plan(config))
