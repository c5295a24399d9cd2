"""Units and their rows: the one place from which both stages learn whom a row belongs to."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from dp_curriculum.data.images import NO_CONTRIBUTION
from dp_curriculum.data.persons import number_persons, person_name, renumbered
from dp_curriculum.data.units import NO_PERSON, Units
from dp_curriculum.privacy.randomness import SecretGenerator


# Persons 0 to 3 with 1, 3, 5 and no contributing rows; rows of no one, of no class, and of a class that there is not.
PERSONS = torch.tensor([2, 1, 2, 0, NO_PERSON, 1, 2, 3, 2, 1, 2, 3, 0])
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 2, NO_CONTRIBUTION, 0, 2, 1, 3, NO_CONTRIBUTION])


def units() -> Units:
    return Units(LABELS, 3, PERSONS)


def rows_one_by_one(persons: list[int], labels: list[int], person: int) -> list[int]:
    """The slow reference."""
    return [row for row in range(len(persons)) if persons[row] == person and 0 <= labels[row] < 3]


def test_the_rows_of_persons_are_those_of_a_loop_and_each_is_its_share() -> None:
    for drawn in ([], [0], [3], [1, 3], [0, 1, 2, 3]):
        rows, weights = units().rows_of(torch.tensor(drawn, dtype=torch.int64))
        expected = [rows_one_by_one(PERSONS.tolist(), LABELS.tolist(), person) for person in drawn]
        assert rows.tolist() == sum(expected, [])
        assert weights is not None and weights.dtype == torch.float64
        assert weights.tolist() == [1 / len(own) for own in expected for _ in own]
        assert units().draw_rows(torch.tensor(drawn, dtype=torch.int64), 4, SecretGenerator()).shape == (
            sum(map(bool, expected)), 4,
        )  # fmt: skip


def test_without_persons_each_row_is_a_unit_in_the_order_of_the_draw() -> None:
    images, drawn = Units(LABELS, 3), torch.tensor([12, 3, 3, 7, 0])
    rows, weights = images.rows_of(drawn)
    assert rows.tolist() == [3, 3, 0] and weights is None and len(images) == len(LABELS)
    assert images.draw_rows(drawn, 8, SecretGenerator()).tolist() == [3, 3, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_all_rows_take_turns_where_they_are_few_and_no_row_is_taken_twice_where_they_are_many(count: int) -> None:
    for _ in range(20):
        for person, drawn in enumerate(units().draw_rows(torch.arange(3), count, SecretGenerator()).tolist()):
            own = rows_one_by_one(PERSONS.tolist(), LABELS.tolist(), person)
            assert set(drawn) <= set(own)
            times = Counter(drawn)
            assert len(times) == min(count, len(own)) and max(times.values()) - min(times.values()) <= 1
            assert all(drawn[turn] == drawn[turn % len(own)] for turn in range(count))


@pytest.mark.statistical
def test_every_row_of_a_person_is_drawn_equally_often_and_anew() -> None:
    """4,000 draws of 2 out of 5, and of 5 places for 3: five standard errors. The twin takes the first rows."""
    secret, trials = SecretGenerator(), 4000

    def is_fair(count: int, person: int, *, sort: bool = False) -> bool:
        own = rows_one_by_one(PERSONS.tolist(), LABELS.tolist(), person)
        drawn = torch.stack([units().draw_rows(torch.tensor([person]), count, secret)[0] for _ in range(trials)])
        if sort:
            drawn = torch.tensor(own).repeat(count)[:count].expand(trials, count)
        means = torch.tensor([(drawn == row).sum(1).double().mean() for row in own])
        share = count / len(own)
        rest = share - math.floor(share)
        return bool((means - share).abs().max() <= 5 * math.sqrt(rest * (1 - rest) / trials))

    assert is_fair(2, 2) and is_fair(5, 1)
    assert not is_fair(2, 2, sort=True) and not is_fair(5, 1, sort=True)
    first = [units().draw_rows(torch.tensor([2]), 1, secret).item() for _ in range(200)]
    again = sum(one == other for one, other in zip(first, first[1:]))
    assert abs(again - 199 / 5) < 5 * math.sqrt(199 * 0.2 * 0.8)


def test_what_is_made_of_a_person_does_not_depend_on_another() -> None:
    """With and without person 2, who comes last, in words that stand still."""

    class Still(SecretGenerator):
        def random_words(self, count: int) -> torch.Tensor:
            return torch.rand(100, generator=torch.Generator().manual_seed(0))[:count]

    kept = PERSONS != 2
    fewer = Units(LABELS[kept], 3, renumbered(PERSONS[kept]))
    places = kept.nonzero().flatten()
    first, second = units().rows_of(torch.tensor([0, 1])), fewer.rows_of(torch.tensor([0, 1]))
    assert first[0].tolist() == places[second[0]].tolist() and torch.equal(first[1], second[1])  # type: ignore[arg-type]
    drawn = units().draw_rows(torch.tensor([0, 1, 2]), 6, Still())[:2]
    assert torch.equal(drawn, places[fewer.draw_rows(torch.tensor([0, 1]), 6, Still())])


def test_no_row_at_all_is_no_person() -> None:
    nobody = Units(LABELS[:0], 3, PERSONS[:0])
    assert len(nobody) == 0 and nobody.rows_of(torch.arange(0))[0].shape == (0,)
    assert nobody.draw_rows(torch.arange(0), 4, SecretGenerator()).shape == (0, 4)
    assert len(Units(LABELS[:2], 3, torch.full((2,), NO_PERSON))) == 0


@pytest.mark.parametrize(
    ("value", "name"),
    [("ann", "ann"), (" ann ", "ann"), (7, "7"), ("7", "7"), (0, "0"), ("", None), ("  ", None), (None, None),
     (7.0, None), (math.nan, None), (True, None), ([1], None), ({"a": 1}, None), (b"ann", None)],
)  # fmt: skip
def test_text_and_whole_numbers_name_a_person(value: object, name: str | None) -> None:
    assert person_name(value) == name


def test_persons_are_numbered_in_order_and_a_gap_is_closed() -> None:
    numbers = number_persons(["b", None, "a", "b", "c", None])
    assert numbers.tolist() == [0, NO_PERSON, 1, 0, 2, NO_PERSON]
    assert renumbered(numbers[[0, 1, 3, 4]]).tolist() == [0, NO_PERSON, 0, 1]
    assert number_persons([]).shape == renumbered(number_persons([])).shape == (0,)
