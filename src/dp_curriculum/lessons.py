"""The easy part of the curriculum: what each lesson spends, what it releases, and the images it teaches with.

`LESSONS` is the table of them. A lesson reads the private images once, in its query; what it released is saved, and
all that follows is post-processing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dp_curriculum.accounting import GaussianEvent
from dp_curriculum.central_images import Statistic, central_image_event, central_image_norm, query_central_images
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.moment_images import draw_moment_images, moment_event, moment_norms, query_moments
from dp_curriculum.randomness import SecretGenerator


Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PlannedStage:
    """
    One private mechanism of a run, before it is spent.

    Args:
        name (`str`): Its name in the ledger and on the card.
        clip_norm (`float`): L2 bound of what one image adds to a released sum.
        event ([`~accounting.GaussianEvent`]): What it spends.
    """

    name: str
    clip_norm: float
    event: GaussianEvent


@dataclass(frozen=True)
class Lesson:
    """
    One kind of lesson.

    Args:
        plan (`Callable`): `(config)` to the mechanisms that the query will run. It reads no data.
        release (`Callable`): `(private, config, public_dataset_size, generator)` to the released tensors, which are
            saved, and the events that the query spent. It alone reads private images.
        draw (`Callable`): `(tensors, count, resolution, generator)` to images `(count, C, resolution, resolution)` in
            `[0, 1]` and labels `(count,)`.
    """

    plan: Callable[[CurriculumConfig], tuple[PlannedStage, ...]]
    release: Callable[
        [PrivateImages, CurriculumConfig, int, SecretGenerator], tuple[Tensors, tuple[GaussianEvent, ...]]
    ]
    draw: Callable[[Tensors, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def draw_rows(
    tensors: Tensors, count: int, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from released `images` `(M, C, H, W)`, which have the resolution, and `labels` `(M,)`."""
    images, labels = tensors["images"], tensors["labels"]
    rows = torch.randint(len(images), (count,), generator=generator, device=images.device)
    return images[rows], labels[rows]


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


LESSONS: dict[str, Lesson] = {
    "mean": _central_images("mean"),
    "mode": _central_images("mode"),
    "moments": Lesson(plan=_moment_plan, release=_release_moments, draw=_draw_moments),
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
