"""Components: parts that depend on one image alone, bounded contributions, and images that are no Gaussian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from summing import Summing
from torch import Tensor

from dp_curriculum.closed_form_prior import ClosedFormPrior, Components
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons import moment_components
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.lessons.moment_components import _Coordinates, _Cut, _cut, query_components
from dp_curriculum.lessons.moment_images import MOMENTS
from dp_curriculum.lessons.planned import lesson_noise_multiplier
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.limits import MOMENT_COMPONENTS
from dp_curriculum.privacy.mechanism import PlannedMechanism


SIDE, RANK = 6, 3
Moments = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moment_components, "_DRAWS", 1000)


def moments(channels: int = 1, classes: int = 2) -> Moments:
    generator = torch.Generator().manual_seed(0)
    factors = 0.06 * torch.randn(classes, channels * SIDE**2, RANK, generator=generator)
    factors *= torch.tensor([1.0, 0.5, 0.5])
    return torch.full((classes, channels, SIDE, SIDE), 0.5), factors, factors.square().sum((1, 2)) * 1.01


def two_kinds(count: int, given: Moments, apart: float = 2.0) -> tuple[Tensor, Tensor]:
    """Images of both classes, each of two kinds that are `apart` along its first direction: not Gaussian."""
    generator = torch.Generator().manual_seed(1)
    means, factors, _ = given
    labels = torch.arange(count) % len(means)
    normals = torch.randn(count, RANK, generator=generator)
    normals[:, 0] = apart / 2 * torch.randn(count, generator=generator).sign() + 0.2 * normals[:, 0]
    moved = torch.einsum("ndr,nr->nd", factors[labels], normals).view(count, *means.shape[1:])
    return (means[labels] + moved).clamp(0, 1), labels


def planned(noise_multiplier: float = 1e-3, clip_norm: float = 4.0) -> PlannedMechanism:
    return PlannedMechanism("moments-components", clip_norm, GaussianEvent(noise_multiplier))


def found(images: Tensor, labels: Tensor, given: Moments, mechanism: PlannedMechanism, **options: Any) -> Components:
    options = {"num_components": 2, "public_dataset_size": len(images), **options}
    return query_components(images, labels, given, mechanism, **options)


def cut_of(given: Moments, num_components: int) -> _Cut:
    means, factors, _ = given
    return _cut(_Coordinates.of(means, factors), means, factors, num_components)[0]


def parts_of(images: Tensor, labels: Tensor, given: Moments, num_components: int) -> Tensor:
    return cut_of(given, num_components).parts_of(images.double(), labels)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_part_of_an_image_is_that_of_whole_numbers_alone_or_among_others() -> None:
    """Beside Python's integers, and in batches of every size: no rounding, and the first of equal scores."""
    given = moments()
    images, labels = two_kinds(200, given)
    cut = cut_of(given, 4)
    together = cut.parts_of(images.double(), labels)
    assert len(together.unique()) == 8
    for size in (1, 7, 64):
        batches = zip(images.double().split(size), labels.split(size))
        assert torch.equal(torch.cat([cut.parts_of(*batch) for batch in batches]), together)
    for image, label, part in zip(images.double(), labels.tolist(), together.tolist()):
        whole = [round(value * 4096) for value in image.flatten().tolist()]
        scores = [
            sum(value * int(weight) for value, weight in zip(whole, weights)) + int(bias)
            for weights, bias in zip(cut.weights[label].tolist(), cut.biases[label].tolist())
        ]
        assert label * 4 + scores.index(max(scores)) == part


def test_no_score_of_the_largest_images_is_rounded() -> None:
    """Sums of whole numbers below 2^53 are exact in float64, in whatever order."""
    pixels, components = 1024, MOMENT_COMPONENTS.high  # a centre is an image less another
    most = pixels / moment_components._PIXEL_UNIT / moment_components._SCORE_UNIT  # every pixel is 1 from its mean
    assert (1.5 * most + 1) * components < 2**53


def test_equal_scores_are_the_first_part() -> None:
    given = (torch.full((1, 1, SIDE, SIDE), 0.5), torch.zeros(1, SIDE**2, RANK), torch.tensor([0.1]))
    images, _ = two_kinds(20, moments(classes=1))
    assert parts_of(images, torch.zeros(20, dtype=torch.long), given, 4).tolist() == [0] * 20


# --- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_components", [2, int(MOMENT_COMPONENTS.high)])
@pytest.mark.parametrize("extreme", [0.0, 1.0, math.nan, 1e30])
def test_an_image_moves_the_sums_by_the_bound_at_most(
    extreme: float, num_components: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that differ by one image far from its class: the parts of all others stay what they are."""
    given = moments(channels)
    images, labels = two_kinds(40, given)
    more = torch.cat([images, torch.full((1, channels, SIDE, SIDE), extreme)]), torch.cat([labels, torch.tensor([1])])
    sums: list[Tensor] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        sums.append(noisy_class_sums(*args, **kwargs))
        return sums[0]

    monkeypatch.setattr(moment_components, "noisy_class_sums", noted)
    generator, mechanism = Summing(), planned(3.0, clip_norm=0.2)
    options: dict[str, Any] = {"num_components": num_components, "public_dataset_size": 40, "generator": generator}
    first, second = found(images, labels, given, mechanism, **options), found(*more, given, mechanism, **options)
    assert generator.stds == [3.0 * 0.2] * 2
    moved = (sums[0] - sums[1]).norm(dim=1)
    assert float(moved.norm()) <= 0.2 * (1 + 1e-9) and int((moved > 1e-9).sum()) <= 1
    if math.isfinite(extreme):  # reached, and not only respected
        assert float(moved.norm()) > 0.9 * 0.2
    assert all(torch.equal(value, other) for value, other in zip(vars(first).values(), vars(second).values()))


# --- what is released ------------------------------------------------------------------------------------------------


def in_parts(images: Tensor, labels: Tensor, given: Moments, num_components: int) -> dict[int, Tensor]:
    """The slow reference: images of each part, one after the other, less the mean of their class."""
    means, _, _ = given
    kept: dict[int, list[Tensor]] = {}
    for image, label, part in zip(images, labels, parts_of(images, labels, given, num_components).tolist()):
        kept.setdefault(part, []).append((image - means[label]).flatten().double())
    return {part: torch.stack(rows) for part, rows in kept.items()}


def test_without_noise_the_parts_have_the_moments_of_their_images() -> None:
    given = moments()
    images, labels = two_kinds(4000, given)
    components = found(images, labels, given, planned(clip_norm=50.0), generator=Summing())
    for part, rows in in_parts(images, labels, given, 2).items():
        label, place = divmod(part, 2)
        factor = given[1][label].double()
        mean = factor @ components.offsets[label, place].double()
        root = factor @ components.roots[label, place].double()
        assert components.shares[label, place].item() == pytest.approx(len(rows) / 2000, rel=1e-3)
        assert (mean - rows.mean(0)).norm() < 0.02 * rows.mean(0).norm()
        covariance = torch.cov(rows.T, correction=0)
        assert (root @ root.T - covariance).norm() < 0.03 * covariance.norm()


def test_draws_are_of_the_kinds_that_a_gaussian_mixes() -> None:
    """Between the kinds there are no images: few of the draws of two components, and many of one Gaussian's."""
    given = moments()
    images, labels = two_kinds(4000, given)
    means, factors, variances = given
    components = found(images, labels, given, planned(1.0))
    normals, texture = torch.randn(2000, RANK), torch.randn(2000, 1, SIDE, SIDE)
    between = {}
    for name, of_parts in (("one", None), ("two", components)):
        prior = ClosedFormPrior.from_moments(means, factors, variances, of_parts)
        drawn = prior.draw(torch.zeros(2000, dtype=torch.long), normals, texture).flatten(1)
        coordinate = (torch.linalg.pinv(factors[0]) @ (drawn - 0.5).T)[0]
        between[name] = float((coordinate.abs() < 0.4).float().mean())
        assert coordinate.std().item() == pytest.approx(1, rel=0.1)
    assert between["one"] > 0.25 and between["two"] < 0.1


@pytest.mark.parametrize("unresolved", [1.01, 2.0, 3.0])
def test_where_noise_hides_the_difference_nearly_the_released_gaussian_is_left(unresolved: float) -> None:
    """Under much noise nothing is made of it, whatever the images are, also where most variance is in no direction."""
    means, factors, variances = moments()
    given = means, factors, unresolved * factors.square().sum((1, 2))
    images, labels = two_kinds(4000, given)
    components = found(images, labels, given, planned(2e4), num_components=4)
    normals, texture = torch.randn(8000, RANK), torch.randn(8000, 1, SIDE, SIDE)
    of_class = torch.ones(8000, dtype=torch.long)
    one = ClosedFormPrior.from_moments(*given).draw(of_class, normals, texture).flatten(1)
    parts = ClosedFormPrior.from_moments(*given, components).draw(of_class, normals, texture).flatten(1)
    assert parts.var(0).sum().item() == pytest.approx(one.var(0).sum().item(), rel=0.1)
    assert (parts.mean(0) - one.mean(0)).norm() < 0.25 * one.var(0).sum().sqrt()
    covariance = torch.cov(one.T)
    assert (torch.cov(parts.T) - covariance).norm() < 0.4 * covariance.norm()


@pytest.mark.parametrize("noise_multiplier", [1e-3, 1.0])
def test_parts_together_have_the_released_variance(noise_multiplier: float) -> None:
    means, factors, variances = moments()
    given = means, factors, 2 * variances
    images, labels = two_kinds(4000, given)
    components = found(images, labels, given, planned(noise_multiplier), num_components=4)
    prior = ClosedFormPrior.from_moments(*given, components)
    for label in range(2):
        of_class = torch.full((8000,), label)
        drawn = prior.draw(of_class, torch.randn(8000, RANK), torch.randn(8000, 1, SIDE, SIDE))
        assert drawn.var(0).sum().item() == pytest.approx(given[2][label].item(), rel=0.07)


def test_the_sheet_of_the_lesson_shows_draws_of_the_parts() -> None:
    given = moments()
    images, labels = two_kinds(4000, given)
    components = found(images, labels, given, planned(1.0))
    tensors = dict(zip(("means", "factors", "variances"), given))
    tensors |= {f"component_{name}": tensor for name, tensor in vars(components).items()}
    config = CurriculumConfig().replace(num_channels=1, resolution=SIDE, block_out_channels=[8], moment_components=2)
    generator = torch.Generator().manual_seed(0)
    prepared = MOMENTS.prepare(tensors, config, ("a", "b"), generator)
    drawn, classes = MOMENTS.draw(prepared, 4000, SIDE, generator)
    coordinate = (torch.linalg.pinv(given[1][1]) @ (drawn[classes == 1].flatten(1) - 0.5).T)[0]
    assert (coordinate.abs() < 0.4).float().mean() < 0.1, "between the kinds there are no images"


def test_a_small_class_is_cut_like_a_large_one() -> None:
    """One image in ten is of the second class. The noise of a share of it has a standard deviation of 0.02."""
    given = moments()
    images, labels = two_kinds(4000, given)
    rows = torch.cat([(labels == 0).nonzero()[:1800], (labels == 1).nonzero()[:200]]).flatten()
    shares = cut_of(given, 2).parts_of(images[rows].double(), labels[rows]).bincount(minlength=4).view(2, 2)
    components = found(images[rows], labels[rows], given, planned(0.5), public_dataset_size=2000)
    assert torch.allclose(components.shares, shares / shares.sum(1, keepdim=True), atol=0.1)
    root = given[1][1] @ components.roots[1]
    assert root.square().sum().item() < 3 * given[1][1].square().sum().item()


def test_less_noise_is_nearer_to_the_images_and_unfiltered_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin keeps all of the noise."""
    given = moments()
    images, labels = two_kinds(4000, given, apart=1.5)
    exact = found(images, labels, given, planned(), generator=Summing())

    def error(noise_multiplier: float) -> float:
        noisy = [found(images, labels, given, planned(noise_multiplier)) for _ in range(5)]
        return sum(float((one.roots @ one.roots.mT - exact.roots @ exact.roots.mT).square().sum()) for one in noisy)

    small, large = error(1.0), error(100.0)
    assert small < 0.5 * large
    monkeypatch.setattr(moment_components, "_kept", lambda noisy, *others: noisy)
    assert error(100.0) > 2 * large


@pytest.mark.parametrize("noise_multiplier", [1.0, 1e3])
@pytest.mark.parametrize("case", ["no images", "no directions", "always black"])
def test_a_class_without_images_or_directions_can_be_drawn(case: str, noise_multiplier: float) -> None:
    """Of one that is always black all draws are equal: it is cut into parts of which all but one are empty."""
    means, factors, variances = moments()
    if case != "no images":
        size = 0.0 if case == "no directions" else 1e-5
        means[1], factors[1] = 0.0, size * factors[1]
        variances[1] = factors[1].square().sum()
    images, _ = two_kinds(10, (means, factors, variances))
    labels = torch.tensor([0] * 8 + [-1, 7])
    components = found(images, labels, (means, factors, variances), planned(noise_multiplier), num_components=4)
    assert components.shares.shape == (2, 4) and torch.allclose(components.shares.sum(1), torch.ones(2))
    prior = ClosedFormPrior.from_moments(means, factors, variances, components)
    drawn = prior.draw(torch.arange(40) % 2, torch.randn(40, RANK), torch.randn(40, 1, SIDE, SIDE))
    assert drawn.isfinite().all() and prior.errors.isfinite().all() and prior.corrections.isfinite().all()


# --- a run -----------------------------------------------------------------------------------------------------------


def test_the_third_query_takes_its_part_of_the_share_of_the_lessons() -> None:
    two = CurriculumConfig().replace(num_channels=1)
    three = two.replace(moment_components=4)
    names = [mechanism.name for mechanism in MOMENTS.plan(three, 1.0)]
    assert names == ["moments-mean", "moments-covariance", "moments-components"]
    assert len(MOMENTS.plan(two, 1.0)) == 2
    assert lesson_noise_multiplier(three) / lesson_noise_multiplier(two) == pytest.approx(math.sqrt(1.5), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"moment_components": 0}, "moment_components=0"),
        ({"moment_components": 17}, "moment_components=17"),
        ({"shortcut": "pretrain"}, "to come with moments in closed form"),
        ({"stages": ["mean", "dp_sgd"]}, "to come with moments in closed form"),
        ({"num_channels": 3, "resolution": 32}, "at most 1,024 values"),
        ({"vae_name_or_path": "org/vae", "resolution": 128, "num_channels": 3}, "no latents"),
    ],
)
def test_components_where_there_can_be_none_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CurriculumConfig().replace(**{"num_channels": 1, "moment_components": 4, **fields})
