"""The guarantee on a GPU: the same gradients, bound and noise as on the CPU, and a run from images to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from test_classifiers import digits
from test_dp_finetuning import ALL, DIVISOR, NUM_CLASSES, ChosenRows, StillDiffusion, make_unet, released
from test_limits import ENDS, adversarial_rows, clipped_sum

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.diffusion.edm import build_unet, edm_loss
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.dp_sgd.gradient_check import check_per_image_gradients
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.evaluation.classifiers import CLASSIFIERS
from dp_curriculum.per_image_gradients import PerImageGradients
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.randomness import SecretGenerator


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


class OnGPU(StillDiffusion):
    """Diffusion noise of the CPU, moved."""

    def gaussian(self, shape: Any, std: float, **options: Any) -> torch.Tensor:
        return super().gaussian(shape, std, **options).to(GPU)


@pytest.fixture
def private() -> PrivateImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return PrivateImages(images, torch.arange(12) % NUM_CLASSES, ("a", "b", "c"))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(
        block_out_channels=[8, 16], attention_resolutions=[4], noise_multiplicity=2, dp_max_grad_norm=1.0
    )


def preset_unet() -> UNet2DModel:
    """The network of the presets for MNIST, with its attention."""
    shape = {
        "block_out_channels": [16, 48],
        "attention_resolutions": [14],
    }
    model = CurriculumConfig().replace(**shape).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(model, resolution=28, num_channels=1, num_classes=NUM_CLASSES)
        for parameter in unet.parameters():  # new networks have layers of zeros, behind which no gradient flows
            parameter.data += 0.02 * torch.randn_like(parameter)
    return unet.to(GPU)


def rows_of_inputs(count: int, size: int = 28) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, size, size, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.linspace(0.1, 2, count)
    return tuple(tensor.to(GPU) for tensor in (images, noise, sigma, torch.arange(count) % NUM_CLASSES))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("copies", [1, 4])
def test_gradients_equal_autograd_image_by_image(copies: int, precision: Any) -> None:
    unet = preset_unet()

    def losses(images: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with autocast(GPU, precision):
            return edm_loss(unet, images, noise, sigma, labels, sigma_data=0.5)

    found = check_per_image_gradients(unet, losses, rows_of_inputs(3 * copies), noise_multiplicity=copies)
    assert found["dtype"] == {"no": "float32", "bf16": "bfloat16"}[precision]
    assert found["max_relative_error"] <= found["tolerance"]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("bound", ENDS)
def test_no_gradient_adds_more_than_its_bound_at_the_ends_of_its_range(bound: float, mode: Any, bf16: bool) -> None:
    """Where squares of float32 under- and overflow, as on the CPU."""
    for row in adversarial_rows(1024, bound):
        assert float(clipped_sum(row[None].to(GPU), bound, mode=mode, bf16=bf16).norm()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_image_moves_the_sum_by_at_most_the_bound(precision: Any, mode: Any) -> None:
    """Also where TF32 and bfloat16 are on: the sum is that of the numbers whose norm was measured."""
    unet, bound = preset_unet(), 1e-3
    engine = PerImageGradients(unet, mode=mode)

    def clipped(count: int) -> torch.Tensor:
        with engine, autocast(GPU, precision):
            engine.backward(edm_loss(unet, *(t[:count] for t in rows_of_inputs(6)), sigma_data=0.5))
            engine.accumulate_clipped(bound)
        return torch.cat([p.__dict__.pop("summed_grad").double().flatten() for p in unet.parameters()])

    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert 0.99 * bound < clipped(1).norm() <= bound * (1 + 1e-5)
        # The gradients of the rows before hang on the kernels that a batch gets, so the difference is theirs as well.
        assert (clipped(6) - clipped(5)).norm() <= bound * (1.05 if precision == "bf16" else 1 + 1e-3)
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


def trainer_on(device: torch.device, private: PrivateImages, config: CurriculumConfig, **options: Any) -> DPTrainer:
    unet = make_unet(config).to(device)
    settings = {"noise_multiplier": 0.0, "sample_rate": 0.5, "divisor": DIVISOR, "secret": ChosenRows(ALL)}
    trainer = DPTrainer(unet, private, config, **{**settings, **options})
    still = OnGPU if device.type == "cuda" else StillDiffusion
    trainer.diffusion_noise = still(config.dp_sgd.noise_multiplicity)
    return trainer


def test_a_step_releases_the_sum_that_it_releases_on_the_cpu(private: PrivateImages, config: CurriculumConfig) -> None:
    there = released(trainer_on(GPU, private, config)).cpu()
    here = released(trainer_on(torch.device("cpu"), private, config))
    assert (there - here).norm() < 1e-3 * here.norm()


@pytest.mark.statistical
def test_the_noise_of_a_step_has_its_scale(private: PrivateImages, config: CurriculumConfig) -> None:
    """An empty draw is noise alone. False alarms: one in a million. A tenth less or more is seen."""

    class Empty(SecretGenerator):
        def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
            return torch.zeros(0, dtype=torch.int64)

    def drawn(multiplier: float) -> np.ndarray:
        secret = Empty("fast", device=GPU)
        trainer = trainer_on(GPU, private, config, noise_multiplier=multiplier, secret=secret)
        return released(trainer).double().cpu().numpy()

    def is_right(noise: np.ndarray) -> bool:
        return abs(noise.std() / 3 - 1) < 4.9 / np.sqrt(2 * len(noise)) and abs(noise.mean()) < 15 / len(noise) ** 0.5

    first, second = drawn(3.0), drawn(3.0)
    assert is_right(first) and is_right(second)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.9 / len(first) ** 0.5
    assert not is_right(drawn(2.7)) and not is_right(first + 0.6 * second)


def test_a_run_goes_from_images_to_a_report(tmp_path: Path, make_config: Any) -> None:
    """On the GPU by itself; and the model draws there what it draws on the CPU."""
    folder = tmp_path / "out"
    config = make_config(
        dataset_name="digits", target_epsilon=10, target_delta=1e-5, public_dataset_size=1437, seed=0
    ).replace(stages=["moments", "dp_sgd"], lesson_noise_multiplier=5, lesson_resolution=8, checkpointing_steps=2)
    config.to_yaml(tmp_path / "config.yaml")
    options = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(folder), "--sample_steps", "0"]
    assert main(["train", *options, "--mixed_precision", "bf16"]) == 0
    assert main(["evaluate", str(folder), "--num_images", "200", "--classifiers", "cnn", "logistic"]) == 0
    assert (folder / "run" / "evaluation" / "evaluation.json").exists()
    assert main(["verify", str(folder), "--local_run"]) == 0
    here = DPCurriculumPipeline.from_pretrained(folder)
    there = DPCurriculumPipeline.from_pretrained(folder).to(GPU)
    drawn = [
        pipeline(
            class_labels=[0, 1, 2],
            generator=[torch.Generator().manual_seed(index) for index in range(3)],
            num_inference_steps=3,
            output_type="pt",
        ).images.cpu()
        for pipeline in (here, there)
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-2


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_a_classifier_learns_there_and_leaves_the_randomness_alone(name: str) -> None:
    images, labels = (tensor.to(GPU) for tensor in digits("train"))
    real, true = digits("test")
    state = torch.cuda.get_rng_state(GPU)
    first, again = (CLASSIFIERS[name](images, labels, 10, 0)(real.to(GPU)) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(GPU), state)
    assert (first == true.numpy()).mean() > 0.85 and (first == again).mean() > 0.97
