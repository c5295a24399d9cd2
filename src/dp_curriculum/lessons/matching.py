"""Public photos brought to the released moments: each class gets those that suit it best, moved to its Gaussian."""

from __future__ import annotations

import torch

from dp_curriculum.closed_form_prior import ClosedFormPrior, fit_latent, lowest, to_frequencies, to_pixels
from dp_curriculum.data.images import to_unit_range


# Tried on CIFAR-10 with Tiny-ImageNet, where a level of 0.5 made no difference.
_LEVEL = 0.2  # noise at which photos are compared with classes: finer detail says more of the camera than of the class
_SHARE, _LEAST = 0.5, 500  # of the public images that all classes take together, and images of one class at the least
_MOST_BYTES = 2**26  # of all that is kept: it lies in the model
_AT_ONCE = 2000


def match_moments(images: torch.Tensor, prior: ClosedFormPrior) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Photos of each class made of public images, with the mean and the covariance that were released for the class.

    A class takes the images that are likelier under its own Gaussian than under those of the others. They are moved by
    the linear map of optimal transport between Gaussians: the nearest images that have the released moments. What
    is not Gaussian in a photo, its edges and things, is that of the public images.

    Args:
        images (`torch.ByteTensor` of shape `(M, C, H, W)`): Public images.
        prior ([`ClosedFormPrior`]): The released moments, of photos or latents, which are not clamped.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Images `(n, C, H, W)`, bytes, and their classes `(n,)`.

    Privacy:
        Post-processing of the released moments. No private image is read, nothing is spent.

    Reference:
        Map between Gaussians: Peyré and Cuturi, "Computational Optimal Transport", arXiv 1803.00567, chapter 2.
    """
    latent = fit_latent(prior.means.cpu(), prior.factors.cpu(), prior.variances.cpu())
    shape, block = images.shape[1:], lowest(images.shape[1:], latent.factors.shape[1])
    low = [_coefficients(part)[:, block] for part in images.split(_AT_ONCE)]
    spread = torch.cat(low).T.cov(correction=0)
    means = to_frequencies(latent.mean.view(-1, *shape)).flatten(1)
    matched, labels = [], []
    for label, rows in enumerate(_suited(images, prior)):
        own = _coefficients(images[rows])
        powers = latent.texture[label].square()
        target = latent.factors[label] @ latent.factors[label].T + torch.diag(powers[block])
        moved = means[label] + _moved(own - own.mean(0), block, spread, target, powers)
        matched.append(to_pixels(moved.view(-1, *shape)).clamp(0, 1).mul(255).round().to(torch.uint8))
        labels.append(torch.full((len(rows),), label))
    return torch.cat(matched), torch.cat(labels)


def _coefficients(images: torch.Tensor) -> torch.Tensor:
    """Frequencies `(n, D)` of images, float64."""
    return to_frequencies(to_unit_range(images.cpu()).double()).flatten(1)


def _suited(images: torch.Tensor, prior: ClosedFormPrior) -> list[torch.Tensor]:
    """Rows of the public images that each class takes, the best suited first."""
    device, parts = prior.means.device, images.split(_AT_ONCE)
    found = [prior.log_likelihoods(to_unit_range(part.to(device)) * 2 - 1, 2 * _LEVEL) for part in parts]
    scores = torch.cat(found).double().cpu()
    count = max(_LEAST, int(_SHARE * len(images) / prior.num_classes))
    count = max(1, min(count, len(images), _MOST_BYTES // (images[0].numel() * prior.num_classes)))
    if prior.num_classes > 1:
        total = scores.logsumexp(1, keepdim=True)
        # log p / (1 - p), where p is the share of a class in the likelihood.
        scores = scores - total - torch.log1p(-(scores - total).exp().clamp_max(1 - 1e-15))
    return list(scores.topk(count, dim=0).indices.T)


def _moved(
    residuals: torch.Tensor, block: torch.Tensor, spread: torch.Tensor, target: torch.Tensor, powers: torch.Tensor
) -> torch.Tensor:
    """
    Coefficients `(n, D)` without their mean, moved to covariance `target` in `block` and variances `powers` elsewhere.

    The covariance of few images is drawn towards `spread`, that of all public ones.
    """
    own = residuals[:, block]
    count, side = own.shape
    covariance = (own.T @ own + side * spread) / (count + side)
    root, inverse = _roots(covariance)
    middle, _ = _roots(root @ target @ root)
    deviations = residuals.square().mean(0).sqrt().clamp_min(1e-4)
    moved = residuals * (powers.sqrt() / deviations)
    moved[:, block] = own @ (inverse @ middle @ inverse)
    return moved


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a covariance, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp_min(1e-8).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
