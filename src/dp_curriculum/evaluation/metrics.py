"""Distances between two sets of images in the space of some features. No image comes in here, only features.

Which features are meant, and on how many images, decides what a number is worth: it has to be said beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import linalg


_CHUNK = 1024


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    r"""
    The Fréchet distance of Gaussians fitted to two sets of features; FID in the features of Inception
    (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        first (`np.ndarray` of shape `(N, D)`): Features. Below D rows their covariance is singular; the distance is
            still defined, and larger than that of larger sets.
        second (`np.ndarray` of shape `(M, D)`): Features of the other set.

    Raises:
        ValueError: If a set has fewer than two rows.
    """
    _require_rows(2, first, second)
    first, second = first.astype(np.float64), second.astype(np.float64)
    means = first.mean(0) - second.mean(0)
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (first, second)]
    # tr (AB)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2); no complex root is taken.
    cross = linalg.svdvals(_symmetric_root(covariances[0]) @ _symmetric_root(covariances[1])).sum()
    distance = means @ means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross
    return max(0.0, float(distance))  # of equal sets, rounding leaves some -1e-12


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    r"""
    The squared maximum mean discrepancy with the kernel (x·y / D + 1)^3, unbiased; KID in the features of Inception
    (Bińkowski et al. 2018, arXiv 1801.01401).

    Args:
        first (`np.ndarray` of shape `(N, D)`): Features.
        second (`np.ndarray` of shape `(M, D)`): Features of the other set.
        num_subsets (`int`, *optional*, defaults to 100): Random subsets that are averaged over.
        subset_size (`int`, *optional*, defaults to 1000): Rows of a subset; smaller where there are fewer.
        seed (`int`, *optional*, defaults to 0): Seed of the subsets.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the subsets.

    Raises:
        ValueError: If a set has fewer than two rows.
    """
    _require_rows(2, first, second)
    generator = np.random.default_rng(seed)
    size = min(subset_size, len(first), len(second))
    values = []
    for _ in range(num_subsets):
        x, y = (rows[generator.choice(len(rows), size, replace=False)].astype(np.float64) for rows in (first, second))
        inside = [_polynomial_kernel(rows, rows) for rows in (x, y)]
        off_diagonal = sum((kernel.sum() - np.trace(kernel)) / (size * (size - 1)) for kernel in inside)
        values.append(off_diagonal - 2 * _polynomial_kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def _polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Manifold:
    """
    Overlap of two sets, by open balls that reach from each row to its k-th nearest neighbour: that of a row with k
    copies is empty.

    Args:
        precision (`float`): Share of generated rows inside a ball of the reference (Kynkäänniemi et al. 2019,
            arXiv 1904.06991).
        recall (`float`): Share of reference rows inside a ball of the generated set (same source).
        density (`float`): Balls of the reference around a generated row, over k (Naeem et al. 2020, arXiv 2002.09797).
        coverage (`float`): Share of reference balls with a generated row inside (same source).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_overlap(reference: np.ndarray, generated: np.ndarray, *, num_neighbors: int = 4) -> Manifold:
    r"""
    Precision, recall, density and coverage.

    Args:
        reference (`np.ndarray` of shape `(N, D)`): Features of real images.
        generated (`np.ndarray` of shape `(M, D)`): Features of generated ones.
        num_neighbors (`int`, *optional*, defaults to 4): k, as DPImageBench has it.

    Raises:
        ValueError: If a set has no more than k rows.
    """
    _require_rows(num_neighbors + 1, reference, generated)
    reference_radius = _neighbor_distances(reference, num_neighbors)
    generated_radius = _neighbor_distances(generated, num_neighbors)
    inside_reference = np.zeros(len(generated))
    covered, recalled = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    for rows, distances in _distance_blocks(reference, generated):
        within = distances < reference_radius[rows, None]
        inside_reference += within.sum(0)
        covered[rows] = within.any(1)
        recalled[rows] = (distances < generated_radius).any(1)
    return Manifold(
        precision=float((inside_reference > 0).mean()),
        recall=float(recalled.mean()),
        density=float(inside_reference.mean() / num_neighbors),
        coverage=float(covered.mean()),
    )


def _require_rows(minimum: int, *sets: np.ndarray) -> None:
    for rows in sets:
        if len(rows) < minimum:
            raise ValueError(f"Expected at least {minimum} images in each set: one has {len(rows)}.")


def nearest_distances(rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance `(N,)` and index `(N,)` of the nearest of `others` `(M, D)` for each of `rows` `(N, D)`."""
    nearest, index = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
    for part, distances in _distance_blocks(rows, others):
        index[part] = distances.argmin(1)
        nearest[part] = distances.min(1)
    return nearest, index


def _neighbor_distances(rows: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Radius of the ball of each row."""
    radius = np.empty(len(rows))
    for part, distances in _distance_blocks(rows, rows):  # the row itself is the nearest
        radius[part] = np.partition(distances, num_neighbors, axis=1)[:, num_neighbors]
    # A ball is open. Smaller by more than rounding, it leaves out what lies as far as the neighbour, such as its copy.
    return radius * (1 - 1e-6)


def _distance_blocks(rows: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances of some rows to all others at a time."""
    center = others.mean(0, dtype=np.float64)  # far from zero, the difference of squares would lose its digits
    rows, others = rows - center, others - center
    squares = (others**2).sum(1)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        scale = (rows[part] ** 2).sum(1)[:, None] + squares
        block = scale - 2 * rows[part] @ others.T
        block[block < 1e-12 * scale] = 0  # a copy
        yield part, np.sqrt(block)


def inception_score(probabilities: np.ndarray) -> float:
    """
    exp of the mean divergence of class probabilities `(N, classes)` from their mean (Salimans et al. 2016,
    arXiv 1606.03498).
    """
    probabilities = probabilities.astype(np.float64).clip(1e-16)
    marginal = probabilities.mean(0)
    return float(np.exp((probabilities * (np.log(probabilities) - np.log(marginal))).sum(1).mean()))
