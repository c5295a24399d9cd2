"""A network that was trained as DDPM, as a denoiser over sigma: exactly, and sampled as diffusers samples it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ddpm import PREDICTION_TYPES, ddim_images, tiny_pipeline, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    UNet2DModel,
)

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.diffusion.edm import SIGMA_DATA, edm_loss, noise_levels
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, NoiseSchedule


LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
TOLERANCE = 1e-3  # float32, of images in [0, 1]
by_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def schedule(prediction_type: str = "epsilon", **fields: Any) -> NoiseSchedule:
    return NoiseSchedule(prediction_type=prediction_type, **{**LINEAR, **fields})


def wrapped(theirs: DDPMPipeline, num_classes: int = 3) -> DPCurriculumPipeline:
    """Our pipeline around the same weights; all classes have an embedding of zeros."""
    fields = {name: value for name, value in theirs.unet.config.items() if not name.startswith("_")}
    unet = UNet2DModel.from_config({**fields, "num_class_embeds": num_classes + 1}).eval()
    rows = torch.zeros_like(unet.class_embedding.weight)
    unet.load_state_dict({**theirs.unet.state_dict(), "class_embedding.weight": rows})
    found = schedule(theirs.scheduler.config.prediction_type, beta_schedule=theirs.scheduler.config.beta_schedule)
    low, high = found.sigma_range
    edm = EDMEulerScheduler(sigma_min=low, sigma_max=min(80.0, high), sigma_data=SIGMA_DATA)
    pipeline = DPCurriculumPipeline(unet, edm, noise_schedule=dataclasses.asdict(found))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the denoiser --------------------------------------------------------------------------------------------------


@by_prediction
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_network_that_is_always_right_gives_the_image(prediction_type: str, beta_schedule: str) -> None:
    """At each kind of level the network gets diffusers' own noisy image and time, and what it should say is known."""
    found, ddpm = (
        schedule(prediction_type, beta_schedule=beta_schedule),
        DDPMScheduler(prediction_type=prediction_type, **{**LINEAR, "beta_schedule": beta_schedule}),
    )
    images, noise = torch.rand(5, 1, 4, 4, generator=seeded()).double() * 2 - 1, torch.randn(5, 1, 4, 4).double()
    steps = torch.tensor([0, 1, 300, 700, 990])
    sigma = found.levels[steps].exp()
    expected = ddpm.add_noise(images, noise, steps)
    answers = {"epsilon": noise, "sample": images, "v_prediction": ddpm.get_velocity(images, noise, steps)}

    def network(given: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(timestep, steps.double(), atol=1e-6, rtol=0)
        return answers[prediction_type]

    labels = torch.zeros(5, dtype=torch.int64)
    denoised = found.denoise(network, images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    torch.testing.assert_close(denoised, images, atol=1e-3, rtol=0)  # float32 products of betas, at a level of 100


def test_time_is_interpolated_between_steps_and_ends_with_the_schedule() -> None:
    found = schedule()
    between = ((found.levels[10] + 3 * found.levels[11]) / 4).exp()
    low, high = found.sigma_range
    times = found.timesteps(torch.stack([between, torch.tensor(low / 9), torch.tensor(high * 9)]))
    torch.testing.assert_close(times, torch.tensor([10.75, 0.0, 999.0]).double(), atol=1e-5, rtol=0)
    assert 0.009 < low < 0.011 and 150 < high < 160  # of the linear schedule: EDM's appendix has 157 for it


def test_levels_of_training_stay_within_the_schedule() -> None:
    normals = torch.linspace(-9, 9, 99)
    drawn = noise_levels(normals, p_mean=-1.2, schedule=schedule())
    low, high = schedule().sigma_range
    assert float(drawn.min()) == pytest.approx(low) and float(drawn.max()) == pytest.approx(high)
    inside = (normals > -4) & (normals < 4) & (noise_levels(normals, p_mean=-1.2) > low)
    torch.testing.assert_close(drawn[inside], noise_levels(normals, p_mean=-1.2)[inside])


@by_prediction
def test_the_loss_is_that_of_the_denoiser(prediction_type: str) -> None:
    """Beside a slow reference, one row at a time: the squared error of what the network predicts."""
    found, unet = schedule(prediction_type), tiny_unet(num_class_embeds=3)
    images, noise = torch.rand(2, 1, 8, 8, generator=seeded()) * 2 - 1, torch.randn(4, 1, 8, 8, generator=seeded())
    sigma, labels = torch.tensor([0.05, 0.5, 2.0, 20.0]), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        losses = edm_loss(unet, images, noise, sigma, labels, schedule=found)
    for row in range(4):
        clean, level = images[row % 2], float(sigma[row])
        noisy, kept = clean + level * noise[row], 1 / (1 + level**2)
        time = torch.tensor([float((found.levels < torch.tensor(level).double().log()).sum()) - 1])
        below, above = found.levels[int(time)], found.levels[int(time) + 1]
        time = time + (torch.tensor(level).double().log() - below) / (above - below)
        with torch.no_grad():
            output = unet((kept**0.5 * noisy)[None], time.float(), class_labels=labels[row][None]).sample[0]
        denoised = {
            "sample": output,
            "epsilon": noisy - level * output,
            "v_prediction": kept * noisy - level * kept**0.5 * output,
        }[prediction_type]
        target = {
            "sample": clean,
            "epsilon": noise[row],
            "v_prediction": kept**0.5 * noise[row] - level * kept**0.5 * clean,
        }[prediction_type]
        expected = float((output - target).square().mean())
        weighted = float(found.weight(sigma)[row]) * float((denoised - clean).square().mean())
        assert weighted == pytest.approx(expected, rel=2e-3), "the weight is of the denoiser's error"
        assert float(losses[row]) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"beta_start": "0.1"}, "beta_start='0.1'"),
        ({"beta_start": 0.9, "beta_end": 0.999}, "levels"),
    ],
)
def test_a_schedule_that_is_none_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**{"prediction_type": "epsilon", **fields})


# --- untouched, it samples as diffusers samples it ------------------------------------------------------------------


@by_prediction
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_with_the_same_scheduler_and_seed_the_images_are_those_of_diffusers(
    prediction_type: str, beta_schedule: str
) -> None:
    theirs = tiny_pipeline(prediction_type, beta_schedule=beta_schedule)
    theirs.set_progress_bar_config(disable=True)
    ours = wrapped(theirs)
    ours.scheduler = DDIMScheduler(**ours.config.noise_schedule)
    options: dict[str, Any] = {"num_inference_steps": 12, "output_type": "pt"}
    found = ours(3, generator=seeded(), **options).images
    torch.testing.assert_close(found, ddim_images(theirs, 12, 3, 3), atol=TOLERANCE, rtol=0)
    ours.scheduler = DDPMScheduler(**ours.config.noise_schedule)
    expected = theirs(3, generator=seeded(), **options).images
    torch.testing.assert_close(ours(3, generator=seeded(), **options).images, expected, atol=TOLERANCE, rtol=0)
    assert float(expected.std()) > 0.01, "images that differ"


@by_prediction
def test_the_denoiser_along_the_levels_of_ddim_makes_its_images(prediction_type: str) -> None:
    """DDIM is Euler's method in x / s over sigma: the wrapping says so, or it is another one."""
    theirs = tiny_pipeline(prediction_type)
    ours, count = wrapped(theirs), 12
    scheduler = DDIMScheduler(**ours.config.noise_schedule, clip_sample=False)
    scheduler.set_timesteps(count)
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = [*((1 - kept) / kept).sqrt(), torch.tensor(0.0)]
    labels = torch.tensor([0, 1, 2])
    latents = torch.randn(3, 1, 8, 8, generator=seeded()) * (1 + sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:]):
            denoised = ours.denoise(latents, sigma, labels, 1.0)
            latents = denoised + following / sigma * (latents - denoised)
    expected = ddim_images(theirs, count, 3, 3, clip_sample=False)
    found = (latents / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    other = {"epsilon": "v_prediction", "v_prediction": "sample", "sample": "epsilon"}[prediction_type]
    with torch.no_grad():
        wrong = schedule(other).denoise(
            lambda images, times, classes: ours.unet(images, times, class_labels=classes).sample,
            latents,
            sigmas[6].expand(3),
            labels,
        )
        right = ours.denoise(latents, sigmas[6], labels, 1.0)
    assert float((wrong - right).abs().max()) > 0.01, "negative control: another prediction type is another denoiser"


@by_prediction
def test_both_edm_samplers_solve_the_same_equation(prediction_type: str) -> None:
    """Heun's method and the multistep solver end near the same images; random weights are rough in time."""
    theirs = tiny_pipeline(prediction_type)
    ours = wrapped(theirs)
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    options: dict[str, Any] = {"class_labels": [0, 1], "latents": noise, "output_type": "pt"}
    heun = ours(num_inference_steps=120, **options).images
    ours.scheduler = EDMDPMSolverMultistepScheduler.from_config(ours.scheduler.config)
    multistep = ours(num_inference_steps=360, **options).images
    assert float((multistep - heun).abs().mean()) < 0.005
    others = ours(num_inference_steps=120, **{**options, "latents": noise.flip(0)}).images
    assert float((others - heun).abs().mean()) > 0.05, "negative control: other noise makes other images"


def test_a_zero_embedding_of_classes_and_guidance_change_no_sample() -> None:
    ours = wrapped(tiny_pipeline())
    ours.scheduler = DDIMScheduler(**ours.config.noise_schedule)
    options: dict[str, Any] = {"num_inference_steps": 6, "output_type": "pt"}
    plain = ours(class_labels=[0, 0], generator=seeded(), **options).images
    guided = ours(class_labels=[2, 1], generator=seeded(), guidance_scale=3.0, **options).images
    torch.testing.assert_close(plain, guided, atol=1e-5, rtol=0)
    with torch.no_grad():
        ours.unet.class_embedding.weight[2] += 1
    assert not torch.equal(ours(class_labels=[2, 0], generator=seeded(), **options).images[0], plain[0])


# --- saved, and loaded by others -----------------------------------------------------------------------------------


def test_it_is_loaded_three_ways(tmp_path: Path) -> None:
    ours = wrapped(tiny_pipeline("v_prediction"))
    ours.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_bytes(Path(str(pipeline_dp_curriculum.__file__)).read_bytes())
    options: dict[str, Any] = {"class_labels": [0, 1], "num_inference_steps": 3, "output_type": "pt"}
    expected = ours(generator=seeded(), **options).images
    first = DPCurriculumPipeline.from_pretrained(tmp_path)
    second = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path / "pipeline.py"), trust_remote_code=True
    )
    for loaded in (first, second):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(generator=seeded(), **options).images, expected)
        assert loaded.config.noise_schedule == {"prediction_type": "v_prediction", **LINEAR}
    bare = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    states = zip(bare.state_dict().values(), ours.unet.state_dict().values())
    assert all(torch.equal(one, other) for one, other in states)


def test_a_pipeline_without_a_schedule_is_saved_as_before(tmp_path: Path) -> None:
    DPCurriculumPipeline(tiny_unet(num_class_embeds=3), EDMEulerScheduler(sigma_data=0.5)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved.get("noise_schedule") is None
    assert DPCurriculumPipeline.from_pretrained(tmp_path).noise_schedule is None


def test_schedulers_of_another_schedule_are_refused() -> None:
    ours = wrapped(tiny_pipeline())
    fields = ours.config.noise_schedule
    for other in (
        DDIMScheduler(**{**fields, "prediction_type": "sample"}),
        DDPMScheduler(**{**fields, "beta_end": 0.03}),
        DDIMScheduler(**fields, rescale_betas_zero_snr=True),
        DDPMScheduler(**fields, trained_betas=[0.1, 0.2]),
    ):
        with pytest.raises(ValueError, match="noise schedule of the network"):
            ours.scheduler = other
    plain = DPCurriculumPipeline(tiny_unet(num_class_embeds=3), EDMEulerScheduler(sigma_data=0.5))
    with pytest.raises(ValueError, match="EDM preconditioning"):
        plain.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="have the fields"):
        DPCurriculumPipeline(tiny_unet(num_class_embeds=3), EDMEulerScheduler(), noise_schedule={"beta_end": 0.02})
