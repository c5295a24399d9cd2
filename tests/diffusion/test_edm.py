"""EDM's preconditioning and loss: the formulas of the paper, written out again, and those of diffusers' scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import build_unet, drop_labels, edm_denoise, edm_loss, noise_levels
from dp_curriculum.pipeline_dp_curriculum import unet_output


SIGMA_DATA = [0.5, math.sqrt(1 / 3)]


class Recorder(nn.Module):
    """A network F that keeps what it was given and answers with a function of it."""

    def __init__(self, scale: float = 0.3, shift: float = 0.1) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.given: dict[str, Any] = {}
        self.config = SimpleNamespace(in_channels=2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        self.given = {"sample": sample, "timestep": timestep, "class_labels": class_labels}
        return SimpleNamespace(sample=self.scale * sample.square() + self.shift * timestep.view(-1, 1, 1, 1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(count: int) -> Tensor:
    return torch.logspace(-2.5, 1.9, count)


def build(config: CurriculumConfig, num_classes: int = 3) -> Any:
    data = config.data
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return build_unet(
            config.model, resolution=data.resolution, num_channels=data.channels, num_classes=num_classes
        ).eval()


@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_denoiser_is_equation_7_with_the_scalings_of_table_1(sigma_data: float) -> None:
    noisy, sigma, labels, unet = normal(6, 2, 4, 4), levels(6), torch.arange(6), Recorder()
    denoised = edm_denoise(unet, noisy, sigma, labels, sigma_data=sigma_data)  # type: ignore[arg-type]
    assert torch.equal(unet.given["class_labels"], labels)
    for i, s in enumerate(sigma.tolist()):
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / math.sqrt(sigma_data**2 + s**2)
        c_in, c_noise = 1 / math.sqrt(s**2 + sigma_data**2), math.log(s) / 4
        assert unet.given["timestep"][i].item() == pytest.approx(c_noise, abs=1e-6)
        torch.testing.assert_close(unet.given["sample"][i], c_in * noisy[i], atol=1e-6, rtol=1e-5)
        output = 0.3 * (c_in * noisy[i]).square() + 0.1 * c_noise
        torch.testing.assert_close(denoised[i], c_skip * noisy[i] + c_out * output, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_denoiser_is_that_of_the_scheduler_that_samples(sigma_data: float) -> None:
    """What is trained is what `EDMEulerScheduler` undoes, to 1e-6."""
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    noisy, sigma, unet = normal(6, 1, 4, 4), levels(6), Recorder()
    column = sigma.view(-1, 1, 1, 1)
    output = unet(scheduler.precondition_inputs(noisy, column), scheduler.precondition_noise(sigma)).sample
    expected = scheduler.precondition_outputs(noisy, output, column)
    denoised = edm_denoise(unet, noisy, sigma, sigma_data=sigma_data)  # type: ignore[arg-type]
    torch.testing.assert_close(denoised, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_loss_is_equation_8_with_the_weight_of_table_1(sigma_data: float) -> None:
    images, noise, sigma = normal(5, 2, 4, 4), normal(5, 2, 4, 4, seed=1), levels(5)
    loss = edm_loss(Recorder(), images, noise, sigma, sigma_data=sigma_data)  # type: ignore[arg-type]
    assert loss.shape == (5,)
    for i, s in enumerate(sigma.tolist()):
        noisy = images[i : i + 1] + s * noise[i : i + 1]
        denoised = edm_denoise(Recorder(), noisy, sigma[i : i + 1], sigma_data=sigma_data)  # type: ignore[arg-type]
        weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
        expected = weight * (denoised - images[i : i + 1]).square().mean()
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_network_that_always_answers_zero_has_a_loss_near_one_at_every_level() -> None:
    """Why the paper weights as it does: Eq. 8 in units of F, whose target has unit variance."""
    images = 0.5 * normal(2000, 1, 4, 4)
    for sigma in (0.02, 0.5, 20.0):
        silent = Recorder(scale=0.0, shift=0.0)
        loss = edm_loss(silent, images, normal(2000, 1, 4, 4, seed=1), torch.full((2000,), sigma), sigma_data=0.5)  # type: ignore[arg-type]
        assert loss.mean().item() == pytest.approx(1.0, abs=0.03)


def test_each_loss_is_of_its_own_image_alone(make_config: Callable[..., CurriculumConfig]) -> None:
    """A real network: the other rows may be anything, NaN included, and gradients do not cross over."""
    unet = build(make_config(block_out_channels=[8, 8], attention_resolutions=[8], num_channels=3))
    images, noise, sigma = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), levels(4)
    labels = torch.tensor([0, 1, 3, 2])
    images.requires_grad_()
    loss = edm_loss(unet, images, noise, sigma, labels, sigma_data=0.5)
    (gradient,) = torch.autograd.grad(loss[2], images)
    assert (gradient[[0, 1, 3]] == 0).all() and (gradient[2] != 0).any()
    alone = edm_loss(unet, images[2:3], noise[2:3], sigma[2:3], labels[2:3], sigma_data=0.5)
    torch.testing.assert_close(alone, loss[2:3], atol=1e-6, rtol=1e-5)
    others = images.detach().clone()
    others[0], others[1] = torch.nan, 1e6
    spoiled = edm_loss(unet, others, noise, sigma, labels, sigma_data=0.5)
    torch.testing.assert_close(spoiled[2:], loss[2:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_never_lowered(dtype: torch.dtype, make_config: Callable[..., CurriculumConfig]) -> None:
    unet = build(make_config()).to(dtype)
    images = normal(2, 1, 8, 8).to(dtype)
    options: dict[str, Any] = {"sigma_data": 0.5}
    exact = edm_loss(unet, images, images, levels(2).to(dtype), torch.tensor([0, 1]), **options)
    assert exact.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        rough = edm_loss(unet, images, images, levels(2).to(dtype), torch.tensor([0, 1]), **options)
    assert rough.dtype == dtype, "the loss is computed in full precision also where the network is not"
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.01)


def test_noise_levels_are_log_normal() -> None:
    sigma = noise_levels(torch.tensor([[0.0, 1.0, -2.0]]), p_mean=-1.2, p_std=1.2)
    assert sigma.shape == (1, 3)
    torch.testing.assert_close(sigma.log(), torch.tensor([[-1.2, 0.0, -3.6]]))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_labels_are_dropped_at_the_rate(rate: float) -> None:
    """100,000 labels: the share is within five standard errors, and a label is dropped or kept, never changed."""
    labels = torch.arange(100_000) % 10
    dropped = drop_labels(labels, normal(100_000), null_label=10, rate=rate)
    share = (dropped == 10).double().mean().item()
    assert abs(share - rate) <= 5 * math.sqrt(rate * (1 - rate) / 100_000)
    kept = dropped != 10
    assert torch.equal(dropped[kept], labels[kept]) and dropped.dtype == torch.int64


def test_the_network_is_a_stock_one_with_a_class_for_none(make_config: Callable[..., CurriculumConfig]) -> None:
    config = make_config(block_out_channels=[8, 16], attention_resolutions=[4], num_channels=3)
    unet = build(config, num_classes=5)
    assert type(unet).__module__.startswith("diffusers.")
    assert unet.config.num_class_embeds == 6 and unet.config.time_embedding_type == "positional"
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.out_channels) == (8, 3, 3)
    assert tuple(unet.config.down_block_types) == ("DownBlock2D", "AttnDownBlock2D")
    assert tuple(unet.config.up_block_types) == ("AttnUpBlock2D", "UpBlock2D")
    output = unet(normal(2, 3, 8, 8), torch.tensor([-1.5, 1.0]), class_labels=torch.tensor([0, 5])).sample
    assert output.shape == (2, 3, 8, 8) and output.isfinite().all()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in unet.modules())
    assert not any(isinstance(module, nn.Dropout) and module.p > 0 for module in unet.modules())


@pytest.mark.parametrize("patch_size", [2, 4])
def test_a_patch_of_pixels_is_one_place_of_the_network(
    patch_size: int, make_config: Callable[..., CurriculumConfig]
) -> None:
    """The network sees each pixel once, in a channel of its own, and what it answers comes back to its place."""
    unet = build(make_config(block_out_channels=[8, 8], num_channels=3, patch_size=patch_size, resolution=16))
    side, channels = 16 // patch_size, 3 * patch_size**2
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.out_channels) == (side, channels, channels)
    images, labels = normal(2, 3, 16, 16), torch.tensor([0, 2])
    cut = torch.stack(
        [
            images[:, channel, row::patch_size, column::patch_size]
            for channel in range(3)
            for row in range(patch_size)
            for column in range(patch_size)
        ],
        dim=1,
    )
    answer = unet(cut, torch.ones(2), class_labels=labels).sample
    output = unet_output(unet, images, torch.ones(2), labels)
    for place in range(channels):
        channel, row, column = place // patch_size**2, place // patch_size % patch_size, place % patch_size
        found = output[:, channel, row::patch_size, column::patch_size]
        torch.testing.assert_close(found, answer[:, place], atol=0, rtol=0)


def test_a_wrapper_of_opacus_is_served(make_config: Callable[..., CurriculumConfig]) -> None:
    unet = build(make_config())
    rows = normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=1), levels(2), torch.tensor([0, 1])
    torch.testing.assert_close(edm_loss(GradSampleModule(unet), *rows), edm_loss(unet, *rows))  # type: ignore[arg-type]


def test_an_attention_resolution_that_the_model_has_not_is_refused(
    make_config: Callable[..., CurriculumConfig],
) -> None:
    with pytest.raises(ValueError, match=r"--attention_resolutions=16 to be a feature side of the model: \[8, 4\]"):
        build(make_config(block_out_channels=[8, 8], attention_resolutions=[4, 16]))
