"""
Mistakes of published implementations, written from their description in papers and reviews; no line is theirs.

The hard stage is built twice here: `AutogradTrainer` takes each image's gradient by itself with autograd, and is
right; its subclasses make one mistake each. The lessons have the shape of ours, so that the same audit looks at them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.lesson import Lesson, Tensors, draw_rows
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


# --- the hard stage --------------------------------------------------------------------------------------------------


class AutogradTrainer(DPTrainer):
    """The reference: slow, and obviously what the guarantee is about."""

    def step(self) -> None:
        rows = self._draw_share()
        gradients = [self.gradients_of(row.view(1)) for row in rows]  # (copies or 1, num_weights) each
        self.release(gradients, len(rows))

    def gradients_of(self, row: Tensor) -> Tensor:
        """The gradient of an image: the mean of its noise draws."""
        losses = self._losses(row)
        return self.flat_gradient(losses.mean()).view(1, -1)

    def flat_gradient(self, loss: Tensor) -> Tensor:
        parameters = list(self.unet.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, gradients)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])

    def clip(self, gradients: Tensor) -> Tensor:
        """The sum of clipped gradients `(images, num_weights)`."""
        norms = gradients.norm(dim=1)
        factors = torch.where(norms.isfinite(), self.bound / norms.clamp_min(self.bound), 0.0)
        return (gradients.nan_to_num(0.0, 0.0, 0.0) * factors[:, None]).sum(0)

    @property
    def bound(self) -> float:
        return float(self.optimizer.max_grad_norm)

    def release(self, gradients: list[Tensor], num_rows: int) -> None:
        if gradients:
            parts = self.clip(torch.cat(gradients)).split([p.numel() for p in self.unet.parameters()])
            for parameter, part in zip(self.unet.parameters(), parts):
                parameter.summed_grad = part.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())
        self.num_steps_taken += 1


class SeededNoise(AutogradTrainer):
    """Row 1: the seed of the configuration, or a constant, is that of the noise, too."""

    def release(self, gradients: list[Tensor], num_rows: int) -> None:
        self.optimizer._secret = _Seeded()
        super().release(gradients, num_rows)


class _Seeded(SecretGenerator):
    def gaussian(self, shape: Any, std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.randn(shape, dtype=dtype) * std


class SkipsEmptyDraws(AutogradTrainer):
    """Row 7: no image was drawn, so the loop goes on to the next batch."""

    def release(self, gradients: list[Tensor], num_rows: int) -> None:
        if num_rows:
            super().release(gradients, num_rows)


class CrashesOnEmptyDraws(AutogradTrainer):
    """Row 7: the gradients of no image are reshaped to `(0, -1)`."""

    def release(self, gradients: list[Tensor], num_rows: int) -> None:
        torch.cat([*gradients, torch.zeros(0)]).reshape(num_rows, -1)
        super().release(gradients, num_rows)


class LetsNaNThrough(AutogradTrainer):
    """Row 19: the factor C / (norm + 1e-6), at most 1. Of an infinite norm it is 0, and 0 times infinity is NaN."""

    def clip(self, gradients: Tensor) -> Tensor:
        factors = (self.bound / (gradients.norm(dim=1) + 1e-6)).clamp(max=1.0)
        return torch.einsum("b,bi->i", factors, gradients)


class ClipsEachCopy(AutogradTrainer):
    """Row 12: each noise draw of an image is clipped by itself: the image moves the sum by K times C."""

    def gradients_of(self, row: Tensor) -> Tensor:
        parameters = list(self.unet.parameters())
        losses = self._losses(row)
        copies = [torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True) for loss in losses]
        return torch.stack(
            [torch.cat([(p.new_zeros(p.shape) if g is None else g).flatten() for p, g in zip(parameters, copy)])
             for copy in copies]
        )  # fmt: skip


class DividesByTheDraw(AutogradTrainer):
    """Row 10: the sum is divided by how many images were drawn."""

    def release(self, gradients: list[Tensor], num_rows: int) -> None:
        self.optimizer.expected_batch_size = max(1, num_rows)
        super().release(gradients, num_rows)


# --- the lessons -----------------------------------------------------------------------------------------------------


Mechanisms = tuple[PlannedMechanism, ...]


def honest_plan(config: CurriculumConfig, noise_multiplier: float) -> Mechanisms:
    return LESSONS["mean"].plan(config, noise_multiplier)


def hand_copied_plan(config: CurriculumConfig, noise_multiplier: float) -> Mechanisms:
    """Row 26: the accounting holds five queries of sigma 5 at rate 0.1, copied once from another configuration."""
    (honest,) = honest_plan(config, noise_multiplier)
    return (PlannedMechanism(honest.name, honest.clip_norm, GaussianEvent(5.0, 0.1, 5)),)


def plan_from_the_configuration(
    private: PrivateImages, config: CurriculumConfig, mechanisms: Mechanisms, size: int, generator: SecretGenerator
) -> Tensors:
    """Row 26: the query computes its numbers by itself, and does not look at what was charged."""
    return LESSONS["mean"].release(private, config, honest_plan(config, 20.0), size, generator)


def mean_over_the_realised_count(
    private: PrivateImages,
    config: CurriculumConfig,
    mechanisms: Mechanisms,
    public_dataset_size: int,
    generator: SecretGenerator,
    *,
    is_bounded: bool = True,
) -> Tensors:
    """
    Rows 30 to 32: the mean of the images of a class that were drawn, with noise scaled to sqrt(d) / 2 over an assumed
    number of them. A class without images has a mean that is no number, and pixels are taken to be in `[0, 1]`.
    """
    event, num_classes = mechanisms[0].event, private.num_classes
    images = private.images.clamp(0, 1).nan_to_num(0.0) if is_bounded else private.images
    assumed = event.sample_rate * public_dataset_size // num_classes
    means = []
    for _ in range(event.num_steps):
        drawn = generator.poisson_sample(len(images), event.sample_rate)
        small = F.interpolate(images[drawn].double(), size=(config.data.resolution // 2,) * 2, mode="area")
        mean = torch.stack([small[private.labels[drawn] == label].mean(dim=0) for label in range(num_classes)])
        sensitivity = math.sqrt(0.25 * mean[0].numel()) / assumed
        noise = generator.gaussian(mean.shape, std=event.noise_multiplier * sensitivity, dtype=torch.float64)
        means.append((mean + noise).clamp(0, 1))
    labels = torch.arange(num_classes).repeat(event.num_steps)
    return {"images": torch.cat(means).float(), "labels": labels}


def mean_of_unbounded_pixels(*arguments: Any) -> Tensors:
    """Row 32: the range of the pixels is assumed."""
    return mean_over_the_realised_count(*arguments, is_bounded=False)


def seeded_mean(
    private: PrivateImages, config: CurriculumConfig, mechanisms: Mechanisms, size: int, generator: SecretGenerator
) -> Tensors:
    """Row 1: seeds everything on the line before the noise is drawn."""
    return LESSONS["mean"].release(private, config, mechanisms, size, _Seeded())


def lesson(release: Any, plan: Any = honest_plan) -> Lesson:
    return Lesson(plan=plan, release=release, draw=draw_rows)
