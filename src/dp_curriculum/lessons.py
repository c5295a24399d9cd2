"""The easy part of the curriculum: what each lesson spends, what it releases, and the images it teaches with.

`LESSONS` is the table of them. A lesson reads the private images once, in its query; what it released is saved, and
all that follows is post-processing. docs/extending.md shows how to add one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dp_curriculum.accounting import GaussianEvent
from dp_curriculum.central_images import Statistic, central_image_event, central_image_norm, query_central_images
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages, to_unit_range
from dp_curriculum.frequency_images import FREQUENCY_NORM, draw_frequency_images, frequency_event, query_frequencies
from dp_curriculum.moment_images import draw_moment_images, moment_event, moment_norms, query_moments
from dp_curriculum.public_images import open_public_dataset, read_public_images
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


def _keep(
    tensors: Tensors, config: CurriculumConfig, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensors:
    return tensors


def _take(config: CurriculumConfig, class_names: tuple[str, ...]) -> None:
    """Refuses nothing."""


@dataclass(frozen=True)
class Lesson:
    """
    One kind of lesson.

    Args:
        plan (`Callable`): `(config)` to the mechanisms that the query will run. It reads no data.
        release (`Callable`): `(private, config, public_dataset_size, generator)` to the released tensors, which are
            saved, and the events that the query spent. It alone reads private images.
        draw (`Callable`): `(tensors, count, resolution, generator)` to images `(count, C, resolution, resolution)` in
            `[0, 1]` and labels `(count,)`, each a class, or the number of classes where it is not known.
        prepare (`Callable`, *optional*): `(tensors, config, class_names, generator)` from the released tensors to
            those that `draw` takes, once, before pretraining: post-processing that takes its time. It keeps them if
            unset.
        noise (`str`, *optional*): Name of the option that holds the noise multiplier of its queries, for
            `--lesson_budget_share`. Without it, the lesson has noise of its own, or no query.
        check (`Callable`, *optional*): `(config, class_names)` raises `ValueError` for what cannot be a lesson, before
            anything is spent. It refuses nothing if unset.
    """

    plan: Callable[[CurriculumConfig], tuple[PlannedStage, ...]]
    release: Callable[
        [PrivateImages, CurriculumConfig, int, SecretGenerator], tuple[Tensors, tuple[GaussianEvent, ...]]
    ]
    draw: Callable[[Tensors, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    prepare: Callable[[Tensors, CurriculumConfig, tuple[str, ...], torch.Generator], Tensors] = _keep
    check: Callable[[CurriculumConfig, tuple[str, ...]], None] = _take
    noise: str | None = None


def draw_rows(
    tensors: Tensors, count: int, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from `images` `(M, C, H, W)`, bytes or floats in `[0, 1]`, and `labels` `(M,)`; resizes where needed."""
    images, labels = tensors["images"], tensors["labels"]
    rows = torch.randint(len(images), (count,), generator=generator, device=images.device)
    drawn = to_unit_range(images[rows], device=images.device)
    if drawn.shape[-1] != resolution:
        drawn = F.interpolate(drawn, size=(resolution, resolution), mode="bilinear", align_corners=False)
    return drawn, labels[rows]


def hold_out(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """
    What a lesson is taught with, and what it is checked with.

    Of images in rows, each class of two or more gives one in ten to the check, and at least one. An image that is the
    only one of its class is in both, as is a lesson that draws fresh images: it has none to learn by heart.
    """
    if "images" not in tensors:
        return tensors, tensors
    labels = tensors["labels"]
    held, alone = torch.zeros(2, len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        held[rows[::10]], alone[rows] = True, len(rows) == 1
    parts = (alone | ~held, held)
    taught, checked = ({**tensors, "images": tensors["images"][part], "labels": labels[part]} for part in parts)
    return taught, checked


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


def _check_public(config: CurriculumConfig, class_names: tuple[str, ...]) -> None:
    open_public_dataset(config, class_names)


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
        check=_check_public,
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
