"""Persons as a dataset names them, and as numbers that live in memory alone.

Nothing here is shown, hashed, logged or saved. Two rows are of one person if their values are the same text; a number
is its digits. Where that is in doubt, two persons who become one keep their guarantee; one who becomes two loses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dp_curriculum.config import DataConfig
from dp_curriculum.data.units import NO_PERSON


def person_name(value: Any) -> str | None:
    """The person that a value names: text without the space around it, or a whole number; `None` for any other."""
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def number_persons(names: Sequence[str | None]) -> torch.Tensor:
    """Persons `(N,)` as numbers from 0, in order of appearance; `NO_PERSON` where a row names none."""
    numbers: dict[str, int] = {}
    found = [NO_PERSON if name is None else numbers.setdefault(name, len(numbers)) for name in names]
    return torch.tensor(found, dtype=torch.int64)


def renumbered(persons: torch.Tensor) -> torch.Tensor:
    """The same persons without gaps, of some rows that are left."""
    kept = persons != NO_PERSON
    numbers = torch.full_like(persons, NO_PERSON)
    numbers[kept] = persons[kept].unique(return_inverse=True)[1]
    return numbers


def check_number_of_persons(number: int, config: DataConfig) -> None:
    """
    Refuses persons of which there are none, or one. Not where their number is declared: a person less would show.

    Raises:
        ValueError: If there are fewer than two; the message says nothing of a row.
    """
    if config.unit == "person" and number < 2:
        found = "none" if number == 0 else "one person, who has all rows"
        raise ValueError(
            f"Expected {person_option(config)} to name persons: it names {found}. Name the column or folders that "
            "tell persons apart, or leave the option out for a guarantee per image."
        )


def person_option(config: DataConfig) -> str:
    """The option that says where persons come from, with its value, for messages."""
    if config.person_column is not None:
        return f"--person_column={config.person_column}"
    return f"--person_from={config.person_from}"
