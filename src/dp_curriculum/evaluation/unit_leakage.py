"""Recognition of single images and single persons by an attack: its tails, with bounds, beside its average.

An average near a blind guess says nothing of the few whom an attack recognises for certain: so no number here is an
average alone. All of it reads private images.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy import stats

from dp_curriculum.data.images import PrivateImages
from dp_curriculum.evaluation.leakage import Bounded, denoising_losses, membership_auc, seen_by_network
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline


_IMAGES_EACH, _MOST_IMAGES = 32, 8000  # of a person, and of all that are attacked
_LEAST_PERSONS = 10  # held out
FALSE_POSITIVE_RATES = (0.01, 0.001)
PERCENTILES = (95, 99)
_RESAMPLES = 1000


def recognition(losses: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    Share `(N,)` of held-out images that look less like training ones than each image does: their loss is larger.

    Args:
        losses (`np.ndarray` of shape `(N,)`): Losses of the attacked model on some images.
        others (`np.ndarray` of shape `(M,)`): Its losses on held-out images. Equal losses count half.
    """
    ordered = np.sort(others)
    larger = len(ordered) - np.searchsorted(ordered, losses, side="right")
    equal = len(ordered) - np.searchsorted(ordered, losses, side="left") - larger
    return (larger + equal / 2) / len(ordered)


def evidence_of_persons(recognised: np.ndarray, persons: np.ndarray) -> np.ndarray:
    r"""
    Attack score of each person `(P,)`: what all of their images say together, in standard deviations of chance.

    The sum over n images of recognition less 1/2, times sqrt(12 / n): about standard normal for a person who did not
    take part, if images were independent. Those of a person are not, so scores are compared with held-out persons.

    Args:
        recognised (`np.ndarray` of shape `(N,)`): Of each image, as [`recognition`] returns it.
        persons (`np.ndarray` of shape `(N,)`): Numbers of persons, each of whom has an image.
    """
    _, index = np.unique(persons, return_inverse=True)
    return np.bincount(index, recognised - 0.5) * np.sqrt(12 / np.bincount(index))


def attack_tails(members: np.ndarray, others: np.ndarray, *, seed: int = 0) -> Mapping[str, Bounded]:
    r"""
    Average and tails of an attack that says "took part" where a score is large.

    Args:
        members (`np.ndarray` of shape `(N,)`): Scores of images or persons that were trained on.
        others (`np.ndarray` of shape `(M,)`): Scores of held-out ones.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        Three kinds of numbers, by name. `auc`: the average. `tpr_at_1` and `tpr_at_0.1`: share of members that are
        recognised where at most 1 % or 0.1 % of the held-out ones are taken for members, with the interval of Clopper
        and Pearson (1934) for that threshold; a blind guess has the same share. `worst_5` and `worst_1`: score that
        the worst 5 % or 1 % of members exceed, less that of the held-out ones, in their standard deviations, with the
        percentiles of a bootstrap of both; 0 for a blind guess.
    """
    found = {"auc": membership_auc(-members, -others)}
    for rate in FALSE_POSITIVE_RATES:
        found[f"tpr_at_{100 * rate:g}"] = _share(members > _threshold(others, rate))
    generator = np.random.default_rng(seed)
    scale = max(float(np.std(others)), 1e-12)
    draws = [tuple(generator.choice(rows, len(rows)) for rows in (members, others)) for _ in range(_RESAMPLES)]
    for percentile in PERCENTILES:
        gaps = [float(np.percentile(one, percentile) - np.percentile(two, percentile)) / scale for one, two in draws]
        value = float(np.percentile(members, percentile) - np.percentile(others, percentile)) / scale
        found[f"worst_{100 - percentile}"] = Bounded(value, *(float(end) for end in np.percentile(gaps, [2.5, 97.5])))
    return found


def _threshold(others: np.ndarray, rate: float) -> float:
    """The smallest score that at most `rate` of the held-out ones exceed; the largest of few."""
    return float(np.sort(others)[::-1][int(rate * len(others))])


def _share(hits: np.ndarray) -> Bounded:
    test = stats.binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci()
    return Bounded(float(test.statistic), float(interval.low), float(interval.high))


def leakage_of_persons(
    pipeline: DPCurriculumPipeline,
    training: PrivateImages,
    held_out: PrivateImages,
    *,
    most_images: int = _MOST_IMAGES,
) -> Mapping[str, tuple[Bounded, str]]:
    """
    Average and tails of an attack on persons by all images of each, and what was compared; nothing for images.

    Args:
        pipeline ([`DPCurriculumPipeline`]): The attacked model.
        training ([`PrivateImages`]): Persons who took part.
        held_out ([`PrivateImages`]): Persons who did not. One half of them says what losses are usual, and the scores
            of the other half are those of persons who did not take part.
        most_images (`int`, *optional*): Images of either set whose losses are computed.

    Raises:
        ValueError: If there are no held-out persons to compare with.
    """
    if training.persons is None:
        return {}
    if held_out.persons is None or len(held_out.units) < _LEAST_PERSONS:
        raise ValueError(
            f"Refusing to measure leakage of persons without {_LEAST_PERSONS} held-out persons: train with --holdout "
            "0.1, and evaluate with --split holdout."
        )
    (losses, persons), (others, other_persons) = (
        _losses_of_persons(pipeline, part, most_images) for part in (training, held_out)
    )
    usual = other_persons % 2 == 1
    members = evidence_of_persons(recognition(losses, others[usual]), persons)
    strangers = evidence_of_persons(recognition(others[~usual], others[usual]), other_persons[~usual])
    data = f"{len(members):,} persons and {len(strangers):,} held-out ones, by up to {_IMAGES_EACH} images of each"
    return {f"person_{name}": (tail, data) for name, tail in attack_tails(members, strangers).items()}


def _losses_of_persons(
    pipeline: DPCurriculumPipeline, private: PrivateImages, most_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the images of persons in random order, and new numbers of the persons; no person is cut off."""
    units = private.units
    rows: list[torch.Tensor] = []
    owners: list[int] = []
    for person in torch.randperm(len(units), generator=torch.Generator().manual_seed(0)):
        own = units.rows_of(person[None])[0][:_IMAGES_EACH]
        if len(owners) + len(own) > most_images:
            break
        rows.append(own)
        owners += [len(rows)] * len(own)
    index = torch.cat(rows)
    losses = denoising_losses(
        pipeline.unet,
        seen_by_network(pipeline, private.images[index]),
        private.labels[index],
        sigma_data=pipeline.scheduler.config.sigma_data,
        prior=pipeline.prior,
        schedule=pipeline.noise_schedule,
    )
    return losses, np.array(owners)
