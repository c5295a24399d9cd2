"""The closed form of released moments: beside integrals, beside the formula of a Gaussian, and in a pipeline."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from dp_curriculum import closed_form_prior, pipeline_dp_curriculum
from dp_curriculum.closed_form_prior import (
    MAX_VALUES,
    ClosedFormPrior,
    Components,
    Latent,
    _bands,
    _clamped_moments,
    _free_latent,
    _Posterior,
    _texture_covariance,
    _unclamped,
    _WienerFilter,
    clamped_posterior,
    draw_latent,
    fineness,
    fit_latent,
    frequencies,
    lowest,
    texture_power,
    to_frequencies,
    to_pixels,
)
from dp_curriculum.config import MAX_CLAMPED_VALUES, MAX_PRIOR_VALUES, ModelConfig
from dp_curriculum.diffusion.edm import build_unet, edm_loss
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, unet_output


SIDE, CLASSES, RANK = 8, 2, 3
SIZES = ("num_classes", "num_channels", "sample_size", "rank", "num_bands")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments(mean: float = 0.4, spread: float = 0.05, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    values = channels * SIDE**2
    means = (mean + 0.2 * normal(CLASSES, channels, SIDE, SIDE)).clamp(0, 1)
    factors = spread * normal(CLASSES, values, RANK, seed=1)
    return means, factors, factors.square().sum((1, 2)) * 1.5


def small_prior(**options: Any) -> ClosedFormPrior:
    return ClosedFormPrior.from_moments(*moments(**options))


def components() -> Components:
    """Two parts of each class, the first of which is drawn three times as often."""
    offsets, roots = torch.zeros(CLASSES, 2, RANK), 0.1 * torch.eye(RANK).repeat(CLASSES, 2, 1, 1)
    offsets[:, 0, 0], offsets[:, 1, 0] = -1.0, 3.0
    return Components(torch.tensor([[0.75, 0.25]]).repeat(CLASSES, 1), offsets, roots)


def small_unet(channels: int = 1, has_prior: bool = True, patch_size: int = 1, side: int = SIDE) -> Any:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = ModelConfig(block_out_channels=[8], patch_size=patch_size)
        return build_unet(
            config, resolution=side, num_channels=channels, num_classes=CLASSES, has_prior=has_prior
        ).eval()


@pytest.mark.parametrize("noisy", [-0.3, 0.0, 0.4, 1.2])
@pytest.mark.parametrize("mean", [-0.4, 0.1, 0.9])
@pytest.mark.parametrize(("deviation", "level"), [(0.3, 0.1), (0.05, 0.5), (1.0, 0.02)])
def test_the_posterior_of_a_clamped_value_is_its_integral(
    noisy: float, mean: float, deviation: float, level: float
) -> None:
    z = torch.linspace(mean - 9 * deviation, mean + 9 * deviation, 400_001, dtype=torch.float64)
    x = z.clamp(0, 1)
    logs = -((z - mean) ** 2) / (2 * deviation**2) - (noisy - x) ** 2 / (2 * level**2)
    weights = logs.softmax(0)
    expected = (weights * x).sum()
    variance = (weights * (x - expected) ** 2).sum()
    arguments = (noisy, level**2, mean, deviation**2)
    found, found_variance = clamped_posterior(*(torch.tensor([value], dtype=torch.float64) for value in arguments))
    assert found.item() == pytest.approx(expected.item(), abs=2e-4)
    assert found_variance.item() == pytest.approx(variance.item(), abs=2e-4)


def test_the_moments_of_a_clamped_gaussian_are_those_of_draws_and_can_be_undone() -> None:
    mean, deviation = torch.tensor([-0.2, 0.3, 0.8]).double(), torch.tensor([0.4, 0.2, 0.5]).double()
    draws = (mean + deviation * normal(400_000, 3, dtype=torch.float64)).clamp(0, 1)
    first, variance, inside = _clamped_moments(mean, deviation)
    assert torch.allclose(first, draws.mean(0), atol=3e-3) and torch.allclose(variance, draws.var(0), atol=3e-3)
    assert torch.allclose(inside, ((draws > 0) & (draws < 1)).double().mean(0), atol=3e-3)
    centre, stretch = _unclamped(first, variance)
    again, again_variance, _ = _clamped_moments(centre, stretch * variance.sqrt())
    assert torch.allclose(again, first, atol=1e-3) and torch.allclose(again_variance, variance, rtol=0.02)


def test_its_images_have_the_released_means_and_variances() -> None:
    means, factors, variances = moments(mean=0.5, spread=0.04)
    prior = ClosedFormPrior.from_moments(means, factors, variances)
    labels = torch.zeros(20_000, dtype=torch.long)
    drawn = prior.draw(labels, normal(20_000, RANK), normal(20_000, 1, SIDE, SIDE, seed=5)).flatten(1)
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert torch.allclose(drawn.mean(0), means[0].flatten(), atol=0.01)
    assert drawn.var(0).sum().item() == pytest.approx(variances[0].item(), rel=0.1)


def test_far_from_black_and_white_it_is_the_denoiser_of_a_gaussian() -> None:
    """mu + S (S + sigma^2)^-1 (y - mu), with nothing clamped: the exact best denoiser."""
    means = torch.full((1, 1, SIDE, SIDE), 0.5) + 0.02 * normal(1, 1, SIDE, SIDE)
    factors = 0.01 * normal(1, SIDE**2, RANK)
    variances = factors.square().sum((1, 2)) * 1.2
    latent = fit_latent(means, factors, variances)
    texture = _texture_covariance((1, SIDE, SIDE))
    scale = latent.texture[0]
    covariance = latent.factors[0] @ latent.factors[0].T + scale[:, None] * texture * scale
    noisy, level = 0.5 + 0.1 * normal(5, SIDE**2, dtype=torch.float64), 0.1
    gain = covariance @ torch.linalg.inv(covariance + level**2 * torch.eye(SIDE**2).double())
    expected = latent.mean[0] + (noisy - latent.mean[0]) @ gain.T
    posterior = _Posterior.of(latent, 0, means.shape[1:], torch.device("cpu"))
    found, variance = posterior.denoise(noisy.float(), torch.full((5, 1), level))
    assert torch.allclose(found, expected.float(), atol=2e-3)
    assert torch.allclose(variance, (level**2 * gain.diagonal()).float().expand(5, -1), rtol=0.1, atol=2e-5)


def test_no_other_denoiser_of_its_images_is_better_than_it_by_much_and_its_error_is_what_it_says() -> None:
    prior = small_prior(spread=0.15)
    labels = torch.arange(600) % CLASSES
    clean = 2 * prior.draw(labels, normal(600, RANK), normal(600, 1, SIDE, SIDE, seed=2)) - 1
    for level in (0.2, 0.7, 2.0):
        sigma = torch.full((600,), level)
        noisy = clean + level * normal(600, 1, SIDE, SIDE, seed=3)
        mean, spread = prior(noisy, sigma, labels)
        error = (mean - clean).square().mean().item()
        assert error == pytest.approx(prior.error(sigma[:1]).item(), rel=0.25)
        # The variance that it states is the squared error that it makes.
        assert (spread.square().mean().item()) == pytest.approx(1.02 * error, rel=0.25)
        # A denoiser that knows the moments alone, and nothing of clamping, does worse.
        linear = _linear_denoiser(prior, noisy, level, labels)
        assert error < (linear - clean).square().mean().item()


def _linear_denoiser(prior: ClosedFormPrior, noisy: Tensor, level: float, labels: Tensor) -> Tensor:
    out = torch.empty_like(noisy)
    for label in range(CLASSES):
        drawn = prior.draw(torch.full((4000,), label), normal(4000, RANK, seed=8), normal(4000, 1, SIDE, SIDE, seed=9))
        flat = 2 * drawn.flatten(1) - 1
        covariance = torch.cov(flat.T)
        gain = covariance @ torch.linalg.inv(covariance + level**2 * torch.eye(SIDE**2))
        rows = labels == label
        out[rows] = (flat.mean(0) + (noisy[rows].flatten(1) - flat.mean(0)) @ gain.T).view_as(out[rows])
    return out


@functools.lru_cache
def smooth_prior(rank: int = 20, side: int = 16, contrasts: tuple[float, float] = (1.0, 1.3)) -> ClosedFormPrior:
    """Two classes whose images are as smooth as photos, with a few pixels at black and at white."""
    places = frequencies(side).flatten().argsort()[:rank]
    basis = torch.zeros(rank, 1, side, side, dtype=torch.float64)
    basis.view(rank, -1)[torch.arange(rank), places] = 1.6 / (1 + frequencies(side).flatten()[places])
    factors = to_pixels(basis).flatten(1).T.float() * torch.tensor(contrasts)[:, None, None]
    means = torch.tensor([0.3, 0.6]).view(2, 1, 1, 1).expand(2, 1, side, side)
    return ClosedFormPrior.from_moments(means, factors, factors.square().sum((1, 2)) * 1.1)


def without_corrections(prior: ClosedFormPrior) -> ClosedFormPrior:
    before = ClosedFormPrior(**{name: prior.config[name] for name in SIZES[:4]})
    before.load_state_dict({name: value for name, value in prior.state_dict().items() if name != "corrections"})
    return before.eval()


def drawn_from(prior: ClosedFormPrior, count: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] of a prior that has not measured itself on them, and their classes."""
    labels, shape = torch.arange(count) % CLASSES, (count, *prior.means.shape[1:])
    return 2 * prior.draw(labels, normal(count, prior.config.rank, seed=11), normal(*shape, seed=12)) - 1, labels


def powers(images: Tensor, labels: Tensor) -> Tensor:
    """Variance of images within their classes, in each band of frequencies."""
    own = torch.cat([images[labels == label] - images[labels == label].mean(0) for label in range(CLASSES)])
    bands = _bands(images.shape[-1])
    squares = to_frequencies(own.double()).square().mean((0, 1))
    return torch.stack([squares[bands == band].sum() for band in range(int(bands.max()) + 1)])


def shared_with_the_noisy_image(prior: ClosedFormPrior, level: float) -> Tensor:
    """What errors share with noisy images over the power of clean ones, `(classes, bands)`."""
    clean, labels = drawn_from(prior, 1500)
    noisy, sigma = clean + level * normal(*clean.shape, seed=13), torch.full((1500,), level)
    bands, means = _bands(clean.shape[-1]), (2 * prior.means - 1)[labels]
    products = to_frequencies(clean - prior(noisy, sigma, labels)[0]) * to_frequencies(noisy - means)
    squares = to_frequencies(clean - means).square()
    sums = [
        [values[labels == label][..., bands == band].sum() for values in (products, squares)]
        for label in range(CLASSES)
        for band in range(8)
    ]
    return torch.stack([product / square for product, square in sums]).view(CLASSES, 8)


@pytest.mark.parametrize("level", [1.0, 0.3, 0.1, 0.03])
def test_what_it_leaves_has_nothing_in_common_with_the_noisy_image_at_any_frequency(level: float) -> None:
    """So it is of the best denoiser of any images. The twin is the same prior without its corrections."""
    prior = smooth_prior()
    assert shared_with_the_noisy_image(prior, level).abs().max() < 0.5 * level**0.5
    assert shared_with_the_noisy_image(without_corrections(prior), level).abs().max() > 0.5


def test_each_class_has_corrections_of_its_own() -> None:
    """The twin has the same ones for both: too much for the class that needs none."""
    prior = smooth_prior(contrasts=(0.4, 1.3))
    twin = ClosedFormPrior(**{name: prior.config[name] for name in SIZES})
    corrections = prior.corrections.mean(0, keepdim=True).expand_as(prior.corrections)
    twin.load_state_dict({**prior.state_dict(), "corrections": corrections})
    assert shared_with_the_noisy_image(prior, 0.1).abs().max() < 0.15
    assert shared_with_the_noisy_image(twin, 0.1).abs().max() > 0.3


def test_corrections_make_a_smaller_error() -> None:
    prior = smooth_prior()
    clean, labels = drawn_from(prior, 1500)
    for level, gain in ((0.3, 0.99), (0.1, 0.95), (0.03, 0.95)):
        noisy, sigma = clean + level * normal(*clean.shape, seed=13), torch.full((1500,), level)
        error, before = (
            (found(noisy, sigma, labels)[0] - clean).square().mean() for found in (prior, without_corrections(prior))
        )
        assert error < gain * before
        assert error == pytest.approx(prior.error(sigma[:1]).item(), rel=0.1)


def test_sampling_with_a_silent_network_keeps_the_power_of_each_frequency() -> None:
    """The twin, without corrections, adds half as much again and more to the fine ones, which is grain."""
    prior, unet = smooth_prior(), small_unet(side=16)
    with torch.no_grad():
        unet.conv_out.weight.zero_()
    drawn = powers(*drawn_from(prior, 300))

    def sampled(found: ClosedFormPrior) -> Tensor:
        pipeline = DPCurriculumPipeline(unet, EDMEulerScheduler(sigma_max=1.0, sigma_min=0.002), prior=found)
        pipeline.set_progress_bar_config(disable=True)
        labels = torch.arange(300) % CLASSES
        images = pipeline(
            class_labels=labels, num_inference_steps=12, output_type="pt", generator=torch.Generator().manual_seed(3)
        ).images
        return powers(2 * images - 1, labels) / drawn

    assert torch.allclose(sampled(prior), torch.ones(8, dtype=torch.float64), atol=0.2)  # of few steps
    assert sampled(without_corrections(prior))[3:].min() > 1.4


@pytest.mark.parametrize("channels", [1, 3])
def test_components_are_drawn_by_their_shares_and_with_their_moments(channels: int) -> None:
    means, factors, variances = moments(mean=0.5, spread=0.03, channels=channels)
    means = 0.5 + 0.3 * (means - 0.5)  # far from black and white
    prior = ClosedFormPrior.from_moments(means, factors, variances, components())
    count = 8000
    labels, texture = torch.ones(count, dtype=torch.long), normal(count, channels, SIDE, SIDE, seed=3)
    drawn = prior.draw(labels, normal(count, RANK, seed=2), texture)
    coordinates = (torch.linalg.pinv(factors[1]) @ (drawn - means[1]).flatten(1).T).T
    is_second = coordinates[:, 0] > 1
    assert is_second.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert coordinates[is_second].mean(0).tolist() == pytest.approx([3, 0, 0], abs=0.1)
    assert coordinates[~is_second].mean(0).tolist() == pytest.approx([-1, 0, 0], abs=0.1)
    one = ClosedFormPrior.from_moments(means, factors, variances)
    noisy, sigma = normal(4, channels, SIDE, SIDE), torch.full((4,), 0.3)
    pixels, level = (noisy.flatten(1) + 1) / 2, sigma[:, None] / 2
    with_parts, without = (each._posterior(1).denoise(pixels, level)[0] for each in (prior, one))
    assert torch.equal(with_parts, without), "its denoiser is that of one Gaussian, but for the corrections"
    for label in (-1, CLASSES):
        with pytest.raises(ValueError, match=f"from 0 to {CLASSES - 1}"):
            prior.draw(torch.tensor([label]), normal(1, RANK), texture[:1])


def test_a_prior_of_before_there_were_corrections_loads_and_has_none(tmp_path: Path) -> None:
    before = without_corrections(smooth_prior())
    before.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_bands"], config["num_components"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ClosedFormPrior.from_pretrained(tmp_path)
    noisy, sigma = normal(4, 1, 16, 16), torch.tensor([0.1, 0.3, 1.0, 2.0])
    for found, expected in zip(loaded(noisy, sigma, torch.arange(4) % 3), before(noisy, sigma, torch.arange(4) % 3)):
        assert torch.equal(found, expected)


def test_photos_and_latents_are_not_corrected() -> None:
    """Their filter is the posterior itself."""
    for shape in ((1, 3, 20, 20), (1, 4, 8, 8)):
        factors = 0.1 * normal(1, 12, 12)
        prior = ClosedFormPrior.from_moments(torch.full(shape, 0.5), factors, factors.square().sum((1, 2)) * 1.5)
        assert prior.config.num_bands == 0


def test_without_a_class_it_weighs_the_classes() -> None:
    prior = small_prior(spread=0.15)
    clean = 2 * prior.draw(torch.zeros(64).long(), normal(64, RANK), normal(64, 1, SIDE, SIDE, seed=2)) - 1
    noisy, sigma = clean + 0.3 * normal(64, 1, SIDE, SIDE, seed=3), torch.full((64,), 0.3)
    unknown, _ = prior(noisy, sigma, torch.full((64,), CLASSES))
    known, _ = prior(noisy, sigma, torch.zeros(64).long())
    wrong, _ = prior(noisy, sigma, torch.ones(64).long())
    assert (unknown - known).abs().mean() < 0.2 * (wrong - known).abs().mean()


def test_rows_are_denoised_each_for_itself() -> None:
    prior = small_prior()
    noisy, sigma, labels = normal(6, 1, SIDE, SIDE), torch.linspace(0.1, 2, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    together, spread = prior(noisy, sigma, labels)
    for row in range(6):
        part = slice(row, row + 1)
        alone, alone_spread = prior(noisy[part], sigma[part], labels[part])
        assert torch.allclose(alone, together[part], atol=1e-5)
        assert torch.allclose(alone_spread, spread[part], rtol=1e-3)


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 3.0)])
def test_moments_of_noise_alone_make_a_prior_like_any_other(values: tuple[float, float]) -> None:
    """Nothing stood out of the noise: no direction, and a variance of nothing or of everything."""
    factor, variance = values
    prior = ClosedFormPrior.from_moments(
        torch.full((1, 1, SIDE, SIDE), 0.5), torch.full((1, SIDE**2, 1), factor), torch.tensor([variance])
    )
    mean, spread = prior(normal(3, 1, SIDE, SIDE), torch.tensor([0.01, 1.0, 50.0]), torch.zeros(3).long())
    assert mean.isfinite().all() and spread.isfinite().all() and (spread > 0).all()
    assert prior.draw(torch.zeros(2).long(), normal(2, 1), normal(2, 1, SIDE, SIDE)).isfinite().all()


def test_the_loss_of_a_silent_network_is_near_one() -> None:
    prior, unet = small_prior(spread=0.15), small_unet()
    with torch.no_grad():
        unet.conv_out.weight.zero_()
    labels = torch.arange(400) % CLASSES
    clean = 2 * prior.draw(labels, normal(400, RANK), normal(400, 1, SIDE, SIDE, seed=2)) - 1
    for level in (0.1, 0.5, 2.0):
        loss = edm_loss(
            unet, clean, normal(400, 1, SIDE, SIDE, seed=4), torch.full((400,), level), labels, prior=prior
        )
        assert loss.mean().item() == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize(
    ("channels", "patch_size", "in_parts"), [(1, 1, False), (1, 1, True), (3, 1, False), (3, 2, True)]
)
def test_it_loads_in_all_ways_and_makes_the_same_images(
    channels: int, patch_size: int, in_parts: bool, tmp_path: Path
) -> None:
    pipeline = DPCurriculumPipeline(
        small_unet(channels, patch_size=patch_size),
        EDMEulerScheduler(sigma_max=1.0),
        prior=ClosedFormPrior.from_moments(*moments(channels=channels), components() if in_parts else None),
        patch_size=patch_size,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_bytes(Path(pipeline_dp_curriculum.__file__).read_bytes())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["prior"] == ["dp_curriculum", "ClosedFormPrior"]

    def images(one: Any) -> Tensor:
        one.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "pt", "return_dict": False}
        result: Tensor = one(class_labels=[0, 1], generator=torch.Generator().manual_seed(0), **options)[0]
        return result

    loaded = DPCurriculumPipeline.from_pretrained(tmp_path)
    by_diffusers = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path / "pipeline.py"), trust_remote_code=True
    )
    assert type(loaded.prior) is ClosedFormPrior and type(by_diffusers.prior) is not ClosedFormPrior
    assert torch.equal(images(loaded), images(pipeline)) and torch.equal(images(by_diffusers), images(pipeline))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(images(DPCurriculumPipeline.from_pretrained(tmp_path / "again")), images(pipeline))


def test_both_schedulers_take_its_denoiser() -> None:
    pipeline = DPCurriculumPipeline(small_unet(), EDMEulerScheduler(sigma_max=1.0), prior=small_prior())
    latents, labels, sigma = normal(4, 1, SIDE, SIDE), torch.arange(4) % CLASSES, torch.tensor(0.7)
    network = functools.partial(unet_output, pipeline.unet)
    expected = pipeline.prior.denoise(network, latents, sigma.expand(4), labels).clamp(-1, 1)
    found = pipeline.denoise(latents, sigma, labels, 1.0)
    assert torch.allclose(found, expected, atol=1e-5)
    pipeline.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    (images,) = pipeline(class_labels=0, num_inference_steps=3, output_type="pt", return_dict=False)
    assert images.isfinite().all()


def test_a_network_without_its_prior_is_refused_by_name(tmp_path: Path) -> None:
    alone = DPCurriculumPipeline(small_unet(), EDMEulerScheduler())
    with pytest.raises(ValueError, match="in_channels=2 of the network to be 1 without a prior"):
        alone(class_labels=0)
    with pytest.raises(ValueError, match="in_channels=1 of the network to be 2 with a prior"):
        DPCurriculumPipeline(small_unet(has_prior=False), EDMEulerScheduler(), prior=small_prior())
    other = ClosedFormPrior(CLASSES + 1, 1, SIDE, 1)
    with pytest.raises(ValueError, match="sides and classes of the network, .1, 8, 8, 2.: it has .1, 8, 8, 3."):
        DPCurriculumPipeline(small_unet(), EDMEulerScheduler(), prior=other)


def test_no_code_of_a_folder_is_run(tmp_path: Path) -> None:
    pipeline = DPCurriculumPipeline(small_unet(), EDMEulerScheduler(sigma_max=1.0), prior=small_prior())
    pipeline.save_pretrained(tmp_path)
    marker = tmp_path / "was-run"
    (tmp_path / "prior" / "dp_curriculum.py").write_text(f"open({str(marker)!r}, 'w')")
    DPCurriculumPipeline.from_pretrained(tmp_path)
    assert not marker.exists()
    (tmp_path / "unet" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass UNet2DModel: pass")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["evil", "UNet2DModel"]}))
    with pytest.raises(ValueError, match=r"its unet would run the code in unet/evil\.py"):
        DPCurriculumPipeline.from_pretrained(tmp_path)
    assert not marker.exists()


def test_the_configuration_knows_the_largest_images() -> None:
    assert MAX_PRIOR_VALUES == MAX_VALUES
    assert MAX_CLAMPED_VALUES == closed_form_prior.MAX_CLAMPED_VALUES


@pytest.mark.parametrize(("channels", "side"), [(3, 65), (1, 111), (4, 56), (16, 28)])
def test_images_that_it_is_not_for_are_refused(channels: int, side: int) -> None:
    with pytest.raises(ValueError, match="to be at most 12288"):
        ClosedFormPrior(1, channels, side, 1)


def photo_latent(channels: int, side: int = 6, rank: int = 9) -> Latent:
    """Of two classes, in the middle of [0, 1], whose lowest coefficients are correlated."""
    generator = torch.Generator().manual_seed(channels)
    values = channels * side**2
    factors = 0.05 * torch.randn(CLASSES, rank, rank, generator=generator).double()
    means = 0.5 + 0.02 * torch.randn(CLASSES, values, generator=generator).double()
    return Latent(means, factors, 0.03 * torch.rand(means.shape, generator=generator).double())


def in_pixels(factor: Tensor, shape: torch.Size) -> Tensor:
    """A factor `(rank, rank)` of the lowest coefficients as `(D, rank)` of pixels."""
    coefficients = torch.zeros(factor.shape[1], shape.numel(), dtype=factor.dtype)
    coefficients[:, lowest(shape, len(factor))] = factor.T
    return to_pixels(coefficients.unflatten(1, shape)).flatten(1).T


def test_the_lowest_coefficients_are_a_disc_of_brightness_and_a_smaller_one_of_colour() -> None:
    mask = torch.zeros(3, 8, 8)
    mask.view(-1)[lowest((3, 8, 8), 60)] = 1
    assert mask.sum() == 60
    radius = fineness((3, 8, 8))
    assert radius[mask.bool()].max() <= radius[~mask.bool()].min()
    assert mask[0].sum() > 2 * mask[1].sum() and mask[1].sum() == mask[2].sum()
    assert lowest((1, 3, 3), 3).tolist() == [0, 1, 3]


def test_the_channels_of_latents_count_the_same() -> None:
    """They are neither mixed nor weighted, of any size; other numbers of channels are those of images."""
    shape = (4, 6, 6)
    assert not closed_form_prior.is_clamped(shape) and closed_form_prior.is_clamped((3, 6, 6))
    mask = torch.zeros(shape)
    mask.view(-1)[lowest(shape, 12)] = 1
    assert [int(part.sum()) for part in mask] == [3] * 4
    power = texture_power(shape)
    assert torch.equal(power[0], power[3]) and power[0, 1, 1] / power[0, 3, 3] < 3, "whiter than photos"
    latents = torch.rand(2, *shape, dtype=torch.float64)
    changed = latents.clone()
    changed[:, 2] += 0.1
    moved = closed_form_prior.to_frequencies(changed - latents).abs().amax((0, 2, 3))
    assert moved[2] > 0.1 and float(moved[[0, 1, 3]].max()) == 0


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("level", [0.01, 0.1, 1.0])
def test_the_filter_of_photos_is_the_posterior_of_a_gaussian(channels: int, level: float) -> None:
    latent, shape = photo_latent(channels), torch.Size((channels, 6, 6))
    basis = torch.eye(shape.numel(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    likelihoods, expected_likelihoods = [], []
    noisy = 0.5 + 0.05 * torch.randn(5, shape.numel(), generator=generator)
    for label in range(CLASSES):
        found = _WienerFilter.of(latent, label, shape, torch.device("cpu"))
        factor, cosines = in_pixels(latent.factors[label], shape), to_pixels(basis.unflatten(1, shape)).flatten(1)
        covariance = factor @ factor.T + (cosines.T * latent.texture[label].square().clamp_min(1e-8)) @ cosines
        total = covariance + level**2 * torch.eye(len(covariance))
        gain = torch.linalg.solve(total, covariance, left=False)
        mean, variance = found.denoise(noisy, torch.full((5, 1), level))
        assert torch.allclose(mean.double(), latent.mean[label] + (noisy - latent.mean[label]) @ gain.T, atol=1e-4)
        left = (covariance - gain @ covariance).trace() / len(covariance)
        assert torch.allclose(variance.double(), left.expand_as(variance), rtol=1e-3)
        likelihoods.append(found.log_likelihood(noisy, torch.full((5, 1), level)))
        normal = torch.distributions.MultivariateNormal(latent.mean[label], total)
        expected_likelihoods.append(normal.log_prob(noisy.double()))
    difference = (likelihoods[0] - likelihoods[1]).double()
    assert torch.allclose(difference, expected_likelihoods[0] - expected_likelihoods[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("level", [0.02, 0.1, 0.5])
def test_photos_are_denoised_at_each_contrast(level: float) -> None:
    """Beside the posterior over a fine grid of contrasts, with dense matrices; a single contrast is worse by far."""
    shape, label = torch.Size((3, 6, 6)), 0
    plain, basis = photo_latent(3), torch.eye(108, dtype=torch.float64)
    latent = replace(plain, contrast=0.4)
    generator = torch.Generator().manual_seed(1)
    labels, texture = torch.zeros(1000, dtype=torch.long), torch.randn(1000, *shape, generator=generator).double()
    latent.texture[:, 0] = 0  # as of a texture
    clean = draw_latent_of_photos(latent, labels, torch.randn(1000, 9, generator=generator).double(), texture)
    noisy = clean + level * torch.randn(1000, 108, generator=generator).double()
    factor, cosines = in_pixels(latent.factors[label], shape), to_pixels(basis.unflatten(1, shape)).flatten(1)
    covariance = factor @ factor.T + (cosines.T * latent.texture[label].square().clamp_min(1e-8)) @ cosines
    normals = torch.linspace(-4, 4, 161, dtype=torch.float64)
    means, logs = [], []
    for normal in normals:
        scaled = covariance * (2 * (0.4 * normal - 0.16)).exp()
        total = scaled + level**2 * torch.eye(108)
        means.append(
            latent.mean[label] + (noisy - latent.mean[label]) @ torch.linalg.solve(total, scaled, left=False).T
        )
        law = torch.distributions.MultivariateNormal(latent.mean[label], total)
        logs.append(law.log_prob(noisy) - normal**2 / 2)
    weights = torch.stack(logs).softmax(0)[:, :, None]
    expected = (weights * torch.stack(means)).sum(0)

    def error(of: Latent) -> float:
        found, _ = _WienerFilter.of(of, label, shape, torch.device("cpu")).denoise(
            noisy.float(), torch.full((1000, 1), level)
        )
        return float((found.double() - expected).square().mean() / (expected - latent.mean[label]).square().mean())

    assert error(latent) < 2e-3
    assert error(replace(latent, contrast=0.0)) > 5 * error(latent)
    found, variance = _WienerFilter.of(latent, label, shape, torch.device("cpu")).denoise(
        noisy.float(), torch.full((1000, 1), level)
    )
    assert float((found - clean).square().mean()) == pytest.approx(float(variance.mean()), rel=0.1), "as it says"


def draw_latent_of_photos(latent: Latent, labels: Tensor, normals: Tensor, texture: Tensor) -> Tensor:
    """Draws, flat, by the rule of photos whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_form_prior, "MAX_CLAMPED_VALUES", 1)
        return draw_latent(latent, labels, normals, texture).flatten(1)


def test_draws_of_photos_have_the_released_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form_prior, "MAX_CLAMPED_VALUES", 1)
    generator = torch.Generator().manual_seed(0)
    latent = photo_latent(3)
    variances = latent.factors.square().sum((1, 2)) + 0.05
    drawn_from = _free_latent(latent.mean.view(CLASSES, 3, 6, 6), latent.factors, variances)
    held = torch.zeros(CLASSES, 108, dtype=torch.float64)
    held[:, lowest((3, 6, 6), 9)] = latent.factors.square().sum(2)
    spectrum = held + drawn_from.texture.square()
    assert torch.allclose(spectrum.sum(1), variances)
    filled = (spectrum / texture_power((3, 6, 6)).flatten())[0, drawn_from.texture[0] > 0]
    assert len(filled) > 50 and torch.allclose(filled, filled[:1]), "where there is texture, the law of photos holds"
    count = 20_000
    labels = torch.zeros(count, dtype=torch.long)
    normals, texture = torch.randn(count, 9, generator=generator), torch.randn(count, 3, 6, 6, generator=generator)
    drawn = draw_latent(drawn_from, labels, normals.double(), texture.double()).flatten(1)
    assert torch.allclose(drawn.mean(0), latent.mean[0], atol=0.01)
    assert drawn.var(0).sum().item() == pytest.approx(variances[0].item(), rel=0.02)


def test_the_error_is_kept_between_its_levels() -> None:
    prior = small_prior()
    levels = torch.logspace(-3, 2, 20)
    errors = prior.error(levels)
    assert (errors > 0).all() and errors.isfinite().all()
    assert prior.error(torch.tensor([1e-9])).item() == pytest.approx(prior.errors[0].item(), rel=0.01)
    assert math.isclose(prior.error(torch.tensor([1e9])).item(), prior.errors[-1].item(), rel_tol=0.02)


@pytest.mark.parametrize("patch_size", [1, 4, True, "2", 2.0, 0])
def test_other_patches_than_those_of_the_network_are_refused(patch_size: Any) -> None:
    with pytest.raises(ValueError, match="to be that of the training: with out_channels=12 of the network"):
        DPCurriculumPipeline(small_unet(3, has_prior=False, patch_size=2), EDMEulerScheduler(), patch_size=patch_size)
