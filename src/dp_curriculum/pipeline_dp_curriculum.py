"""Inference with a class-conditional EDM model. Imports torch and diffusers alone, for it ships with every model."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F


_DECODED_PIXELS = 2**16  # at once: one image of 256 x 256 or more, or four of 128 x 128
_DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "variant")

Generator = torch.Generator | list[torch.Generator] | None
ClassLabels = SupportsIndex | str | Sequence[SupportsIndex | str] | torch.Tensor | None
Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    r"""
    Noise levels of the time steps of a network that was trained as DDPM, and what it predicts: a denoiser over sigma.

    Such a network saw x_t = s (x_0 + sigma n) with s = 1 / sqrt(1 + sigma^2). So for an image x_0 + sigma n it is
    called with s times that, at the time step whose level is sigma (Karras et al. 2022, arXiv 2206.00364, Table 1).
    Between two steps the time is interpolated, linearly in ln(sigma).

    Args:
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"sample"`.
        num_train_timesteps (`int`): Number of time steps.
        beta_schedule (`str`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`, as in diffusers' schedulers.
        beta_start, beta_end (`float`): First and last variance of a step.

    Raises:
        ValueError: If a value is another one, or the levels do not rise.
    """

    prediction_type: str
    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float

    def __post_init__(self) -> None:
        known = {
            "prediction_type": ("epsilon", "v_prediction", "sample"),
            "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        }
        for name, values in known.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"Expected {name}={value!r} of the noise schedule to be one of {', '.join(values)}.")
        steps = _as_index(self.num_train_timesteps)
        if steps is None or not 2 <= steps <= 100_000:
            raise ValueError(f"Expected num_train_timesteps={self.num_train_timesteps!r} to be a number of steps.")
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(f"Expected {name}={value!r} of the noise schedule to be between 0 and 1.")
        if not bool((self.levels.diff() > 0).all()) or not bool(self.levels.isfinite().all()):
            raise ValueError("Expected the levels of the noise schedule to rise from each time step to the next.")

    @functools.cached_property
    def levels(self) -> torch.Tensor:
        """ln(sigma) of each time step, shape `(num_train_timesteps,)`, float64."""
        kept = DDPMScheduler(**asdict(self)).alphas_cumprod.double()
        return ((1 - kept) / kept).log() / 2

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level that the network knows."""
        return float(self.levels[0].exp()), float(self.levels[-1].exp())

    def timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time steps of noise levels, of the same shape, fractional; levels beyond the schedule are its ends."""
        levels = self.levels.to(sigma.device)
        wanted = sigma.double().log().clamp(levels[0], levels[-1])
        after = torch.searchsorted(levels, wanted.contiguous()).clamp(1, len(levels) - 1)
        below, above = levels[after - 1], levels[after]
        return after - 1 + (wanted - below) / (above - below)

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """
        Weights of the squared errors of the denoiser at noise levels, of the same shape: those that make it the plain
        squared error of what the network predicts, as in its own training (EDM Sec. 5: 1 / c_out^2).
        """
        if self.prediction_type == "sample":
            return torch.ones_like(sigma)
        return 1 / sigma**2 if self.prediction_type == "epsilon" else 1 + 1 / sigma**2

    def denoise(
        self, network: Network, noisy_images: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """
        The denoiser D(x; sigma) of images `(B, C, H, W)` plus noise of levels `sigma` `(B,)`; float32 also under
        autocast.
        """
        level = sigma.view(-1, 1, 1, 1)
        scale = (1 + level**2).rsqrt()
        output = network(scale * noisy_images, self.timesteps(sigma).to(noisy_images.dtype), class_labels)
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "epsilon":
            return noisy_images - level * output
        return scale**2 * noisy_images - level * scale * output


class DPCurriculumPipeline(DiffusionPipeline):
    r"""
    Class-conditional image generation with a model that was trained from easy to hard under differential privacy.

    Sampling touches no private data: it is post-processing, and as many images as one likes cost nothing.

    With an [`EDMEulerScheduler`], whose noise levels and preconditioning it uses, the pipeline takes the second-order
    steps of EDM's stochastic sampler (Karras et al. 2022, arXiv 2206.00364, Algorithm 2), which diffusers does not
    have as a scheduler: `num_inference_steps` steps call the network `2 * num_inference_steps - 1` times. An
    [`EDMDPMSolverMultistepScheduler`] makes its own steps, with one call each. No other scheduler has the
    preconditioning that the network was trained with: it is refused where it is set, loaded or called with.

    A network that began as DDPM has a `noise_schedule`, by which it is a denoiser over the same noise levels. It may
    also be sampled as diffusers samples it, with a [`DDPMScheduler`] or [`DDIMScheduler`] of that schedule:
    `pipe.scheduler = DDIMScheduler(**pipe.config.noise_schedule)`.

    A network that was trained on the latents of a public autoencoder comes with it, as `vae`: it makes latents, which
    are decoded at the end, a few at a time.

    A call changes nothing of the pipeline, so several threads may share one.

    Args:
        unet ([`UNet2DModel`]): The network, with positional time embedding; its last class stands for "no class".
        scheduler ([`EDMEulerScheduler`] or [`EDMDPMSolverMultistepScheduler`]): Noise levels and preconditioning.
            To swap them keep the configuration, which holds the `sigma_data` of the training:
            `EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
        id2label (`dict[int, str]`, *optional*): Names of the classes.
        sampling (`dict[str, float]`, *optional*): Defaults of `num_inference_steps`, `guidance_scale`, `s_churn`,
            `s_tmin`, `s_tmax` and `s_noise`.
        privacy (`dict`, *optional*): The privacy report of the training run.
        prior ([`ClosedFormPrior`], *optional*): The closed form of the released moments, to which the network adds.
            Sampling then starts from its own images, noised to the highest level.
        patch_size (`int`, *optional*, defaults to 1): Side of the patches of pixels that are one place of the network.
        noise_schedule (`dict`, *optional*): Fields of the [`NoiseSchedule`] of a network that began as DDPM.
        vae ([`AutoencoderKL`], *optional*): The autoencoder whose latents the network makes.
        latent_bound (`float`, *optional*): End of the range of its latents, in the standard deviations that it states:
            the network makes values in [-1, 1], which are latents over this number.

    Raises:
        ValueError: If the scheduler is another one, the prior or the autoencoder is missing or does not fit the
            network, the noise schedule is none, or the scheduler has another `prediction_type` than `"epsilon"`.
    """

    _optional_components = ["prior", "vae"]
    model_cpu_offload_seq = "prior->unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: EDMEulerScheduler | EDMDPMSolverMultistepScheduler,
        id2label: dict[Any, Any] | None = None,
        sampling: dict[Any, Any] | None = None,
        privacy: dict[Any, Any] | None = None,
        prior: Any = None,
        patch_size: int = 1,
        noise_schedule: dict[Any, Any] | None = None,
        vae: AutoencoderKL | None = None,
        latent_bound: float | None = None,
    ) -> None:
        super().__init__()
        _check_latents(vae, latent_bound)
        _check_patches(unet, patch_size, vae)
        if latent_bound is not None:
            self.register_to_config(latent_bound=float(latent_bound))
        if noise_schedule is not None:  # a pipeline without one is saved as those before it were
            self.register_to_config(noise_schedule=asdict(_as_schedule(noise_schedule)))
        self.register_modules(unet=unet, scheduler=scheduler, prior=None, vae=vae)
        self.register_to_config(id2label=id2label, sampling=sampling, privacy=privacy, patch_size=patch_size)
        if prior is not None:
            self._take_prior(prior)

    def _take_prior(self, prior: Any) -> None:
        """Puts a prior under the network."""
        self._check_prior(prior)
        self.register_modules(prior=prior)
        # Its file lies beside it under the name of the package, for loaders that have none.
        self.register_to_config(prior=("dp_curriculum", "ClosedFormPrior"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        r"""
        Loads the pipeline as in diffusers, from safetensors alone: a pickle, which diffusers would fall back to, is
        never read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub id.
            kwargs (*optional*): As for [`DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: If `use_safetensors=False` is passed, or an index lists weights that are no safetensors.
            OSError: If there are no weights as safetensors.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("Expected use_safetensors=False to be left out: other weights are pickles, never read.")
        folder = pretrained_model_name_or_path
        if folder is not None and os.path.isdir(folder):
            _refuse_foreign_code(Path(folder))
            _refuse_pickled_shards(Path(folder))
            if "prior" not in kwargs and (Path(folder) / "prior").is_dir():
                # By the installed class, once the rest is there: no code of the folder is run.
                pipeline = super().from_pretrained(folder, use_safetensors=True, prior=None, **kwargs)
                pipeline._take_prior(_load_prior(Path(folder), kwargs.get("torch_dtype")))
                return pipeline
        elif folder is not None:
            downloading = {name: kwargs[name] for name in _DOWNLOADING if name in kwargs}
            folder = cls.download(folder, use_safetensors=True, **downloading)
            return cls.from_pretrained(folder, **kwargs)
        return super().from_pretrained(folder, use_safetensors=True, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> Any:
        """Downloads a repository as in diffusers, and looks at what its weights are before they are loaded."""
        # The code that lies beside a prior is not run here: the loader gets a prior of the installed class.
        folder = super().download(pretrained_model_name, **{**kwargs, "trust_remote_code": True})
        _refuse_foreign_code(Path(folder))
        _refuse_pickled_shards(Path(folder))
        return folder

    def to_json_string(self) -> str:
        """As in diffusers, but for a line on an autoencoder that is not there: versions before know of none."""
        fields = json.loads(super().to_json_string())
        if fields.get("vae") == [None, None]:
            del fields["vae"]
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            _check_scheduler(value, self.noise_schedule)
        super().__setattr__(name, value)

    def _check_prior(self, prior: Any) -> None:
        """Refuses a network without the prior that it was trained on, and a prior of other images."""
        unet = self.unet.config
        channels, expected = unet.in_channels, unet.out_channels * (1 if prior is None else 2)
        if channels != expected:
            what = "without a prior" if prior is None else "with a prior"
            raise ValueError(
                f"Expected in_channels={channels} of the network to be {expected} {what}: load the folder that has "
                "both."
            )
        if prior is None:
            return
        shape = (*self.latent_shape, self.num_classes)
        found = (prior.config.num_channels, *[prior.config.sample_size] * 2, prior.config.num_classes)
        if found != shape:
            raise ValueError(
                f"Expected the prior to have the channels, sides and classes of the network, {shape}: it has {found}."
            )

    @property
    def noise_schedule(self) -> NoiseSchedule | None:
        """By which a network that began as DDPM is a denoiser over sigma; `None` of any other."""
        fields = getattr(self, "_internal_dict", {}).get("noise_schedule")
        return None if fields is None else _as_schedule(fields)

    @property
    def privacy(self) -> dict[str, Any] | None:
        """The privacy report of the training run, as on the card; `None` where the pipeline came without one."""
        return self.config.privacy

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; the one that stands for "no class" is not among them."""
        return (self.unet.config.num_class_embeds or 1) - 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network makes: of latents, or of images without an autoencoder."""
        size, patch = self.unet.config.sample_size, self.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config.out_channels // patch**2), height * patch, width * patch

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.latent_shape[0] if self.vae is None else int(self.vae.config.out_channels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        _, height, width = self.latent_shape
        factor = 1 if self.vae is None else int(2 ** (len(self.vae.config.block_out_channels) - 1))
        return height * factor, width * factor

    @property
    def labels(self) -> dict[str, int]:
        """Class index by name, in the order of the names."""
        names = {int(index): str(name) for index, name in (self.config.id2label or {}).items()}
        return dict(sorted((name, index) for index, name in names.items()))

    def get_label_ids(self, labels: str | list[str]) -> list[int]:
        """
        Class indices of class names.

        Raises:
            ValueError: If a name is unknown; the message lists the known ones.
        """
        known = self.labels
        labels = [labels] if isinstance(labels, str) else labels
        for label in labels:
            if label not in known:
                names = f"expected one of {', '.join(known)}" if known else "the classes of this model have no names"
                raise ValueError(f"Unknown class name {label!r}: {names}.")
        return [known[label] for label in labels]

    def check_inputs(
        self,
        batch_size: SupportsIndex,
        class_labels: ClassLabels,
        num_inference_steps: SupportsIndex,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> torch.Tensor:
        """Validates the arguments of a call and returns the class of each image, shape `(B,)`."""
        count = _as_index(batch_size)
        if count is None or count < 1:
            raise ValueError(f"Expected batch_size={batch_size!r} to be a positive integer.")
        steps = _as_index(num_inference_steps)
        if steps is None or steps < 1:
            raise ValueError(f"Expected num_inference_steps={num_inference_steps!r} to be a positive integer.")
        if output_type not in ("pil", "np", "pt") and (output_type != "latent" or self.vae is None):
            more = "; 'latent' needs a vae" if self.vae is None else " or 'latent'"
            raise ValueError(f"Expected output_type={output_type!r} to be 'pil', 'np' or 'pt'{more}.")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"Expected callback_on_step_end_tensor_inputs={name!r} to be among {self._callback_tensor_inputs}."
                )
        if class_labels is None:
            # Each class in turn: "no class" is what the model knows least about.
            return torch.arange(count) % max(1, self.num_classes)
        return torch.tensor([self._class_index(label) for label in _listed(class_labels, count)])

    def _class_index(self, label: Any) -> int:
        if isinstance(label, str):
            return self.get_label_ids(label)[0]
        index = _as_index(label)
        if index is None or not 0 <= index < self.num_classes:
            raise ValueError(
                f"Expected class_labels={label!r} to be an integer from 0 to {self.num_classes - 1}, or the name of a "
                "class."
            )
        return index

    def prepare_latents(
        self,
        batch_size: int,
        generator: Generator,
        latents: torch.Tensor | None,
        sigma: torch.Tensor | float,
    ) -> torch.Tensor:
        """Pure noise of level `sigma`, shape `(B, C, H, W)`, or `latents` times `sigma` where they are given."""
        shape = (batch_size, *self.latent_shape)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Expected {len(generator)} generators to be as many as the {batch_size} images.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        elif latents.shape != shape:
            raise ValueError(f"Expected latents of shape {shape}: they have shape {tuple(latents.shape)}.")
        return latents.to(self._execution_device, self.unet.dtype) * sigma

    def _prior_images(self, class_labels: torch.Tensor, generator: Generator) -> torch.Tensor:
        """Images of the prior in [-1, 1], shape `(B, C, H, W)`."""
        device, means = self._execution_device, self.prior.means
        rank = self.prior.factors.shape[2]
        normals = randn_tensor((len(class_labels), rank), generator=generator, device=device, dtype=torch.float32)
        shape = (len(class_labels), *means.shape[1:])
        texture = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return 2 * self.prior.draw(class_labels, normals, texture) - 1

    def denoise(
        self, latents: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """The denoiser D(x; sigma) at one noise level, with classifier-free guidance where the scale is above 1."""
        output = self._predict(self.scheduler.precondition_inputs(latents, sigma), sigma, class_labels, guidance_scale)
        return self.scheduler.precondition_outputs(latents, output, sigma)

    def _predict(
        self, model_input: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        return self._guided(self._output, model_input, sigma, class_labels, guidance_scale)

    def _guided(
        self,
        network: Network,
        model_input: torch.Tensor,
        level: torch.Tensor,
        class_labels: torch.Tensor,
        guidance_scale: float,
    ) -> torch.Tensor:
        if guidance_scale <= 1:
            return network(model_input, level, class_labels)
        both = torch.cat([class_labels, torch.full_like(class_labels, self.num_classes)])
        conditional, unconditional = network(torch.cat([model_input] * 2), level, both).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _output(self, model_input: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Output of the network, or of a denoiser that is made of it as if one network had made it."""
        schedule = self.noise_schedule
        if self.prior is None and schedule is None:
            timestep = self.scheduler.precondition_noise(sigma).reshape(1).to(model_input)
            return unet_output(self.unet, model_input, timestep, class_labels)
        latents = model_input * (sigma**2 + self.scheduler.config.sigma_data**2).sqrt()
        levels = sigma.reshape(1).expand(len(latents)).to(latents)
        network = functools.partial(unet_output, self.unet)
        if schedule is not None:
            denoised = schedule.denoise(network, latents, levels, class_labels).to(latents)
        else:
            denoised = self.prior.denoise(network, latents, levels, class_labels).clamp(-1, 1)
        # What a scheduler makes of zero is what it adds to c_out times the output.
        kept = self.scheduler.precondition_outputs(latents, torch.zeros_like(latents), sigma)
        scale = self.scheduler.precondition_outputs(torch.zeros_like(latents), torch.ones_like(latents), sigma)
        return (denoised - kept) / scale

    def _heun_step(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        step: int,
        class_labels: torch.Tensor,
        guidance_scale: float,
        churn: tuple[float, float, float, float],
        generator: Generator,
    ) -> torch.Tensor:
        """One step of EDM Algorithm 2, from noise level `step` of `sigmas` to the next."""
        s_churn, s_tmin, s_tmax, s_noise = churn
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
            sigma_hat = sigma * (1 + gamma)
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            latents = latents + (sigma_hat**2 - sigma**2).sqrt() * s_noise * noise
            sigma = sigma_hat
        slope = (latents - self.denoise(latents, sigma, class_labels, guidance_scale)) / sigma
        proposal = latents + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return proposal
        next_slope = (proposal - self.denoise(proposal, sigma_next, class_labels, guidance_scale)) / sigma_next
        return latents + (sigma_next - sigma) * (slope + next_slope) / 2

    @torch.no_grad()
    def __call__(
        self,
        batch_size: SupportsIndex = 1,
        class_labels: ClassLabels = None,
        num_inference_steps: SupportsIndex | None = None,
        guidance_scale: float | None = None,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        s_churn: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        r"""
        Generates images.

        Args:
            batch_size (`int`, *optional*, defaults to 1): Number of images where `class_labels` is not a list.
            class_labels (`int`, `str`, or a list, array or tensor of them, *optional*): The class of each image, by
                index or name; each class in turn if unset. Whatever Python takes for an index is one, NumPy's
                integers too; `True` and `1.0` are not.
            num_inference_steps (`int`, *optional*): Denoising steps; as saved with the pipeline if unset.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 is none; as saved if unset.
            generator (`torch.Generator` or a list of one an image, *optional*): Makes the images reproducible.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Standard normal noise to start from.
            s_churn (`float`, *optional*): Noise put back on the way, EDM's S_churn; needs an [`EDMEulerScheduler`]; as
                saved if unset.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W),
                arrays in [0, 1]. With a `vae` also `"latent"`, latents (B, c, h, w) before they are decoded, in the
                standard deviations that it states; [`decode_latents`] makes images of them.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an [`ImagePipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipeline, step, timestep, {"latents": …})`
                after each step; what it returns under "latents" is used from then on.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names of the tensors to hand to it.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            ValueError: If an argument is out of range, which the message gives, or the scheduler is none that works.
        """
        saved = self.config.sampling or {}
        num_inference_steps = (
            int(saved.get("num_inference_steps", 18)) if num_inference_steps is None else num_inference_steps
        )
        guidance_scale = saved.get("guidance_scale", 1.0) if guidance_scale is None else guidance_scale
        s_churn = saved.get("s_churn", 0.0) if s_churn is None else s_churn
        churn = (s_churn, saved.get("s_tmin", 0.0), saved.get("s_tmax", math.inf), saved.get("s_noise", 1.0))
        tensor_inputs = (
            ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        )

        # 1. Check the arguments
        self._check_prior(self.prior)
        _check_latents(self.vae, self.config.get("latent_bound"))
        labels = self.check_inputs(batch_size, class_labels, num_inference_steps, output_type, tensor_inputs)
        labels = labels.to(self._execution_device)

        # 2. Prepare the noise levels and the noise; levels of its own, for another thread may be in a call, too
        _check_scheduler(self.scheduler, self.noise_schedule)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(operator.index(num_inference_steps), device=self._execution_device)
        as_ddpm = isinstance(scheduler, (DDPMScheduler, DDIMScheduler))
        highest = scheduler.init_noise_sigma if as_ddpm else scheduler.sigmas[0]
        latents = self.prepare_latents(len(labels), generator, latents, highest)
        if self.prior is not None:
            latents = latents + self._prior_images(labels, generator).to(latents)

        # 3. Denoise
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            if isinstance(scheduler, EDMEulerScheduler):
                latents = self._heun_step(latents, scheduler.sigmas, step, labels, guidance_scale, churn, generator)
            elif as_ddpm:
                network = functools.partial(unet_output, self.unet)
                output = self._guided(network, latents, timestep, labels, guidance_scale)
                latents = scheduler.step(output, timestep, latents, generator=generator).prev_sample
            else:
                model_input = scheduler.scale_model_input(latents, timestep)
                output = self._predict(model_input, scheduler.sigmas[step], labels, guidance_scale)
                latents = scheduler.step(output, timestep, latents, generator=generator).prev_sample
            latents = latents.to(self.unet.dtype)
            if callback_on_step_end is not None:
                returned = callback_on_step_end(self, step, timestep, dict.fromkeys(tensor_inputs, latents))
                latents = returned.pop("latents", latents)

        # 4. Convert
        images: Any = (latents.float() / 2 + 0.5).clamp(0, 1)
        if self.vae is not None:
            images = (2 * images - 1) * self.config.latent_bound
            images = images if output_type == "latent" else decode_latents(self.vae, images)
        if output_type not in ("pt", "latent"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def unet_output(
    unet: UNet2DModel, images: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None
) -> torch.Tensor:
    """
    Output of a network `(B, C', H, W)` for `images` `(B, C, H, W)`, cut into the patches that it was built for.

    A patch of p x p pixels is one place of the network with p² times as many channels: all pixels are there, and an
    orthonormal change of coordinates changes no norm. A wrapper that hides the configuration, as that of Opacus does,
    is taken for a network without patches: one with patches refuses the channels.
    """
    channels = unet.config.in_channels if hasattr(unet, "config") else images.shape[1]
    patch_size = math.isqrt(channels // images.shape[1])
    output = unet(F.pixel_unshuffle(images, patch_size), timestep, class_labels=class_labels).sample
    return F.pixel_shuffle(output, patch_size)


def latent_scale(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of latents, as an autoencoder states them: `(1, c, 1, 1)` or `(1, 1, 1, 1)`."""
    config = vae.config
    mean = config.latents_mean if config.latents_mean is not None else [config.shift_factor or 0.0]
    deviation = config.latents_std if config.latents_std is not None else [1.0]
    means, deviations = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, deviation))
    return means, deviations / config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """
    Images `(B, C, H, W)` in [0, 1], float32, of latents `(B, c, h, w)` in standard deviations; a few at a time, for
    the memory that a decoder takes.
    """
    mean, deviation = (values.to(latents.device) for values in latent_scale(vae))
    pixels = latents.shape[-2] * latents.shape[-1] * 4 ** (len(vae.config.block_out_channels) - 1)
    parts = (latents.float() * deviation + mean).split(max(1, _DECODED_PIXELS // pixels))
    images = [vae.decode(part.to(vae.dtype)).sample.float() for part in parts]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def _check_latents(vae: AutoencoderKL | None, latent_bound: Any) -> None:
    """Refuses a network that makes latents without what decodes them, and an autoencoder without their range."""
    if vae is None and latent_bound is not None:
        raise ValueError(
            "Expected the pipeline to come with its vae: the network makes latents of it. Load the folder that has "
            "both."
        )
    is_number = isinstance(latent_bound, (int, float)) and not isinstance(latent_bound, bool)
    if vae is not None and not (is_number and 0 < latent_bound < math.inf):
        raise ValueError(f"Expected latent_bound={latent_bound!r} to be the range of the latents, a positive number.")


def _refuse_foreign_code(folder: Path) -> None:
    """Refuses a component that would be made by a Python file of the folder; that of a prior is never run."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # diffusers says what is wrong with it
        return
    for name, value in index.items():
        if name != "prior" and isinstance(value, list) and (folder / name / f"{value[0]}.py").is_file():
            raise ValueError(f"Refusing to load {folder}: its {name} would run the code in {name}/{value[0]}.py.")


def _load_prior(folder: Path, dtype: torch.dtype | None) -> Any:
    """The prior of a folder, as the installed package knows it."""
    try:
        prior_class = importlib.import_module("dp_curriculum").ClosedFormPrior
    except ImportError:
        raise ValueError(
            f"Expected the package dp_curriculum to be installed, to load {folder} in this way: install it, or load "
            "the folder by DiffusionPipeline.from_pretrained with its custom_pipeline."
        ) from None
    prior = prior_class.from_pretrained(folder / "prior", use_safetensors=True)
    return prior if dtype is None else prior.to(dtype)


def _check_patches(unet: UNet2DModel, patch_size: Any, vae: AutoencoderKL | None = None) -> None:
    """Refuses patches that are not those of grey or colour images, or of the latents, in this network."""
    channels = unet.config.out_channels
    if vae is not None:
        latent = vae.config.latent_channels
        if _as_index(patch_size) is None or channels != latent * patch_size**2:
            raise ValueError(
                f"Expected the vae to have the latents that the network makes: they have {latent} channels, and the "
                f"network has out_channels={channels} with patch_size={patch_size!r}."
            )
        return
    if _as_index(patch_size) is None or channels not in (patch_size**2, 3 * patch_size**2):
        raise ValueError(
            f"Expected patch_size={patch_size!r} to be that of the training: with out_channels={channels} of the "
            "network its square times 1 (grey) or 3 (colour) is that number."
        )


def _refuse_pickled_shards(folder: Path) -> None:
    """Refuses an index of weights in parts whose parts are no safetensors: diffusers would read them as pickles."""
    for path in folder.glob("*/*.index.json"):
        try:
            parts = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            is_safe = all(part.endswith(".safetensors") for part in parts)
        except (ValueError, KeyError, TypeError, AttributeError):
            is_safe = False
        if not is_safe:
            raise ValueError(f"Refusing to load {path}: it lists weights that are no safetensors.")


def _as_schedule(fields: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of the configuration of a pipeline."""
    try:
        return _known_schedule(tuple(sorted(fields.items())))
    except TypeError:
        names = ", ".join(NoiseSchedule.__dataclass_fields__)
        raise ValueError(f"Expected noise_schedule={fields!r} to have the fields {names}, and no other.") from None


@functools.lru_cache
def _known_schedule(fields: tuple[tuple[str, Any], ...]) -> NoiseSchedule:
    """A noise schedule with its levels, which are computed once."""
    return NoiseSchedule(**dict(fields))


def _check_scheduler(scheduler: Any, schedule: NoiseSchedule | None = None) -> None:
    """Refuses what samples noise, or not at all, from a network that was trained with another preconditioning."""
    if schedule is not None and isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        found = {name: scheduler.config[name] for name in asdict(schedule)}
        plain = scheduler.config.trained_betas is None and not scheduler.config.rescale_betas_zero_snr
        if found != asdict(schedule) or not plain:
            raise ValueError(
                f"Expected the {type(scheduler).__name__} to have the noise schedule of the network: make it with "
                f"{type(scheduler).__name__}(**pipe.config.noise_schedule)."
            )
        return
    works = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
    if not isinstance(scheduler, works):
        raise ValueError(
            f"Expected scheduler={type(scheduler).__name__} to be one of {', '.join(one.__name__ for one in works)}: "
            "the network was trained under EDM preconditioning, which others do not have."
        )
    predicted = scheduler.config.prediction_type
    if predicted != "epsilon":
        raise ValueError(
            f"Expected prediction_type={predicted} of {type(scheduler).__name__} to be epsilon: the network was "
            "trained with it."
        )


def _as_index(value: Any) -> int | None:
    """The integer that `value` stands for; `None` for all else, and for truth values."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _listed(class_labels: Any, count: int) -> list[Any]:
    """One label an image; a single one is for all of them."""
    given = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    if isinstance(given, str) or _as_index(given) is not None:
        return [given] * count
    if not isinstance(given, Sequence) or not given:
        raise ValueError(
            f"Expected class_labels={class_labels!r} to be an integer, the name of a class, or a non-empty list of "
            "them."
        )
    return list(given)
