"""Presets of larger images: they are planned, the memory estimate is near what a step takes, and one of them runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.plan import plan_budget


ROOT = Path(__file__).parents[2]
# Parameters of DPImageBench's networks; ours differ in the blocks' details.
SIZES = {"rgb32": (32, 4.0e6), "rgb64": (64, 4.0e6), "rgb128": (128, 4.0e6)}


def preset(name: str) -> CurriculumConfig:
    return CurriculumConfig.from_yaml(ROOT / "examples" / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_planned_within_its_target(name: str) -> None:
    config, (resolution, size) = preset(name), SIZES[name]
    data, privacy = config.data, config.privacy
    assert (data.resolution, data.channels) == (resolution, 3)
    assert privacy.public_dataset_size is not None and data.num_classes is not None
    plan = plan_budget(config, dataset_size=privacy.public_dataset_size, num_classes=data.num_classes)
    assert plan.dp_sgd is not None and plan.dp_sgd.event.noise_multiplier > 1
    unet = build_unet(config.model, resolution=resolution, num_channels=3, num_classes=data.num_classes)
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(size, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak")
def test_the_memory_estimate_is_within_a_fifth_of_what_a_step_takes() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--config", ROOT / "examples/configs/rgb32.yaml"]
    command += ["--max_physical_batch_size", "8"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["estimated_bytes"] == pytest.approx(found["measured_bytes"], rel=0.2)


def colour_images() -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"img": [Image.fromarray(image) for image in pixels], "label": [0, 1] * 20}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.slow
def test_a_short_run_of_colour_images_of_32_pixels(tmp_path: Path) -> None:
    config = preset("rgb32").replace(
        public_dataset_size=40, pretrain_steps=2, pretrain_batch_size=2, expected_batch_size=2, num_dp_steps=2,
        noise_multiplicity=2, max_physical_batch_size=4, mixed_precision="no", num_inference_steps=1, sample_steps=0,
        num_classes=2,
    )  # fmt: skip
    result = run_curriculum(config, colour_images(), output_dir=tmp_path / "o")
    assert result.finished and result.report.epsilon <= 10
    image = result.pipeline(class_labels=[1]).images[0]
    assert image.mode == "RGB" and image.size == (32, 32)


@pytest.mark.slow
def test_a_short_run_of_photos_in_closed_form(tmp_path: Path) -> None:
    """What anybody gets who names no stages: a prior of photos under the network, saved, loaded and sampled."""
    config = CurriculumConfig().replace(
        resolution=32, num_channels=3, num_classes=2, public_dataset_size=40, expected_batch_size=2, num_dp_steps=2,
        noise_multiplicity=2, block_out_channels=[8], max_physical_batch_size=4, num_inference_steps=1, sample_steps=0,
    )  # fmt: skip
    result = run_curriculum(config, colour_images(), output_dir=tmp_path / "o")
    assert result.finished and config.has_prior
    loaded = DPCurriculumPipeline.from_pretrained(tmp_path / "o")
    assert loaded.prior.factors.shape[1] == loaded.prior.factors.shape[2] < 3072
    assert loaded.scheduler.config.sigma_max == 0.4
    image = loaded(class_labels=[1]).images[0]
    assert image.mode == "RGB" and image.size == (32, 32)
    generator = torch.Generator().manual_seed(0)
    noisy, sigma, labels = torch.randn(2, 3, 32, 32, generator=generator), torch.full((2,), 0.3), torch.tensor([0, 1])
    for found, expected in zip(loaded.prior(noisy, sigma, labels), result.pipeline.prior(noisy, sigma, labels)):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_lesson_alone_is_sampled_by_its_own_draws(tmp_path: Path) -> None:
    """The network was never trained: what it would add, and noise that it would have to take away, are left out."""
    config = CurriculumConfig().replace(
        resolution=32, num_channels=3, num_classes=2, public_dataset_size=40, stages=["moments"],
        block_out_channels=[8], num_inference_steps=1,
        target_epsilon=1000.0,  # of less, 40 images are noise, and what one step does to that is a lottery
    )  # fmt: skip
    pipeline = run_curriculum(config, colour_images(), output_dir=tmp_path / "o").pipeline
    assert pipeline.scheduler.config.sigma_max == 0.01
    labels, generators = torch.arange(6) % 2, [torch.Generator().manual_seed(0) for _ in range(2)]
    images = pipeline(class_labels=labels.tolist(), generator=generators[0], output_type="pt").images
    pipeline.prepare_latents(len(labels), generators[1], None, 1.0)
    drawn = (pipeline._prior_images(labels, generators[1]) / 2 + 0.5).clamp(0, 1)
    assert float((images - drawn).abs().mean()) < 0.005
