"""Frequency images: pictures of a small generator that is fitted to the noisy Fourier features of each class.

The mean of random Fourier features tells two distributions apart in every frequency, and each image has features of
norm 1, so one query of all images releases it with little noise. The generator is fitted to what was released: an
unlimited lesson, sharper than a mean. The lesson is FETA-Pro's (arXiv 2601.06368), the query DP-MERF's
(arXiv 2002.11603, section 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.units import Units
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.lessons.lesson import Lesson, Tensors, draw_rows
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


# What no image exceeds: the squares of cosine and sine of a frequency add up to 1.
FREQUENCY_NORM = 1.0
NUM_FREQUENCIES = 5000  # directions along which features are taken
IMAGES_PER_CLASS = 1000  # drawn by the fitted generator
FIT_STEPS = 600  # in which the generator is fitted
_FIT_BATCH_SIZE = 32  # images of each class per step
_FIT_LEARNING_RATE = 3e-3
# Length scales reach from the largest down to 2^-1.5 of it: the large ones pull a picture of nothing towards its
# class, the small ones tell pictures of one class apart.
_OCTAVES = 1.5
_LARGEST_SCALE = 0.37  # times the root of the number of values, if it is not set
_LATENT_SIZE = 32
_CHANNELS = 48


@functools.lru_cache(maxsize=2)  # a hundred megabytes at 32 pixels
def draw_frequencies(
    num_values: int, length_scale: float | None = None, num_frequencies: int = NUM_FREQUENCIES
) -> torch.Tensor:
    r"""
    The directions along which features are taken, public and the same in every run.

    Args:
        num_values (`int`): Pixels times channels of an image.
        length_scale (`float`, *optional*): Largest length scale l, `0.37 * sqrt(num_values)` if unset. The features
            stand for the mean of Gaussian kernels exp(-|x - y|^2 / 2 s^2), s from l down to l / 2^1.5, evenly in its
            logarithm.
        num_frequencies (`int`, *optional*): F, their number.

    Returns:
        `torch.Tensor` of shape `(num_values, F)`: float32, column f normal with standard deviation 1 / s_f
        (Rahimi and Recht 2007, section 3, for each s).
    """
    largest = length_scale or _LARGEST_SCALE * math.sqrt(num_values)
    scales = largest / 2 ** torch.linspace(0, _OCTAVES, num_frequencies)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_values, num_frequencies, generator=generator) / scales


def fourier_features(images: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, over the root of their number, of `(B, C, h, w)`: `(B, 2 F)`, each row of norm 1."""
    phases = images.flatten(1) @ frequencies.to(images)
    return torch.cat([phases.cos(), phases.sin()], dim=1) / math.sqrt(frequencies.shape[1])


def query_frequencies(
    images: torch.Tensor,
    labels: torch.Tensor,
    mechanism: PlannedMechanism,
    *,
    num_classes: int,
    public_dataset_size: int,
    resolution: int,
    length_scale: float | None = None,
    num_frequencies: int = NUM_FREQUENCIES,
    units: Units | None = None,
    generator: SecretGenerator | None = None,
) -> torch.Tensor:
    r"""
    Releases the noisy mean of the Fourier features of each class.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        mechanism ([`PlannedMechanism`]): As it was charged. A clip norm below 1 would scale features down.
        num_classes (`int`): Number of classes, public.
        public_dataset_size (`int`): Number of images, or of persons, that the divisor assumes; public, or disclosed.
        resolution (`int`): Side of the images whose features are taken.
        length_scale (`float`, *optional*): As [`draw_frequencies`] takes it.
        num_frequencies (`int`, *optional*): F, likewise.
        units ([`Units`], *optional*): Persons, each of whom adds the average over their images; images if unset.
        generator ([`SecretGenerator`], *optional*): Source of the noise; a new one if unset.

    Returns:
        `torch.Tensor` of shape `(num_classes, 2 F)`: float32, divided by the constant
        `public_dataset_size / num_classes`.

    Privacy:
        One query of all images by [`noisy_class_sums`]. The features of an image have an L2 norm of 1 and enter the
        sum of one class: adding or removing it moves the sums by at most 1, replacing it by at most 2. Directions and
        divisor are public constants.
    """
    shape = (images.shape[1], resolution, resolution)
    frequencies = draw_frequencies(math.prod(shape), length_scale, num_frequencies).double()

    def features(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return fourier_features(F.interpolate(pixels, size=shape[1:], mode="area"), frequencies)

    sums = noisy_class_sums(
        images,
        labels,
        features,
        (2 * num_frequencies,),
        num_classes=num_classes,
        mechanism=mechanism,
        units=units,
        generator=generator or SecretGenerator(),
    )
    return (sums * (num_classes / public_dataset_size)).float()


class ImageGenerator(nn.Module):
    """From class and latent vector to an image: two convolutions ahead of doubling the side, one for the pixels."""

    def __init__(self, num_classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, side, _ = shape
        self.side, self.small = side, max(1, math.ceil(side / 4))
        self.classes = nn.Embedding(num_classes, _LATENT_SIZE)
        self.first = nn.Linear(2 * _LATENT_SIZE, 2 * _CHANNELS * self.small**2)
        self.middle = nn.Conv2d(2 * _CHANNELS, _CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(_CHANNELS, _CHANNELS // 2, 3, padding=1)
        self.pixels = nn.Conv2d(_CHANNELS // 2, channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Latents `(B, 32)` and labels `(B,)` to images `(B, C, side, side)` in `[0, 1]`."""
        hidden = self.first(torch.cat([latents, self.classes(labels)], dim=1))
        hidden = hidden.view(len(latents), -1, self.small, self.small)
        for layer, side in ((self.middle, 2 * self.small), (self.last, self.side)):
            hidden = layer(F.leaky_relu(F.layer_norm(hidden, hidden.shape[1:]), 0.2))
            hidden = F.interpolate(hidden, size=(side, side), mode="bilinear", align_corners=False)
        return self.pixels(F.leaky_relu(hidden, 0.2)).sigmoid()


def fit_generator(
    features: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    length_scale: float | None = None,
    num_steps: int = FIT_STEPS,
    generator: torch.Generator,
) -> ImageGenerator:
    r"""
    Fits a generator whose images have the released mean features of each class.

    Minimised is the squared distance between the two means, summed over the classes: the maximum mean discrepancy of
    the kernel (DP-MERF, equation 6). It is post-processing.

    Args:
        features (`torch.Tensor` of shape `(classes, 2 F)`): As [`query_frequencies`] releases them.
        shape (`tuple[int, int, int]`): Channels, height and width of the images whose features were taken.
        length_scale (`float`, *optional*): The same as then.
        num_steps (`int`, *optional*): Steps of Adam.
        generator (`torch.Generator`): Public randomness, on the device to compute on.
    """
    device = generator.device
    frequencies = draw_frequencies(math.prod(shape), length_scale, features.shape[1] // 2).to(device)
    target, num_classes = features.to(device), len(features)
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from the global generator
        torch.random.default_generator.manual_seed(
            int(torch.randint(2**31, (), generator=generator, device=device).item())
        )
        model = ImageGenerator(num_classes, shape).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 0.7 times the time on a CPU
    optimizer = torch.optim.Adam(model.parameters(), lr=_FIT_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    labels = torch.arange(num_classes, device=device).repeat_interleave(_FIT_BATCH_SIZE)
    for _ in tqdm(range(num_steps), desc="fitting the generator of the lesson", leave=False):
        latents = torch.randn(len(labels), _LATENT_SIZE, generator=generator, device=device)
        made = fourier_features(model(latents, labels), frequencies)
        loss = (made.view(num_classes, -1, made.shape[1]).mean(dim=1) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def draw_frequency_images(
    features: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    length_scale: float | None = None,
    num_steps: int = FIT_STEPS,
    images_per_class: int = IMAGES_PER_CLASS,
    generator: torch.Generator,
) -> Mapping[str, torch.Tensor]:
    """`images` `(M, C, h, w)` in `[0, 1]` and `labels` `(M,)`: equally many of each class, by a fitted generator."""
    model = fit_generator(features, shape=shape, length_scale=length_scale, num_steps=num_steps, generator=generator)
    device = generator.device
    labels = torch.arange(len(features), device=device).repeat(images_per_class)
    with torch.no_grad():
        images = [
            model(torch.randn(len(rows), _LATENT_SIZE, generator=generator, device=device), rows)
            for rows in labels.split(500)
        ]
    return {"images": torch.cat(images), "labels": labels}


def _resolution(config: CurriculumConfig) -> int:
    """Side of the images whose Fourier features are taken, pixels."""
    return config.lessons.lesson_resolution or min(32, config.input_shape[1])


def _plan(config: CurriculumConfig, noise_multiplier: float) -> tuple[PlannedMechanism, ...]:
    return (PlannedMechanism("frequency", FREQUENCY_NORM, GaussianEvent(noise_multiplier)),)


def _release(
    private: PrivateImages,
    config: CurriculumConfig,
    mechanisms: tuple[PlannedMechanism, ...],
    public_dataset_size: int,
    generator: SecretGenerator,
) -> Tensors:
    features = query_frequencies(
        private.images,
        private.labels,
        mechanisms[0],
        num_classes=private.num_classes,
        public_dataset_size=public_dataset_size,
        resolution=_resolution(config),
        length_scale=config.lessons.frequency_length_scale,
        units=private.units,
        generator=generator,
    )
    return {"features": features}


def _prepare(
    tensors: Tensors, config: CurriculumConfig, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensors:
    side = _resolution(config)
    shape = (config.input_shape[0], side, side)
    scale = config.lessons.frequency_length_scale
    return draw_frequency_images(tensors["features"], shape=shape, length_scale=scale, generator=generator)


_TYPICAL_NORM = 0.6  # of the mean features of a class, typical; those of one image have norm 1


def _signal_to_noise(
    config: CurriculumConfig, mechanisms: tuple[PlannedMechanism, ...], images_per_class: float
) -> float:
    noise = mechanisms[0].noise_std / images_per_class * math.sqrt(2 * NUM_FREQUENCIES)
    return _TYPICAL_NORM / noise


FREQUENCY = Lesson(plan=_plan, release=_release, prepare=_prepare, draw=draw_rows, signal_to_noise=_signal_to_noise)
