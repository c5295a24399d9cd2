"""A real trainer on a tiny network, set up so that an audit can repeat its steps and see what they release."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dp_curriculum.audit.neighbours import dataset, random_images
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.privacy_report import Unit
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.run import blank_prior


_MOST_ROWS = 4096  # of a dataset


class StillDiffusion:
    """Mixed into a trainer: diffusion noise and label dropout that belong to the row, and scales of losses.

    Of the K rows of a person, they belong to the row and its place among the K.
    """

    loss_scale = torch.ones(_MOST_ROWS)
    config: CurriculumConfig
    private: PrivateImages

    def _diffusion_normals(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = 1 if rows.ndim == 1 else rows.shape[1]
        copies, shape = self.config.dp_sgd.noise_multiplicity // places, self.private.images.shape[1:]
        each = rows.t().flatten()
        normals = torch.zeros(copies, len(each), 1 + math.prod(shape))
        labels = torch.zeros(len(each))
        for column, row in enumerate(each.tolist()):
            source = torch.Generator().manual_seed(row + _MOST_ROWS * (column // max(1, len(rows))))
            labels[column] = torch.randn((), generator=source)
            normals[:, column] = torch.randn(copies, normals.shape[2], generator=source)
        flat = normals.flatten(0, 1)
        return labels, flat[:, 0], flat[:, 1:].reshape(-1, *shape)

    def _draw_share(self) -> Tensor:
        """The rows of each person in ascending order, as if the adversary knew it; which rows they are stays drawn."""
        share: Tensor = super()._draw_share()  # type: ignore[misc]
        return share if share.ndim == 1 else share.sort(dim=1).values

    def _losses(self, rows: Tensor) -> Tensor:
        losses: Tensor = super()._losses(rows)  # type: ignore[misc]
        each = rows.t().flatten()
        return losses * self.loss_scale[each].repeat(len(losses) // max(1, len(each)))


@dataclass(frozen=True)
class StepAudit:
    """
    Configuration and data with which the hard stage is audited.

    Args:
        config ([`CurriculumConfig`]): With a tiny model, see [`tiny_model`].
        event ([`~accounting.GaussianEvent`]): What the run is charged for.
        num_classes (`int`): Public.
        divisor (`float`): Public.
        trainer (`type`, *optional*): The trainer under test.
    """

    config: CurriculumConfig
    event: GaussianEvent
    num_classes: int
    divisor: float
    trainer: type[DPTrainer] = DPTrainer

    def build(
        self,
        private: PrivateImages,
        secret: SecretGenerator,
        *,
        loss_scale: Tensor | None = None,
        noise_multiplier: float | None = None,
        sample_rate: float | None = None,
    ) -> DPTrainer:
        """A trainer on `private`, always with the same initial weights, whose diffusion noise belongs to the row."""
        channels, side, _ = self.config.input_shape
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            unet = build_unet(
                self.config.model,
                resolution=side,
                num_channels=channels,
                num_classes=self.num_classes,
                has_prior=self.config.has_prior,
            )
        still = type("StillTrainer", (StillDiffusion, self.trainer), {})
        trainer: Any = still(
            unet,
            private,
            self.config,
            noise_multiplier=self.event.noise_multiplier if noise_multiplier is None else noise_multiplier,
            sample_rate=self.event.sample_rate if sample_rate is None else sample_rate,
            divisor=self.divisor,
            secret=secret,
            prior=blank_prior(self.config, self.num_classes),
        )
        if loss_scale is not None:
            trainer.loss_scale = loss_scale
        return trainer

    def with_physical_batches_of(self, num_images: int) -> StepAudit:
        rows = num_images * self.config.dp_sgd.noise_multiplicity
        return replace(self, config=self.config.replace(max_physical_batch_size=rows))

    @property
    def unit(self) -> Unit:
        """Unit of the guarantee that is audited."""
        return self.config.data.unit

    @property
    def bound(self) -> float:
        """The sensitivity that is claimed: C."""
        return self.config.dp_sgd.dp_max_grad_norm

    def images(self, count: int) -> PrivateImages:
        """`count` images of classes in turn; or as many persons, who have three, two and one images in turn."""
        persons = None
        if self.unit == "person":
            persons = [person for person in range(count) for _ in range(3 - person % 3)]
        rows = count if persons is None else len(persons)
        images = random_images(rows, self.config.input_shape)
        return dataset(images, [row % self.num_classes for row in range(rows)], self.num_classes, persons)

    def canary(self) -> PrivateImages:
        """One image; or one person with K images, each of which is in every gradient of theirs."""
        if self.unit == "image":
            return self.images(1)
        count = self.config.dp_sgd.noise_multiplicity
        images = random_images(count, self.config.input_shape)
        return dataset(images, [row % self.num_classes for row in range(count)], self.num_classes, [0] * count)


def tiny_model(config: CurriculumConfig) -> CurriculumConfig:
    """
    The configuration with a network of ten thousand weights on 8x8 images, or 8x8 latents. The mechanism stays as it
    is; LoRA has a rank and layers that such a network has.
    """
    rank = None if config.dp_sgd.lora_rank is None else min(4, config.dp_sgd.lora_rank)
    start = config.start.pretrained_model_name_or_path
    return config.replace(
        lora_rank=rank,
        lora_target_modules=[],
        pretrained_model_name_or_path=None,
        revision=None,
        subfolder=None,
        shortcut=config.curriculum.shortcut if start is None else "pretrain",  # such a network has no prior
        resolution=8 * (config.autoencoder.vae_downsampling or 1),
        lesson_resolution=None,
        block_out_channels=[8],
        layers_per_block=1,
        attention_resolutions=[],
    )


def watch_gradients(trainer: DPTrainer, *, apply: bool = True) -> list[Tensor]:
    """
    A list that grows by what the weights are updated with in each step, `(num_weights,)`.

    Args:
        trainer ([`~dp_finetuning.DPTrainer`]): Its inner optimizer is watched, after all that DP-SGD does.
        apply (`bool`, *optional*, defaults to `True`): Whether the weights are updated with it.
    """
    seen: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([gradient.detach().flatten() for gradient in gradients]))
        if not apply:
            torch._foreach_zero_(gradients)

    trainer.adam.register_step_pre_hook(keep)
    return seen
