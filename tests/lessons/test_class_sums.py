"""The one private query of all lessons: bounded whatever is contributed, and in the classes that were declared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_curriculum.lessons import class_sums
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


class Silent(SecretGenerator):
    """No noise, and a note of what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[tuple[int, ...], float, torch.dtype]] = []

    def gaussian(self, shape: Any, std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        self.asked.append((tuple(shape), std, dtype))
        return torch.zeros(*shape, dtype=dtype)


def sums_of(contributions: Tensor, labels: list[int], *, max_norm: float = 1.0, **options: Any) -> Tensor:
    """Sums of two classes, where image i contributes row i of `contributions`."""
    rows = torch.arange(len(contributions), dtype=torch.float64).view(-1, 1, 1, 1) / 255
    values = {"noise_multiplier": 3.0, "sample_rate": 1.0, **options}
    generator = values.pop("generator", None) or Silent()
    outer_products = values.pop("outer_products", False)
    mechanism = PlannedMechanism("sums", max_norm, GaussianEvent(**values))
    return noisy_class_sums(
        rows,
        torch.tensor(labels),
        lambda pixels, _: contributions[(pixels.flatten() * 255).round().long()],
        contributions.shape[1:],
        num_classes=2,
        mechanism=mechanism,
        outer_products=outer_products,
        generator=generator,
    )


def test_each_image_is_added_to_its_class_and_rows_of_no_class_to_none() -> None:
    contributions = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.1]], dtype=torch.float64)
    found = sums_of(contributions, [1, 0, 1, -1])
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.4], [0.6, 0.8]], dtype=torch.float64))
    assert found.dtype == torch.float64
    assert sums_of(contributions, [2, 7, -1, -1]).abs().sum() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_not_finite_adds_zero_and_leaves_the_others_alone(value: float) -> None:
    """1e200 is a number; its square is not."""
    contributions = torch.tensor([[0.1, 0.2], [value, 0.0], [0.0, 0.3]], dtype=torch.float64)
    found = sums_of(contributions, [0, 0, 0])
    torch.testing.assert_close(found[0], torch.tensor([0.1, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0, 1e6])
def test_a_contribution_is_scaled_down_to_the_norm_and_never_up(norm: float) -> None:
    direction = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    found = sums_of(norm * direction, [1], max_norm=1.5)[1]
    torch.testing.assert_close(found, min(norm, 1.5) * direction[0])


def test_noise_is_asked_for_once_for_all_classes_in_float64() -> None:
    secret = Silent()
    sums_of(torch.zeros(3, 5, dtype=torch.float64), [0, 0, 1], max_norm=0.7, generator=secret)
    assert secret.asked == [((2, 5), 3.0 * 0.7, torch.float64)]


def test_noise_is_added_to_the_sums() -> None:
    class Ones(SecretGenerator):
        def gaussian(self, shape: Any, std: float, **options: Any) -> Tensor:
            return torch.full(tuple(shape), std, dtype=torch.float64)

    found = sums_of(torch.tensor([[0.5]], dtype=torch.float64), [0], generator=Ones())
    assert found.tolist() == [[3.5], [3.0]]


@pytest.mark.parametrize(("values", "parts"), [(20, [4, 4, 2]), (3, [1] * 10), (10**6, [10])])
def test_images_are_read_in_parts_that_fit_and_the_parts_change_nothing(
    values: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    contributions = torch.rand(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, seen, add = sums_of(contributions, [0, 1] * 5), [], class_sums._add_clipped

    def watched(sums: Tensor, labels: Tensor, rows: Tensor, clip_norm: float, share: Tensor | None) -> None:
        seen.append(len(rows))
        add(sums, labels, rows, clip_norm, share)

    monkeypatch.setattr(class_sums, "_add_clipped", watched)
    monkeypatch.setattr(class_sums, "CHUNK_VALUES", values)
    torch.testing.assert_close(sums_of(contributions, [0, 1] * 5), expected)
    assert seen == parts


def outer_products_one_by_one(vectors: Tensor, labels: list[int], clip_norm: float) -> Tensor:
    """The slow reference: each image's packed outer product, clipped by its own norm, in a loop."""
    size = vectors.shape[1]
    sums = torch.zeros(2, size * (size + 1) // 2, dtype=torch.float64)
    for vector, label in zip(vectors, labels):
        packed = torch.stack(
            [vector[i] * vector[j] * (1 if i == j else 2**0.5) for i in range(size) for j in range(i, size)]
        )
        norm = packed.norm()
        if label in (0, 1) and norm.isfinite():
            sums[label] += packed * min(1.0, clip_norm / max(float(norm), 1e-300))
    return sums


@pytest.mark.parametrize("values", [10, 10**6])
@pytest.mark.parametrize("clip_norm", [0.3, 2.0, 1e6])
def test_outer_products_are_those_of_each_image_clipped_by_itself(
    clip_norm: float, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of vectors that are not finite or whose square is not, of no class, and in parts."""
    monkeypatch.setattr(class_sums, "CHUNK_VALUES", values)
    vectors = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[2, 1], vectors[3, 0], vectors[4, 3], vectors[5] = math.nan, math.inf, 1e200, 0.0
    labels = [0, 1, 1, 0, 1, 0, 1, 0, -1, 2, 0, 1]
    found = sums_of(vectors, labels, max_norm=clip_norm, outer_products=True)
    torch.testing.assert_close(found, outer_products_one_by_one(vectors, labels, clip_norm), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change", ["add", "replace"])
@pytest.mark.parametrize("extreme", [0.0, 1.0, 1e-3, 1e6, 1e160, math.nan])
def test_an_image_moves_outer_products_by_the_norm_at_most(extreme: float, change: str) -> None:
    vectors = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vectors[-1] = extreme * vectors[-1]
    labels = [0, 1] * 4 + [1]
    others = vectors[:-1] if change == "add" else torch.cat([vectors[:-1], -3 * vectors[:1]])
    other_labels = labels[:-1] if change == "add" else labels
    here = sums_of(vectors, labels, max_norm=0.7, outer_products=True)
    there = sums_of(others, other_labels, max_norm=0.7, outer_products=True)
    assert (here - there).norm() <= 0.7 * (1 if change == "add" else 2) * (1 + 1e-12)
    if extreme in (1.0, 1e6) and change == "add":
        assert (here - there).norm() == pytest.approx(0.7)


def test_packing_keeps_the_norm_and_can_be_undone() -> None:
    half = torch.randn(2, 4, 4, dtype=torch.float64)
    matrices = half + half.mT
    packed = class_sums.pack_symmetric(matrices)
    torch.testing.assert_close(packed.norm(dim=1), matrices.flatten(1).norm(dim=1))
    torch.testing.assert_close(class_sums.unpack_symmetric(packed, 4), matrices)


def test_the_sample_rate_is_that_of_the_mask() -> None:
    """At rate 0.25 about a quarter of 4000 images is in; off by 6 deviations, 4 %, is caught."""
    count = float(sums_of(torch.ones(4000, 1, dtype=torch.float64), [0] * 4000, sample_rate=0.25)[0])
    assert abs(count - 1000) < 6 * math.sqrt(4000 * 0.25 * 0.75)
