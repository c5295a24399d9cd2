"""Classifiers that measure images: they learn, they repeat for a seed, and they leave global state alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from dp_curriculum.config import DataConfig
from dp_curriculum.data import load_images, to_unit_range
from dp_curriculum.evaluation import classifiers
from dp_curriculum.evaluation.classifiers import CLASSIFIERS, SmallCNN, SmallResNet, network_features, train_cnn


pytestmark = [pytest.mark.usefixtures("quick_classifiers"), pytest.mark.filterwarnings("ignore:.*[Cc]onverge")]

Images = tuple[torch.Tensor, torch.Tensor]


def digits(split: str) -> Images:
    loaded = load_images(DataConfig(resolution=8), split)
    return to_unit_range(loaded.images), loaded.labels


@pytest.fixture(scope="module")
def training() -> Images:
    return digits("train")


@pytest.fixture(scope="module")
def testing() -> Images:
    return digits("test")


def in_colour(images: torch.Tensor) -> torch.Tensor:
    """Digits in yellow."""
    return images * torch.tensor([1.0, 1.0, 0.2]).view(1, 3, 1, 1)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_each_classifier_learns_real_digits(
    name: str, training: Images, testing: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "resnet":
        few_steps(monkeypatch, 60)
    predicted = CLASSIFIERS[name](*training, 10, 0)(testing[0])
    assert predicted.shape == (len(testing[0]),) and predicted.dtype.kind == "i"
    assert (predicted == testing[1].numpy()).mean() > 0.85


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_each_classifier_learns_images_in_colour(name: str, training: Images, testing: Images) -> None:
    predicted = CLASSIFIERS[name](in_colour(training[0]), training[1], 10, 0)(in_colour(testing[0]))
    assert (predicted == testing[1].numpy()).mean() > 0.85


def few_steps(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    fit = classifiers._fit
    monkeypatch.setattr(
        classifiers, "_fit", lambda model, images, labels, num_steps: fit(model, images, labels, min(num_steps, count))
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_a_seed_repeats_a_classifier_and_another_seed_does_not(
    name: str, training: Images, testing: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few steps, where the answers still hang on the draws. Logistic regression is convex: it has no seed."""
    few_steps(monkeypatch, 3)
    images, labels = training[0][:200], training[1][:200]
    first, again, other = (CLASSIFIERS[name](images, labels, 10, seed)(testing[0]) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_neither_reads_nor_moves_the_global_generators(
    name: str, training: Images, testing: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch, 2)
    images, labels = training[0][:200], training[1][:200]
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        answers.append(CLASSIFIERS[name](images, labels, 10, 0)(testing[0][:50]))
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert np.array_equal(*answers)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 12)])
def test_classifiers_take_images_of_any_shape(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some classes are missing."""
    few_steps(monkeypatch, 1)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, *shape, generator=generator), torch.arange(40) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predict = CLASSIFIERS[name](images, labels, 5, 0)
    assert set(predict(images[:7]).tolist()) <= set(range(5))


def test_features_are_those_ahead_of_the_last_layer(training: Images) -> None:
    model = train_cnn(training[0][:64], training[1][:64], num_classes=10, num_steps=2)
    found = network_features(model, training[0][:20])
    assert found.shape == (20, 128) and found.dtype == np.float64
    logits = model.classifier(torch.from_numpy(found).float())
    assert torch.allclose(logits, model(training[0][:20]), atol=1e-6)


def test_a_trained_network_answers_each_image_by_itself(training: Images) -> None:
    """Dropout is off, and batch normalization uses what it has learned."""
    for model in (SmallCNN(1, 8, 10), SmallResNet(1, 10)):
        classifiers._fit(model, training[0][:64], training[1][:64], 2)
        with torch.no_grad():
            together, alone = model(training[0][:5]), torch.cat([model(row) for row in training[0][:5].split(1)])
        assert torch.allclose(together, alone, atol=1e-5)
