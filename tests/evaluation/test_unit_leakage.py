"""Tails of an attack: a few who are recognised for certain show, where the average is that of a blind guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.evaluation import unit_leakage
from dp_curriculum.evaluation.leakage import membership_auc
from dp_curriculum.evaluation.unit_leakage import (
    attack_tails,
    evidence_of_persons,
    leakage_of_persons,
    recognition,
)


def normals(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count)


def test_recognition_is_the_share_of_larger_losses_and_its_mean_is_the_auc() -> None:
    losses, others = np.array([0.1, 0.5, 0.5, 3.0]), np.array([0.5, 1.0, 0.2, 2.0])
    slow = [np.mean([(other > loss) + (other == loss) / 2 for other in others]) for loss in losses]
    assert recognition(losses, others) == pytest.approx(slow)
    assert recognition(losses, others).mean() == pytest.approx(membership_auc(losses, others).value)


def test_evidence_of_a_person_is_standard_normal_by_chance_and_grows_with_their_images() -> None:
    persons = np.repeat(np.arange(3000), np.arange(3000) % 7 + 1)
    chance = evidence_of_persons(np.random.default_rng(0).random(len(persons)), persons)
    assert len(chance) == 3000 and abs(chance.mean()) < 5 / 3000**0.5 and chance.std() == pytest.approx(1, abs=0.07)
    evidence = evidence_of_persons(np.full(101, 0.6), np.array([5] + [9] * 100))
    assert evidence == pytest.approx([0.1 * 12**0.5, 0.1 * 1200**0.5])


def test_an_attack_that_knows_nothing_is_within_its_bounds() -> None:
    found = attack_tails(normals(4000, 0), normals(4000, 1))
    for name, blind in (("auc", 0.5), ("tpr_at_1", 0.01), ("tpr_at_0.1", 0.001), ("worst_5", 0.0), ("worst_1", 0.0)):
        # The threshold of a rate is drawn, too; a factor is left for that.
        slack = 0.01 if name == "tpr_at_1" else 0.003
        assert found[name].low - slack <= blind <= found[name].high + slack, name


def test_a_few_who_are_recognised_show_in_the_tails_and_not_in_the_average() -> None:
    """One in fifty members stands out by six standard deviations: the case in which an average misleads."""
    members = normals(2000, 0)
    members[:40] += 6
    found = attack_tails(members, normals(2000, 1))
    assert abs(found["auc"].value - 0.5) < 0.03
    assert found["tpr_at_0.1"].low > 5 * 0.001 and found["tpr_at_1"].low > 0.01
    assert found["worst_1"].low > 1 and found["worst_1"].low <= found["worst_1"].value <= found["worst_1"].high


def test_the_false_positives_of_a_threshold_are_no_more_than_was_said() -> None:
    for count in (50, 100, 1000, 2001):
        others = normals(count, 2)
        for rate in unit_leakage.FALSE_POSITIVE_RATES:
            assert (others > unit_leakage._threshold(others, rate)).mean() <= rate


# --- of a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(finished_run: Path) -> DPCurriculumPipeline:
    return DPCurriculumPipeline.from_pretrained(finished_run)


def persons(count: int, seed: int) -> PrivateImages:
    owners = torch.arange(count).repeat_interleave(torch.arange(count) % 4 + 1)
    images = torch.randint(256, (len(owners), 1, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    labels = torch.arange(len(owners)) % 10
    labels[:3] = NO_CONTRIBUTION
    return PrivateImages(images, labels, tuple("0123456789"), owners)


def test_persons_are_attacked_whole_and_compared_with_persons(
    pipeline: DPCurriculumPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, held_out = persons(80, 0), persons(60, 1)
    found = leakage_of_persons(pipeline, training, held_out)
    assert {*found} == {"person_auc", "person_tpr_at_1", "person_tpr_at_0.1", "person_worst_5", "person_worst_1"}
    # Two persons of the training have no image that can be read, and one or two of each half.
    assert all(data.startswith("78 persons and ") and "held-out ones" in data for _, data in found.values())
    assert found["person_auc"][0].value == pytest.approx(0.5, abs=0.25), "it has seen none of them"

    def knows(unet: Any, images: torch.Tensor, *rest: Any, **options: Any) -> np.ndarray:
        known = {image.numpy().tobytes() for image in training.images.float() / 255}
        return np.array([0.0 if image.numpy().tobytes() in known else 1.0 for image in images])

    monkeypatch.setattr(unit_leakage, "denoising_losses", knows)
    found = leakage_of_persons(pipeline, training, held_out)
    assert found["person_auc"][0].value == found["person_tpr_at_1"][0].value == 1


def test_images_have_no_persons_and_persons_need_others(pipeline: DPCurriculumPipeline) -> None:
    training, held_out = persons(30, 0), persons(6, 1)
    images = PrivateImages(training.images, training.labels, training.class_names)
    assert leakage_of_persons(pipeline, images, held_out) == {}
    for few in (held_out, images):
        with pytest.raises(ValueError, match="Refusing to measure leakage of persons without 10 held-out persons"):
            leakage_of_persons(pipeline, training, few)
