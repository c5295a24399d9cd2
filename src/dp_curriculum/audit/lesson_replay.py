"""Record and replay of lessons: one on a dataset and on its neighbours, with masks and noise that stand still.

A lesson is what `LESSONS` lists, so that a new one is audited as soon as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.frozen import FrozenGenerator
from dp_curriculum.audit.neighbours import Neighbours, neighbours
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.lessons.lesson import Tensors
from dp_curriculum.lessons.planned import PlannedLesson
from dp_curriculum.privacy.privacy_report import Unit


TOLERANCE = 1e-5


def audit_lesson(
    name: str, planned: PlannedLesson, config: CurriculumConfig, *, num_classes: int, dataset_size: int
) -> list[Finding]:
    """
    Replays a lesson on neighbours, at the configured resolution.

    Args:
        name (`str`): How the findings call it.
        planned ([`~lessons.PlannedLesson`]): The lesson under test, and what it is charged.
        config ([`CurriculumConfig`]): As a run would have it.
        num_classes (`int`): Public.
        dataset_size (`int`): Number of images, or of persons, that divisors assume; public.
    """
    channels, side, _ = config.input_shape
    unit = config.data.unit
    pairs = list(neighbours(num_channels=channels, side=side, num_classes=num_classes, unit=unit))
    replays = [_Replay(planned, config, pair, dataset_size) for pair in pairs]
    noise = [
        (mechanism.noise_std, mechanism.event.sample_rate)
        for mechanism in planned.mechanisms
        for _ in range(mechanism.event.num_steps)
    ]
    multipliers = [
        mechanism.event.noise_multiplier for mechanism in planned.mechanisms for _ in range(mechanism.event.num_steps)
    ]
    return [
        _sensitivity(name, unit, replays, multipliers),
        _charges(name, replays, noise),
        _sameness(name, replays),
    ]


class _Replay:
    """One lesson on two neighbours: recorded on the first, replayed on the second."""

    def __init__(self, planned: PlannedLesson, config: CurriculumConfig, pair: Neighbours, dataset_size: int) -> None:
        self.pair = pair
        self.first = FrozenGenerator(always=pair.changed)
        self.second = FrozenGenerator(always=pair.changed, recorded=self.first)
        self.released = _release(planned, config, pair.first, dataset_size, self.first)
        self.replayed = _release(planned, config, pair.second, dataset_size, self.second)

    def distances(self, multipliers: Sequence[float]) -> list[float]:
        """Distance between the sums, in units of what their noise allows one image, or one person, to move them by."""
        if len(self.first.sums) != len(self.second.sums) or len(self.first.sums) != len(multipliers):
            return [math.inf]  # noise was left out, or added to something of another number
        distances = []
        for sums, others, std, multiplier in zip(self.first.sums, self.second.sums, self.first.stds, multipliers):
            same = sums.shape == others.shape
            distance = (sums - others).norm().item() if same else math.inf
            distances.append(distance / (std / multiplier) / self.pair.distance if std > 0 else math.inf)
        return [math.inf if math.isnan(distance) else distance for distance in distances]

    def is_same(self) -> bool:
        """Compares everything beside the sums; true if all of it is equal."""
        return (
            self.first.requests == self.second.requests
            and self.released.keys() == self.replayed.keys()
            and all(_are_equal(value, self.replayed[name]) for name, value in self.released.items())
        )


def _are_equal(value: torch.Tensor, other: torch.Tensor) -> bool:
    return value.shape == other.shape and bool(value.isfinite().all()) and torch.equal(value, other)


def _release(
    planned: PlannedLesson,
    config: CurriculumConfig,
    private: PrivateImages,
    dataset_size: int,
    secret: FrozenGenerator,
) -> Tensors:
    return planned.lesson.release(private, config, planned.mechanisms, dataset_size, secret)


def _sensitivity(name: str, unit: Unit, replays: Sequence[_Replay], multipliers: Sequence[float]) -> Finding:
    # A lesson without a query moves nothing.
    worst = max(replays, key=lambda replay: max(replay.distances(multipliers), default=0.0))
    distance = max(worst.distances(multipliers), default=0.0)
    return Finding(
        f"{name}: one {unit} moves the sums by no more than their noise is for",
        holds=distance <= 1 + TOLERANCE,
        measured=f"{distance:.6f} of it ({worst.pair.name})",
        allowed=f"at most 1 + {TOLERANCE:g}",
        power=f"{len(replays)} pairs of neighbours, masks and noise frozen; catches any excess, with certainty",
    )


def _charges(name: str, replays: Sequence[_Replay], noise: Sequence[tuple[float, float]]) -> Finding:
    """Tests that every draw of noise is planned for: its size, its number, and the sample rate of its mask."""
    wrong = [
        replay.pair.name
        for replay in replays
        if replay.first.stds != [std for std, _ in noise] or replay.first.rates != [rate for _, rate in noise]
    ]
    return Finding(
        f"{name}: noise, sample rates and number of draws are those that are charged",
        holds=not wrong,
        measured=f"{len(replays) - len(wrong)} of {len(replays)} runs agree",
        allowed="all, to the last digit",
        power=f"{len(noise)} draws per run; catches any difference, with certainty",
    )


def _sameness(name: str, replays: Sequence[_Replay]) -> Finding:
    different = [replay.pair.name for replay in replays if not replay.is_same()]
    seen = f" (not: {different[0]})" if different else ""
    return Finding(
        f"{name}: with equal noised sums, all that is released is equal",
        holds=not different,
        measured=f"{len(replays) - len(different)} of {len(replays)} pairs{seen}",
        allowed="all, to the last bit",
        power="images, labels, shapes, and what was asked of the generator; catches any difference",
    )
