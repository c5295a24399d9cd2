"""Evaluation: every number says what it touched and whether epsilon covers it, and bad input is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from dp_curriculum.config import DataConfig
from dp_curriculum.data import NO_CONTRIBUTION, PrivateImages, load_images, to_unit_range
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.evaluation import classifiers
from dp_curriculum.evaluation.evaluation import (
    NO_TRAINING_IMAGE,
    NOT_COVERED,
    Evaluation,
    evaluate_images,
    evaluate_leakage,
    sample_images,
)
from dp_curriculum.evaluation.haar_features import haar_features
from dp_curriculum.evaluation.metrics import frechet_distance
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline


pytestmark = pytest.mark.usefixtures("quick_classifiers")


@pytest.fixture(scope="module")
def training() -> PrivateImages:
    return load_images(DataConfig(resolution=8), "train")


@pytest.fixture(scope="module")
def testing() -> PrivateImages:
    return load_images(DataConfig(resolution=8), "test")


def evaluate(generated: PrivateImages, reference: PrivateImages, **options: Any) -> Evaluation:
    settings: dict[str, Any] = {"reference_name": "digits (test)", "classifiers": ("logistic",), **options}
    return evaluate_images(to_unit_range(generated.images), generated.labels, reference, **settings)


@pytest.fixture
def pipeline(make_config: Any) -> DPCurriculumPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(make_config().model, resolution=8, num_channels=1, num_classes=10)
    found = DPCurriculumPipeline(unet.eval(), EDMEulerScheduler(sigma_data=0.5), sampling={"num_inference_steps": 2})
    found.set_progress_bar_config(disable=True)
    return found


# --- sampling ------------------------------------------------------------------------------------------------------


def test_sampled_images_are_balanced_and_repeat_for_a_seed(pipeline: DPCurriculumPipeline) -> None:
    images, labels = sample_images(pipeline, 25, batch_size=10)
    assert images.shape == (25, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert labels.tolist() == [index % 10 for index in range(25)]
    again, _ = sample_images(pipeline, 25, batch_size=10)
    other, _ = sample_images(pipeline, 25, batch_size=10, seed=1)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert len({image.numpy().tobytes() for image in images}) == 25


# --- utility and fidelity ------------------------------------------------------------------------------------------


def test_the_reference_network_of_an_earlier_evaluation_gives_the_same_numbers(
    training: PrivateImages, testing: PrivateImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(training, testing)
    monkeypatch.setattr("dp_curriculum.evaluation.evaluation.train_cnn", None)  # it is not trained again
    again = evaluate(training, testing, reference_network=first.reference_network)
    assert again.metrics == first.metrics


def test_real_images_against_real_ones_score_near_the_top(training: PrivateImages, testing: PrivateImages) -> None:
    found = evaluate(training, testing, classifiers=("logistic", "cnn"))
    assert found.value("accuracy_logistic") > 0.95 and found.value("accuracy_cnn") > 0.85
    for name in ("precision", "recall", "density", "coverage"):
        assert found.value(name) > 0.8
    assert found.confusion is not None
    assert found.confusion.trace() / found.confusion.sum() == pytest.approx(found.value("accuracy_cnn"))
    assert found.confusion.sum(1).tolist() == torch.bincount(testing.labels).tolist()


def test_noise_scores_at_the_bottom_and_shuffled_labels_cost_utility_alone(
    training: PrivateImages, testing: PrivateImages
) -> None:
    generator = torch.Generator().manual_seed(0)
    real = evaluate(training, testing)
    noise = torch.randint(0, 256, training.images.shape, generator=generator, dtype=torch.uint8)
    found = evaluate(PrivateImages(noise, training.labels, training.class_names), testing)
    assert found.value("accuracy_logistic") < 0.4
    assert found.value("fd_classifier") > 20 * real.value("fd_classifier")
    assert found.value("precision") < 0.5 > found.value("coverage")
    order = torch.randperm(len(training), generator=generator)
    assert found.value("fd_haar") > 20 * real.value("fd_haar_floor")
    found = evaluate(PrivateImages(training.images, training.labels[order], training.class_names), testing)
    assert found.value("accuracy_logistic") < 0.4
    for name in ("fd_classifier", "fd_haar", "fd_haar_floor"):
        assert found.value(name) == real.value(name)


def test_every_metric_says_what_it_touched_and_that_no_training_image_was_read(
    training: PrivateImages, testing: PrivateImages
) -> None:
    metrics = evaluate(training, testing).metrics
    assert [metric.name for metric in metrics] == [
        "accuracy_logistic",
        *("fd_classifier", "fd_haar", "fd_haar_floor", "precision", "recall", "density", "coverage"),
    ]
    for metric in metrics:
        assert metric.privacy == NO_TRAINING_IMAGE
        assert ("1,437" in metric.data) is (metric.name != "fd_haar_floor") and "360 of digits (test)" in metric.data
    assert "trained on 1,437 generated images, tested on" in metrics[0].data
    assert "in features of a CNN trained on the latter" in metrics[1].data and "k = 4" in metrics[4].data
    assert metrics[2].data == "1,437 generated images against 360 of digits (test), in Haar features"
    assert metrics[3].data == "two halves of 360 of digits (test), in Haar features"


def test_a_reference_that_was_trained_on_is_marked_not_covered(training: PrivateImages) -> None:
    found = evaluate(training, training, reference_is_private=True)
    assert {metric.privacy for metric in found.metrics} == {NOT_COVERED}


def test_spread_is_over_trainings_of_the_classifier(training: PrivateImages, testing: PrivateImages) -> None:
    few = PrivateImages(training.images[:300], training.labels[:300], training.class_names)
    once = evaluate(few, testing, classifiers=("cnn",)).metrics[0]
    assert once.spread is None
    thrice = evaluate(few, testing, classifiers=("cnn",), num_seeds=3).metrics[0]
    assert thrice.spread is not None and thrice.spread > 0
    assert abs(thrice.value - once.value) <= 3 * thrice.spread
    assert evaluate(few, testing, classifiers=("cnn",), num_seeds=3).metrics[0] == thrice


def test_classifiers_see_large_images_at_a_smaller_side_and_the_report_says_so(
    training: PrivateImages, testing: PrivateImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(images: PrivateImages) -> PrivateImages:
        shape = (*images.images.shape[:2], 4, 2, 4, 2)
        return dataclasses.replace(images, images=images.images.view(shape).float().mean(dim=(3, 5)).round().byte())

    small = evaluate(halved(training), halved(testing))
    monkeypatch.setattr(classifiers, "SEEN_SIDE", 4)
    found = evaluate(training, testing)
    assert found.metrics[0].data.endswith("of digits (test), both at 4x4 pixels")
    assert found.value("accuracy_logistic") == pytest.approx(small.value("accuracy_logistic"), abs=0.03)
    assert found.images.shape[-1] == 8 and found.reference_network is not None


def test_rows_of_the_reference_without_a_label_are_left_out(training: PrivateImages, testing: PrivateImages) -> None:
    labels = testing.labels.clone()
    labels[::2] = NO_CONTRIBUTION
    half = PrivateImages(testing.images, labels, testing.class_names)
    assert "180 of digits (test)" in evaluate(training, half).metrics[0].data


def test_the_numbers_are_json(training: PrivateImages, testing: PrivateImages) -> None:
    numbers = json.loads(json.dumps(evaluate(training, testing).to_dict(), allow_nan=False))
    assert numbers["num_images"] == 1437 and len(numbers["metrics"]) == 8
    assert set(numbers["metrics"][0]) == {"name", "value", "data", "privacy", "spread", "interval", "meaning"}


# --- bad input -----------------------------------------------------------------------------------------------------


def changed(images: PrivateImages, change: str) -> PrivateImages:
    pixels, labels, names = images.images, images.labels, images.class_names
    return {
        "colour": PrivateImages(pixels.repeat(1, 3, 1, 1), labels, names),
        "resolution": PrivateImages(pixels.repeat(1, 1, 2, 2), labels, names),
        "few": PrivateImages(pixels[:99], labels[:99], names),
        "unlabelled": PrivateImages(pixels, torch.full_like(labels, NO_CONTRIBUTION), names),
        "fewer classes": PrivateImages(pixels, labels.clamp_max(8), names[:9]),
        "more classes": PrivateImages(pixels, labels, (*names, "ten")),
        "nothing": images,
    }[change]


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ("colour", {}, r"\(1, 8, 8\): it has \(3, 8, 8\)"),
        ("resolution", {}, r"\(1, 8, 8\): it has \(1, 16, 16\)"),
        ("few", {}, "at least 100 images on each side: 1437 were generated .*the reference has 99"),
        ("unlabelled", {}, "the reference has 0 with a label"),
        ("fewer classes", {}, "classes of the generated images, 10: it names 9"),
        ("more classes", {}, "classes of the generated images, 10: it names 11"),
        ("nothing", {"classifiers": ("svm",)}, "--classifiers=svm to be one of logistic, mlp, cnn, resnet"),
        ("nothing", {"num_seeds": 0}, "--num_seeds=0"),
        ("nothing", {"inception_weights": "nowhere.pth"}, "--inception_weights=nowhere.pth"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_trained(
    change: str,
    options: dict[str, Any],
    named: str,
    training: PrivateImages,
    testing: PrivateImages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("dp_curriculum.evaluation.classifiers._fit", fail)
    monkeypatch.setitem(
        __import__("dp_curriculum.evaluation.evaluation", fromlist=["CLASSIFIERS"]).CLASSIFIERS, "logistic", fail
    )
    with pytest.raises(ValueError, match=named) as caught:
        evaluate(training, changed(testing, change), **options)
    assert str(caught.value).startswith("Expected ") and "\n" not in str(caught.value)


def test_too_few_generated_images_are_refused(training: PrivateImages, testing: PrivateImages) -> None:
    with pytest.raises(ValueError, match=r"99 were generated \(--num_images\)"):
        evaluate(changed(training, "few"), testing)


def test_images_of_one_class_have_a_distance_and_no_utility(
    training: PrivateImages, testing: PrivateImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without labels there is no classifier to train: neither utility nor its features are reported."""
    sets = [PrivateImages(rows.images, torch.zeros_like(rows.labels), ("image",)) for rows in (training, testing)]
    alone = evaluate(*sets)
    assert [metric.name for metric in alone.metrics] == ["fd_haar", "fd_haar_floor"] and alone.confusion is None
    assert alone.value("fd_haar") == evaluate(training, testing).value("fd_haar")
    monkeypatch.setattr("dp_curriculum.evaluation.evaluation.check_inception", lambda weights: None)
    monkeypatch.setattr("dp_curriculum.evaluation.evaluation.inception_features", features_without_a_network)
    found = evaluate(*sets, inception_weights="weights.pth")
    assert [metric.name for metric in found.metrics[2:]] == ["fid", "kid", "inception_score"]


def test_the_floor_does_not_depend_on_the_order_of_the_real_images(
    training: PrivateImages, testing: PrivateImages
) -> None:
    """Sorted by class, two halves of a file have no class in common; a distance of those would be no floor."""
    rows = testing.labels.argsort(stable=True)
    by_class = PrivateImages(testing.images[rows], testing.labels[rows], testing.class_names)
    floors = [evaluate(training, part).value("fd_haar_floor") for part in (testing, by_class)]
    features = haar_features(to_unit_range(by_class.images))
    assert max(floors) < 0.5 * frechet_distance(features[:180], features[180:])


def features_without_a_network(images: torch.Tensor, weights: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = images.flatten(1).double()
    return pixels.numpy(), pixels[:, :20].softmax(1).numpy()


def test_inception_adds_its_three_metrics(
    training: PrivateImages, testing: PrivateImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dp_curriculum.evaluation.evaluation.check_inception", lambda weights: None)
    monkeypatch.setattr("dp_curriculum.evaluation.evaluation.inception_features", features_without_a_network)
    metrics = {metric.name: metric for metric in evaluate(training, testing, inception_weights="weights.pth").metrics}
    assert metrics["fid"].value > 0 and metrics["kid"].spread is not None and metrics["inception_score"].value >= 1
    assert "in features of Inception v3" in metrics["fid"].data


# --- leakage -------------------------------------------------------------------------------------------------------


def test_leakage_is_marked_not_covered_with_intervals(
    pipeline: DPCurriculumPipeline, training: PrivateImages, testing: PrivateImages
) -> None:
    images, _ = sample_images(pipeline, 120)
    metrics = evaluate_leakage(pipeline, images, training, testing, num_images=100)
    assert {metric.name: metric.data for metric in metrics[:3]} == {
        "nearest_neighbor_ratio": "100 generated images against 360 training images and as many held-out ones; "
        "1 without copies",
        "nearest_training_share": "100 generated images against 1,437 training images and 360 held-out ones; "
        "0.800 without copies",
        "membership_auc": "100 training images and as many held-out ones; 0.5 for a blind guess",
    }
    for metric in metrics:
        assert metric.privacy == NOT_COVERED
        assert metric.interval is not None and metric.interval[0] <= metric.value <= metric.interval[1]
    tails = ["tpr_at_1", "tpr_at_0.1", "worst_5", "worst_1"]
    assert [metric.name for metric in metrics[3:]] == [f"membership_{name}" for name in tails]
    # The network is untrained: it knows no image better than another.
    assert metrics[2].value == pytest.approx(0.5, abs=0.15)


def test_copies_are_seen_whichever_training_images_they_are_of(
    pipeline: DPCurriculumPipeline, training: PrivateImages, testing: PrivateImages
) -> None:
    """A fortieth of the training images is what a test split of that size is compared with, as equals."""
    few = PrivateImages(testing.images[:36], testing.labels[:36], testing.class_names)
    _, share, *_ = evaluate_leakage(pipeline, to_unit_range(training.images[:300]), training, few)
    assert share.interval is not None and share.interval[0] > 1437 / (1437 + 36)
    ratio, share, *_ = evaluate_leakage(pipeline, to_unit_range(training.images[:300]), training, testing)
    assert share.value == 1 and ratio.interval is not None and ratio.interval[1] < 1
    ratio, share, *_ = evaluate_leakage(pipeline, to_unit_range(testing.images[:300]), training, testing)
    assert share.value == 0 and ratio.value > 100


def test_leakage_compares_like_with_like_where_datasets_are_sorted(
    pipeline: DPCurriculumPipeline, training: PrivateImages, testing: PrivateImages
) -> None:
    """Sorted by class, in opposite directions: their first rows have no class in common."""
    up, down = training.labels.argsort(stable=True), testing.labels.argsort(stable=True, descending=True)
    members = PrivateImages(training.images[up], training.labels[up], training.class_names)
    others = PrivateImages(testing.images[down], testing.labels[down], testing.class_names)
    images, _ = sample_images(pipeline, 20)
    _, _, auc, *_ = evaluate_leakage(pipeline, images, members, others, num_images=100)
    assert auc.value == pytest.approx(0.5, abs=0.15)


def test_leakage_leaves_out_rows_without_a_label(
    pipeline: DPCurriculumPipeline, training: PrivateImages, testing: PrivateImages
) -> None:
    labels = testing.labels.clone()
    labels[50:] = NO_CONTRIBUTION
    partly = PrivateImages(testing.images, labels, testing.class_names)
    images, _ = sample_images(pipeline, 20)
    metrics = evaluate_leakage(pipeline, images, training, partly)
    assert "against 50 training images" in metrics[0].data and metrics[2].data.startswith("50 training images")
