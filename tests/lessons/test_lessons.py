"""Lessons: what is planned, what is spent and what is noised are one and the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.lessons import frequency_images
from dp_curriculum.lessons.lesson import draw_rows, hold_out
from dp_curriculum.lessons.table import LESSONS, find_lesson
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.teaching import draw_for_sheet


class NotingGenerator(SecretGenerator):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stds: list[float] = []
        self.rates: list[float] = []

    def gaussian(self, shape: int | Sequence[int], std: float, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        self.stds.append(std)
        return super().gaussian(shape, std, dtype=dtype)

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        self.rates.append(sample_rate)
        return super().poisson_sample(num_rows, sample_rate)


NAMED = {"public": {"stages": ["public"], "pretrain_dataset_name": "digits"}}


quick_fit = functools.partial(frequency_images.draw_frequency_images, num_steps=2, images_per_class=4)


@pytest.mark.parametrize("stage", [stage for stage in LESSONS if stage != "public"])
@pytest.mark.parametrize("change", [{"noise": 0.5}, {"norm": 2.0}, {"rate": 0.5}, {"steps": 2}])
def test_a_query_draws_with_what_was_charged_and_nothing_else(
    stage: str, change: dict[str, float], make_config: Callable[..., CurriculumConfig]
) -> None:
    """Whatever the configuration says: norm, noise, sample rate and steps are those of the mechanisms it is given."""
    lesson, config = find_lesson(stage), make_config(lesson_resolution=3)
    factor = {name: change.get(name, 1) for name in ("noise", "norm", "rate", "steps")}
    charged = tuple(
        PlannedMechanism(
            row.name,
            row.clip_norm * factor["norm"],
            GaussianEvent(7.0 * factor["noise"], factor["rate"], int(factor["steps"]) if lesson.repeats else 1),
        )
        for row in lesson.plan(config, 7.0)
    )
    generator = NotingGenerator()
    lesson.release(private_images(30, 1), config, charged, 30, generator)
    draws = [row for row in charged for _ in range(row.event.num_steps)]
    assert generator.stds == [row.noise_std for row in draws]
    assert generator.rates == [row.event.sample_rate for row in draws]


def private_images(count: int, num_channels: int) -> PrivateImages:
    images = torch.randint(256, (count, num_channels, 8, 8), generator=torch.Generator().manual_seed(0))
    return PrivateImages(images.to(torch.uint8), torch.arange(count) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("stage", LESSONS)
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("max_image_norm", [None, 0.5])
def test_a_lesson_spends_what_it_planned(
    stage: str,
    num_channels: int,
    max_image_norm: float | None,
    make_config: Callable[..., CurriculumConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Number of releases, sampling rate, and the noise over the bound on one image that the plan publishes."""
    config = make_config(
        num_channels=num_channels,
        lesson_resolution=3,
        central_sample_rate=0.5,
        central_images_per_class=4,
        lesson_max_image_norm=max_image_norm,
        **NAMED.get(stage, {}),
    )
    monkeypatch.setattr(frequency_images, "draw_frequency_images", quick_fit)
    lesson, generator = find_lesson(stage), NotingGenerator()
    planned = lesson.plan(config, 7.0)
    assert all(row.event.noise_multiplier == 7.0 for row in planned)
    tensors = lesson.release(private_images(30, num_channels), config, planned, 30, generator)
    releases = [row for row in planned for _ in range(row.event.num_steps)]
    assert generator.rates == [row.event.sample_rate for row in releases]
    assert generator.stds == pytest.approx([row.noise_std for row in releases])
    prepared = lesson.prepare(tensors, config, ("a", "b", "c"), torch.Generator().manual_seed(0))
    images, labels = lesson.draw(prepared, 50, 8, torch.Generator().manual_seed(0))
    assert images.shape == (50, num_channels, 8, 8) and labels.shape == (50,)
    assert images.min() >= 0 and images.max() <= 1
    assert set(labels.tolist()) in ({0, 1, 2}, {3}), "every class, or none that is known"
    assert stage != "public" or labels[0] == 3, "the digits have other classes"


def test_a_lesson_keeps_no_row_and_its_form_does_not_depend_on_their_number(
    make_config: Callable[..., CurriculumConfig],
) -> None:
    for stage in LESSONS:
        shapes = set()
        for count in (0, 1, 30):
            lesson, config = find_lesson(stage), make_config()
            planned = lesson.plan(config, 20.0)
            tensors = lesson.release(private_images(count, 1), config, planned, 30, SecretGenerator())
            shapes.add(tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        assert len(shapes) == 1


def test_images_are_drawn_with_their_labels() -> None:
    images = (torch.arange(4.0) / 4).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    tensors = {"images": images, "labels": torch.tensor([3, 2, 1, 0])}
    drawn, labels = draw_rows(tensors, 200, 8, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 1, 8, 8)
    assert torch.equal(drawn[:, 0, 0, 0], (3.0 - labels) / 4)
    assert set(labels.tolist()) == {0, 1, 2, 3}
    bytes_drawn, _ = draw_rows({**tensors, "images": (images * 240).byte()}, 200, 4, torch.Generator().manual_seed(0))
    assert bytes_drawn.shape == (200, 1, 4, 4)
    torch.testing.assert_close(bytes_drawn[:, 0, 0, 0], (3.0 - labels) * 60 / 255)
    again = draw_rows(tensors, 200, 8, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], drawn) and torch.equal(again[1], labels)


def test_each_class_holds_out_a_tenth_of_its_images_unless_it_has_but_one() -> None:
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 2 + [3])[torch.randperm(55, generator=torch.manual_seed(0))]
    tensors = {"images": torch.arange(55).view(55, 1, 1, 1), "labels": labels, "other": torch.ones(2)}
    taught, checked = hold_out(tensors)
    assert checked["labels"].bincount().tolist() == [4, 2, 1, 1]
    assert taught["labels"].bincount().tolist() == [36, 10, 1, 1]
    rows = [part["images"].flatten() for part in (taught, checked)]
    assert torch.cat(rows).unique().numel() == 55, "no image is lost"
    common = set(rows[0].tolist()) & set(rows[1].tolist())
    assert labels[list(common)].tolist() == [3]
    for part, kept in zip((taught, checked), rows):
        assert torch.equal(labels[kept], part["labels"]) and torch.equal(part["other"], tensors["other"])


def test_a_lesson_of_fresh_images_is_its_own_check() -> None:
    tensors = {"means": torch.zeros(2, 1, 4, 4), "factors": torch.zeros(2, 16, 3)}
    assert hold_out(tensors) == (tensors, tensors)


def test_an_unknown_lesson_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--stages=median to be one of public, mean, mode, .*, dp_sgd"):
        find_lesson("median")


@pytest.mark.parametrize("label", [0, 11, 999, 1000])
def test_a_sheet_shows_the_classes_that_occur_and_keeps_no_more_than_it_shows(label: int) -> None:
    """Also where they are none of the first ten, or none at all, as in a public dataset with others."""
    images, labels = draw_for_sheet(
        lambda count, generator: (torch.zeros(count, 1, 2, 2), torch.full((count,), label)), 1000, torch.Generator()
    )
    assert labels.tolist() == [label] * 8 and images.shape == (8, 1, 2, 2)
    assert images.untyped_storage().nbytes() == images.nbytes


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_a_sheet_takes_few_images_at_a_time_however_many_classes_there_are(num_classes: int) -> None:
    counts = []

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(count)
        labels = torch.randint(num_classes, (count,), generator=generator)
        return labels.float().view(-1, 1, 1, 1), labels

    images, labels = draw_for_sheet(draw, num_classes, torch.Generator().manual_seed(0))
    assert max(counts) <= 640
    assert labels.unique().tolist() == list(range(min(10, num_classes)))
    assert (
        labels.bincount().max() <= 8 and labels.bincount().min() >= 6 and images.flatten().tolist() == labels.tolist()
    )
