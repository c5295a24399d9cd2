"""Gain of an attacker from a model: how near its images come to training images, and whether its loss knows them.

These numbers read the private images. They stay on the machine, are not covered by epsilon, and are lower bounds of
what can be learned, not proofs: the guarantee comes from the mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DModel
from scipy import stats

from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.data.images import to_unit_range
from dp_curriculum.diffusion.autoencoder import LatentSpace
from dp_curriculum.diffusion.edm import edm_loss
from dp_curriculum.evaluation.metrics import nearest_distances
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, NoiseSchedule


@dataclass(frozen=True)
class Bounded:
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def nearest_neighbor_ratio(
    generated: np.ndarray, training: np.ndarray, held_out: np.ndarray, *, seed: int = 0
) -> Bounded:
    r"""
    Median, over generated images, of the distance to the nearest training image over that to the nearest held-out one.

    Args:
        generated (`np.ndarray` of shape `(M, D)`): Flattened images, or features.
        training (`np.ndarray` of shape `(N, D)`): Images that were trained on.
        held_out (`np.ndarray` of shape `(N, D)`): As many that were not.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        [`Bounded`]: Near 1 where the model does not copy; well below 1 where it does. Bootstrap percentiles.

    Raises:
        ValueError: If the two sets differ in size: a larger set has nearer neighbours.
    """
    if len(training) != len(held_out):
        raise ValueError(
            f"Expected as many training images as held-out ones: there are {len(training)} and {len(held_out)}."
        )
    near_training, _ = nearest_distances(generated, training)
    near_held_out, _ = nearest_distances(generated, held_out)
    ratios = near_training / np.maximum(near_held_out, 1e-12)
    generator = np.random.default_rng(seed)
    medians = [np.median(generator.choice(ratios, len(ratios))) for _ in range(1000)]
    return Bounded(float(np.median(ratios)), *(float(q) for q in np.percentile(medians, [2.5, 97.5])))


def nearest_training_share(generated: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> Bounded:
    r"""
    Share of generated images whose nearest real image is a training one.

    It sees copies of any training image, where the ratio sees those of as many as there are held-out ones.

    Args:
        generated (`np.ndarray` of shape `(M, D)`): Flattened images, or features.
        training (`np.ndarray` of shape `(N, D)`): All images that were trained on.
        held_out (`np.ndarray` of shape `(H, D)`): Images of the same kind that were not, however many.

    Returns:
        [`Bounded`]: Near N / (N + H) where the model does not copy, for which of the real images were trained on was
        then chance; near 1 where it does. Exact binomial interval, for these real images.
    """
    near_training, _ = nearest_distances(generated, training)
    near_held_out, _ = nearest_distances(generated, held_out)
    test = stats.binomtest(int((near_training < near_held_out).sum()), len(generated))
    interval = test.proportion_ci()
    return Bounded(float(test.statistic), float(interval.low), float(interval.high))


def seen_by_network(pipeline: DPCurriculumPipeline, images: torch.Tensor) -> torch.Tensor:
    """Values in `[0, 1]` that the network sees of images `(N, C, H, W)`, bytes: of them, or of their latents."""
    space = LatentSpace.of(pipeline)
    return to_unit_range(images if space is None else space.encode(images)[0])


@torch.no_grad()
def denoising_losses(
    unet: UNet2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    sigma_data: float,
    prior: ClosedFormPrior | None = None,
    schedule: NoiseSchedule | None = None,
    sigmas: tuple[float, ...] = (0.05, 0.2, 0.8),
    num_draws: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """Mean denoising loss `(N,)` of images `(N, C, H, W)` in `[0, 1]` over noise levels and draws."""
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(num_draws, *images.shape[1:], generator=generator)  # the same for each image
    losses = torch.zeros(len(images))
    for start in range(0, len(images), 256):
        part = slice(start, start + 256)
        clean = images[part].to(unet.device) * 2 - 1
        for level in sigmas:
            sigma = torch.full((len(clean),), level, device=unet.device)
            for noise in noises.to(unet.device):
                value = edm_loss(
                    unet,
                    clean,
                    noise.expand_as(clean),
                    sigma,
                    labels[part].to(unet.device),
                    sigma_data=sigma_data,
                    prior=prior,
                    schedule=schedule,
                )
                losses[part] += value.cpu() / (num_draws * len(sigmas))
    return losses.double().numpy()


def membership_auc(training_losses: np.ndarray, held_out_losses: np.ndarray) -> Bounded:
    r"""
    Chance that a training image has a smaller loss than a held-out one: 0.5 is a blind guess.

    Args:
        training_losses (`np.ndarray` of shape `(N,)`): Losses of the attacked model on images it was trained on.
        held_out_losses (`np.ndarray` of shape `(M,)`): Its losses on others.

    Returns:
        [`Bounded`]: With the interval of Hanley and McNeil (1982, doi 10.1148/radiology.143.1.7063747).
    """
    members, others = len(training_losses), len(held_out_losses)
    statistic = stats.mannwhitneyu(held_out_losses, training_losses).statistic
    auc = float(statistic / (members * others))
    better, worse = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (better - auc**2) + (others - 1) * (worse - auc**2)
    width = stats.norm.ppf(0.975) * np.sqrt(variance / (members * others))
    return Bounded(auc, float(max(0.0, auc - width)), float(min(1.0, auc + width)))
