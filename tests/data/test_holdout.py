"""Held-out images: a filter of single rows, so that the guarantee is that of training on what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.holdout import held_out_part, is_held_out, training_part
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.persons import renumbered
from dp_curriculum.data.units import NO_PERSON


KEYS = [bytes([number]) * 32 for number in range(40)]


def images(count: int, seed: int = 0) -> PrivateImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return PrivateImages(pixels, torch.arange(count) % 2, ("a", "b"))


def rows_of(private: PrivateImages) -> list[tuple[bytes, int]]:
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(private.images, private.labels)]


def without(private: PrivateImages, row: int) -> PrivateImages:
    kept = torch.arange(len(private)) != row
    return PrivateImages(private.images[kept], private.labels[kept], private.class_names)


@pytest.mark.parametrize("key", KEYS[:5])
def test_both_parts_make_the_whole_and_share_nothing(key: bytes) -> None:
    private = images(200)
    kept, held = rows_of(training_part(private, key, 0.3)), rows_of(held_out_part(private, key, 0.3))
    assert sorted(kept + held) == sorted(rows_of(private)) and not set(kept) & set(held)
    assert kept == [row for row in rows_of(private) if row in set(kept)]  # in their order


@pytest.mark.parametrize("key", KEYS)
def test_one_row_less_is_at_most_one_row_less_in_what_is_trained_on_for_every_key(key: bytes) -> None:
    """The proof of docs/privacy.md: also to somebody who knows the key, neighbours stay neighbours."""
    private = images(12)
    for row in range(len(private)):
        whole, less = training_part(private, key, 0.4), training_part(without(private, row), key, 0.4)
        expected = rows_of(whole)
        if not is_held_out(private.images, key, 0.4)[row]:
            expected.remove(rows_of(private)[row])
        assert rows_of(less) == expected


def test_a_replaced_row_moves_no_other_and_its_place_does_not_count() -> None:
    private, other = images(30), images(30, seed=1)
    before = is_held_out(private.images, KEYS[0], 0.5)
    private.images[7] = other.images[0]
    after = is_held_out(private.images, KEYS[0], 0.5)
    assert before[torch.arange(30) != 7].equal(after[torch.arange(30) != 7])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert is_held_out(private.images[order], KEYS[0], 0.5).equal(after[order])


def test_equal_images_are_on_one_side_whatever_their_label() -> None:
    private = images(20)
    twice = torch.cat([private.images, private.images])
    found = is_held_out(twice, KEYS[3], 0.5)
    assert found[:20].equal(found[20:]) and 0 < found.sum() < 40


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_held_out_on_average_and_keys_are_independent(share: float) -> None:
    pixels = images(2000).images
    found = torch.stack([is_held_out(pixels, key, share) for key in KEYS]).double()
    deviation = (share * (1 - share) / found.numel()) ** 0.5
    assert abs(float(found.mean()) - share) < 5 * deviation
    assert abs(float(((found[0] - share) * (found[1] - share)).mean())) < 5 * share * (1 - share) / 2000**0.5


def test_what_is_accounted_for_is_a_constant() -> None:
    """The true number of images that are left is a draw; no constant of the guarantee follows from it."""
    assert DataConfig(holdout=0.1).training_size(2001) == 1801 and DataConfig().training_size(2001) == 2001
    assert DataConfig(holdout=0.999).training_size(1) == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="--holdout="):
        CurriculumConfig().replace(holdout=share)


def test_floats_are_refused() -> None:
    """Two computers may round them differently, and a row would change sides."""
    floats: Any = torch.rand(3, 1, 8, 8)
    with pytest.raises(TypeError):
        is_held_out(floats, KEYS[0], 0.5)


# --- persons ---------------------------------------------------------------------------------------------------------


def with_persons(count: int, seed: int = 0) -> PrivateImages:
    """Persons of one to five images, mixed, and rows of no one."""
    private = images(count, seed)
    persons = torch.randint(-1, max(1, count // 3), (count,), generator=torch.Generator().manual_seed(seed))
    return PrivateImages(private.images, private.labels, private.class_names, renumbered(persons))


def persons_in(private: PrivateImages) -> dict[frozenset[bytes], int]:
    """The persons, by their images, and how many images each has."""
    assert private.persons is not None
    owners = [private.persons == person for person in range(len(private.units))]
    return {frozenset(image.numpy().tobytes() for image in private.images[own]): int(own.sum()) for own in owners}


@pytest.mark.parametrize("key", KEYS[:10])
def test_persons_are_held_out_whole(key: bytes) -> None:
    private = with_persons(90)
    kept, held = training_part(private, key, 0.4), held_out_part(private, key, 0.4)
    assert len(kept) + len(held) == len(private) and 0 < len(held.units) < len(private.units)
    assert persons_in(kept) | persons_in(held) == persons_in(private)
    assert not persons_in(kept).keys() & persons_in(held).keys()
    assert held.persons is not None and NO_PERSON not in held.persons, "who is no one is not compared with anybody"


@pytest.mark.parametrize("key", KEYS[:20])
def test_one_person_less_is_at_most_one_person_less_in_what_is_trained_on_for_every_key(key: bytes) -> None:
    private = with_persons(30)
    assert private.persons is not None
    whole = persons_in(training_part(private, key, 0.4))
    for person in range(len(private.units)):
        left = private.persons != person
        fewer = PrivateImages(
            private.images[left], private.labels[left], private.class_names, renumbered(private.persons[left])
        )
        (gone,) = persons_in(private).keys() - persons_in(fewer).keys()
        assert persons_in(training_part(fewer, key, 0.4)) == {k: v for k, v in whole.items() if k != gone}


def test_the_order_of_images_and_the_numbers_of_persons_do_not_count() -> None:
    private = with_persons(60)
    assert private.persons is not None
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    other = PrivateImages(
        private.images[order],
        private.labels[order],
        ("a", "b"),
        renumbered(private.persons[order].neg().clamp_min(-1)),
    )
    mixed = PrivateImages(private.images[order], private.labels[order], ("a", "b"), private.persons[order])
    assert persons_in(training_part(mixed, KEYS[0], 0.5)) == persons_in(training_part(private, KEYS[0], 0.5))
    assert persons_in(other) != persons_in(private), "a twin whose persons are others"


def test_a_share_of_the_persons_is_held_out_on_average() -> None:
    private = PrivateImages(images(1000).images, torch.zeros(1000).long(), ("a",), torch.arange(1000) // 4)
    held = [len(held_out_part(private, key, 0.2).units) for key in KEYS]
    assert abs(sum(held) / len(KEYS) - 50) < 5 * (250 * 0.2 * 0.8 / len(KEYS)) ** 0.5
