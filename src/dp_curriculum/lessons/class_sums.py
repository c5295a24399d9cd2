"""The one private query of all lessons: a noisy sum per class of bounded contributions, one per image or person."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from dp_curriculum.data.images import to_unit_range
from dp_curriculum.data.units import Units
from dp_curriculum.privacy.limits import check_mechanism
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


CHUNK_VALUES = 2**24  # contributions in memory at once


def noisy_class_sums(
    images: torch.Tensor,
    labels: torch.Tensor,
    contribute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
    shape: Sequence[int],
    *,
    num_classes: int,
    mechanism: PlannedMechanism,
    outer_products: bool = False,
    num_extras: int = 0,
    units: Units | None = None,
    generator: SecretGenerator,
) -> torch.Tensor:
    r"""
    Adds up what the images of each class contribute, then adds noise: one step of a mechanism.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Private images in `[0, 1]`, or bytes as `torch.uint8`.
        labels (`torch.LongTensor` of shape `(N,)`): Class of each image; a row outside `[0, num_classes)` adds zero.
        contribute (`Callable`): Images `(B, C, H, W)` as float64 in `[0, 1]` and labels `(B,)` to `(B, *shape)`. What
            it makes of an image must depend on that image, its label and public values alone.
        shape (`Sequence[int]`): Shape of what `contribute` makes of one image.
        num_classes (`int`): Number of classes, public.
        mechanism ([`PlannedMechanism`]): As it was charged. A contribution longer than its `clip_norm` is scaled down
            to it, and one that is not finite adds zero; a unit enters with probability `sample_rate`; the noise has a
            standard deviation of `noise_multiplier` times `clip_norm`.
        outer_products (`bool`, *optional*, defaults to `False`): Whether an image contributes the outer product of its
            vector `(D,)` with itself, as [`pack_symmetric`] lays it out, in place of the vector. Their sum is a
            product of matrices; no single one is formed.
        num_extras (`int`, *optional*, defaults to 0): Further values per image beside its outer product. `contribute`
            then returns two tensors, `(B, D)` and `(B, num_extras)`; the clipped norm is that of both together.
        units ([`Units`], *optional*): Persons, each of whom adds the average of what their images would add; images
            are the units if unset.
        generator ([`SecretGenerator`]): Source of mask and noise.

    Raises:
        ValueError: If norm, noise or sample rate is out of the range in which its bound was tested.

    Returns:
        `torch.Tensor` of shape `(num_classes, *shape)`, or `(num_classes, D * (D + 1) / 2 + num_extras)` of outer
        products. float64; every class is in it, also one without images.

    Privacy:
        An image enters the sum of one class only, with a norm of at most `clip_norm`; that of an outer product is the
        squared norm of its vector. Adding or removing it moves the stacked sums of all classes by at most `clip_norm`
        in L2; replacing it, by at most twice that. Spent is one of the steps of `mechanism.event`.

        A person is bounded by all images at once, whichever classes they are in: each image is a vector of norm at
        most `clip_norm` in the stacked space of all classes, and so is the average of any number of such vectors.
    """
    event, clip_norm = mechanism.event, mechanism.clip_norm
    check_mechanism(clip_norm=clip_norm, noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)
    units = Units(labels, num_classes) if units is None else units
    indices, weights = units.rows_of(generator.poisson_sample(len(units), event.sample_rate))
    summed_shape = [*shape, *shape] if outer_products else shape
    sums = torch.zeros(num_classes, *summed_shape, dtype=torch.float64)
    extra_sums = torch.zeros(num_classes, num_extras, dtype=torch.float64)
    # In chunks, for the memory that images and contributions take.
    largest = max(math.prod(shape), math.prod(images.shape[1:]))
    size = max(1, CHUNK_VALUES // largest)
    shares: Iterable[torch.Tensor | None] = itertools.repeat(None) if weights is None else weights.split(size)
    for rows, share in zip(indices.split(size), shares):
        pixels = to_unit_range(images[rows], dtype=torch.float64)
        contributed = contribute(pixels, labels[rows])
        vectors, extras = (
            contributed if isinstance(contributed, tuple) else (contributed, pixels.new_zeros(len(rows), 0))
        )
        if outer_products:
            _add_clipped_outer_products(sums, extra_sums, labels[rows], vectors, extras, clip_norm, share)
        else:
            _add_clipped(sums, labels[rows], vectors, clip_norm, share)
    if outer_products:
        sums = torch.cat([pack_symmetric(sums), extra_sums], dim=1)
    # In float64 up to the sum: rounded earlier, noise is a grid through which the sum shows.
    return sums + generator.gaussian(sums.shape, std=mechanism.noise_std, dtype=torch.float64).to(sums)


def _add_clipped(
    sums: torch.Tensor, labels: torch.Tensor, contributions: torch.Tensor, clip_norm: float, share: torch.Tensor | None
) -> None:
    """Adds each contribution, clipped, to the sum of its class; of a person's, the share that is one image's."""
    factors = _clip_factors(contributions.flatten(1).norm(dim=1), clip_norm)
    factors = factors if share is None else factors * share
    sums.index_add_(0, labels, _finite(contributions) * factors.view(-1, *[1] * (contributions.ndim - 1)))


def _add_clipped_outer_products(
    sums: torch.Tensor,
    extra_sums: torch.Tensor,
    labels: torch.Tensor,
    vectors: torch.Tensor,
    extras: torch.Tensor,
    clip_norm: float,
    share: torch.Tensor | None,
) -> None:
    """
    Adds `factor * v v^T` of each vector `v` to the matrix of its class, and `factor` times its extras `e` to theirs.

    The norm of both together is `sqrt(|v|^4 + |e|^2)`. One matrix product per class; no outer product is formed.
    """
    squared = vectors.square().sum(dim=1)
    factors = _clip_factors(torch.hypot(squared, extras.norm(dim=1)), clip_norm)
    factors = factors if share is None else factors * share
    vectors = _finite(vectors)
    extra_sums.index_add_(0, labels, _finite(extras) * factors[:, None])
    for label in labels.unique():
        own = labels == label
        sums[label].addmm_((vectors[own] * factors[own, None]).T, vectors[own])


def _clip_factors(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Factors that scale longer rows down to the norm. A row whose norm is not finite gets zero."""
    return torch.where(norms.isfinite(), clip_norm / norms.clamp_min(clip_norm), 0.0)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    """Zero in place of what is not finite: times a factor of zero it would not be a number."""
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def pack_symmetric(matrices: torch.Tensor) -> torch.Tensor:
    """
    Upper triangles of symmetric matrices, off-diagonal entries times sqrt(2): the norm is that of the matrix.

    Shapes:
        `(..., D, D)` to `(..., D * (D + 1) / 2)`.
    """
    rows, columns, scale = _upper_triangle(matrices.shape[-1])
    return matrices[..., rows, columns] * scale


def unpack_symmetric(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The symmetric matrices `(..., D, D)` that [`pack_symmetric`] packed, D being `size`."""
    rows, columns, scale = _upper_triangle(size)
    matrices = packed.new_zeros(*packed.shape[:-1], size, size)
    matrices[..., rows, columns] = matrices[..., columns, rows] = packed / scale
    return matrices


def _upper_triangle(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = torch.triu_indices(size, size)
    scale = torch.full(rows.shape, math.sqrt(2), dtype=torch.float64)
    scale[rows == columns] = 1.0
    return rows, columns, scale
