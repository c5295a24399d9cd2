"""Distances between sets of features: against other implementations, closed forms, and at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import prdc
import pytest
import torch
from torch import nn

from dp_curriculum.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_overlap,
    nearest_distances,
)


class Unchanged(nn.Module):
    """What torchmetrics takes for a network: the features come in as they are."""

    num_features = 12

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def features(rows: int, *, shift: float = 0.0, scale: float = 1.0, width: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated features, as those of a network are."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width))
    return scale * generator.normal(size=(rows, width)) @ mixing + shift


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    return features(300), features(240, shift=0.4, scale=1.2, seed=1)


def torchmetrics(module: str) -> Any:
    """It cannot be imported where torch-fidelity was installed without torchvision."""
    return pytest.importorskip(f"torchmetrics.image.{module}", exc_type=ImportError)


def second_opinion(metric: Any, first: np.ndarray, second: np.ndarray) -> Any:
    metric.update(torch.from_numpy(first), real=True)
    metric.update(torch.from_numpy(second), real=False)
    return metric.compute()


# --- Fréchet distance ----------------------------------------------------------------------------------------------


def test_frechet_distance_equals_that_of_torchmetrics(pair: tuple[np.ndarray, np.ndarray]) -> None:
    theirs = float(
        second_opinion(
            torchmetrics("fid").FrechetInceptionDistance(feature=Unchanged()).set_dtype(torch.float64), *pair
        )
    )
    assert frechet_distance(*pair) == pytest.approx(theirs, rel=1e-5)


def with_moments(mean: np.ndarray, covariance: np.ndarray, rows: int = 50) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly those."""
    white = np.random.default_rng(0).normal(size=(rows, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_gaussians_is_that_of_their_standard_deviations() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2."""
    first, second = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    distance = frechet_distance(
        with_moments(np.zeros(3), np.diag(first**2)), with_moments(np.array([1.0, -2.0, 0.0]), np.diag(second**2))
    )
    assert distance == pytest.approx(5 + ((first - second) ** 2).sum(), rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2): its eigenvalues give sum and product."""
    a, b = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    distance = frechet_distance(with_moments(np.zeros(2), a), with_moments(np.array([0.0, 3.0]), b))
    assert distance == pytest.approx(9 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)


def test_frechet_distance_is_symmetric_and_zero_for_equal_sets(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pair
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert 0 <= frechet_distance(first, first[::-1]) < 1e-9


def test_frechet_distance_takes_singular_covariances() -> None:
    """Fewer rows than features, features that never move, a single feature: finite, and zero for equal sets."""
    first, second = features(8), features(6, shift=1.0, seed=1)
    first[:, 3], second[:, 3] = 1.0, 4.0
    without = [np.delete(rows, 3, axis=1) for rows in (first, second)]
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(*without) + 9, rel=1e-6)
    assert 0 <= frechet_distance(first, first) < 1e-5
    assert frechet_distance(first[:, :1], first[:, :1] + 2) == pytest.approx(4)


# --- kernel distance -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernel_distance_equals_that_of_torchmetrics(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """On subsets that are the whole sets, so that both draw the same ones."""
    first, second = pair[0][:200], pair[1][:200]
    metric = torchmetrics("kid").KernelInceptionDistance(feature=Unchanged(), subsets=2, subset_size=200)
    theirs, _ = second_opinion(metric.set_dtype(torch.float64), first, second)
    ours, deviation = kernel_distance(first, second, num_subsets=2, subset_size=200)
    assert ours == pytest.approx(float(theirs), rel=1e-4)
    assert deviation < 1e-9 * ours


def test_kernel_distance_is_unbiased(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Sets of one law are at distance zero on average, within five standard errors; of two laws, far from it."""
    values = [
        kernel_distance(features(40, seed=2 * i), features(40, seed=2 * i + 1), num_subsets=1)[0] for i in range(200)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 5 * error
    assert kernel_distance(*pair, num_subsets=1)[0] > 5 * error


def test_kernel_distance_is_symmetric_and_the_same_for_a_seed(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pair[0][:100], pair[1][:100]
    options = {"num_subsets": 1, "subset_size": 100}
    assert kernel_distance(first, second, **options)[0] == pytest.approx(kernel_distance(second, first, **options)[0])
    values = [kernel_distance(*pair, num_subsets=3, subset_size=50, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert values[0][1] > 0


# --- precision, recall, density, coverage --------------------------------------------------------------------------


@pytest.mark.parametrize("num_neighbors", [1, 4])
def test_manifold_overlap_equals_that_of_prdc(num_neighbors: int, pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, generated = pair
    theirs = prdc.compute_prdc(reference, generated, nearest_k=num_neighbors)
    ours = vars(manifold_overlap(reference, generated, num_neighbors=num_neighbors))
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert 0 < ours["precision"] < 1 and 0 < ours["coverage"] < 1


def test_manifold_overlap_equals_that_of_prdc_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dp_curriculum.evaluation.metrics._CHUNK", 7)
    reference, generated = features(50), features(33, shift=0.3, seed=1)
    assert vars(manifold_overlap(reference, generated)) == pytest.approx(
        prdc.compute_prdc(reference, generated, nearest_k=4), rel=1e-9
    )


def test_equal_sets_overlap_wholly_and_distant_ones_not_at_all(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, _ = pair
    assert vars(manifold_overlap(first, first[::-1])) == pytest.approx(
        {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    )
    assert set(vars(manifold_overlap(first, first + 1e3)).values()) == {0.0}


def test_precision_of_one_is_recall_of_the_other(pair: tuple[np.ndarray, np.ndarray]) -> None:
    there, back = manifold_overlap(*pair), manifold_overlap(*pair[::-1])
    assert (there.precision, there.recall) == (back.recall, back.precision)


def test_a_generator_of_one_image_has_precision_without_recall(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, _ = pair
    found = manifold_overlap(reference, np.repeat(reference[:1], 30, axis=0))
    assert found.precision == 1 and found.recall < 0.05 and found.coverage < 0.1


def test_copies_of_a_row_make_balls_without_a_radius() -> None:
    """Seven copies of a row: its fourth neighbour is at distance zero, and such a ball is empty.

    Nor does a ball hold a copy of the neighbour that it reaches to. Rounding must not decide: without care it does, in
    a sixth of these sets.
    """
    few = features(6)
    copies = manifold_overlap(np.repeat(few, 7, axis=0), few.repeat(6, axis=0))
    assert vars(copies) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    for seed in range(40):
        width = (3, 12, 64, 128)[seed % 4]
        few = features(6, width=width, seed=seed, shift=10.0 ** (seed % 5))
        others = features(20 + seed, width=width, seed=seed + 1, shift=10.0 ** (seed % 5))
        reference = np.concatenate([np.repeat(few, 7, axis=0), others])
        generated = np.concatenate([few.repeat(6, axis=0), others[::2] + 0.1])
        exact = brute_force(reference, generated, num_neighbors=4)
        assert vars(manifold_overlap(reference, generated)) == pytest.approx(exact, rel=1e-9)


def brute_force(reference: np.ndarray, generated: np.ndarray, *, num_neighbors: int) -> dict[str, float]:
    """By differences of rows, which are exactly zero for copies."""

    def distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.sqrt(((rows[:, None] - others[None]) ** 2).sum(2))

    reference_radius = np.sort(distances(reference, reference), axis=1)[:, num_neighbors]
    generated_radius = np.sort(distances(generated, generated), axis=1)[:, num_neighbors]
    between = distances(reference, generated)
    in_reference = between < reference_radius[:, None]
    return {
        "precision": in_reference.any(0).mean(),
        "recall": (between < generated_radius).any(1).mean(),
        "density": in_reference.sum(0).mean() / num_neighbors,
        "coverage": in_reference.any(1).mean(),
    }


def test_nearest_distances_find_the_row_and_its_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dp_curriculum.evaluation.metrics._CHUNK", 4)
    others = features(20)
    distances, index = nearest_distances(others[[3, 17, 0, 5, 9]] + 1e-3, others)
    assert index.tolist() == [3, 17, 0, 5, 9]
    assert distances == pytest.approx(np.sqrt(12) * 1e-3, rel=1e-6)


# --- Inception Score -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inception_score_equals_that_of_torchmetrics() -> None:
    logits = torch.from_numpy(features(200, width=Unchanged.num_features))
    metric = torchmetrics("inception").InceptionScore(feature=Unchanged(), splits=1)
    metric.update(logits)
    assert inception_score(logits.softmax(1).numpy()) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(np.tile([0.2, 0.3, 0.5], (9, 1))) == pytest.approx(1)
    assert inception_score(np.eye(10)) == pytest.approx(10)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "minimum"), [(frechet_distance, 2), (kernel_distance, 2), (manifold_overlap, 5)])
def test_too_few_rows_are_refused_on_either_side(distance: Any, minimum: int) -> None:
    enough, few = features(minimum), features(minimum - 1)
    for pair in ((enough, few), (few, enough)):
        with pytest.raises(ValueError, match=f"at least {minimum} images in each set: one has {minimum - 1}"):
            distance(*pair)
    distance(enough, enough)
