"""A public autoencoder: its files are checked, and images are encoded by it, one at a time, and decoded again.

Latents are kept as images are: as bytes, of which 0 and 255 stand for the two ends of a public range. So they are
bounded, and all that works on images in [0, 1] works on them. A step between two bytes is a 32nd of the standard
deviation of a latent; an image loses as much by being stored in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.config_sections import LATENT_BOUND
from dp_curriculum.diffusion.model_files import PublicModel, find_file, first_line, read_object, settings_of
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, decode_latents, latent_scale


OPTION = "--vae_name_or_path"
ROOM = "vae"  # of a pipeline
NAMES = (CONFIG_NAME, f"{ROOM}/{CONFIG_NAME}")
_IMAGE_CHANNELS = (1, 3)
_MIDDLE = 128  # byte of a latent at its middle, in place of latents that are no numbers
_CURE = "Name an AutoencoderKL, such as the folder vae of a Stable Diffusion pipeline."
_OTHERS = {  # why they are none
    "VQModel": ", whose latents are entries of a codebook",
    "AutoencoderTiny": ", which has no scale by which its latents are bounded",
    "AsymmetricAutoencoderKL": ", whose decoder takes more than latents",
    "AutoencoderDC": ", which is another architecture",
}


@dataclass(frozen=True)
class PretrainedAutoencoder(PublicModel):
    """An autoencoder before its weights are read: all that a plan needs to know of it."""

    model_class = AutoencoderKL

    @property
    def image_channels(self) -> int:
        """Channels of the images that it encodes."""
        return int(self.fields["in_channels"])

    @property
    def latent_channels(self) -> int:
        """Channels of their latents."""
        return int(self.fields["latent_channels"])

    @property
    def downsampling(self) -> int:
        """Pixels of an image, per side, that are one place of its latents."""
        return int(2 ** (len(self.fields["block_out_channels"]) - 1))

    def build(self) -> AutoencoderKL:
        """The autoencoder with random weights, which a caller may not want to draw from the global generator."""
        return AutoencoderKL.from_config(dict(self.fields))


def read_autoencoder(folder: Path, label: str) -> PretrainedAutoencoder:
    """
    Reads what a folder says of an autoencoder. Its weights are not opened, and need not be there.

    Args:
        folder (`Path`): That of an `AutoencoderKL`, or of a pipeline with one.
        label (`str`): The option that named it, with its value, for messages.

    Raises:
        ValueError: If it is another kind of model, or its latents have no finite scale. The message says what to do.
    """
    config = find_file(folder, CONFIG_NAME, ROOM)
    if config is None:
        raise ValueError(
            f"Expected {label} to be an AutoencoderKL, or a pipeline with one: it holds no {CONFIG_NAME} and no "
            f"{ROOM}/{CONFIG_NAME}. Name the folder within it with --vae_subfolder."
        )
    fields = _fields(read_object(config, label), label)
    _check_shape(fields, label)
    _check_scale(fields, label)
    model = PretrainedAutoencoder(label, fields, folder, config.parent / SAFETENSORS_WEIGHTS_NAME, (config,))
    try:
        with torch.device("meta"):
            model.build()
    except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"Expected {CONFIG_NAME} of {label} to be that of a model: {first_line(error)}") from None
    return model


def _fields(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    kind = config.get("_class_name", "model that does not say its class")
    if kind != "AutoencoderKL":
        raise ValueError(f"Refusing to encode with {label}: its class is {kind}{_OTHERS.get(kind, '')}. {_CURE}")
    return settings_of(AutoencoderKL, config, label)


def _check_shape(fields: Mapping[str, Any], label: str) -> None:
    """Refuses images that are neither grey nor colour, and latents that would be taken for images."""
    taken, made, latent = (fields[name] for name in ("in_channels", "out_channels", "latent_channels"))
    if taken not in _IMAGE_CHANNELS or made != taken:
        raise ValueError(
            f"Refusing to encode with {label}: it takes images of {taken} channels and makes images of {made}, and "
            f"images here have 1 or 3. {_CURE}"
        )
    if type(latent) is not int or latent < 1 or latent in _IMAGE_CHANNELS:
        raise ValueError(
            f"Refusing to encode with {label}: its latents have latent_channels={latent}, and latents of 1 or 3 "
            "channels would be taken for images. Name an AutoencoderKL with 4 or 16."
        )


def _check_scale(fields: Mapping[str, Any], label: str) -> None:
    """Refuses a scale of the latents that is not finite, or zero."""
    scale, shift = fields["scaling_factor"], fields["shift_factor"]
    if not _is_number(scale) or scale == 0:
        raise ValueError(
            f"Refusing to encode with {label}: its scaling_factor is {scale}, and latents cannot be brought to one "
            f"scale by it. Correct its {CONFIG_NAME}, or name another one."
        )
    if shift is not None and not _is_number(shift):
        raise ValueError(f"Refusing to encode with {label}: its shift_factor is {shift}. Correct its {CONFIG_NAME}.")
    for name in ("latents_mean", "latents_std"):
        values = fields[name]
        if values is None:
            continue
        is_fine = (
            isinstance(values, list) and len(values) == fields["latent_channels"] and all(map(_is_number, values))
        )
        if not is_fine or (name == "latents_std" and 0 in values):
            raise ValueError(f"Refusing to encode with {label}: its {name} is {values}. Correct its {CONFIG_NAME}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_image_channels(config: CurriculumConfig, model: PretrainedAutoencoder) -> None:
    """
    Refuses images of other channels than those that the autoencoder takes, once they are settled.

    Raises:
        ValueError: The message has what to do.
    """
    asked, taken = config.data.channels, model.image_channels
    if asked != taken:
        raise ValueError(
            f"Expected --num_channels={asked} to be {taken}, the channels of the images of {model.label}: add "
            f"--num_channels {taken}, to which your images are converted, or name another autoencoder."
        )


class LatentSpace:
    r"""
    Images as latents of a frozen autoencoder, and back.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): The autoencoder, in float32, on its device. It is frozen.

    Privacy:
        What [`~LatentSpace.encode`] makes of an image is a deterministic function of that image and of public weights:
        each image goes through the network alone, and no other image has a part in its latents, not even by rounding.
        So two datasets that differ in one image differ in the latents of that image alone, and every later query or
        step has the sensitivity that it has on images.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)

    @classmethod
    def of(cls, pipeline: DPCurriculumPipeline) -> LatentSpace | None:
        """That of a pipeline; `None` of one whose network makes images."""
        return None if pipeline.vae is None else cls(pipeline.vae)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Latents of images, each computed by itself: the mean of the posterior, never a sample.

        Args:
            images (`torch.Tensor` of shape `(N, C, H, W)`): `torch.uint8`, on any device.

        Returns:
            Latents `(N, c, h, w)` as `torch.uint8` on the CPU, from -LATENT_BOUND to LATENT_BOUND standard
            deviations; and a mask `(N,)`, false where they are no finite numbers, and the middle stands for them.
        """
        shape = (self.vae.config.latent_channels, *(side // self._downsampling for side in images.shape[2:]))
        latents, is_finite = torch.empty(len(images), *shape, dtype=torch.uint8), torch.empty(len(images)).bool()
        with _exact():
            for row, image in enumerate(images):
                scaled = self._encoded(image.to(self.vae.device))
                is_finite[row] = scaled.isfinite().all()
                latents[row] = torch.where(is_finite[row].to(scaled.device), _to_bytes(scaled), _MIDDLE).cpu()
        return latents, is_finite

    def _encoded(self, image: torch.Tensor) -> torch.Tensor:
        """Latents `(c, h, w)` of an image `(C, H, W)` of bytes, in standard deviations."""
        pixels = image[None].float() / 127.5 - 1
        mean, deviation = (values.to(pixels.device) for values in latent_scale(self.vae))
        return ((self.vae.encode(pixels).latent_dist.mode() - mean) / deviation)[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Images of latents, as the pipeline makes them.

        Args:
            latents (`torch.Tensor` of shape `(N, c, h, w)`): In `[0, 1]`, the two ends of their range.

        Returns:
            `torch.Tensor` of shape `(N, C, H, W)`: float32, in `[0, 1]`, on the device of the autoencoder.
        """
        return decode_latents(self.vae, (2 * latents.to(self.vae.device) - 1) * LATENT_BOUND)

    def check(self, side: int, label: str) -> None:
        """
        Tries the autoencoder on one public image of random pixels.

        Raises:
            ValueError: If latents or images of it are no numbers, or of another shape.
        """
        channels = self.vae.config.in_channels
        pixels = torch.randint(256, (1, channels, side, side), generator=torch.Generator().manual_seed(0))
        latents, is_finite = self.encode(pixels.to(torch.uint8))
        made = self.decode(latents / 255)
        if not bool(is_finite.all()) or not bool(made.isfinite().all()):
            raise ValueError(
                f"Refusing to encode with {label}: what it makes of a picture of random pixels is not finite. Its "
                "weights are damaged, or are those of another model: restore them, or name another one."
            )
        if made.shape != pixels.shape:
            raise ValueError(
                f"Refusing to encode with {label}: it makes images of {made.shape[-1]} pixels of those of {side}. "
                "Name another one."
            )

    @property
    def _downsampling(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def _to_bytes(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest bytes of latents in standard deviations; what lies beyond the range is moved to its end."""
    unit = (0.5 + scaled / (2 * LATENT_BOUND)).nan_to_num(nan=0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8)


@contextmanager
def _exact() -> Iterator[None]:
    """float32 as it is, and the same bits for the same image: neither TF32, nor a kernel that is chosen by a trial."""
    cudnn, matmul_precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
