"""The pipeline with an autoencoder: it makes latents, decodes them at the end, and saves and loads as others do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoders import tiny_vae
from diffusers import AutoencoderKL, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, UNet2DModel

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import ModelConfig
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, decode_latents


CALL: dict[str, Any] = {"class_labels": [0, 1, 0], "num_inference_steps": 2, "output_type": "pt"}


def small_unet(channels: int = 4, patch_size: int = 1, has_prior: bool = False) -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        config = ModelConfig(block_out_channels=[8], patch_size=patch_size)
        return build_unet(config, resolution=8, num_channels=channels, num_classes=2, has_prior=has_prior).eval()


def small_pipeline(**options: Any) -> DPCurriculumPipeline:
    pipeline = DPCurriculumPipeline(
        options.pop("unet", small_unet()), EDMEulerScheduler(), vae=tiny_vae(), latent_bound=4.0, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline: DPCurriculumPipeline, **options: Any) -> torch.Tensor:
    found = pipeline(generator=torch.Generator().manual_seed(3), **{**CALL, **options})
    return torch.as_tensor(found.images)


def test_its_images_are_those_of_the_autoencoder() -> None:
    """Decoding what it gives as latents is what it does, to the last bit; a network in latents makes just those."""
    pipeline = small_pipeline()
    assert pipeline.image_size == (32, 32) and pipeline.num_channels == 3 and pipeline.latent_shape == (4, 8, 8)
    images, latents = images_of(pipeline), images_of(pipeline, output_type="latent")
    assert images.shape == (3, 3, 32, 32) and latents.shape == (3, 4, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1 and float(latents.abs().max()) <= 4
    assert torch.equal(images, decode_latents(pipeline.vae, latents))
    vae = pipeline.vae
    direct = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.allclose(images, (direct / 2 + 0.5).clamp(0, 1), atol=1e-6)
    assert images_of(pipeline, output_type="np").shape == (3, 32, 32, 3)
    pictures = pipeline(generator=torch.Generator().manual_seed(3), **{**CALL, "output_type": "pil"}).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 3 and pictures[0].mode == "RGB"


def test_the_sampler_works_on_latents_as_it_works_on_images() -> None:
    """The same network in a pipeline of images makes what this one makes before it decodes, but for their range."""
    unet = small_unet(3)  # a network of three channels can be in both
    vae = tiny_vae(latent_channels=3, scaling_factor=1.0)
    in_latents = DPCurriculumPipeline(unet, EDMEulerScheduler(), vae=vae, latent_bound=4.0)
    in_pixels = DPCurriculumPipeline(unet, EDMEulerScheduler())
    for pipeline in (in_latents, in_pixels):
        pipeline.set_progress_bar_config(disable=True)
    assert torch.allclose(images_of(in_latents, output_type="latent"), (2 * images_of(in_pixels) - 1) * 4, atol=1e-6)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_noise_to_start_from_has_the_shape_of_latents(scheduler: Any) -> None:
    pipeline = small_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert images_of(pipeline, latents=noise).shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"latents of shape \(3, 4, 8, 8\)"):
        images_of(pipeline, latents=torch.zeros(3, 3, 32, 32))


def test_patches_and_a_prior_go_with_latents() -> None:
    assert images_of(small_pipeline(unet=small_unet(patch_size=2), patch_size=2)).shape == (3, 3, 32, 32)
    prior = ClosedFormPrior(2, 4, 8, 6)
    prior.factors.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    prior.variances.fill_(5.0)
    pipeline = small_pipeline(unet=small_unet(has_prior=True), prior=prior.eval())
    assert images_of(pipeline).shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="Expected the prior to have the channels"):
        small_pipeline(unet=small_unet(has_prior=True), prior=ClosedFormPrior(2, 3, 32, 6))


def test_it_saves_and_loads_in_three_ways(tmp_path: Path) -> None:
    pipeline = small_pipeline(id2label={0: "a", 1: "b"})
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_bytes(Path(pipeline_dp_curriculum.__file__).read_bytes())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["latent_bound"] == 4.0
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    code = str(tmp_path / "pipeline.py")
    theirs = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=code, trust_remote_code=True)
    ours = DPCurriculumPipeline.from_pretrained(tmp_path)
    for loaded in (theirs, ours):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(images_of(loaded), images_of(pipeline))
    bare = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert torch.equal(bare.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)
    assert set(pipeline.components) == {"unet", "scheduler", "prior", "vae"}


def test_a_pipeline_without_one_is_saved_as_before(tmp_path: Path) -> None:
    pipeline = DPCurriculumPipeline(small_unet(3), EDMEulerScheduler())
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert "vae" not in index and "latent_bound" not in index and index["prior"] == [None, None]
    loaded = DPCurriculumPipeline.from_pretrained(tmp_path)
    assert loaded.vae is None and set(loaded.components) == {"unet", "scheduler", "prior", "vae"}
    with pytest.raises(ValueError, match="output_type='latent' to be 'pil', 'np' or 'pt'; 'latent' needs a vae"):
        loaded(output_type="latent")


def test_bfloat16_takes_the_autoencoder_along() -> None:
    pipeline = small_pipeline().to(torch.bfloat16)
    assert pipeline.vae.dtype == torch.bfloat16
    images, latents = images_of(pipeline), images_of(pipeline, output_type="latent")
    assert images.dtype == torch.float32 and images.shape == (3, 3, 32, 32)
    assert torch.equal(images, decode_latents(pipeline.vae, latents))
    assert float((images - decode_latents(tiny_vae(), latents)).abs().mean()) < 0.02, "as in float32, nearly"


def test_one_that_is_missing_or_of_others_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to come with its vae: the network makes latents"):
        DPCurriculumPipeline(small_unet(), EDMEulerScheduler(), latent_bound=4.0)
    small_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="to come with its vae"):
        DPCurriculumPipeline.from_pretrained(tmp_path, vae=None)
    pipeline = small_pipeline()
    pipeline.vae = None
    with pytest.raises(ValueError, match="to come with its vae"):
        pipeline()
    for bound in (None, 0, float("inf"), True, "4"):
        with pytest.raises(ValueError, match="latent_bound=.* a positive number"):
            DPCurriculumPipeline(small_unet(), EDMEulerScheduler(), vae=tiny_vae(), latent_bound=bound)
    with pytest.raises(ValueError, match="they have 4 channels, and the network has out_channels=3"):
        DPCurriculumPipeline(small_unet(3), EDMEulerScheduler(), vae=tiny_vae(), latent_bound=4.0)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError):
        DPCurriculumPipeline.from_pretrained(tmp_path)
