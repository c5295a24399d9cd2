"""The type of a lesson: what it spends, what it releases, and the images it teaches with. The table is in table.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.config_sections import LATENT_BOUND
from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


Tensors = Mapping[str, torch.Tensor]
TYPICAL_CONTRAST = 0.1  # difference of a class mean from grey, of white; of photos. Digits have more.
# Standard deviation of a latent, as a share of its range: an autoencoder states the scale by which it is one.
LATENT_DEVIATION = 1 / (2 * LATENT_BOUND)


def contrast_over_noise(config: CurriculumConfig, mechanism: PlannedMechanism, images_per_class: float) -> float:
    """Typical contrast of the mean picture of a class over the noise in one of its pixels."""
    noise = mechanism.noise_std / (mechanism.event.sample_rate * images_per_class)
    contrast = TYPICAL_CONTRAST * (LATENT_DEVIATION / 0.25 if config.has_latents else 1)  # a quarter: of pixels
    return contrast / noise


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
        plan (`Callable`): `(config, noise_multiplier)` to the mechanisms that the query will run, each with that noise
            multiplier. It reads no data.
        release (`Callable`): `(private, config, mechanisms, public_dataset_size, generator)` to the released tensors,
            which are saved. `mechanisms` are those of `plan`, as the ledger charged them: norm, noise, sample rate and
            number of steps come from them, and from nowhere else. It alone reads private images.
        draw (`Callable`): `(tensors, count, resolution, generator)` to images `(count, C, resolution, resolution)` in
            `[0, 1]` and labels `(count,)`, each a class, or the number of classes where it is not known.
        prepare (`Callable`, *optional*): `(tensors, config, class_names, generator)` from the released tensors to
            those that `draw` takes, once, before pretraining: post-processing that takes its time. It keeps them if
            unset.
        check (`Callable`, *optional*): `(config, class_names)` raises `ValueError` for what cannot be a lesson, before
            anything is spent. It refuses nothing if unset.
        repeats (`bool`, *optional*): Whether the query runs as many rounds as its mechanism has steps; an audit then
            takes many trials in one release.
        signal_to_noise (`Callable`, *optional*): `(config, mechanisms, images_per_class)` to the size of what the
            query finds in typical images over that of its noise, from public constants. Left out of a plan if unset.
        noises_sums (`bool`, *optional*): Whether an image adds along one direction of the noised sums, so that an
            audit can score it there. A query that counts levels has no such direction.
        draws_pixels (`bool`, *optional*): Whether what `prepare` returns are images of pixels, bytes, also where the
            private ones are latents: the run then encodes them.
    """

    plan: Callable[[CurriculumConfig, float], tuple[PlannedMechanism, ...]]
    release: Callable[[PrivateImages, CurriculumConfig, tuple[PlannedMechanism, ...], int, SecretGenerator], Tensors]
    draw: Callable[[Tensors, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    prepare: Callable[[Tensors, CurriculumConfig, tuple[str, ...], torch.Generator], Tensors] = _keep
    check: Callable[[CurriculumConfig, tuple[str, ...]], None] = _take
    repeats: bool = False
    signal_to_noise: Callable[[CurriculumConfig, tuple[PlannedMechanism, ...], float], float] | None = None
    noises_sums: bool = True
    draws_pixels: bool = False


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
    The tensors that a lesson is taught with, and those that it is checked with.

    If images are in rows, each class of two or more gives one in ten to the check, and at least one. An image that is
    the only one of its class is in both, as is a lesson that draws fresh images: it has none to learn by heart.
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
