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
from dp_curriculum.lessons.planned import plan_lessons
from dp_curriculum.lessons.pretraining import pretrain
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training import cost_estimate
from dp_curriculum.training.cost_estimate import CostEstimate, estimate_cost


CPU = torch.device("cpu")


def estimate(config: CurriculumConfig, dataset_size: int = 100) -> CostEstimate:
    return estimate_cost(config, num_classes=10, dataset_size=dataset_size, device=CPU)


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


def test_time_is_that_of_a_pass_times_passes_and_steps(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed takes a tenth of a second."""
    monkeypatch.setattr(cost_estimate, "_seconds", lambda compute, device: 0.1)
    monkeypatch.setattr(cost_estimate, "reading_seconds", lambda config, num_images: 0.001 * num_images)
    base = make_config(
        noise_multiplicity=2, num_dp_steps=10, expected_batch_size=32, max_physical_batch_size=16, sample_steps=4
    )
    cost = estimate(base, 200)
    assert cost.dp_sgd_seconds == pytest.approx(10 * (4.5 * 0.1 + 0.1)), "four or five passes, and an update"
    assert cost.pretraining_seconds == pytest.approx(3 * 0.1 / 3), "three steps at once"
    assert cost.reading_seconds == pytest.approx(0.2)
    calls = 2 * base.sampler.num_inference_steps - 1
    assert cost.sheet_seconds == pytest.approx((1 + 2 + 1) * calls * 0.1)
    assert cost.query_seconds == pytest.approx(0.1), "so few are not extrapolated"
    parts = cost.reading_seconds + cost.query_seconds + cost.pretraining_seconds + cost.dp_sgd_seconds
    assert cost.seconds == pytest.approx(parts + cost.sheet_seconds)
    two = estimate(base.replace(stages=["mode", "mean", "dp_sgd"]), 200)
    assert two.pretraining_seconds == pytest.approx(2 * cost.pretraining_seconds)
    assert two.query_seconds == pytest.approx(0.2)
    assert estimate(base.replace(stages=["mean"])).dp_sgd_seconds == 0
    assert estimate(base.replace(max_physical_batch_size=4096)).dp_sgd_seconds == pytest.approx(10 * 0.2)


def test_a_query_of_many_images_is_extrapolated(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a second, and a millisecond an image."""
    taken: list[int] = []

    def release(images: PrivateImages, *arguments: Any) -> None:
        taken.append(len(images))

    def seconds(compute: Any, device: torch.device) -> float:
        compute()
        return 1.0 + 0.001 * taken[-1]

    (group,) = plan_lessons(config := make_config())
    planned = dataclasses.replace(group[0], lesson=dataclasses.replace(group[0].lesson, release=release))
    monkeypatch.setattr(cost_estimate, "_seconds", seconds)
    found = cost_estimate._query_seconds([(planned,)], config, 10, 60_000, CPU)
    assert found == pytest.approx(61.0) and max(taken) <= 4000


def test_times_are_measured_on_the_threads_that_are_asked_for(make_config: Any) -> None:
    before = torch.get_num_threads()
    assert estimate(make_config(cpu_threads=2)).num_threads == 2
    assert torch.get_num_threads() == before


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

    for name in ("datasets.load_dataset", "sklearn.datasets.load_digits", "dp_curriculum.data.sources.open_images"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("builtins.open", fail)
    cost = estimate(make_config(dataset_name="org/private"))
    found = dataclasses.asdict(cost)
    assert found.pop("encoding_seconds") == found.pop("matching_seconds") == 0 and found.pop("dataset_bytes") == (
        6400,
        6400,
    ), "they stay images"
    assert all(value > 0 for value in found.values())


@pytest.mark.usefixtures("bf16_hardware")
def test_colour_unlabelled_and_low_precision_are_estimated(make_config: Any) -> None:
    config = make_config(num_channels=3, mixed_precision="bf16", attention_resolutions=[8])
    assert estimate_cost(config, num_classes=1, dataset_size=100, device=CPU).dp_sgd_seconds > 0


def test_public_photos_are_timed_by_their_number(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_config(
        resolution=20,
        num_channels=3,
        stages=["moments", "public"],
        pretrain_dataset_name="org/photos",
        pretrain_steps=0,
    )
    taken: list[float] = []

    def seconds(compute: Any, device: Any) -> float:
        compute()
        return taken.pop() if taken else 0.1

    def match(images: torch.Tensor, prior: Any) -> Any:
        taken.append(2.0 + 0.001 * len(images))

    monkeypatch.setattr(cost_estimate, "_seconds", seconds)
    monkeypatch.setattr(cost_estimate, "match_moments", match)
    assert estimate(photos).matching_seconds == pytest.approx(2.0 + 0.001 * 10_000), (
        "what is done once is counted once"
    )
    assert estimate(photos.replace(pretrain_dataset_matching="none")).matching_seconds == 0
