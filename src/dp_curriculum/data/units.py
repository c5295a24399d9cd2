"""Units of the guarantee, and the rows of each: both stages learn here, and nowhere else, whom a row belongs to.

A unit is one image, or one person with all their images. Units are sampled, each by its own coin. A unit counts once:
in a lesson with the average of what its rows contribute, in a noisy step with one clipped gradient.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dp_curriculum.privacy.randomness import SecretGenerator


NO_PERSON = -1  # of a row that belongs to no one: it contributes zero


def contributing(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mask of shape `(N,)`: rows whose label is a class. All others contribute zero."""
    return (labels >= 0) & (labels < num_classes)


@dataclass(frozen=True)
class Units:
    r"""
    The units of some rows.

    Args:
        labels (`torch.LongTensor` of shape `(N,)`): Class of each row; one outside `[0, num_classes)` contributes
            nothing.
        num_classes (`int`): Number of classes.
        persons (`torch.LongTensor` of shape `(N,)`, *optional*): Person of each row, from 0 without a gap, or
            `NO_PERSON`. If unset, each row is a unit.

    Privacy:
        What is made of a unit depends on the rows of that unit alone, whatever the others hold.
    """

    labels: torch.Tensor
    num_classes: int
    persons: torch.Tensor | None = None

    def __len__(self) -> int:
        if self.persons is None:
            return len(self.labels)
        return int(self.persons.max()) + 1 if len(self.persons) else 0

    @functools.cached_property
    def _by_person(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Contributing rows, person after person `(R,)`, and where each person begins `(len(self) + 1,)`."""
        assert self.persons is not None, "rows are their own units"
        counted = contributing(self.labels, self.num_classes) & (self.persons != NO_PERSON)
        rows = counted.nonzero().flatten()
        owners = self.persons[rows]
        counts = torch.bincount(owners, minlength=len(self))
        return rows[owners.argsort(stable=True)], torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def rows_of(self, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        All contributing rows of some units, and how much of its unit each row is.

        Args:
            units (`torch.LongTensor` of shape `(n,)`): Which, without repetition.

        Returns:
            Rows `(R,)`, and weights `(R,)` in float64: one over the number of contributing rows of the unit; `None`
            where each row is a unit.

        Privacy:
            The weights of a unit add up to 1, or to 0 if it has no contributing row. So if every row contributes at
            most C in norm, in whichever class, the unit contributes at most C, by the triangle inequality.
        """
        if self.persons is None:
            return units[contributing(self.labels[units], self.num_classes)], None
        rows, counts = self._rows_and_counts(units)
        return rows, (1 / counts.double()).repeat_interleave(counts)

    def draw_rows(self, units: torch.Tensor, count: int, secret: SecretGenerator) -> torch.Tensor:
        r"""
        Rows of which the gradient of each unit is made; units without a contributing row are left out.

        Args:
            units (`torch.LongTensor` of shape `(n,)`): Which, without repetition.
            count (`int`): K, the rows of a person: all of them in turn where there are at most K, else K of them,
                without replacement.
            secret ([`SecretGenerator`]): Draws the order of each person's rows, every time anew.

        Returns:
            `(m, K)` rows of persons; `(m,)` where each row is a unit.
        """
        if self.persons is None:
            return self.rows_of(units)[0]
        rows, counts = self._rows_and_counts(units)
        counts = counts[counts > 0]
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        order = secret.random_words(len(rows)).argsort()
        order = order[owners[order].argsort(stable=True)]  # person after person, each in random order
        turns = torch.arange(count) % counts[:, None]
        return rows[order][(counts.cumsum(0) - counts)[:, None] + turns]

    def _rows_and_counts(self, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contributing rows `(R,)` of persons, one person after the other, and their number for each `(n,)`."""
        rows, starts = self._by_person
        counts = starts[units + 1] - starts[units]
        shift = starts[units] - (counts.cumsum(0) - counts)
        return rows[torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)], counts
