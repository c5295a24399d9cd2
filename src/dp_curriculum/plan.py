"""The whole budget before anything is spent: mechanisms, noise, epsilon of each stage and in all. It reads no data."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dp_curriculum.accounting import (
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
    compute_epsilon,
)
from dp_curriculum.central_images import central_image_events, central_image_sensitivity
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.edm import build_unet, edm_loss
from dp_curriculum.per_image_gradients import PerImageGradients


CENTRAL_IMAGES, DP_SGD = "central-images", "dp-sgd"


@dataclass(frozen=True)
class PlannedStage:
    """One private stage: its name, the bound of one image's share, and what it spends."""

    name: str
    clip_norm: float
    event: GaussianEvent


@dataclass(frozen=True)
class BudgetPlan:
    """
    The private stages in order, with every constant that the run will use.

    Args:
        stages (`tuple[PlannedStage, ...]`): The mechanisms.
        dataset_size (`int`): Number of images that sample rate and divisors assume.
        num_classes (`int`): Number of classes.
    """

    stages: tuple[PlannedStage, ...]
    dataset_size: int
    num_classes: int

    def stage(self, name: str) -> PlannedStage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        return tuple(stage.event for stage in self.stages)


def dp_sgd_sample_rate(config: CurriculumConfig, dataset_size: int) -> float:
    """
    Probability that an image enters a step of DP-SGD.

    Raises:
        ValueError: If the batch is larger than the dataset.
    """
    batch = config.dp_sgd.expected_batch_size
    if batch > dataset_size:
        raise ValueError(
            f"Expected --expected_batch_size={batch} to be at most the number of images, {dataset_size}: make it smaller."
        )
    return batch / dataset_size


def plan_budget(
    config: CurriculumConfig,
    *,
    dataset_size: int,
    num_classes: int,
    spent: tuple[GaussianEvent, ...] | None = None,
) -> BudgetPlan:
    """
    Calibrates the hard stage on the composition of all stages to the target epsilon.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        dataset_size (`int`): Number of images; `public_dataset_size` goes before it.
        num_classes (`int`): Number of classes.
        spent (`tuple[GaussianEvent, ...]`, *optional*): What a resumed run has charged before its hard stage, in place
            of the planned easy stage.

    Raises:
        PrivacyBudgetExceeded: If the easy stage alone spends the target; it says how much, and what would do.
        ValueError: If the batch is larger than the dataset.
    """
    budget = config.privacy
    dataset_size = budget.public_dataset_size or dataset_size
    values = config.data.num_channels * config.central_resolution**2
    sensitivity = central_image_sensitivity(config.central_images, num_values=values)
    stages = [
        PlannedStage(CENTRAL_IMAGES, sensitivity, event) for event in central_image_events(config.central_images)
    ]
    easy = tuple(stage.event for stage in stages) if spent is None else spent
    if config.dp_sgd.num_dp_steps == 0:
        _check_easy_stage(config, easy)
        return BudgetPlan(tuple(stages), dataset_size, num_classes)
    sample_rate, num_steps = dp_sgd_sample_rate(config, dataset_size), config.dp_sgd.num_dp_steps
    noise_multiplier = 0.0
    if not budget.non_private:
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon=budget.target_epsilon,
            target_delta=budget.target_delta,
            sample_rate=sample_rate,
            num_steps=num_steps,
            prior_events=easy,
            adjacency=budget.adjacency,
            group_size=budget.group_size,
        )
    event = GaussianEvent(noise_multiplier, sample_rate, num_steps)
    stages.append(PlannedStage(DP_SGD, config.dp_sgd.dp_max_grad_norm, event))
    return BudgetPlan(tuple(stages), dataset_size, num_classes)


def _check_easy_stage(config: CurriculumConfig, easy: tuple[GaussianEvent, ...]) -> None:
    budget = config.privacy
    epsilon = compute_epsilon(easy, budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)
    if epsilon > budget.target_epsilon and not budget.non_private:
        raise PrivacyBudgetExceeded(
            f"Expected --target_epsilon={budget.target_epsilon} to cover the easy stage, which spends {epsilon:.4g}: "
            "raise the target or --central_noise_multiplier.",
            spent_epsilon=epsilon,
            smallest_target_epsilon=epsilon,
        )


@dataclass(frozen=True)
class CostEstimate:
    """Seconds of each stage and bytes of the largest tensors, measured on random inputs on this machine."""

    parameters: int
    pretraining_seconds: float
    dp_sgd_seconds: float
    gradient_bytes: int


def estimate_cost(config: CurriculumConfig, *, num_classes: int, device: torch.device) -> CostEstimate:
    """Times one small physical batch of each stage on random inputs; it reads no data."""
    data, options = config.data, config.dp_sgd
    unet = build_unet(
        config.model, resolution=data.resolution, num_channels=data.num_channels, num_classes=num_classes
    ).to(device)
    copies = options.noise_multiplicity
    max_images = max(1, config.runtime.max_physical_batch_size // copies)
    images = min(max_images, options.expected_batch_size)

    def seconds_per_row(rows: int, noise_multiplicity: int | None) -> float:
        shape = (rows, data.num_channels, data.resolution, data.resolution)
        inputs, sigma = torch.randn(shape, device=device), torch.ones(rows, device=device)
        labels = torch.zeros(rows, dtype=torch.int64, device=device)

        def once() -> None:
            edm_loss(unet, inputs, inputs, sigma, labels, sigma_data=config.model.sigma_data).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        if noise_multiplicity is None:
            once()
            start = time.perf_counter()
            once()
            return (time.perf_counter() - start) / rows
        with PerImageGradients(unet, noise_multiplicity=noise_multiplicity):
            once()
            start = time.perf_counter()
            once()
        return (time.perf_counter() - start) / rows

    few = max(1, min(images, 64 // copies))
    per_row = seconds_per_row(few * copies, copies)
    plain = seconds_per_row(config.pretraining.pretrain_batch_size, None)
    pretrains = config.central_images.central_statistic != "none"
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return CostEstimate(
        parameters=parameters,
        pretraining_seconds=plain
        * config.pretraining.pretrain_batch_size
        * config.pretraining.pretrain_steps
        * pretrains,
        dp_sgd_seconds=per_row * options.num_dp_steps * options.expected_batch_size * copies,
        gradient_bytes=4 * parameters * images,
    )
