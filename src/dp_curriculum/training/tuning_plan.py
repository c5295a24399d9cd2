"""The cost of tuning before it starts: settings, the law of the number of tries, and what each try may spend."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.privacy.accounting import Events, GaussianEvent, PrivacyBudgetExceeded
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.selection import Selection, Tries, merged
from dp_curriculum.training.plan import plan_budget


Score = Literal["held_out", "synthetic"]
SCORES = ("held_out", "synthetic")
_TUNABLE = ("curriculum", "lessons", "model", "pretraining", "dp_sgd", "sampler")  # sections
_TUNABLE_FIELDS = ("lesson_budget_share", "lesson_noise_multiplier")
_LEAST_NOISE = 10.0  # of the count, in images
_SHARE_OF_NOISE = 0.01  # of the images that are held out
_MOST_SETTINGS = 100
_CLOSE_ENOUGH = 0.99  # of the target
_ROUNDS = 15


@dataclass(frozen=True)
class TuningOptions:
    """
    Settings to try, and the way in which one is chosen.

    Args:
        settings (`tuple[Mapping[str, Any], ...]`): Fields that each setting changes.
        expected_tries (`float`): Number of tries on average, where it is random.
        score (`str`, *optional*, defaults to `"held_out"`): `"held_out"` counts, with noise, the held-out images that
            a classifier of generated images gets right. `"synthetic"` tests it on other generated images.
        score_noise_multiplier (`float`, *optional*): Noise of the count, in images. By default a hundredth of the
            images that are held out, and at least 10.
        num_images (`int`, *optional*, defaults to 2000): Generated images for a score.

    Raises:
        ValueError: If a value is out of its range.
    """

    settings: tuple[Mapping[str, Any], ...]
    expected_tries: float
    score: str = "held_out"
    score_noise_multiplier: float | None = None
    num_images: int = 2000

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"Expected --score={self.score} to be one of {', '.join(SCORES)}.")
        if self.num_images < 100:
            raise ValueError(f"Expected --num_images={self.num_images} to be at least 100.")
        noise = self.score_noise_multiplier
        if noise is not None and not (math.isfinite(noise) and noise > 0):
            raise ValueError(f"Expected --score_noise_multiplier={noise} to be positive and finite.")


@dataclass(frozen=True)
class TuningPlan:
    """
    Tuning, resolved.

    Args:
        options ([`TuningOptions`]): As they were asked for.
        configs (`tuple[CurriculumConfig, ...]`): A training for each setting, with the epsilon that a try may spend.
        tries ([`Tries`], *optional*): Law of the number of tries; `None` where each setting is tried once, and all are
            composed, because that is less.
        score_event ([`GaussianEvent`], *optional*): The count of a score; `None` where it reads no private image.
        charge ([`Charge`]): What all of it spends.
        epsilon (`float`): The same, at the delta of the budget.
        without_tuning (`float`): Epsilon that one training of these settings would spend alone, its score excluded.
    """

    options: TuningOptions
    configs: tuple[CurriculumConfig, ...]
    tries: Tries | None
    score_event: GaussianEvent | None
    charge: Charge
    epsilon: float
    without_tuning: float


def parse_settings(vary: Sequence[str], num_random: int | None, seed: int | None) -> tuple[dict[str, Any], ...]:
    """
    The settings of a grid, or a few random ones of them.

    Args:
        vary (`Sequence[str]`): `"name=value,value"`, one per field.
        num_random (`int`, *optional*): How many settings are drawn; all of the grid if unset.
        seed (`int`, *optional*): Of the draw, which is public.

    Raises:
        ValueError: If a field is unknown or may not be tuned, or there are too many settings.
    """
    fields: dict[str, list[Any]] = {}
    for word in vary:
        name, _, values = word.partition("=")
        _check_tunable(name)
        if not values or name in fields:
            raise ValueError(f"Expected --vary {word} to be of the form name=value,value, each name once.")
        fields[name] = [yaml.safe_load(value) for value in values.split(",")]
    grid = [dict(zip(fields, values)) for values in itertools.product(*fields.values())]
    if num_random is not None:
        if not 1 <= num_random <= len(grid):
            raise ValueError(f"Expected --random_settings={num_random} in [1, {len(grid)}], the size of the grid.")
        grid = random.Random(seed).sample(grid, num_random)
    if not 1 <= len(grid) <= _MOST_SETTINGS or not fields:
        raise ValueError(f"Expected --vary to give between 1 and {_MOST_SETTINGS} settings: it gives {len(grid)}.")
    return tuple(grid)


def _check_tunable(name: str) -> None:
    sections = CurriculumConfig.sections()
    fields = [(sections[section](), f.name) for section in _TUNABLE for f in dataclasses.fields(sections[section])]
    single = [field for section, field in fields if not isinstance(getattr(section, field), list)]
    allowed = [*_TUNABLE_FIELDS, *single]
    if name not in allowed:
        raise ValueError(
            f"Expected --vary {name}=... to name a field that may be tuned: one of {', '.join(sorted(allowed))}."
        )


def plan_tuning(
    config: CurriculumConfig, options: TuningOptions, *, dataset_size: int, num_classes: int
) -> TuningPlan:
    """
    Finds what a try may spend, so that all of the tuning ends at the target epsilon of `config`.

    The bound of private selection with a geometric and with a Poisson number of tries, and the composition of one try
    of each setting, are compared; the least of them is taken.

    Args:
        config ([`CurriculumConfig`]): The configuration; its target is that of the whole tuning.
        options ([`TuningOptions`]): What is tried.
        dataset_size (`int`): Number of images that training assumes.
        num_classes (`int`): Number of classes.

    Raises:
        PrivacyBudgetExceeded: If the target leaves nothing to train with.
        ValueError: If a setting is refused, or images are to be counted and none are held out.
    """
    if config.privacy.non_private:
        raise ValueError("Refusing to tune with --non_private: there is nothing to account.")
    if options.score == "held_out" and config.data.unit != "image":
        raise ValueError("Expected --score=synthetic: one person may be many of the images that held_out counts.")
    if options.score == "held_out" and config.data.holdout is None:
        raise ValueError("Expected --holdout to be given: --score=held_out counts held-out images, for example 0.1.")
    score_event = _score_event(config, options, dataset_size)
    base = config.replace(dataset_ledger=None, push_to_hub=False, report_to="none")  # a tracker would tell of tries
    target, low, high = config.privacy.target_epsilon, 0.0, config.privacy.target_epsilon
    one, best = target / 2, None
    for _ in range(_ROUNDS):
        configs = tuple(base.replace(**setting, target_epsilon=one) for setting in options.settings)
        trainings = [plan_budget(c, dataset_size=dataset_size, num_classes=num_classes).events for c in configs]
        charge, epsilon = _cheapest(config, options, [_with(events, score_event) for events in trainings])
        if epsilon <= target:
            low = one
            alone = max(_epsilon(config, Charge(events)) for events in trainings)
            tries = None if charge.selection is None else charge.selection.tries
            best = TuningPlan(options, configs, tries, score_event, charge, epsilon, alone)
            if epsilon >= _CLOSE_ENOUGH * target:
                break
        else:
            high = one
        step = one * (0.997 * target / epsilon)  # about proportional
        one = step if low < step < high else (low + high) / 2
    if best is None:
        raise PrivacyBudgetExceeded(
            f"Expected --target_epsilon={target:g} to leave something to train with: {len(options.settings)} settings "
            f"and {options.expected_tries:g} tries cost more. Set it higher, or try less.",
            spent_epsilon=math.inf,
            smallest_target_epsilon=math.inf,
        )
    return best


def _score_event(config: CurriculumConfig, options: TuningOptions, dataset_size: int) -> GaussianEvent | None:
    """The count of held-out images: one image more or less changes it by one, so its noise is its multiplier."""
    if options.score != "held_out" or config.data.holdout is None:
        return None
    held_out = dataset_size * config.data.holdout / (1 - config.data.holdout)
    return GaussianEvent(options.score_noise_multiplier or max(_LEAST_NOISE, _SHARE_OF_NOISE * held_out))


def _with(events: Events, score: GaussianEvent | None) -> Events:
    return merged(events if score is None else (*events, score))


def _cheapest(
    config: CurriculumConfig, options: TuningOptions, alternatives: Iterable[Events]
) -> tuple[Charge, float]:
    different = tuple(dict.fromkeys(alternatives_list := list(alternatives)))
    charges = [
        Charge((), Selection(Tries(options.expected_tries), different)),
        Charge((), Selection(Tries(options.expected_tries, "poisson"), different)),
        Charge(tuple(event for events in alternatives_list for event in events)),
    ]
    costs = [(_epsilon(config, charge), number) for number, charge in enumerate(charges)]
    epsilon, number = min(costs)
    return charges[number], epsilon


def _epsilon(config: CurriculumConfig, charge: Charge) -> float:
    budget = config.privacy
    return charge.epsilon(budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)


def format_tuning(config: CurriculumConfig, plan: TuningPlan) -> str:
    """The plan in words: what is tried, what it costs, and what a training without tries would have."""
    budget, options = config.privacy, plan.options
    lines = [f"tuning: {len(options.settings)} settings"]
    lines += [f"  {', '.join(f'{name} {value}' for name, value in setting.items())}" for setting in options.settings]
    if plan.tries is None:
        lines.append("tries: each setting once, all composed, which is less here than a random number of them")
    else:
        law = "Poisson" if plan.tries.law == "poisson" else "geometric"
        lines.append(
            f"tries: {plan.tries.expected:g} on average ({law}), each of a setting drawn at random; the best is kept, "
            "and how many there were stays secret"
        )
    score = "on other generated images; it costs nothing beyond the training"
    if plan.score_event is not None:
        score = f"on held-out images, counted with noise {plan.score_event.noise_multiplier:g}"
    lines.append(f"score: a classifier of {options.num_images:,} generated images, tested {score}")
    lines.append(
        f"epsilon of all of it: {plan.epsilon:.4f} at delta {budget.target_delta:g}; a try trains with "
        f"{plan.without_tuning:.4f}, in place of {budget.target_epsilon:g} without tuning"
    )
    return "\n".join(lines)
