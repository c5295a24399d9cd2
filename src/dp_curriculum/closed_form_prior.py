"""The best denoiser of released moments, in closed form. Imports torch and diffusers alone: it ships with models."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch.nn import functional


SIGMA_DATA = math.sqrt(1 / 3)  # standard deviation of pixels in [-1, 1], as for the network without a prior
MAX_VALUES = 12_288  # per image: 64 x 64 pixels in colour
MAX_CLAMPED_VALUES = 1024  # above it pixels are not clamped: a clamped denoiser is matrices of this side per class
TEXTURE_SHARE = 0.2  # of the variance that no released direction holds, drawn as texture; chosen on MNIST
SPREAD_FLOOR = 0.02  # of the mean squared error: the least that the network may say of a pixel, squared
SHIPPED_AS = "dp_curriculum"  # name of this file beside a prior: loaders take it where the package is missing
_LEVELS = torch.linspace(math.log(0.002), math.log(80.0), 32)  # ln(sigma) at which errors and corrections are kept
# Draws on which a prior measures itself, per level: of all classes if it is corrected, and the least per class.
_MEASURED_DRAWS, _LEAST_DRAWS = 1000, 24
_BAND_WIDTH = 2  # of the frequencies that are corrected together
_RIDGE = 1e-3  # of the least squares of a correction, relative: at low noise both of its parts are nearly known
_POOLED_DRAWS = 20  # as many draws of a class as the correction of all classes together counts for in its own
_MAX_INFLATION = 6.0  # of a released direction in one pixel, as a standard deviation
_HERMITE_ORDER, _QUADRATURE = 7, 81
_KNOWN_LEVELS = 64  # per class, of which what follows from them is kept
_COLOUR_BASIS = ((1, 1, 1), (1, 0, -1), (1, -2, 1))  # brightness and two differences, orthogonal
_COLOUR_POWER = (1.0, 0.1, 0.03)  # of texture in each: photos differ in brightness first
# Standard deviation of the logarithm of the contrast of a photo: a constant. Of 10,000 public photos it is 0.3.
_PHOTO_CONTRAST = 0.4
_CONTRASTS, _REACH = 9, 2.5  # at which a photo is denoised, and how far they go, in such deviations
_IMAGE_CHANNELS = (1, 3)  # any other number is that of latents of an autoencoder

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Latent:
    """
    A Gaussian z whose values outside [0, 1] are clamped: x = clamp(z).

    Shapes:
        mean: `(classes, D)`.
        factors: `(classes, D, rank)`.
        texture: `(classes, D)`, standard deviations per pixel of a texture with the spectrum of [`texture_power`].

    Where the clamp is not reckoned with, factors are `(classes, rank, rank)`, of the [`lowest`] coefficients, and the
    texture has a standard deviation per coefficient. There images differ in contrast, too: what an image differs by
    from its mean is a Gaussian times exp(t n - t²), n being a standard normal and t the number `contrast`. That leaves
    all covariances as they are.
    """

    mean: torch.Tensor
    factors: torch.Tensor
    texture: torch.Tensor
    contrast: float = 0.0


@dataclass(frozen=True)
class Components:
    """
    Several Gaussians per class, as affine maps of the normals n of its released factors F: the mean of the class plus
    F (offset + root n).

    Shapes:
        shares: `(classes, m)`, how often each is drawn.
        offsets: `(classes, m, rank)`.
        roots: `(classes, m, rank, rank)`.
    """

    shares: torch.Tensor
    offsets: torch.Tensor
    roots: torch.Tensor


class ClosedFormPrior(ModelMixin, ConfigMixin):
    r"""
    Denoiser of what the lesson `moments` released: in closed form, so that nothing is trained.

    An image of a class is a Gaussian whose values are clamped to [0, 1], such that mean and variance of each pixel are
    the released ones. Of that distribution it knows the posterior mean of an image under Gaussian noise, up to one
    approximation: what the other pixels say about a pixel is their best linear estimate. What that approximation does
    to each frequency is measured on images of its own, and taken back. A network adds what is not in the moments; see
    [`~ClosedFormPrior.denoise`].

    With more than `MAX_CLAMPED_VALUES` values, as photos have, whose pixels are seldom black or white, the Gaussian is
    taken as it is, in the frequencies of a cosine transform: there its denoiser is the Wiener filter. Latents of an
    autoencoder are taken in the same way, of any size; their channels count the same.

    Args:
        num_classes (`int`): Number of classes k.
        num_channels (`int`): Channels C: 1 or 3 of images, any other number of latents.
        sample_size (`int`): Side of the images, pixels; D = C · side² values.
        rank (`int`): Released directions per class.
        num_photos (`int`): Public images that it holds and draws; 0 where it draws Gaussian images.
        num_bands (`int`): Bands of frequencies in which the posterior mean is corrected; 0 of photos, whose filter is
            exact, and of priors that were saved before there were corrections.
        num_components (`int`): Gaussians per class m of which images are drawn. The posterior mean is that of one,
            with corrections that are measured on draws of all.

    Shapes:
        means: buffer `(k, C, side, side)`, in [0, 1].
        factors: buffer `(k, D, rank)`; a factor times its transpose is the released covariance. Of photos
            `(k, rank, rank)`, of their [`lowest`] coefficients.
        variances: buffer `(k,)`, of an image, summed over its values.
        errors: buffer `(levels,)`, mean squared error per value of its own images, in [-1, 1], by noise level.
        corrections: buffer `(k, levels, 2, num_bands)`: of the posterior mean less the mean of the class, and of the
            noisy image less the posterior mean, the shares that are added to the posterior mean.
        photos: buffer `(num_photos, C, H, W)`, bytes: public images that were moved to the released moments. Draws are
            these where there are any.
        photo_labels: buffer `(num_photos,)`, their classes.
        component_shares, component_offsets, component_roots: buffers, where m is above 1; see [`Components`].

    Privacy:
        Post-processing of two released queries, with components of three, which the ledger has charged.

    Raises:
        ValueError: If an image has more than `MAX_VALUES` values.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        num_classes: int,
        num_channels: int,
        sample_size: int,
        rank: int,
        num_photos: int = 0,
        num_bands: int = 0,
        num_components: int = 1,
    ) -> None:
        super().__init__()
        shape = (num_channels, sample_size, sample_size)
        num_values = math.prod(shape)
        if num_values > MAX_VALUES:
            raise ValueError(f"Expected num_channels * sample_size**2={num_values} to be at most {MAX_VALUES}.")
        self.register_buffer("means", torch.full((num_classes, *shape), 0.5))
        self.register_buffer("factors", torch.zeros(num_classes, num_values if is_clamped(shape) else rank, rank))
        self.register_buffer("variances", torch.zeros(num_classes))
        self.register_buffer("errors", torch.ones(len(_LEVELS)))
        if num_bands:
            self.register_buffer("corrections", torch.zeros(num_classes, len(_LEVELS), 2, num_bands))
        if num_photos:
            self.register_buffer("photos", torch.zeros(num_photos, *shape, dtype=torch.uint8))
            self.register_buffer("photo_labels", torch.zeros(num_photos, dtype=torch.int64))
        if num_components > 1:
            self.register_buffer("component_shares", torch.ones(num_classes, num_components) / num_components)
            self.register_buffer("component_offsets", torch.zeros(num_classes, num_components, rank))
            self.register_buffer("component_roots", torch.eye(rank).repeat(num_classes, num_components, 1, 1))
        self._latent: Latent | None = None
        self._drawn_latent: Latent | None = None
        self._posteriors: dict[int, _Posterior | _WienerFilter] = {}

    @classmethod
    def from_moments(
        cls,
        means: torch.Tensor,
        factors: torch.Tensor,
        variances: torch.Tensor,
        components: Components | None = None,
    ) -> ClosedFormPrior:
        """The prior of released moments; see the buffers for the shapes. It takes about a second per class."""
        shape = means.shape[1:]
        prior = cls(
            len(means),
            shape[0],
            shape[1],
            factors.shape[2],
            num_bands=corrected_bands(shape),
            num_components=1 if components is None else components.shares.shape[1],
        )
        if components is not None:
            for name, tensor in vars(components).items():
                getattr(prior, f"component_{name}").copy_(tensor)
        prior.means.copy_(means)
        prior.factors.copy_(factors)
        prior.variances.copy_(variances)
        prior._measure_itself()
        return prior.eval()

    def with_photos(self, photos: torch.Tensor, labels: torch.Tensor) -> ClosedFormPrior:
        """
        The same prior, which draws photos instead of Gaussian images.

        Args:
            photos (`torch.ByteTensor` of shape `(n, C, H, W)`): Public images with the moments of their classes.
            labels (`torch.LongTensor` of shape `(n,)`): Their classes; each occurs.

        Privacy:
            They have to be public, or post-processing of what was released: whoever gets the prior sees them.

        Raises:
            ValueError: If a class has no photo.
        """
        missing = set(range(self.num_classes)) - set(labels.tolist())
        if missing:
            raise ValueError(f"Expected photos of each class: there is none of class {min(missing)}.")
        sizes = self.config.num_channels, self.config.sample_size, self.config.rank
        counts = {name: self.config[name] for name in ("num_bands", "num_components")}
        prior = type(self)(self.num_classes, *sizes, num_photos=len(photos), **counts)
        prior.load_state_dict({**self.state_dict(), "photos": photos, "photo_labels": labels})
        return prior.to(self.means.device).eval()

    @property
    def num_classes(self) -> int:
        return int(self.config.num_classes)

    @torch.no_grad()
    def forward(
        self, noisy_images: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Posterior mean of an image, and how far off it may be.

        Args:
            noisy_images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1] plus noise of level `sigma`.
            sigma (`torch.Tensor` of shape `(B,)`): Noise levels.
            class_labels (`torch.LongTensor` of shape `(B,)`): Classes; `num_classes` is "no class".

        Returns:
            Two tensors `(B, C, H, W)`: the mean, and a standard deviation of each pixel, both in [-1, 1].
        """
        pixels, level = (noisy_images.flatten(1).float() + 1) / 2, sigma.view(-1, 1).float() / 2
        mean, variance = torch.empty_like(pixels), torch.empty_like(pixels)
        for label in class_labels.unique().tolist():
            rows = class_labels == label
            if label < self.num_classes:
                mean[rows], variance[rows] = self._denoised(label, pixels[rows], level[rows])
            else:
                mean[rows], variance[rows] = self._denoised_without_class(pixels[rows], level[rows])
        floor = SPREAD_FLOOR * self.error(sigma).view(-1, 1)
        spread = (4 * variance + floor).sqrt()
        return (2 * mean - 1).view_as(noisy_images).to(noisy_images), spread.view_as(noisy_images).to(noisy_images)

    def denoise(
        self, network: Network, noisy_images: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The denoiser D(x; sigma) = m + s · F(c_in x, m; c_noise), with mean m and spread s of the prior.

        Args:
            network (`Callable`): The network F: from inputs `(B, 2C, H, W)`, `c_noise` `(B,)` and classes `(B,)` to
                `(B, C, H, W)`.
            noisy_images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1] plus noise of level `sigma`.
            sigma (`torch.Tensor` of shape `(B,)`): Noise levels.
            class_labels (`torch.LongTensor` of shape `(B,)`): Classes; the last one of the network is "no class".

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32 also under autocast.
        """
        mean, spread = self(noisy_images, sigma, class_labels)
        level = sigma.view(-1, 1, 1, 1)
        inputs = torch.cat([noisy_images / (level**2 + SIGMA_DATA**2).sqrt(), mean], dim=1)
        output = network(inputs, sigma.log() / 4, class_labels)
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        return mean + spread * output

    def error(self, sigma: torch.Tensor) -> torch.Tensor:
        """Mean squared error per value of the posterior mean, in [-1, 1], at noise levels `(B,)`: the loss at zero."""
        return _at_level(self.errors.float().log(), sigma).exp()

    @torch.no_grad()
    def log_likelihoods(self, noisy_images: torch.Tensor, sigma: float) -> torch.Tensor:
        """
        Log densities of images under each class, up to a constant per row.

        Args:
            noisy_images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1] plus noise of level `sigma`.
            sigma (`float`): The noise level.

        Returns:
            `torch.Tensor` of shape `(B, num_classes)`.
        """
        pixels = (noisy_images.flatten(1).float() + 1) / 2
        level = pixels.new_full((len(pixels), 1), sigma / 2)
        return self._log_likelihoods(pixels, level)

    def draw(self, class_labels: torch.Tensor, normals: torch.Tensor, texture: torch.Tensor) -> torch.Tensor:
        """
        Images `(B, C, H, W)` in [0, 1], from standard normals `(B, rank)` and `(B, C, H, W)`. With photos, the first
        value of `texture` says which; with components, of which one it is drawn.

        Raises:
            ValueError: If a label is no class.
        """
        if self.config.num_photos:
            return self._choose_photos(class_labels, texture.flatten(1)[:, 0]).to(texture)
        rows = self._choose_components(class_labels, texture.flatten(1)[:, 0])
        drawn = draw_latent(self._drawn_gaussian(), rows, normals.double().cpu(), texture.double().cpu())
        return drawn.to(texture)

    def _choose_components(self, class_labels: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
        """Rows `(B,)` of [`_drawn_gaussian`] for labels `(B,)`, by normals `(B,)` that a texture leaves free."""
        class_labels, count = class_labels.cpu(), self.config.num_components
        _check_labels(class_labels, self.num_classes)
        if count == 1:
            return class_labels
        ends = self.component_shares.double().cpu()[class_labels].cumsum(1)
        places = torch.special.ndtr(normals.double().cpu())[:, None]
        return class_labels * count + (places * ends[:, -1:] > ends[:, :-1]).sum(1)

    def _choose_photos(self, class_labels: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
        """A photo `(C, H, W)` in [0, 1] for each label, by normals `(B,)`."""
        labels, shares = self.photo_labels, torch.special.ndtr(normals.double())
        rows = torch.empty(len(normals), dtype=torch.int64)
        for label in class_labels.unique().tolist():
            of_class, wanted = (labels == label).nonzero()[:, 0].cpu(), (class_labels == label).cpu()
            if not len(of_class):
                raise ValueError(f"Expected class_labels to be classes, from 0 to {self.num_classes - 1}.")
            places = (shares[wanted.to(shares.device)] * len(of_class)).long().clamp_max(len(of_class) - 1)
            rows[wanted] = of_class[places.cpu()]
        return self.photos[rows.to(labels.device)].float() / 255

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the prior as in diffusers, and this file beside it: a loader without this package needs it."""
        super().save_pretrained(save_directory, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / f"{SHIPPED_AS}.py")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # What follows from the buffers is where they are.
        self._latent, self._drawn_latent, self._posteriors = None, None, {}
        return super()._apply(fn, recurse)

    def _latent_gaussian(self) -> Latent:
        """The latent Gaussian, float64, made at first use."""
        if self._latent is None:
            self._latent = fit_latent(self.means.cpu(), self.factors.cpu(), self.variances.cpu())
        return self._latent

    def _drawn_gaussian(self) -> Latent:
        """The latent Gaussians of all components, of one class after the other; float64, made at first use."""
        if self.config.num_components == 1:
            return self._latent_gaussian()
        if self._drawn_latent is None:
            components = released_components(dict(self.named_buffers()))
            self._drawn_latent = fit_components(self.means, self.factors, self.variances, components)
        return self._drawn_latent

    def _posterior(self, label: int) -> _Posterior | _WienerFilter:
        """The posterior of one class, made at first use."""
        if label not in self._posteriors:
            latent, shape, device = self._latent_gaussian(), self.means.shape[1:], self.means.device
            way = _Posterior if is_clamped(shape) else _WienerFilter
            self._posteriors[label] = way.of(latent, label, shape, device)
        return self._posteriors[label]

    def _denoised(self, label: int, noisy: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and variance `(B, D)` of a class, of noisy images `(B, D)`, in [0, 1]."""
        mean, variance = self._posterior(label).denoise(noisy, level)
        if self.config.num_bands:
            sigma = 2 * (level[:1] if _is_same(level) else level).flatten()
            shares = _at_level(self.corrections[label].float(), sigma)
            mean = self._corrected(mean, noisy, self.means[label].float().flatten(), shares)
        return mean, variance

    def _corrected(
        self, mean: torch.Tensor, noisy: torch.Tensor, means: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Posterior means `(B, D)` with shares `(B or 1, 2, num_bands)` of what [`_in_frequencies`] has."""
        known, seen = self._in_frequencies(mean, noisy, means)
        shares = shares[:, :, _bands(self.config.sample_size).to(shares.device)]
        change = shares[:, :1] * known + shares[:, 1:] * seen
        return (mean + to_pixels(change).flatten(1)).clamp(0, 1)

    def _in_frequencies(
        self, mean: torch.Tensor, noisy: torch.Tensor, means: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients `(B, C, H, W)` of a posterior mean less that of its class, and of a noisy image less it."""
        shape = self.means.shape[1:]
        return to_frequencies((mean - means).unflatten(1, shape)), to_frequencies((noisy - mean).unflatten(1, shape))

    def _denoised_without_class(self, noisy: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and variance `(B, D)` where the class is not known."""
        mean, square = torch.zeros_like(noisy), torch.zeros_like(noisy)
        for label, weight in enumerate(self._log_likelihoods(noisy, level).softmax(1).T):
            own_mean, own_variance = self._denoised(label, noisy, level)
            mean += weight[:, None] * own_mean
            square += weight[:, None] * (own_variance + own_mean.square())
        return mean, (square - mean.square()).clamp_min(0)

    def _log_likelihoods(self, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Log densities `(B, num_classes)` of noisy images `(B, D)` in [0, 1], up to a constant per row."""
        posteriors = [self._posterior(label) for label in range(self.num_classes)]
        return torch.stack([posterior.log_likelihood(noisy, level) for posterior in posteriors], dim=1)

    @torch.no_grad()
    def _measure_itself(self) -> None:
        """Corrections, and the error that is left, at each level of `_LEVELS`, on images of its own."""
        generator = torch.Generator().manual_seed(0)
        per_class = max(_LEAST_DRAWS, _MEASURED_DRAWS // self.num_classes if self.config.num_bands else 0)
        labels = torch.arange(self.num_classes).repeat_interleave(per_class)
        shape = (len(labels), *self.means.shape[1:])
        rank = self.factors.shape[2]
        drawn = self.draw(
            labels,
            torch.randn(len(labels), rank, generator=generator),
            torch.randn(shape, generator=generator),
        )
        clean, means = drawn.flatten(1).float(), self.means.flatten(1).float()
        for index, sigma in enumerate(_LEVELS.float().exp()):
            noisy = clean + sigma / 2 * torch.randn(clean.shape, generator=generator, dtype=torch.float32)
            mean = torch.empty_like(clean)
            for label in range(self.num_classes):
                rows = labels == label
                mean[rows], _ = self._posterior(label).denoise(noisy[rows], (sigma / 2).expand(per_class, 1))
            if self.config.num_bands:
                known, seen = self._in_frequencies(mean, noisy, means[labels])
                missing = to_frequencies((clean - mean).unflatten(1, shape[1:]))
                self.corrections[:, index] = self._found_corrections(missing, known, seen)
                mean = self._corrected(mean, noisy, means[labels], self.corrections[labels, index].float())
            self.errors[index] = (2 * (mean - clean)).square().mean().clamp_min(1e-6)

    def _found_corrections(self, missing: torch.Tensor, known: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """
        Shares `(k, 2, num_bands)` of `known` and `seen` that come nearest to `missing`, by least squares.

        What is left has nothing in common with the posterior mean or the noisy image in any band, as it has to be of
        the best denoiser. A sampler depends on it: the power of a band grows on its way by the part that they share.
        Classes differ in it. Each has shares of its own, which a few draws' worth of all classes hold together.

        Args:
            missing (`torch.Tensor` of shape `(k * n, C, H, W)`): Images less posterior means, n per class, one class
                after the other, in frequencies.
            known (`torch.Tensor` of the same shape): Posterior means less those of the classes.
            seen (`torch.Tensor` of the same shape): Noisy images less posterior means.
        """
        num_classes, bands = self.num_classes, _bands(self.config.sample_size)
        found = torch.zeros(num_classes, 2, self.config.num_bands, dtype=torch.float64)
        for band in range(self.config.num_bands):
            both = torch.stack([part[..., bands == band].double() for part in (known, seen)])
            both = both.reshape(2, num_classes, -1).transpose(0, 1)  # (k, 2, values of a class)
            products = both @ both.transpose(1, 2)
            target = (both @ missing[..., bands == band].double().reshape(num_classes, -1, 1))[:, :, 0]
            products += torch.diag_embed(_RIDGE * products.diagonal(dim1=1, dim2=2) + 1e-12)
            share = _POOLED_DRAWS / (len(missing) / num_classes)
            pooled = torch.linalg.solve(products.sum(0), target.sum(0))
            held = share * products.mean(0)
            found[:, :, band] = torch.linalg.solve(products + held, target + held @ pooled)
        return found


def _at_level(values: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Values `(levels, ...)` of the levels of `_LEVELS`, between them at noise levels `(B,)`: `(B, ...)`."""
    levels = _LEVELS.to(values.device)
    place = ((sigma.float().log() - levels[0]) / (levels[1] - levels[0])).clamp(0, len(levels) - 1.001)
    lower = place.long()
    return torch.lerp(values[lower], values[lower + 1], (place - lower).view(-1, *[1] * (values.dim() - 1)))


def _is_same(level: torch.Tensor) -> bool:
    """True if all rows have the same noise level, as in a sampler."""
    return bool((level == level[:1]).all())


# --- the latent Gaussian -------------------------------------------------------------------------------------------


def fit_latent(means: torch.Tensor, factors: torch.Tensor, variances: torch.Tensor) -> Latent:
    r"""
    The Gaussian whose clamped values have the released moments.

    The released directions hold a part of the variance. The rest is where noise hid it: a small share of it becomes
    texture, and what is left of it makes the released directions larger. No pixel with values in [0, 1] and mean m can
    have a variance above m (1 - m) (Bhatia and Davis 2000), so that none is where a class is always black or white.

    Args:
        means (`torch.Tensor` of shape `(k, C, H, W)`): Released means.
        factors (`torch.Tensor` of shape `(k, D, rank)`): Released factors of the covariances.
        variances (`torch.Tensor` of shape `(k,)`): Released sums of the variances of all values.
    """
    shape = means.shape[1:]
    if not is_clamped(shape):
        return _free_latent(means, factors, variances)
    mean = means.flatten(1).double().clamp(1e-4, 1 - 1e-4)
    smooth = factors.double().square().sum(2).clamp_min(1e-9)
    largest = mean * (1 - mean)
    # Pixel variances: what is released, up to the bound, then the rest wherever there is room.
    base = torch.minimum(smooth, largest)
    room = (largest - smooth).clamp_min(0)
    excess = (variances.double() - base.sum(1)).clamp_min(0)
    wanted = base + room * (excess / room.sum(1).clamp_min(1e-12)).clamp_max(1)[:, None]
    envelope = (largest / largest.mean(1, keepdim=True)).clamp_min(0.02)
    per_unit = _texture_covariance(tuple(shape)).diagonal()
    texture = envelope * per_unit
    unresolved = (variances.double() - smooth.sum(1)).clamp_min(0)
    texture = texture * (TEXTURE_SHARE * unresolved / texture.sum(1))[:, None]
    kept = torch.minimum(texture, 0.95 * wanted)
    inflation = ((wanted - kept) / smooth).sqrt().clamp_max(_MAX_INFLATION)
    latent_mean, stretch = _unclamped(mean, wanted)
    return Latent(
        mean=latent_mean,
        factors=factors.double() * (stretch * inflation)[:, :, None],
        texture=stretch * (kept / per_unit).sqrt(),
    )


def released_components(tensors: Mapping[str, torch.Tensor]) -> Components:
    """Components among released tensors, or the buffers of a prior: their names begin with `component_`."""
    return Components(*(tensors[f"component_{field.name}"] for field in fields(Components)))


def fit_components(
    means: torch.Tensor, factors: torch.Tensor, variances: torch.Tensor, components: Components
) -> Latent:
    """The Gaussians of all components, one class after the other; each class has its released variance."""
    means, factors, variances = (moments.double().cpu() for moments in (means, factors, variances))
    shares, offsets, roots = (tensor.double().cpu() for tensor in vars(components).values())
    own = torch.einsum("kdr,kmrs->kmds", factors, roots)
    shifts = torch.einsum("kdr,kmr->kmd", factors, offsets)
    held = own.square().sum((2, 3))
    rest = (variances - (shares * (held + shifts.square().sum(2))).sum(1)).clamp_min(0)
    centres = means[:, None] + shifts.unflatten(2, means.shape[1:])
    return fit_latent(centres.flatten(0, 1), own.flatten(0, 1), (rest[:, None] + held).flatten())


def is_clamped(shape: Sequence[int]) -> bool:
    """True if what a clamp does to the moments of images of this shape is reckoned with; not so for photos."""
    return math.prod(shape) <= MAX_CLAMPED_VALUES and not is_latent(shape)


def corrected_bands(shape: Sequence[int]) -> int:
    """Bands of frequencies in which the posterior mean of images of this shape is corrected: none of photos."""
    return math.ceil(shape[-1] / _BAND_WIDTH) if is_clamped(shape) else 0


def is_latent(shape: Sequence[int]) -> bool:
    """True if this is the shape of latents, whose channels are neither brightness nor colours."""
    return shape[0] not in _IMAGE_CHANNELS


def _free_latent(means: torch.Tensor, factors: torch.Tensor, variances: torch.Tensor) -> Latent:
    """
    The Gaussian of the released moments as they are.

    The variance that no direction holds is texture. It fills the spectrum of the directions up to that of
    [`texture_power`], times the number with which all variances add up to the released one.
    """
    shape = means.shape[1:]
    held, wanted = means.new_zeros(means.flatten(1).shape, dtype=torch.float64), variances.double()[:, None]
    held[:, lowest(shape, factors.shape[1])] = factors.double().square().sum(2)
    power = texture_power(shape).flatten()
    low, high = torch.zeros_like(wanted), wanted / power.sum() + (held / power.clamp_min(1e-12)).amax(1, keepdim=True)
    for _ in range(60):  # by halves: the sum grows with the number
        middle = (low + high) / 2
        is_much = torch.maximum(middle * power, held).sum(1, keepdim=True) > wanted
        low, high = torch.where(is_much, low, middle), torch.where(is_much, middle, high)
    texture = (low * power - held).clamp_min(0).sqrt()
    return Latent(means.flatten(1).double(), factors.double(), texture, contrast_of(shape))


def contrast_of(shape: Sequence[int]) -> float:
    """Standard deviation of the logarithm of the contrast of images of this shape: 0 but for photos."""
    return 0.0 if is_clamped(shape) or is_latent(shape) else _PHOTO_CONTRAST


def draw_latent(
    latent: Latent, class_labels: torch.Tensor, normals: torch.Tensor, texture: torch.Tensor
) -> torch.Tensor:
    """Clamped draws `(B, C, H, W)` of a latent Gaussian; see [`~ClosedFormPrior.draw`]."""
    _check_labels(class_labels, len(latent.mean))
    drawn = latent.mean[class_labels].clone()
    directions = drawn.new_zeros(len(drawn), latent.factors.shape[1])
    for label in class_labels.unique().tolist():
        rows = class_labels == label
        directions[rows] = normals[rows].to(drawn) @ latent.factors[label].T
    noise, scales = texture.to(drawn), latent.texture[class_labels]
    if is_clamped(texture.shape[1:]):
        drawn += directions + scales * _textured(noise).flatten(1)
    else:
        coefficients = noise.flatten(1) * scales
        coefficients[:, lowest(texture.shape[1:], directions.shape[1])] += directions
        # A texture has no mean, so that its first normal is free to be that of the contrast.
        coefficients *= (latent.contrast * noise.flatten(1)[:, :1] - latent.contrast**2).exp()
        drawn += to_pixels(coefficients.view_as(noise)).flatten(1)
    return drawn.clamp(0, 1).view_as(texture)


def _check_labels(class_labels: torch.Tensor, num_classes: int) -> None:
    if class_labels.numel() and not 0 <= int(class_labels.min()) <= int(class_labels.max()) < num_classes:
        raise ValueError(f"Expected class_labels to be classes, from 0 to {num_classes - 1}.")


def _unclamped(mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of a Gaussian, and factor of its standard deviation, whose clamp to [0, 1] has this mean and variance."""
    variance = torch.minimum(variance, 0.95 * mean * (1 - mean)).clamp_min(1e-8)
    deviation = variance.sqrt()
    centre, spread = mean.clone(), deviation.clone()
    for _ in range(300):  # a fixed point: both are nearly monotonous in what they are moved by
        _, clamped_variance, _ = _clamped_moments(centre, spread)
        spread = spread * (variance / clamped_variance.clamp_min(1e-12)).pow(0.25).clamp(0.8, 1.25)
        spread = torch.minimum(spread, _MAX_INFLATION * deviation)
        clamped_mean, _, inside = _clamped_moments(centre, spread)
        centre = centre + 0.5 * (mean - clamped_mean).clamp(-0.5, 0.5) / inside.clamp_min(0.1)
        centre = torch.minimum(torch.maximum(centre, -3 * spread), 1 + 3 * spread)
    return centre, spread / deviation


def _clamped_moments(mean: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance of clamp(N(mean, deviation²), 0, 1), and the probability that nothing is clamped."""
    low, high = -mean / deviation, (1 - mean) / deviation
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    above = torch.special.ndtr(-high)
    at_low, at_high = _density(low), _density(high)
    first = mean * inside + deviation * (at_low - at_high) + above
    second = (mean**2 + deviation**2) * inside + above
    second = second + 2 * mean * deviation * (at_low - at_high) + deviation**2 * (low * at_low - high * at_high)
    return first, (second - first**2).clamp_min(0), inside


def _density(value: torch.Tensor) -> torch.Tensor:
    return torch.exp(-value * value / 2) / math.sqrt(2 * math.pi)


# --- texture -------------------------------------------------------------------------------------------------------


def cosine_transform(size: int) -> torch.Tensor:
    """The orthonormal DCT-II of `size` values, float64, one frequency per row."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (place[None] + 0.5) * place[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def frequencies(size: int) -> torch.Tensor:
    """Radial frequency of each coefficient of a picture, `(size, size)`, in half cycles per side."""
    place = torch.arange(size, dtype=torch.float64, device="cpu")
    return torch.hypot(place[:, None], place[None])


def lowest(shape: Sequence[int], count: int) -> torch.Tensor:
    """
    Places `(count,)` of the lowest frequencies among the coefficients of images of shape `(C, H, H)`, in ascending
    order. Differences of colour count as twice as fine as brightness, which is what JPEG makes of them too. The
    channels of latents count the same.
    """
    return fineness(shape).flatten().argsort(stable=True)[:count].sort().values


def fineness(shape: Sequence[int]) -> torch.Tensor:
    """Frequency of each coefficient `(C, H, H)`, in half cycles per side; twice that of differences of colour."""
    if is_latent(shape):
        return frequencies(shape[-1]).repeat(shape[0], 1, 1)
    return torch.stack([frequencies(shape[-1]) * scale for scale in (1, 2, 2)[: shape[0]]])


def texture_power(shape: Sequence[int]) -> torch.Tensor:
    """
    Variance of each coefficient of a texture of shape `(C, H, H)`: 1 / f², as natural images have it; no mean. Latents
    are whiter, 1 / f: an autoencoder takes away what neighbours have in common.
    """
    falloff = frequencies(shape[-1])
    power = 1 / (1 + (falloff if is_latent(shape) else falloff.square()))
    power[0, 0] = 0
    if is_latent(shape):
        return power.repeat(shape[0], 1, 1)
    return torch.stack([weight * power for weight in _COLOUR_POWER[: shape[0]]])


def to_frequencies(images: torch.Tensor) -> torch.Tensor:
    """Coefficients `(..., C, H, H)` of images in an orthonormal basis: cosines, and brightness and two differences."""
    transform = cosine_transform(images.shape[-1]).to(images)
    return _mixed_channels(transform @ images @ transform.T, is_inverse=False)


def to_pixels(coefficients: torch.Tensor) -> torch.Tensor:
    """The images `(..., C, H, H)` of such coefficients."""
    transform = cosine_transform(coefficients.shape[-1]).to(coefficients)
    return transform.T @ _mixed_channels(coefficients, is_inverse=True) @ transform


def _mixed_channels(values: torch.Tensor, *, is_inverse: bool) -> torch.Tensor:
    if values.shape[-3] != 3:
        return values
    basis = _colour_basis().to(values)
    return torch.einsum("kc,...chw->...khw", basis.T if is_inverse else basis, values)


def _colour_basis() -> torch.Tensor:
    return functional.normalize(torch.tensor(_COLOUR_BASIS, dtype=torch.float64), dim=1)


@functools.lru_cache(maxsize=2)
def _bands(side: int) -> torch.Tensor:
    """The band `(H, H)` of each coefficient; the corners, which few have, belong to the last one."""
    return (frequencies(side) / _BAND_WIDTH).long().clamp_max(math.ceil(side / _BAND_WIDTH) - 1)


@functools.lru_cache(maxsize=2)
def _texture_covariance(shape: tuple[int, ...]) -> torch.Tensor:
    """Covariance `(D, D)` of a texture of shape `(C, H, H)`, float64, not to be changed."""
    transform = cosine_transform(shape[-1])
    cosines = torch.kron(transform, transform)
    basis = torch.kron(_colour_basis(), cosines) if shape[0] == 3 else cosines
    return (basis.T * texture_power(shape).flatten()) @ basis


def _textured(normals: torch.Tensor) -> torch.Tensor:
    """Standard normals `(B, C, H, H)` to textures with the covariance of [`_texture_covariance`]."""
    return to_pixels(normals * texture_power(normals.shape[1:]).sqrt().to(normals))


# --- the posterior -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Posterior:
    """
    One class of a prior, prepared for denoising: everything in the eigenvectors of the covariance of x.

    Shapes:
        latent_mean, clamped_mean, latent_variance, eigenvalues: `(D,)`.
        vectors: `(D, D)`, eigenvectors in columns.
        cross: `(D, D)`, covariance of z with x, times the eigenvectors.
        known: What follows from a noise level alone, by level: a sampler comes to the same ones with each batch.
    """

    latent_mean: torch.Tensor
    clamped_mean: torch.Tensor
    latent_variance: torch.Tensor
    eigenvalues: torch.Tensor
    vectors: torch.Tensor
    cross: torch.Tensor
    known: dict[float, tuple[torch.Tensor, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, latent: Latent, label: int, shape: torch.Size, device: torch.device) -> _Posterior:
        mean, factor, scale = latent.mean[label], latent.factors[label], latent.texture[label]
        covariance = factor @ factor.T + scale[:, None] * _texture_covariance(tuple(shape)) * scale
        variance = covariance.diagonal().clamp_min(1e-10)
        deviation = variance.sqrt()
        correlation = covariance / deviation[:, None] / deviation
        coefficients, clamped_variance = _hermite(mean, deviation)
        # Mehler's formula: Cov(f(z_i), g(z_j)) is a power series in their correlation.
        clamped = torch.zeros_like(covariance)
        for order in range(1, _HERMITE_ORDER + 1):
            clamped += coefficients[order][:, None] * coefficients[order] * correlation**order
        clamped += torch.diag((clamped_variance - clamped.diagonal()).clamp_min(0) + 1e-6)
        eigenvalues, vectors = torch.linalg.eigh(clamped)
        cross = (correlation * deviation[:, None] * coefficients[1]) @ vectors
        parts = (mean, coefficients[0], variance, eigenvalues.clamp_min(1e-7), vectors, cross)
        mean, clamped_mean, variance, eigenvalues, vectors, cross = (part.float().to(device) for part in parts)
        return cls(mean, clamped_mean, variance, eigenvalues, vectors, cross)

    def denoise(self, noisy: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Posterior mean and variance `(B, D)` of x, given x plus noise of standard deviation `level` `(B, 1)`.

        A pixel's own noisy value is taken out of the linear estimate of z, and comes in again exactly.
        """
        inverse, share, variance = self._at(level)
        residual = ((noisy - self.clamped_mean) @ self.vectors) * inverse
        estimate = self.latent_mean + residual @ self.cross.T - share * (residual @ self.vectors.T)
        return clamped_posterior(noisy, level**2, estimate, variance)

    def _at(self, level: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inverse eigenvalues, share of a pixel in its own estimate, and variance without it: each `(B or 1, D)`."""
        if _is_same(level):
            level = level[:1]
            if float(level) in self.known:
                return self.known[float(level)]
        inverse = 1 / (self.eigenvalues + level**2)
        own = inverse @ self.vectors.square().T
        variance = self.latent_variance - inverse @ self.cross.square().T
        shared = inverse @ (self.cross * self.vectors).T
        found = inverse, shared / own, (variance + shared.square() / own).clamp_min(1e-5)
        if len(level) == 1 and len(self.known) < _KNOWN_LEVELS:
            self.known[float(level)] = found
        return found

    def log_likelihood(self, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Log density `(B,)` of noisy images, as if they were Gaussian, up to a constant."""
        variance = self.eigenvalues + level**2
        residual = (noisy - self.clamped_mean) @ self.vectors
        return -0.5 * (residual.square() / variance + variance.log()).sum(1)


@dataclass(frozen=True)
class _WienerFilter:
    """
    One class of a prior whose pixels are not clamped. Of the coefficients of an image, a block of low ones is
    correlated, and is filtered in its eigenvectors; the others are independent, and each is filtered for itself.
    That is done at several contrasts, and what comes out is weighed by how likely each of them is.

    Shapes:
        shape: `(C, H, H)`.
        mean: `(D,)`.
        block: `(m,)`, the correlated coefficients among all D.
        vectors: `(m, m)`, eigenvectors in columns.
        eigenvalues: `(m,)`.
        powers: `(D,)`, variances of the independent coefficients; those of the block are not used.
        contrasts, log_weights: `(n,)`, squared factors of all variances, and how likely they are ahead of an image.
    """

    shape: torch.Size
    mean: torch.Tensor
    block: torch.Tensor
    vectors: torch.Tensor
    eigenvalues: torch.Tensor
    powers: torch.Tensor
    contrasts: torch.Tensor
    log_weights: torch.Tensor

    @classmethod
    def of(cls, latent: Latent, label: int, shape: torch.Size, device: torch.device) -> _WienerFilter:
        factor, powers = latent.factors[label], latent.texture[label].square().clamp_min(1e-8)
        block = lowest(shape, len(factor))
        covariance = factor @ factor.T + torch.diag(powers[block])
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        normals = torch.linspace(-_REACH, _REACH, _CONTRASTS) if latent.contrast else torch.zeros(1)
        contrasts = (2 * (latent.contrast * normals - latent.contrast**2)).exp()
        log_weights = (-(normals**2) / 2).log_softmax(0)
        parts = (latent.mean[label], vectors, eigenvalues.clamp_min(1e-8), powers, contrasts, log_weights)
        mean, vectors, eigenvalues, powers, contrasts, log_weights = (part.float().to(device) for part in parts)
        return cls(shape, mean, block.to(device), vectors, eigenvalues, powers, contrasts, log_weights)

    def denoise(self, noisy: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Posterior mean and variance `(B, D)` of x, given x plus noise of standard deviation `level` `(B, 1)`.

        The variance is the average over pixels. The mean is moved into [0, 1], where every image is.
        """
        coefficients, own = self._split(noisy)
        noise = level.square()
        weights = self._log_likelihoods(coefficients, own, noise).softmax(1)
        low, high = torch.zeros_like(own), torch.zeros_like(coefficients)
        square = torch.zeros_like(noise)  # of the mean at one contrast, on average over contrasts
        for weight, contrast in zip(weights.T[:, :, None], self.contrasts):
            low_gain, high_gain = self._gains(contrast, noise)
            low += weight * low_gain
            high += weight * high_gain
            square += weight * (own * low_gain).square().sum(1, keepdim=True)
            square += weight * (coefficients * high_gain).square().sum(1, keepdim=True)
        square -= (own * low).square().sum(1, keepdim=True) + (coefficients * high).square().sum(1, keepdim=True)
        filtered = (coefficients * high).index_copy(1, self.block, (own * low) @ self.vectors.T)
        mean = self.mean + to_pixels(filtered.unflatten(1, self.shape)).flatten(1)
        left = noise * (low.sum(1, keepdim=True) + high.sum(1, keepdim=True)) + square.clamp_min(0)
        return mean.clamp(0, 1), (left / noisy.shape[1]).expand_as(noisy)

    def log_likelihood(self, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Log density `(B,)` of noisy images, up to a constant."""
        return self._log_likelihoods(*self._split(noisy), level.square()).logsumexp(1)

    def _gains(self, contrast: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share that is kept of the block `(B, m)`, and of all coefficients `(B, D)`: of those of the block 0."""
        low, high = contrast * self.eigenvalues, contrast * self.powers
        return low / (low + noise), (high / (high + noise)).index_fill(1, self.block, 0.0)

    def _log_likelihoods(self, coefficients: torch.Tensor, own: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Log density `(B, n)` together with each contrast, up to a constant."""
        found = []
        for contrast, log_weight in zip(self.contrasts, self.log_weights):
            low, high = contrast * self.eigenvalues + noise, contrast * self.powers + noise
            terms = (coefficients.square() / high + high.log()).index_fill(1, self.block, 0.0)
            found.append(log_weight - 0.5 * (terms.sum(1) + (own.square() / low + low.log()).sum(1)))
        return torch.stack(found, dim=1)

    def _split(self, noisy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All coefficients `(B, D)` of what differs from the mean, and those of the block in its eigenvectors."""
        coefficients = to_frequencies((noisy - self.mean).unflatten(1, self.shape)).flatten(1)
        return coefficients, coefficients[:, self.block] @ self.vectors


def _hermite(mean: torch.Tensor, deviation: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Coefficients `(D,)` of clamp(z) in normalized Hermite polynomials of z, and its variance."""
    # Gauss-Hermite nodes of the standard normal, from the eigenvalues of the Jacobi matrix (Golub and Welsch 1969).
    off = torch.arange(1, _QUADRATURE, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square()
    values = (mean[:, None] + deviation[:, None] * nodes).clamp(0, 1)
    previous, current = torch.zeros_like(nodes), torch.ones_like(nodes)
    coefficients = []
    for order in range(_HERMITE_ORDER + 1):
        coefficients.append(values @ (weights * current))
        following = (nodes * current - math.sqrt(order) * previous) / math.sqrt(order + 1)
        previous, current = current, following
    variance = (values - coefficients[0][:, None]).square() @ weights
    return coefficients, variance


def clamped_posterior(
    noisy: torch.Tensor, noise_variance: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Posterior mean and variance of clamp(z, 0, 1) given y = clamp(z, 0, 1) + noise, each value for itself.

    Three things may have happened: z was below 0, above 1, or between. The posterior is a mixture of two points and a
    truncated Gaussian.

    Args:
        noisy (`torch.Tensor`): y.
        noise_variance (`torch.Tensor`): Of the noise, positive.
        mean (`torch.Tensor`): Of z.
        variance (`torch.Tensor`): Of z.
    """
    deviation = variance.sqrt()
    log_below = torch.special.log_ndtr(-mean / deviation) - noisy**2 / (2 * noise_variance)
    log_above = torch.special.log_ndtr((mean - 1) / deviation) - (noisy - 1) ** 2 / (2 * noise_variance)
    total = variance + noise_variance
    centre = (mean * noise_variance + noisy * variance) / total
    width = (variance * noise_variance / total).sqrt()
    low, high = -centre / width, (1 - centre) / width
    # The log of ndtr(high) - ndtr(low), on the side on which both are small.
    flipped = low > 0
    larger = torch.special.log_ndtr(torch.where(flipped, -low, high))
    smaller = torch.special.log_ndtr(torch.where(flipped, -high, low))
    log_mass = larger + torch.log1p(-torch.exp((smaller - larger).clamp_max(-1e-7)))
    log_between = log_mass - (noisy - mean) ** 2 / (2 * total) + 0.5 * torch.log(noise_variance / total)
    at_low = torch.exp((_log_density(low) - log_mass).clamp_max(30))
    at_high = torch.exp((_log_density(high) - log_mass).clamp_max(30))
    inner = (centre + width * (at_low - at_high)).clamp(0, 1)
    inner_variance = 1 + low * at_low - high * at_high - (at_low - at_high) ** 2
    inner_variance = width**2 * inner_variance.clamp(0, 1)
    _, between, above = torch.stack([log_below, log_between, log_above]).softmax(0)
    posterior = between * inner + above
    return posterior, (between * (inner_variance + inner**2) + above - posterior**2).clamp_min(0)


def _log_density(value: torch.Tensor) -> torch.Tensor:
    return -value * value / 2 - 0.5 * math.log(2 * math.pi)
