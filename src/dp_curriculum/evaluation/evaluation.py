"""Quality of generated images: utility, fidelity and leakage, each number with the data that it touched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dp_curriculum.data.images import PrivateImages, contributing, to_unit_range
from dp_curriculum.evaluation.classifiers import CLASSIFIERS, SmallCNN, as_classifiers_see, network_features, train_cnn
from dp_curriculum.evaluation.haar_features import haar_features
from dp_curriculum.evaluation.inception import check_inception, inception_features
from dp_curriculum.evaluation.leakage import (
    Bounded,
    denoising_losses,
    membership_auc,
    nearest_neighbor_ratio,
    nearest_training_share,
    seen_by_network,
)
from dp_curriculum.evaluation.metrics import frechet_distance, inception_score, kernel_distance, manifold_overlap
from dp_curriculum.evaluation.sampling import sample_images as sample_images
from dp_curriculum.evaluation.unit_leakage import attack_tails, leakage_of_persons
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline


MIN_IMAGES = 100
NO_TRAINING_IMAGE = "reads no training image"
NOT_COVERED = "reads training images: not covered by epsilon"
NOT_PUBLIC = "reads real images that are not known to be public: not covered by epsilon"

# Meaning of each number, and which way is good.
MEANINGS = {
    "accuracy": "share of real images that a classifier gets right after training on generated ones; higher is better",
    "fd_classifier": "distance between generated and real images, to a classifier; lower is better, 0 is equal",
    "fd_haar": "distance between generated and real images, in edges and layout; lower is better, 0 is equal",
    "fd_haar_floor": "fd_haar between two halves of the real images: near it is good, unless they are few",
    "precision": "share of generated images that look like real ones; higher is better",
    "recall": "share of real images that generated ones look like; higher is better",
    "density": "how crowded with real images the places of generated ones are; higher is better, 1 is equal",
    "coverage": "share of real images with a generated one nearby; higher is better",
    "fid": "distance between generated and real images, to Inception; lower is better, 0 is equal",
    "kid": "distance between generated and real images, to Inception; lower is better, 0 is equal",
    "inception_score": "how distinct and varied the images are to Inception; higher is better",
    "nearest_neighbor_ratio": "nearness to training images beside others; 1 is good, well below 1 means copies",
    "nearest_training_share": "share nearest to a training image; its stated share is good, near 1 means copies",
    "membership_auc": "how well an attack recognises training images; 0.5 is good, 1 is a full leak",
    "membership_tpr_at_1": "share of training images that it recognises at 1 % false alarms; 0.01 is good",
    "membership_tpr_at_0.1": "the same at 0.1 % false alarms; 0.001 is good",
    "membership_worst_5": "how far the worst 5 % stand out, in standard deviations of held-out ones; 0 is good",
    "membership_worst_1": "the same of the worst 1 %; 0 is good",
    "person_auc": "how well an attack recognises persons by all their images; 0.5 is good, 1 is a full leak",
    "person_tpr_at_1": "share of persons that it recognises at 1 % false alarms; 0.01 is good",
    "person_tpr_at_0.1": "the same at 0.1 % false alarms; 0.001 is good",
    "person_worst_5": "how far the worst 5 % of persons stand out, in deviations of held-out ones; 0 is good",
    "person_worst_1": "the same of the worst 1 % of persons; 0 is good",
}


@dataclass(frozen=True)
class Metric:
    """
    One number, and what has to be known about it.

    Args:
        name (`str`): What it measures.
        value (`float`): The mean over seeds where there are several.
        spread (`float`, *optional*): Standard deviation over seeds or subsets.
        interval (`tuple[float, float]`, *optional*): 95 % confidence interval.
        data (`str`): The images that it touched.
        privacy (`str`): Whether epsilon covers it.
    """

    name: str
    value: float
    data: str
    privacy: str
    spread: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def meaning(self) -> str:
        """Meaning of the number, and which way is good."""
        return MEANINGS["accuracy" if self.name.startswith("accuracy") else self.name]


@dataclass(frozen=True)
class Evaluation:
    """
    All metrics of one set of generated images, what plots are made from, and the network in whose features images were
    compared, which is trained on the reference alone.

    Shapes:
        images: `(M, C, H, W)` in `[0, 1]`; labels: `(M,)`; confusion: `(classes, classes)`, rows are true classes.
    """

    metrics: tuple[Metric, ...]
    images: torch.Tensor
    labels: torch.Tensor
    confusion: np.ndarray | None = None
    reference_network: SmallCNN | None = None

    def value(self, name: str) -> float:
        return next(metric.value for metric in self.metrics if metric.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        rows = [{**dataclasses.asdict(metric), "meaning": metric.meaning} for metric in self.metrics]
        return {"num_images": len(self.images), "metrics": rows}


def evaluate_images(
    images: torch.Tensor,
    labels: torch.Tensor,
    reference: PrivateImages,
    *,
    reference_name: str,
    reference_is_private: bool = False,
    reference_is_public: bool = True,
    classifiers: Sequence[str] = ("logistic", "cnn"),
    num_seeds: int = 1,
    inception_weights: str | None = None,
    reference_network: SmallCNN | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    r"""
    Utility and fidelity of generated images, measured against a reference that was not trained on.

    Images of one class have no utility here, and no distance to a classifier: none can be trained. Classifiers see
    images of more than 64 pixels per side at 64.

    Args:
        images (`torch.Tensor` of shape `(M, C, H, W)`): Generated images in `[0, 1]`.
        labels (`torch.LongTensor` of shape `(M,)`): Their classes.
        reference ([`PrivateImages`]): Real images of the same shape and classes.
        reference_name (`str`): Dataset and split, as the report names them.
        reference_is_private (`bool`, *optional*, defaults to `False`): Whether the reference was trained on; the
            numbers are then marked as not covered by epsilon.
        reference_is_public (`bool`, *optional*, defaults to `True`): Whether anybody may see the reference; if not,
            the numbers are marked as not covered, too.
        classifiers (`Sequence[str]`, *optional*): Names from [`CLASSIFIERS`], trained on the generated images alone.
        num_seeds (`int`, *optional*, defaults to 1): Trainings of each classifier; mean and spread are reported.
        inception_weights (`str`, *optional*): File of Inception's weights, for FID, KID and Inception Score.
        reference_network ([`SmallCNN`], *optional*): That of an earlier [`Evaluation`] against the same reference, on
            the same device; trained if unset.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where networks are trained and run: the CPU
            or a CUDA device.

    Raises:
        ValueError: If there are too few images, shapes or classes differ, or a classifier is unknown.
    """
    rows = contributing(reference.labels, reference.num_classes)
    real, real_labels = to_unit_range(reference.images[rows]), reference.labels[rows]
    _check(images, labels, real, reference.num_classes, classifiers)
    if num_seeds < 1:
        raise ValueError(f"Expected --num_seeds={num_seeds} to be at least 1.")
    if inception_weights is not None:
        check_inception(inception_weights)
    unseen = NO_TRAINING_IMAGE if reference_is_public else NOT_PUBLIC
    privacy = NOT_COVERED if reference_is_private else unseen
    tested = f"trained on {len(images):,} generated images, tested on {len(real):,} of {reference_name}"
    metrics, confusion = [], None
    # The results hold the images, and plots are drawn of them: these copies are for the networks.
    there, labels_there, real_there = images.to(device), labels.to(device), real.to(device)
    seen, real_seen = as_classifiers_see(there), as_classifiers_see(real_there)
    if seen.shape != there.shape:
        tested += f", both at {seen.shape[-2]}x{seen.shape[-1]} pixels"
    for name in classifiers if reference.num_classes > 1 else ():
        scores = []
        for seed in range(num_seeds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scikit-learn on training that reached its limit of steps
                predicted = CLASSIFIERS[name](seen, labels_there, reference.num_classes, seed)(real_seen)
            scores.append(float((predicted == real_labels.numpy()).mean()))
        metrics.append(Metric(f"accuracy_{name}", float(np.mean(scores)), tested, privacy, _spread(scores)))
        confusion = _confusion(real_labels.numpy(), predicted, reference.num_classes)
    network = reference_network
    if network is None and reference.num_classes > 1:
        network = train_cnn(real_seen, real_labels.to(device), num_classes=reference.num_classes, num_steps=1000)
    metrics += _fidelity(there, real_there, network, reference_name, privacy, inception_weights)
    return Evaluation(tuple(metrics), images, labels, confusion, network)


def _check(
    images: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, num_classes: int, classifiers: Sequence[str]
) -> None:
    if images.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"Expected the reference to have the shape of the generated images, {tuple(images.shape[1:])}: it has "
            f"{tuple(real.shape[1:])}; set --resolution and --num_channels."
        )
    if min(len(images), len(real)) < MIN_IMAGES:
        raise ValueError(
            f"Expected at least {MIN_IMAGES} images on each side: {len(images)} were generated (--num_images), the "
            f"reference has {len(real)} with a label."
        )
    if int(labels.max()) + 1 != num_classes:
        raise ValueError(
            f"Expected the reference to have the classes of the generated images, {int(labels.max()) + 1}: it names "
            f"{num_classes}; generate images of each class, and compare with a dataset of the same classes."
        )
    for name in classifiers:
        if name not in CLASSIFIERS:
            raise ValueError(f"Expected --classifiers={name} to be one of {', '.join(CLASSIFIERS)}.")


def _fidelity(
    images: torch.Tensor,
    real: torch.Tensor,
    network: SmallCNN | None,
    reference_name: str,
    privacy: str,
    inception_weights: str | None,
) -> list[Metric]:
    """Distances to a classifier that was trained on the reference, to the eye, and to Inception where asked."""
    compared = f"{len(images):,} generated images against {len(real):,} of {reference_name}"
    metrics = [] if network is not None else _haar_distances(images, real, reference_name, privacy)
    if network is not None:
        ours, theirs = (network_features(network, as_classifiers_see(side)) for side in (images, real))
        space = f"{compared}, in features of a CNN trained on the latter"
        metrics.append(Metric("fd_classifier", frechet_distance(ours, theirs), space, privacy))
        metrics += _haar_distances(images, real, reference_name, privacy)
        overlap = dataclasses.asdict(manifold_overlap(theirs, ours))
        metrics += [Metric(name, value, f"{space}, k = 4", privacy) for name, value in overlap.items()]
    if inception_weights is not None:
        ours, probabilities = inception_features(images, inception_weights)
        theirs, _ = inception_features(real, inception_weights)
        space = f"{compared}, in features of Inception v3"
        mean, deviation = kernel_distance(ours, theirs)
        metrics += [
            Metric("fid", frechet_distance(ours, theirs), space, privacy),
            Metric("kid", mean, space, privacy, deviation),
            Metric("inception_score", inception_score(probabilities), f"{len(images):,} generated images", privacy),
        ]
    return metrics


def _haar_distances(images: torch.Tensor, real: torch.Tensor, reference_name: str, privacy: str) -> list[Metric]:
    """The distance in features that know no class, and what it is between real images."""
    ours, theirs = haar_features(images), haar_features(real)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).numpy()  # datasets may be sorted
    floor = frechet_distance(theirs[order[::2]], theirs[order[1::2]])
    compared = f"{len(images):,} generated images against {len(real):,} of {reference_name}, in Haar features"
    halves = f"two halves of {len(real):,} of {reference_name}, in Haar features"
    return [
        Metric("fd_haar", frechet_distance(ours, theirs), compared, privacy),
        Metric("fd_haar_floor", floor, halves, privacy),
    ]


def evaluate_leakage(
    pipeline: DPCurriculumPipeline,
    images: torch.Tensor,
    training: PrivateImages,
    held_out: PrivateImages,
    *,
    num_images: int = 1000,
) -> tuple[Metric, ...]:
    r"""
    Measures what the model and its images reveal about training images, compared with held-out ones.

    Args:
        pipeline ([`DPCurriculumPipeline`]): The attacked model.
        images (`torch.Tensor` of shape `(M, C, H, W)`): What it generated.
        training ([`PrivateImages`]): Images that were trained on.
        held_out ([`PrivateImages`]): Images that were not.
        num_images (`int`, *optional*, defaults to 1000): Generated images that are compared, and images of either set
            whose losses are computed.

    Privacy:
        Reads training images without noise. Keep the result to yourself.
    """
    rows_of = [_in_random_order(rows) for rows in (training, held_out)]
    sets = [
        (to_unit_range(private.images[rows]), private.labels[rows])
        for private, rows in zip((training, held_out), rows_of)
    ]
    flat = [pixels.flatten(1).numpy() for pixels, _ in sets]
    seen = [
        seen_by_network(pipeline, private.images[rows[:num_images]])
        for private, rows in zip((training, held_out), rows_of)
    ]
    generated = images[:num_images].flatten(1).numpy()
    size = min(len(pixels) for pixels in flat)
    count = min(num_images, size)
    sigma_data = pipeline.scheduler.config.sigma_data
    losses = [
        denoising_losses(
            pipeline.unet,
            values[:count],
            labels[:count],
            sigma_data=sigma_data,
            prior=pipeline.prior,
            schedule=pipeline.noise_schedule,
        )
        for values, (_, labels) in zip(seen, sets)
    ]
    compared = f"{len(generated):,} generated images against"
    expected = len(flat[0]) / (len(flat[0]) + len(flat[1]))
    found: Mapping[str, tuple[Bounded, str]] = {
        "nearest_neighbor_ratio": (
            nearest_neighbor_ratio(generated, flat[0][:size], flat[1][:size]),
            f"{compared} {size:,} training images and as many held-out ones; 1 without copies",
        ),
        "nearest_training_share": (
            nearest_training_share(generated, *flat),
            f"{compared} {len(flat[0]):,} training images and {len(flat[1]):,} held-out ones; {expected:.3f} without "
            "copies",
        ),
        "membership_auc": (
            membership_auc(losses[0], losses[1]),
            f"{count:,} training images and as many held-out ones; 0.5 for a blind guess",
        ),
    }
    tails, data = attack_tails(-losses[0], -losses[1]), f"{count:,} training images and as many held-out ones"
    found = {
        **found,
        **{f"membership_{name}": (tail, data) for name, tail in tails.items() if name != "auc"},
        **leakage_of_persons(pipeline, training, held_out),
    }
    return tuple(
        Metric(name, bounded.value, data, NOT_COVERED, interval=(bounded.low, bounded.high))
        for name, (bounded, data) in found.items()
    )


def _in_random_order(private: PrivateImages) -> torch.Tensor:
    """Rows that have a label, in random order. First rows are special: many datasets are sorted."""
    rows = contributing(private.labels, private.num_classes).nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def _spread(scores: list[float]) -> float | None:
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def _confusion(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (true, predicted), 1)
    return counts
