"""A filter by a classifier: what it draws again, what it leaves, and that it judges nothing that it was trained on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dp_curriculum.config import DataConfig
from dp_curriculum.data import load_images, to_unit_range
from dp_curriculum.evaluation import classifiers, sampling
from dp_curriculum.evaluation.sampling import MOST_DRAWS, Judge, draw_agreeing, sample_images, train_judge


class Digits:
    """A generator of real digits, of which one in four is of another class than it was asked for."""

    num_classes, device = 10, torch.device("cpu")
    vae, unet = None, SimpleNamespace(config=SimpleNamespace(sample_size=8))

    def __init__(self) -> None:
        digits = load_images(DataConfig(resolution=8), "train")
        self.images, self.labels = to_unit_range(digits.images), digits.labels
        self.seeds: list[int] = []

    def __call__(self, class_labels: list[int], generator: list[torch.Generator], **options: Any) -> Any:
        assert options == {"output_type": "pt", "return_dict": False}
        self.seeds += [one.initial_seed() for one in generator]
        return (torch.stack([self._one(label, one) for label, one in zip(class_labels, generator)]),)

    def _one(self, label: int, generator: torch.Generator) -> torch.Tensor:
        if torch.rand((), generator=generator) < 0.25:
            label = (label + 1 + int(torch.randint(9, (), generator=generator))) % 10
        rows = (self.labels == label).nonzero().flatten()
        return self.images[rows[torch.randint(len(rows), (), generator=generator)]]

    def right(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        nearest = torch.cdist(images.flatten(1), self.images.flatten(1)).argmin(1)
        return float((self.labels[nearest] == labels).float().mean())


class Agreeable(Judge):
    """The broken twin: it lets everything through."""

    def agrees(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images), dtype=torch.bool)


@pytest.fixture
def generator() -> Any:
    return Digits()


def test_fewer_images_are_of_another_class_and_each_class_has_as_many(quick_classifiers: None, generator: Any) -> None:
    plain, labels = sample_images(generator, 400)
    assert 0.68 < generator.right(plain, labels) < 0.82
    judge = train_judge(generator)
    filtered, same_labels = sample_images(generator, 400, judge=judge)
    assert generator.right(filtered, labels) > 0.93
    assert torch.equal(labels, same_labels) and bool(judge.agrees(filtered, labels).all())
    kept = judge.agrees(plain, labels)
    assert torch.equal(filtered[kept], plain[kept]) and not torch.equal(filtered[~kept], plain[~kept])
    broken, _ = sample_images(generator, 400, judge=Agreeable(judge.network))
    assert torch.equal(broken, plain)


def test_large_images_are_judged_at_a_smaller_side(
    quick_classifiers: None, generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "SEEN_SIDE", 4)
    judge = train_judge(generator)
    assert judge.network.features[8].in_features == 64  # at 8 pixels 256
    images, labels = sample_images(generator, 400, judge=judge)
    assert images.shape[-1] == 8 and generator.right(images, labels) > 0.85


def test_the_judge_sees_no_image_that_it_judges(quick_classifiers: None, generator: Any) -> None:
    """torch seeds the generator of a CPU by the lowest 32 bits of a seed: those are what must differ."""
    judge = train_judge(generator)
    trained_on = {seed % 2**32 for seed in generator.seeds}
    generator.seeds.clear()
    sample_images(generator, 300, judge=judge)
    assert len(trained_on) == 2000 and not trained_on & {seed % 2**32 for seed in generator.seeds}


def test_each_draw_of_an_image_is_another_one() -> None:
    seen: list[int] = []

    def draw(labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        seen.extend(seeds.tolist())
        numbers = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
        return torch.stack(numbers).view(-1, 1, 1, 1)

    never = SimpleNamespace(agrees=lambda images, labels: labels == 1)
    labels = torch.tensor([0, 1, 0])
    images = draw_agreeing(draw, labels, torch.tensor([5, 6, 7]), never)  # type: ignore[arg-type]
    assert seen[:3] == [5, 6, 7] and seen.count(6) == 1
    assert len(seen) == 1 + 2 * MOST_DRAWS and len({seed % 2**32 for seed in seen}) == len(seen)
    # What nothing recognises stays as its last draw; what agrees is its first.
    assert torch.equal(images, draw(labels, torch.tensor([seen[-2], 6, seen[-1]])))


def test_the_number_of_images_of_the_judge_follows_the_classes(
    monkeypatch: pytest.MonkeyPatch, quick_classifiers: None
) -> None:
    asked: list[int] = []

    def stop(pipeline: Any, count: int, **options: Any) -> Any:
        asked.append(count)
        raise InterruptedError

    monkeypatch.setattr(sampling, "sample_images", stop)
    for num_classes in (2, 10, 20, 1000):
        with pytest.raises(InterruptedError):
            train_judge(SimpleNamespace(num_classes=num_classes))  # type: ignore[arg-type]
    assert asked == [2000, 2000, 4000, 10_000]
    with pytest.raises(ValueError, match="--filter_by_classifier to come with a model of at least 2 classes"):
        train_judge(SimpleNamespace(num_classes=1))  # type: ignore[arg-type]
