"""The pipeline: what it is asked, what it gives, how it is saved, and that its sampler solves EDM's equation."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline


MakePipeline = Callable[..., DPCurriculumPipeline]
PRIVACY = {"epsilon": 9.97, "delta": 1e-5, "private": True, "mechanisms": [{"name": "dp-sgd", "num_steps": 3}]}


@pytest.fixture
def make_pipeline(make_config: Callable[..., CurriculumConfig]) -> MakePipeline:
    """Random weights, three classes; the last layer is not zero, so that the classes differ."""

    def make(num_channels: int = 1, **options: Any) -> DPCurriculumPipeline:
        config = make_config(num_channels=num_channels)
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(0)
            unet = build_unet(config.model, resolution=8, num_channels=num_channels, num_classes=3)
        given = {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "sampling": {"num_inference_steps": 4}, **options}
        pipeline = DPCurriculumPipeline(unet.eval(), EDMEulerScheduler(sigma_data=0.5), **given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(pipeline: DPCurriculumPipeline, **options: Any) -> Tensor:
    return pipeline(**{"generator": seeded(), "output_type": "pt", **options}).images


# --- reproducible --------------------------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_images(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    first, second = (images_of(pipeline, class_labels=[0, 1, 2]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, images_of(pipeline, class_labels=[0, 1, 2], generator=seeded(1)))
    churned = [images_of(pipeline, class_labels=[0, 1, 2], s_churn=10.0) for _ in range(2)]
    assert torch.equal(*churned) and not torch.equal(churned[0], first)


def test_the_global_generator_is_neither_read_nor_moved(make_pipeline: MakePipeline) -> None:
    pipeline, state = make_pipeline(), torch.random.get_rng_state()
    images_of(pipeline, batch_size=2, s_churn=10.0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("s_churn", [0.0, 10.0])
def test_with_a_generator_each_image_does_not_depend_on_the_batch(make_pipeline: MakePipeline, s_churn: float) -> None:
    pipeline, labels = make_pipeline(), [0, 2, 1, 0]
    together = images_of(pipeline, class_labels=labels, generator=[seeded(i) for i in range(4)], s_churn=s_churn)
    for i, label in enumerate(labels):
        alone = images_of(pipeline, class_labels=[label], generator=[seeded(i)], s_churn=s_churn)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.01


def test_latents_are_the_noise_to_start_from(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    expected = images_of(pipeline, class_labels=[0, 1])
    assert torch.equal(images_of(pipeline, class_labels=[0, 1], latents=noise, generator=None), expected)
    wide = images_of(pipeline, class_labels=[0, 1], latents=noise.double(), generator=None)
    torch.testing.assert_close(wide, expected)


# --- what it is asked ----------------------------------------------------------------------------------------------


def test_classes_may_be_an_integer_a_list_a_tensor_or_names(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    expected = images_of(pipeline, class_labels=[1, 1])
    assert torch.equal(images_of(pipeline, batch_size=2, class_labels=1), expected)
    assert torch.equal(images_of(pipeline, class_labels=torch.tensor([1, 1])), expected)
    assert torch.equal(images_of(pipeline, batch_size=2, class_labels=torch.tensor(1)), expected)
    assert torch.equal(images_of(pipeline, class_labels=(1, 1)), expected)
    assert torch.equal(images_of(pipeline, class_labels=pipeline.get_label_ids(["dog", "dog"])), expected)
    assert torch.equal(images_of(pipeline, class_labels=["dog", "dog"]), expected)
    assert torch.equal(images_of(pipeline, batch_size=2, class_labels="dog"), expected)
    assert not torch.equal(images_of(pipeline, class_labels=[1, 2]), expected), "the class is heard"


@pytest.mark.parametrize(
    "given",
    [
        range(3),
        np.arange(3),
        np.arange(3, dtype=np.uint8),
        [np.int64(0), np.int32(1), np.uint16(2)],
        [torch.tensor(0), torch.tensor(1), 2],
        np.array(["cat", "dog", "eel"]),
        ["cat", 1, np.int64(2)],
        ("cat", "dog", "eel"),
    ],
    ids=repr,
)
def test_classes_may_be_whatever_counts_as_indices_or_names(given: Any, make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    assert torch.equal(images_of(pipeline, class_labels=given), images_of(pipeline, class_labels=[0, 1, 2]))


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), np.array(1), torch.tensor(1), "dog"], ids=repr)
@pytest.mark.parametrize("count", [2, np.int64(2), np.array(2), torch.tensor(2)], ids=repr)
def test_one_class_and_a_count_may_be_any_integers(one: Any, count: Any, make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    images = images_of(pipeline, class_labels=one, batch_size=count, num_inference_steps=np.int64(3))
    assert torch.equal(images, images_of(pipeline, class_labels=[1, 1], num_inference_steps=3))


def test_without_classes_they_come_in_turn(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    in_turn = images_of(pipeline, batch_size=5)
    assert torch.equal(in_turn, images_of(pipeline, class_labels=[0, 1, 2, 0, 1]))


def test_names_are_looked_up_and_unknown_ones_listed(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    assert pipeline.num_classes == 3, "the class that stands for none is not one to ask for"
    assert pipeline.labels == {"cat": 0, "dog": 1, "eel": 2}
    assert pipeline.get_label_ids("eel") == [2] and pipeline.get_label_ids(["dog", "cat"]) == [1, 0]
    with pytest.raises(ValueError, match="Unknown class name 'cow': expected one of cat, dog, eel"):
        pipeline.get_label_ids(["cat", "cow"])
    with pytest.raises(ValueError, match="Unknown class name 'cat': the classes of this model have no names"):
        images_of(make_pipeline(id2label=None), class_labels=["cat"])


def test_a_name_of_digits_goes_before_an_index(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(id2label={0: "2", 1: "0", 2: "1"})
    assert torch.equal(images_of(pipeline, class_labels=["2", "0"]), images_of(pipeline, class_labels=[0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 3}, "class_labels=3 to be an integer from 0 to 2"),
        ({"class_labels": [0, -1]}, "class_labels=-1 to be an integer from 0 to 2"),
        ({"class_labels": ["dog", "cow"]}, "Unknown class name 'cow': expected one of cat, dog, eel"),
        ({"class_labels": "cow"}, "Unknown class name 'cow': expected one of cat, dog, eel"),
        ({"class_labels": 1.5}, "class_labels=1.5 to be an integer, the name of a class, or a non-empty list"),
        ({"class_labels": np.float64(1.0)}, "to be an integer, the name of a class, or a non-empty list"),
        ({"class_labels": np.array([0.0, 1.0])}, "class_labels=0.0 to be an integer from 0 to 2"),
        ({"class_labels": np.array([True])}, "class_labels=True to be an integer from 0 to 2"),
        ({"class_labels": [np.True_]}, "to be an integer from 0 to 2"),
        ({"class_labels": [torch.tensor(True)]}, "to be an integer from 0 to 2"),
        ({"class_labels": range(2, 4)}, "class_labels=3 to be an integer from 0 to 2"),
        ({"class_labels": {0, 1}}, "to be an integer, the name of a class, or a non-empty list"),
        ({"class_labels": {"dog": 1}}, "to be an integer, the name of a class, or a non-empty list"),
        ({"class_labels": [1.0]}, "class_labels=1.0 to be an integer"),
        ({"class_labels": True}, "class_labels=True to be an integer"),
        ({"class_labels": [True]}, "class_labels=True to be an integer"),
        ({"class_labels": torch.tensor([0.0])}, "class_labels=0.0 to be an integer"),
        ({"class_labels": torch.tensor([[0, 1]])}, r"class_labels=\[0, 1\] to be an integer"),
        ({"class_labels": []}, r"class_labels=\[\] to be an integer, the name of a class, or a non-empty list"),
        (
            {"class_labels": range(0)},
            r"class_labels=range\(0, 0\) to be an integer, the name of a class",
        ),
        ({"batch_size": 0}, "batch_size=0 to be a positive integer"),
        ({"batch_size": -4}, "batch_size=-4 to be a positive integer"),
        ({"batch_size": 2.0}, "batch_size=2.0 to be a positive integer"),
        ({"batch_size": True}, "batch_size=True to be a positive integer"),
        ({"batch_size": np.float32(2)}, "batch_size=.*2.0.* to be a positive integer"),
        ({"batch_size": np.int64(0)}, "batch_size=.*0.* to be a positive integer"),
        ({"batch_size": np.array([1, 2])}, "to be a positive integer"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 to be a positive integer"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 to be a positive integer"),
        ({"num_inference_steps": True}, "num_inference_steps=True to be a positive integer"),
        ({"output_type": "latent"}, "output_type='latent' to be 'pil', 'np' or 'pt'"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"latents of shape \(1, 1, 8, 8\): they have shape \(2, 1, 8, 8\)"),
        ({"batch_size": 3, "generator": [seeded(), seeded()]}, "2 generators to be as many as the 3 images"),
        ({"batch_size": 2, "generator": [seeded()] * 3}, "3 generators to be as many as the 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["unet"]}, r"callback_on_step_end_tensor_inputs='unet' to be among"),
    ],
)
def test_bad_arguments_are_refused_with_the_valid_range(
    options: dict[str, Any], message: str, make_pipeline: MakePipeline
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        images_of(make_pipeline(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [1, 7, 33])
def test_odd_batches_are_served(batch_size: int, make_pipeline: MakePipeline) -> None:
    assert images_of(make_pipeline(), batch_size=batch_size, num_inference_steps=1).shape == (batch_size, 1, 8, 8)


def test_guidance_moves_away_from_no_class(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    plain = images_of(pipeline, class_labels=[1], guidance_scale=1.0)
    assert torch.equal(images_of(pipeline, class_labels=[1]), plain), "1 is none, and the default"
    guided = images_of(pipeline, class_labels=[1], guidance_scale=3.0)
    assert not torch.equal(guided, plain)
    none = torch.tensor([3])
    latents, sigma = torch.randn(1, 1, 8, 8, generator=seeded()), torch.tensor(0.7)
    with torch.no_grad():
        conditional = pipeline.denoise(latents, sigma, torch.tensor([1]), 1.0)
        unconditional = pipeline.denoise(latents, sigma, none, 1.0)
        expected = unconditional + 3 * (conditional - unconditional)
        torch.testing.assert_close(pipeline.denoise(latents, sigma, torch.tensor([1]), 3.0), expected)


def test_saved_sampling_defaults_are_used_and_can_be_overruled(make_pipeline: MakePipeline) -> None:
    saved = {"num_inference_steps": 2, "guidance_scale": 2.0, "s_churn": 5.0, "s_tmin": 0.0, "s_tmax": 80.0}
    steps: list[int] = []

    def count(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    defaults = images_of(make_pipeline(sampling=saved), callback_on_step_end=count)
    assert steps == [0, 1]
    plain = images_of(make_pipeline(sampling=None), num_inference_steps=2, guidance_scale=2.0, s_churn=5.0)
    assert torch.equal(defaults, plain)
    overruled = images_of(make_pipeline(sampling=saved), num_inference_steps=3, guidance_scale=1.0, s_churn=0.0)
    assert torch.equal(overruled, images_of(make_pipeline(sampling=None), num_inference_steps=3))
    images_of(make_pipeline(sampling=None), callback_on_step_end=count, num_inference_steps=None)
    assert len(steps) == 2 + 18


# --- what it gives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grey_and_colour_come_in_three_forms(num_channels: int, mode: str, make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(num_channels)
    pictures, arrays, tensors = (
        pipeline(class_labels=[0, 1], generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt")
    )
    assert [picture.mode for picture in pictures] == [mode] * 2 and pictures[0].size == (8, 8)
    assert isinstance(arrays, np.ndarray) and arrays.shape == (2, 8, 8, num_channels)
    assert isinstance(tensors, Tensor) and tensors.shape == (2, num_channels, 8, 8)
    assert tensors.min() >= 0 and tensors.max() <= 1 and tensors.std() > 0.01
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pictures[1]).reshape(8, 8, -1), (arrays[1] * 255).round().astype(np.uint8))


def test_a_tuple_is_returned_where_no_dict_is_wanted(make_pipeline: MakePipeline) -> None:
    returned = make_pipeline()(generator=seeded(), output_type="pt", return_dict=False)
    assert isinstance(returned, tuple) and len(returned) == 1
    assert torch.equal(returned[0], images_of(make_pipeline()))


def test_callback_sees_each_step_and_may_change_the_latents(make_pipeline: MakePipeline) -> None:
    pipeline, seen = make_pipeline(), []

    def whiten(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipeline and tensors["latents"].shape == (2, 1, 8, 8)
        seen.append((step, float(timestep)))
        return {"latents": torch.ones_like(tensors["latents"])} if step == 3 else {}

    images = images_of(pipeline, batch_size=2, callback_on_step_end=whiten)
    assert (images == 1).all()
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert sorted((time for _, time in seen), reverse=True) == [time for _, time in seen]
    nothing = images_of(
        pipeline,
        callback_on_step_end=lambda *args: {} if not args[-1] else pytest.fail("nothing was asked for"),
        callback_on_step_end_tensor_inputs=[],
    )
    assert torch.equal(nothing, images_of(pipeline))


def test_the_network_is_called_twice_a_step_but_for_the_last(make_pipeline: MakePipeline) -> None:
    pipeline, calls = make_pipeline(), []
    pipeline.unet.register_forward_hook(lambda *args: calls.append(1))
    images_of(pipeline, num_inference_steps=18)
    assert len(calls) == 35 <= 40


def test_progress_bar_can_be_silenced(make_pipeline: MakePipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = make_pipeline()
    images_of(pipeline)
    assert capfd.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False)
    images_of(pipeline)
    assert "4/4" in capfd.readouterr().err


# --- saved and loaded ----------------------------------------------------------------------------------------------


def test_saved_pipeline_loads_with_its_privacy_and_its_names(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    sampling = {"num_inference_steps": 3, "s_churn": 2.0, "s_tmax": 50.0}
    pipeline = make_pipeline(num_channels=3, privacy=PRIVACY, sampling=sampling)
    pipeline.save_pretrained(tmp_path)
    loaded = DPCurriculumPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is DPCurriculumPipeline
    assert loaded.privacy == PRIVACY and loaded.labels == pipeline.labels
    assert dict(loaded.config.sampling) == sampling
    assert loaded.scheduler.config.sigma_data == 0.5
    assert torch.equal(images_of(loaded, batch_size=2), images_of(pipeline, batch_size=2))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DPCurriculumPipeline", "a string: no trust is asked for"
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in saved} <= {".json", ".safetensors", ".md"}, "no pickle"


def test_a_pipeline_without_report_or_names_loads_too(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline(id2label=None, sampling=None).save_pretrained(tmp_path)
    loaded = DPCurriculumPipeline.from_pretrained(tmp_path)
    assert loaded.privacy is None and loaded.labels == {} and loaded.num_classes == 3


LOAD_ELSEWHERE = """
import sys
sys.modules["dp_curriculum"] = None  # an import of it fails
import torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder + "/pipeline.py", trust_remote_code=True)
images = pipeline(class_labels=[0, 1], generator=torch.Generator().manual_seed(0), output_type="np").images
assert type(pipeline).__name__ == "DPCurriculumPipeline" and pipeline.privacy["epsilon"] == 9.97
images.tofile(out)
"""


@pytest.mark.slow
def test_shipped_file_loads_where_the_package_is_not_installed(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(privacy=PRIVACY)
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    shutil.copyfile(pipeline_dp_curriculum.__file__, folder / "pipeline.py")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(folder), str(tmp_path / "images")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    images = np.fromfile(tmp_path / "images", dtype=np.float32).reshape(2, 8, 8, 1)
    expected = pipeline(class_labels=[0, 1], generator=seeded(), output_type="np").images
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_diffusers_own_loader_asks_for_trust(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    shutil.copyfile(pipeline_dp_curriculum.__file__, tmp_path / "pipeline.py")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path / "pipeline.py"))


# --- the sampler ---------------------------------------------------------------------------------------------------

MEANS, STD = (-0.3, 0.2, 0.0), 0.15  # of the pixels, by class; the last class is "none"


class GaussianUNet(UNet2DModel):
    """The network F whose denoiser is exact where pixels are N(MEANS[class], STD^2)."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **kwargs: Any) -> Any:
        assert class_labels is not None
        sigma, sigma_data = (4 * timestep.double()).exp().view(-1, 1, 1, 1), 0.5
        noisy = sample.double() * (sigma**2 + sigma_data**2).sqrt()
        mean = torch.tensor(MEANS, dtype=torch.float64)[class_labels].view(-1, 1, 1, 1)
        denoised = (STD**2 * noisy + sigma**2 * mean) / (STD**2 + sigma**2)
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return UNet2DOutput(sample=((denoised - c_skip * noisy) / c_out).to(sample.dtype))


def gaussian_pipeline(scheduler: Any = None) -> DPCurriculumPipeline:
    unet = GaussianUNet(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=3,
    )
    pipeline = DPCurriculumPipeline(unet, scheduler or EDMEulerScheduler(sigma_data=0.5))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moments(images: Tensor) -> tuple[float, float]:
    pixels = images.double() * 2 - 1
    return pixels.mean().item(), pixels.std().item()


def scale_of(pipeline: DPCurriculumPipeline, **options: Any) -> tuple[float, float]:
    """The sampler maps noise z to a + b z here: a should be the mean and b the standard deviation of the pixels."""
    noise = torch.cat([torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)])
    low, high = pipeline(class_labels=[1, 1], latents=noise, output_type="pt", **options).images * 2 - 1
    return low.mean().item(), (high - low).mean().item()


def heun_in_one_number(noise: float, *, mean: float, steps: int, order: int = 2) -> float:
    """EDM Algorithm 2 without churn, for one pixel and the exact denoiser, written from the paper."""
    rho, high, low = 7, 80.0, 0.002
    ramp = [high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho)) for i in range(steps)]
    t = [value**rho for value in ramp] + [0.0]
    x = noise * t[0]

    def slope(x: float, sigma: float) -> float:
        return (x - (STD**2 * x + sigma**2 * mean) / (STD**2 + sigma**2)) / sigma

    for now, then in zip(t, t[1:]):
        d = slope(x, now)
        euler = x + (then - now) * d
        x = euler if then == 0 or order == 1 else x + (then - now) * (d + slope(euler, then)) / 2
    return x


@pytest.mark.parametrize("steps", [10, 18, 31])
def test_heun_steps_are_those_of_algorithm_2(steps: int) -> None:
    """The same numbers as a scalar version of the algorithm, and not those of its first-order half."""
    mean, scale = scale_of(gaussian_pipeline(), num_inference_steps=steps)
    zero, one = (heun_in_one_number(noise, mean=MEANS[1], steps=steps) for noise in (0.0, 1.0))
    assert mean == pytest.approx(zero, abs=1e-3) and scale == pytest.approx(one - zero, abs=1e-3)
    assert abs(heun_in_one_number(1.0, mean=MEANS[1], steps=steps, order=1) - one) > 0.01


def test_heun_steps_converge_to_the_data_distribution_at_second_order() -> None:
    """Twice the steps, a quarter of the error; a first-order sampler, the broken twin, halves it."""
    counts = (36, 72, 144)
    pairs = [scale_of(gaussian_pipeline(), num_inference_steps=steps) for steps in counts]
    errors = [abs(scale / STD - 1) for _, scale in pairs]
    assert errors[0] < 0.03 and errors[2] < 0.002
    assert all(3 < coarse / fine < 6 for coarse, fine in zip(errors, errors[1:]))
    # Zero noise is a sample of N(0, sigma_max^2), which the mean has moved by this much.
    assert pairs[-1][0] == pytest.approx(MEANS[1] * (1 - STD / 80), abs=0.002 * STD)
    one, zero = ([heun_in_one_number(z, mean=0.2, steps=n, order=1) for n in counts] for z in (1.0, 0.0))
    first_order = [abs((a - b) / STD - 1) for a, b in zip(one, zero)]
    assert all(coarse / fine < 3 for coarse, fine in zip(first_order, first_order[1:]))


@pytest.mark.statistical
@pytest.mark.parametrize("s_churn", [0.0, 10.0, 40.0])
def test_samples_have_the_mean_and_the_scale_of_the_data(s_churn: float) -> None:
    """10,240 pixels: five standard errors and 1.5 % of discretisation; with churn, fresh noise replaces the old."""
    images = images_of(
        gaussian_pipeline(), class_labels=[0] * 40, num_inference_steps=128, s_churn=s_churn, generator=seeded(3)
    )
    mean, std = moments(images)
    assert abs(mean - MEANS[0]) < STD * (5 / math.sqrt(10_240) + 0.015)
    assert abs(std / STD - 1) < 5 / math.sqrt(2 * 10_240) + 0.015


def test_guidance_shifts_the_mean_as_its_formula_says() -> None:
    images = images_of(gaussian_pipeline(), class_labels=[1] * 40, num_inference_steps=72, guidance_scale=2.5)
    mean, std = moments(images)
    assert mean == pytest.approx(MEANS[2] + 2.5 * (MEANS[1] - MEANS[2]), abs=0.01)
    assert std == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_another_edm_scheduler_makes_its_own_steps(solver_order: int, make_pipeline: MakePipeline) -> None:
    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=0.5, solver_order=solver_order)
    mean, std = moments(
        images_of(gaussian_pipeline(scheduler), class_labels=[1] * 40, num_inference_steps=200, generator=seeded(1))
    )
    assert mean == pytest.approx(MEANS[1], abs=0.01) and std == pytest.approx(STD, rel=0.04)
    pipeline, calls = make_pipeline(), []
    pipeline.scheduler = scheduler
    pipeline.unet.register_forward_hook(lambda *args: calls.append(1))
    first = images_of(pipeline, class_labels=[0, 1], num_inference_steps=10, guidance_scale=2.0)
    assert len(calls) == 10
    assert torch.equal(first, images_of(pipeline, class_labels=[0, 1], num_inference_steps=10, guidance_scale=2.0))


# --- several threads -----------------------------------------------------------------------------------------------

SOLVERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: EDMEulerScheduler(sigma_data=0.5),
    "dpmsolver++": lambda: EDMDPMSolverMultistepScheduler(sigma_data=0.5),
    "sde-dpmsolver++": lambda: EDMDPMSolverMultistepScheduler(sigma_data=0.5, algorithm_type="sde-dpmsolver++"),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_threads", [2, 4])
def test_threads_that_share_a_pipeline_get_the_images_of_one(
    solver: str, num_threads: int, make_pipeline: MakePipeline
) -> None:
    """40 calls of other lengths: equal to the bit to those that were made one after the other."""
    pipeline = make_pipeline()
    pipeline.scheduler = SOLVERS[solver]()
    switch = sys.getswitchinterval()

    def call(index: int) -> Tensor:
        options = {"s_churn": 5.0} if solver == "euler" and index % 2 else {}
        return images_of(
            pipeline, class_labels=[index % 3], generator=seeded(index), num_inference_steps=2 + index % 5, **options
        )

    alone = [call(index) for index in range(40)]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            together = list(pool.map(call, range(40)))
    finally:
        sys.setswitchinterval(switch)
    assert all(torch.equal(one, other) for one, other in zip(together, alone))


def test_progress_bars_of_threads_count_their_own_steps(
    make_pipeline: MakePipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=False, mininterval=0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda steps: images_of(pipeline, num_inference_steps=steps), range(2, 10)))
    written = capfd.readouterr().err
    assert all(f"{steps}/{steps}" in written for steps in range(2, 10))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_call_leaves_the_scheduler_as_it_was(solver: str, make_pipeline: MakePipeline) -> None:
    pipeline, untouched = make_pipeline(), SOLVERS[solver]()
    pipeline.scheduler = SOLVERS[solver]()
    images_of(pipeline, num_inference_steps=3)
    with pytest.raises(RuntimeError, match="stop"):
        images_of(pipeline, callback_on_step_end=stop)
    assert pipeline.scheduler.num_inference_steps is None and pipeline.scheduler.step_index is None
    assert torch.equal(pipeline.scheduler.sigmas, untouched.sigmas)


def stop(*args: Any) -> dict[str, Any]:
    raise RuntimeError("stop")


# --- other schedulers ----------------------------------------------------------------------------------------------

OTHERS = [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
REFUSED = "to be one of EDMEulerScheduler, EDMDPMSolverMultistepScheduler: the network was trained under EDM"


@pytest.mark.parametrize("kind", OTHERS)
def test_another_scheduler_is_refused_by_name_wherever_it_comes_in(
    kind: Any, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    pipeline, message = make_pipeline(), rf"scheduler={kind.__name__} {REFUSED}"
    with pytest.raises(ValueError, match=message):
        pipeline.scheduler = kind()
    assert isinstance(pipeline.scheduler, EDMEulerScheduler), "the one that works is still there"
    with pytest.raises(ValueError, match=message):
        DPCurriculumPipeline(pipeline.unet, kind())
    with pytest.raises(ValueError, match=message):
        pipeline.register_modules(scheduler=kind())
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DPCurriculumPipeline.from_pretrained(tmp_path, scheduler=kind())
    vars(pipeline)["scheduler"] = kind()  # past every check but that of the call
    with pytest.raises(ValueError, match=message):
        images_of(pipeline)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind.__name__]}))
    kind().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=message):
        DPCurriculumPipeline.from_pretrained(tmp_path)


def test_nothing_and_another_prediction_are_refused_as_schedulers(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=f"scheduler=NoneType {REFUSED}"):
        pipeline.scheduler = None
    with pytest.raises(ValueError, match="prediction_type=v_prediction of EDMEulerScheduler to be epsilon"):
        pipeline.scheduler = EDMEulerScheduler(prediction_type="v_prediction")


def test_a_swapped_scheduler_keeps_the_configuration_and_is_saved(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    loaded = DPCurriculumPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, EDMDPMSolverMultistepScheduler) and loaded.scheduler.config.sigma_data == 0.5
    torch.testing.assert_close(images_of(loaded), images_of(pipeline), atol=1e-5, rtol=0)
    given = DPCurriculumPipeline.from_pretrained(tmp_path, scheduler=EDMEulerScheduler(sigma_data=0.5))
    given.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images_of(given), images_of(make_pipeline()), atol=1e-5, rtol=0)
