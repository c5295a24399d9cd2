"""EDM preconditioning and loss (Karras et al. 2022, arXiv 2206.00364, Table 1), unreduced: one value an image."""

from __future__ import annotations

import functools
import math

import torch
from diffusers import UNet2DModel

from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import ModelConfig
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule, unet_output


SIGMA_DATA = math.sqrt(1 / 3)  # standard deviation of pixels in [-1, 1], as DP-FETA's code has it
_FIRST_OUTPUT = 0.1  # of the usual initial weights of the last layer, on top of a prior
P_STD = 1.2  # standard deviation of ln(sigma), EDM Table 1


def edm_denoise(
    unet: UNet2DModel,
    noisy_images: torch.Tensor,
    sigma: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    *,
    sigma_data: float = SIGMA_DATA,
) -> torch.Tensor:
    r"""
    The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network F, with `time_embedding_type="positional"`: "fourier" divides by
            the time step, and c_noise crosses zero at sigma = 1.
        noisy_images (`torch.Tensor` of shape `(B, C, H, W)`): Images in `[-1, 1]` plus noise of level `sigma`.
        sigma (`torch.Tensor` of shape `(B,)`): Noise levels, positive.
        class_labels (`torch.LongTensor` of shape `(B,)`, *optional*): Classes; the last class embedding is "none".
        sigma_data (`float`, *optional*): Standard deviation of the data.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: The denoised images, float32 also under autocast.
    """
    level = sigma.view(-1, 1, 1, 1)
    c_skip = sigma_data**2 / (level**2 + sigma_data**2)
    c_out = level * sigma_data / (level**2 + sigma_data**2).sqrt()
    c_in = 1 / (level**2 + sigma_data**2).sqrt()
    c_noise = sigma.log() / 4
    output = unet_output(unet, c_in * noisy_images, c_noise, class_labels)
    # float() only widens: a model in float64 keeps its precision.
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    return c_skip * noisy_images + c_out * output


def edm_loss(
    unet: UNet2DModel,
    images: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    *,
    sigma_data: float = SIGMA_DATA,
    prior: ClosedFormPrior | None = None,
    schedule: NoiseSchedule | None = None,
) -> torch.Tensor:
    r"""
    The weighted denoising loss of each image, EDM Eq. 8 with lambda(sigma) of Table 1.

    Noise and sigma are arguments, so that nothing random is hidden here.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network F.
        images (`torch.Tensor` of shape `(B, C, H, W)`): Clean images in `[-1, 1]`.
        noise (`torch.Tensor` of shape `(K * B, C, H, W)`): Standard normal; row `k * B + b` is draw `k` of image `b`.
        sigma (`torch.Tensor` of shape `(K * B,)`): Noise levels.
        class_labels (`torch.LongTensor` of shape `(K * B,)`, *optional*): Classes.
        sigma_data (`float`, *optional*): Standard deviation of the data.
        prior ([`ClosedFormPrior`], *optional*): What the network adds to. The loss is then in units of the error of
            the prior alone at that noise level.
        schedule ([`NoiseSchedule`], *optional*): That of a network which began as DDPM. The loss is then the squared
            error of what the network predicts, as in its own training.

    Returns:
        `torch.Tensor` of shape `(K * B,)`: Mean over pixels of the weighted squared error.
    """
    by_draw = (len(noise) // max(1, len(images)), len(images))  # images are broadcast over draws, and not copied
    noisy = (images + (sigma.view(-1, 1, 1, 1) * noise).unflatten(0, by_draw)).flatten(0, 1)
    if prior is None and schedule is None:
        denoised = edm_denoise(unet, noisy, sigma, class_labels, sigma_data=sigma_data)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    elif schedule is not None:
        assert class_labels is not None, "a network that is trained has classes"
        denoised = schedule.denoise(functools.partial(unet_output, unet), noisy, sigma, class_labels)
        weight = schedule.weight(sigma)
    else:
        assert class_labels is not None and prior is not None, "a prior has classes"
        denoised = prior.denoise(functools.partial(unet_output, unet), noisy, sigma, class_labels)
        weight = 1 / prior.error(sigma)
    return weight * (denoised.unflatten(0, by_draw) - images).square().mean(dim=(2, 3, 4)).flatten()


def noise_levels(
    normals: torch.Tensor, *, p_mean: float, p_std: float = P_STD, schedule: NoiseSchedule | None = None
) -> torch.Tensor:
    """
    Log-normal noise levels from standard normals, of the same shape; EDM Table 1. With a noise schedule, those beyond
    it are its ends, because the network knows no others.
    """
    sigma = (p_mean + p_std * normals).exp()
    return sigma if schedule is None else sigma.clamp(*schedule.sigma_range)


def drop_labels(labels: torch.Tensor, normals: torch.Tensor, *, null_label: int, rate: float) -> torch.Tensor:
    """
    Replaces labels by `null_label` with probability `rate`, for classifier-free guidance.

    Args:
        labels (`torch.LongTensor` of shape `(B,)`): Classes.
        normals (`torch.Tensor` of shape `(B,)`): Standard normals that decide.
        null_label (`int`): The class that stands for "no class".
        rate (`float`): Probability in `[0, 1)`.
    """
    withheld = torch.special.ndtr(normals) < rate
    return torch.where(withheld, null_label, labels)


def build_unet(
    config: ModelConfig, *, resolution: int, num_channels: int, num_classes: int, has_prior: bool = False
) -> UNet2DModel:
    """
    A stock `UNet2DModel` as this package trains it: positional time embedding, one extra class for "no class".

    With a prior, its inputs are a noisy image and what the prior makes of it, and its output starts small: at first
    the model is the prior. A patch of pixels is one place of it; [`unet_output`] cuts images into patches.

    Raises:
        ValueError: If an attention resolution is not among the feature sides of this model.
    """
    side, values = resolution // config.patch_size, num_channels * config.patch_size**2
    sides = [side // 2**level for level in range(len(config.block_out_channels))]
    unknown = sorted(set(config.attention_resolutions) - set(sides))
    if unknown:
        raise ValueError(f"Expected --attention_resolutions={unknown[0]} to be a feature side of the model: {sides}.")
    attends = [feature_side in config.attention_resolutions for feature_side in sides]
    unet = UNet2DModel(
        sample_size=side,
        in_channels=2 * values if has_prior else values,
        out_channels=values,
        time_embedding_type="positional",
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        num_class_embeds=num_classes + 1,
    )
    if has_prior:
        with torch.no_grad():
            unet.conv_out.weight.mul_(_FIRST_OUTPUT)
            unet.conv_out.bias.zero_()
    return unet
