"""The estimate before a run: near what the run takes, larger where more is asked for, and made without data."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.pretraining import pretrain
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training import cost_estimate
from dp_curriculum.training.cost_estimate import CostEstimate, estimate_cost


CPU = torch.device("cpu")


def estimate(config: CurriculumConfig) -> CostEstimate:
    return estimate_cost(config, num_classes=10, device=CPU)


def test_times_are_within_a_factor_of_six_of_the_real_ones(make_config: Any) -> None:
    """Of the best of three tries each: other programs slow some down."""
    config = make_config(
        resolution=16, block_out_channels=[8, 16], expected_batch_size=64, num_dp_steps=2, pretrain_steps=6
    )
    unet = build_unet(config.model, resolution=16, num_channels=1, num_classes=10)
    private = PrivateImages(torch.zeros(64, 1, 16, 16, dtype=torch.uint8), torch.arange(64) % 10, tuple("0123456789"))

    def real_dp_sgd() -> None:
        trainer = DPTrainer(
            unet, private, config, noise_multiplier=1.0, sample_rate=1.0, divisor=64.0, secret=SecretGenerator()
        )
        for _ in range(2):
            trainer.step()

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(count, 1, 16, 16, generator=generator), torch.arange(count) % 10

    def real_pretraining() -> None:
        pretrain(unet, draw, config, generator=torch.Generator(), disable_progress_bar=True)

    def seconds(work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    costs = [estimate(config) for _ in range(3)]
    for guessed, real in (
        (min(cost.dp_sgd_seconds for cost in costs), min(seconds(real_dp_sgd) for _ in range(3))),
        (min(cost.pretraining_seconds for cost in costs), min(seconds(real_pretraining) for _ in range(3))),
    ):
        assert real / 6 < guessed < 6 * real
    assert costs[0].num_parameters == sum(parameter.numel() for parameter in unet.parameters())


def test_time_is_that_of_a_row_times_rows_and_steps(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of a tenth of a second a row, whatever stage it is of."""
    monkeypatch.setattr(cost_estimate, "_probe", lambda unet, rows, backward, config: (0.1 * rows, 1000 * rows))
    base = make_config(noise_multiplicity=2, num_dp_steps=10, expected_batch_size=30, pretrain_batch_size=8)
    cost = estimate(base)
    assert cost.dp_sgd_seconds == pytest.approx(0.1 * 2 * 30 * 10)
    assert cost.pretraining_seconds == pytest.approx(0.1 * 8 * 3)
    assert estimate(base.replace(stages=["mode", "mean", "dp_sgd"])).pretraining_seconds == pytest.approx(4.8)
    for physical in (1, 7, 4096):
        assert estimate(base.replace(max_physical_batch_size=physical)).dp_sgd_seconds == pytest.approx(60)


def test_memory_grows_with_the_physical_batch_and_with_kept_gradients(make_config: Any) -> None:
    sizes = (2, 8, 32, 256)

    def memory(size: int, mode: str, **fields: Any) -> int:
        config = make_config(
            expected_batch_size=64,
            noise_multiplicity=2,
            max_physical_batch_size=size,
            per_image_gradients=mode,
            **fields,
        )
        return estimate(config).memory_bytes

    kept = [memory(size, "materialize") for size in sizes]
    twice = [memory(size, "norms_first") for size in sizes]
    assert kept == sorted(set(kept)) and twice == sorted(set(twice))
    # What is saved is gradients: much where there are many weights for few pixels, and nothing the other way round.
    heavy = {"resolution": 4, "block_out_channels": [64]}
    assert memory(32, "materialize", **heavy) > 1.3 * memory(32, "norms_first", **heavy)
    for size, more, less in zip(sizes, kept, twice):
        assert memory(size, "auto") == pytest.approx(more, rel=0.01)
        assert memory(size, "auto", gradient_memory_limit=0) == pytest.approx(less, rel=0.01)
    # No more images than a step has on average: a physical batch beyond them costs nothing.
    assert memory(10**6, "materialize") == pytest.approx(memory(128, "materialize"), rel=0.01)


def test_memory_holds_weights_moments_average_and_the_gradients_of_a_batch(make_config: Any) -> None:
    config = make_config(max_physical_batch_size=16, noise_multiplicity=2, per_image_gradients="materialize")
    cost = estimate(config)
    assert cost.memory_bytes > 32 * cost.num_parameters + 8 * 4 * cost.num_parameters


def test_no_data_is_opened(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("data was opened")

    for name in ("datasets.load_dataset", "sklearn.datasets.load_digits", "sklearn.datasets.load_digits"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("builtins.open", fail)
    cost = estimate(make_config(dataset_name="org/private"))
    assert all(value > 0 for value in dataclasses.asdict(cost).values())


@pytest.mark.usefixtures("bf16_hardware")
def test_colour_unlabelled_and_low_precision_are_estimated(make_config: Any) -> None:
    config = make_config(num_channels=3, mixed_precision="bf16", attention_resolutions=[8])
    assert estimate_cost(config, num_classes=1, device=CPU).dp_sgd_seconds > 0
