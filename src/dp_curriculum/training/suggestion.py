"""A configuration for public facts, a machine and a time: what was the best on public datasets, scaled to them.

Its rules are few, and each comes from a measurement in docs/experiments.md. Small grey images, such as digits and
clothes, get the lesson in closed form and then noisy steps, as many as the time allows. Photos get the lesson alone,
with the whole budget, because noisy steps have not made images of photos better within hours; if a public dataset is
named, its photos are moved to the lesson.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dp_curriculum.config import MAX_PRIOR_VALUES, CurriculumConfig
from dp_curriculum.config_sections import DEFAULT_CLOSED_FORM_SHARE, require


if TYPE_CHECKING:
    from dp_curriculum.training.cost_estimate import CostEstimate

_CHOSEN = ("autoencoder", "curriculum", "lessons", "start", "model", "pretraining", "dp_sgd", "sampler")
# What the default of an option that is suggested would refuse of images that are few or of an odd size.
LEFT_OPEN: dict[str, object] = {"expected_batch_size": 1, "block_out_channels": [8]}
WITH_PUBLIC_IMAGES = ["moments", "public"]  # stages where a public dataset is named
_PROMISE = ("target_epsilon", "target_delta", "adjacency", "stages")  # always written


@dataclass(frozen=True)
class _Recipe:
    """Options of a preset that a time scales, and those that come with them."""

    epsilon: int
    share: float
    steps: int
    most_steps: int
    batch: int
    copies: int

    @property
    def inputs(self) -> int:
        """Number of network inputs in all noisy steps."""
        return self.steps * self.batch * self.copies


# Measured on MNIST and Fashion-MNIST at epsilon 1 and 10. Where noise hides what noisy steps see, the lesson gets
# most, and each image is seen under two noises. Elsewhere more and smaller steps pay. Images times epsilon tell one
# from the other.
_HIDDEN = _Recipe(epsilon=1, share=0.7, steps=120, most_steps=480, batch=2048, copies=2)
_CLEAR = _Recipe(epsilon=10, share=DEFAULT_CLOSED_FORM_SHARE, steps=480, most_steps=960, batch=1024, copies=1)
_P_MEAN = -0.3  # large noise levels, at which the network mends what sampling starts from
_LITTLE_SIGNAL = 120_000
# Several Gaussians per class pay where the noise of a third query hides little of them. Less was not measured.
_COMPONENTS, _SIGNAL_OF_COMPONENTS = 4, 600_000
_LEAST_STEPS, _MOST_COPIES = 20, 16
_MOST_RATE = 0.25  # part of the images in a step
# Twice the channels pay once noisy steps take as many network inputs as in the preset of two hours: images are nearer
# to the real ones, and a classifier learns as much from them. Measured at epsilon 10, where noise hides little.
_NARROW, _WIDE, _INPUTS_OF_WIDE = [8, 16, 32], [16, 32, 48], 480 * 2048
_LEAST_IMAGES = 10_000  # with 11,000 and more, noisy steps have been seen to help
_OF_THE_TIME = 0.8  # for noisy steps; reading, sheets and a slower hour take the rest


@dataclass(frozen=True)
class Reached:
    """
    A result on a public dataset.

    Args:
        name (`str`): The dataset.
        images, classes, resolution, channels (`int`): Its public facts.
        epsilon (`float`): At delta 1e-5.
        minutes (`float`): Of one core, of training.
        accuracy (`float`): Of a CNN that is trained on generated images and tested on real ones.
        spread (`float`, *optional*): Its standard deviation over three trainings of that classifier; one if unset.
        public_photos (`int`): Photos of other classes that were moved to the released moments.
    """

    name: str
    images: int
    classes: int
    resolution: int
    channels: int
    epsilon: float
    minutes: float
    accuracy: float
    spread: float | None = None
    public_photos: int = 0

    def describe(self) -> str:
        """A line for a person."""
        what = f"{self.images:,} {'grey' if self.channels == 1 else 'colour'} images of {self.resolution} pixels"
        what += f" and {self.public_photos:,} public ones" if self.public_photos else ""
        spread = "trained once" if self.spread is None else f"± {self.spread:.1%} over three trainings of it"
        time = f"{self.minutes:.0f} minute{'s' if self.minutes > 1 else ''} of one core"
        return (
            f"{self.name}, {what}, {self.classes} classes, epsilon {self.epsilon:g}, {time}: a classifier learns "
            f"{self.accuracy:.1%} from what is generated ({spread})"
        )


REACHED = (
    Reached("MNIST", 60_000, 10, 28, 1, 1.0, 20, 0.950, 0.002),
    Reached("Fashion-MNIST", 60_000, 10, 28, 1, 1.0, 20, 0.796, 0.003),
    Reached("MNIST", 60_000, 10, 28, 1, 10.0, 20, 0.960, 0.002),
    Reached("Fashion-MNIST", 60_000, 10, 28, 1, 10.0, 20, 0.821, 0.002),
    Reached("Fashion-MNIST", 60_000, 10, 28, 1, 3.0, 50, 0.815, 0.005),
    Reached("CIFAR-10", 50_000, 10, 32, 3, 1.0, 1, 0.438, 0.005),
    Reached("CIFAR-10", 50_000, 10, 32, 3, 10.0, 1, 0.458, 0.004),
    Reached("CIFAR-10", 10_000, 10, 32, 3, 3.0, 1, 0.397, 0.003),
    Reached("CIFAR-10", 10_000, 10, 32, 3, 10.0, 1, 0.432, 0.002),
    Reached("CIFAR-10", 2_000, 10, 32, 3, 3.0, 1, 0.311, 0.001),
    Reached("CIFAR-10", 2_000, 10, 32, 3, 10.0, 1, 0.363, 0.006),
    Reached("airplanes and automobiles of CIFAR-10", 10_000, 2, 32, 3, 3.0, 1, 0.867, 0.004),
    Reached("airplanes and automobiles of CIFAR-10", 10_000, 2, 32, 3, 10.0, 1, 0.871, 0.004),
    Reached("airplanes and automobiles of CIFAR-10", 2_000, 2, 32, 3, 3.0, 1, 0.855, 0.001),
    Reached("airplanes and automobiles of CIFAR-10", 2_000, 2, 32, 3, 10.0, 1, 0.859, 0.006),
    Reached("CIFAR-10", 50_000, 10, 32, 3, 1.0, 2, 0.447, 0.001, public_photos=50_000),
    Reached("CIFAR-10", 50_000, 10, 32, 3, 10.0, 2, 0.482, 0.006, public_photos=50_000),
)


@dataclass(frozen=True)
class Suggestion:
    """
    A configuration, why it is that, and what similar datasets reached.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        reasons (`tuple[str, ...]`): A sentence for each choice.
        similar (`tuple[Reached, ...]`): The nearest results.
    """

    config: CurriculumConfig
    reasons: tuple[str, ...]
    similar: tuple[Reached, ...]

    def describe(self) -> Iterator[str]:
        """Lines for a person."""
        yield "Suggested, because"
        yield from (f"  - {reason}" for reason in self.reasons)
        yield "What similar datasets reached; yours may differ:"
        yield from (f"  - {reached.describe()}" for reached in self.similar)

    def to_yaml(self, path: str | Path) -> None:
        """
        Writes the configuration, without most of what it has by default, and the reasons as comments.

        Raises:
            FileExistsError: If there is such a file.
        """
        fields = yaml.safe_dump(_without_defaults(self.config), sort_keys=False)
        comments = "".join(f"# {line}\n" for line in self.describe())
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(comments + fields)


def suggest(
    config: CurriculumConfig,
    *,
    dataset_size: int,
    hours: float,
    measure: Callable[[CurriculumConfig], CostEstimate],
    num_classes: int | None = None,
) -> Suggestion:
    r"""
    Suggests stages, shares, Gaussians per class, network, steps, batch, K and sampler, from public constants alone.

    Args:
        config ([`CurriculumConfig`]): Data and budget; all else as it is by default.
        dataset_size (`int`): Public number of images, or of persons.
        hours (`float`): Time for the training.
        measure (`Callable`): What a configuration takes on this machine.
        num_classes (`int`, *optional*): Of the images, by which similar results are chosen, too.

    Raises:
        ValueError: If the hours are no time, a choice was made that is its own, or images are larger than any that
            were measured.
    """
    require(math.isfinite(hours) and 0 < hours <= 24 * 365, "hours", hours, "to be a time above 0")
    _check_left_open(config)
    values = config.data.channels * config.data.resolution**2
    require(
        values <= MAX_PRIOR_VALUES,
        "resolution",
        config.data.resolution,
        f"to come with at most {MAX_PRIOR_VALUES:,} values per image, num_channels * resolution^2, with --suggest: "
        f"there are {values:,}, and nothing so large was measured. Make --resolution smaller",
    )
    similar = _nearest(config, dataset_size, num_classes)
    closed_form = f"moments are learned exactly, in closed form, at {values:,} values per image"
    public = config.public_images.pretrain_dataset_name
    require(
        public is None or config.has_photos,
        "pretrain_dataset_name",
        public,
        "to come with photos: of smaller images, nothing was measured with public ones",
    )
    if why := _why_no_steps(config, dataset_size):
        why_public = f"each class draws the photos of {public} that suit it, moved to its moments"
        reasons = (closed_form, f"no noisy steps: {why}", "so the lesson gets the whole budget")
        return Suggestion(_lesson_alone(config), (*reasons, *([why_public] if public else [])), similar)
    signal = dataset_size * config.privacy.target_epsilon
    recipe = _HIDDEN if signal < _LITTLE_SIGNAL else _CLEAR
    if signal >= _SIGNAL_OF_COMPONENTS:
        config = config.replace(moment_components=_COMPONENTS)

    def inputs_of(widths: list[int]) -> float:
        """Network inputs that noisy steps may take in the time, by what the steps of the preset take."""
        tried = dataclasses.replace(recipe, batch=min(recipe.batch, _largest_batch(dataset_size)))
        seconds = measure(_with_steps(config, tried, widths)).dp_sgd_seconds
        return 3600 * hours * _OF_THE_TIME * tried.inputs / seconds

    widths, inputs = _NARROW, inputs_of(_NARROW)
    # A wider network is slower, so whether there is the time for one is asked only where it might be.
    if recipe == _CLEAR and inputs >= _INPUTS_OF_WIDE:
        wide = inputs_of(_WIDE)
        widths, inputs = (_WIDE, wide) if wide >= _INPUTS_OF_WIDE else (_NARROW, inputs)
    found = _scaled(recipe, dataset_size, inputs)
    reasons = (
        closed_form,
        f"{found.steps} noisy steps of {found.batch:,} {config.data.unit}s with K = {found.copies} take about "
        f"{60 * _OF_THE_TIME * hours:.0f} minutes on this machine",
        f"lessons get {recipe.share:.0%} of the budget, as in the presets of epsilon {recipe.epsilon}",
    )
    has_parts, is_wide = config.lessons.moment_components > 1, widths == _WIDE
    parts = f"each class is drawn from {_COMPONENTS} Gaussians, because noise hides little of what they differ in"
    wider = "a network of twice the channels, because there is the time to train it"
    more = [reason for reason, is_taken in ((parts, has_parts), (wider, is_wide)) if is_taken]
    return Suggestion(_with_steps(config, found, widths), (*reasons, *more), similar)


def _why_no_steps(config: CurriculumConfig, dataset_size: int) -> str | None:
    if config.has_photos:
        return "these are photos, and such steps have not made images of photos better within hours"
    if dataset_size < _LEAST_IMAGES:
        return f"with fewer than {_LEAST_IMAGES:,} {config.data.unit}s they have not been seen to help"
    return None


def _check_left_open(config: CurriculumConfig) -> None:
    """Refuses options that a suggestion is there to choose."""
    unset = CurriculumConfig()
    for section in _CHOSEN:
        given, default = getattr(config, section), getattr(unset, section)
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            left_open = getattr(default, field.name), LEFT_OPEN.get(field.name)
            follows = field.name == "stages" and value == WITH_PUBLIC_IMAGES
            require(follows or value in left_open, field.name, value, "to be left out with --suggest")
    for name in ("lesson_budget_share", "lesson_noise_multiplier"):
        value = getattr(config.privacy, name)
        require(value is None, name, value, "to be left out with --suggest")


def _lesson_alone(config: CurriculumConfig) -> CurriculumConfig:
    """The moments in closed form with the whole budget. The network is never trained, and adds nothing."""
    has_public_images = config.public_images.pretrain_dataset_name is not None
    return config.replace(
        stages=WITH_PUBLIC_IMAGES if has_public_images else ["moments"],
        pretrain_steps=0 if has_public_images else config.pretraining.pretrain_steps,
        shortcut="closed_form",
        block_out_channels=_levels(_NARROW, config.data.resolution),
        label_dropout=0.0,
        num_inference_steps=1,
    )


def _with_steps(config: CurriculumConfig, recipe: _Recipe, widths: list[int]) -> CurriculumConfig:
    """The moments in closed form, then the noisy steps of a recipe, with a network of these channels."""
    return config.replace(
        stages=["moments", "dp_sgd"],
        shortcut="closed_form",
        lesson_budget_share=recipe.share,
        block_out_channels=_levels(widths, config.data.resolution),
        label_dropout=0.0,
        expected_batch_size=recipe.batch,
        num_dp_steps=recipe.steps,
        noise_multiplicity=recipe.copies,
        dp_learning_rate=6e-3,
        dp_warmup_steps=5,
        dp_p_mean=_P_MEAN,
        num_inference_steps=8,
        s_churn=8.0,
    )


def _levels(widths: list[int], resolution: int) -> list[int]:
    """Channels of as many levels as the side of the images can be halved, at most as many as there are."""
    count = len(widths)
    while resolution % 2 ** (count - 1):
        count -= 1
    return widths[:count]


def _largest_batch(dataset_size: int) -> int:
    """The largest expected batch size that is chosen for so many images, or persons."""
    return int(_MOST_RATE * dataset_size)


def _scaled(recipe: _Recipe, dataset_size: int, inputs: float) -> _Recipe:
    """The recipe with as many network inputs: steps and batch grow by one factor, then K."""
    growth = math.sqrt(inputs / recipe.inputs)
    batch = max(1, min(_rounded(recipe.batch * growth), _largest_batch(dataset_size)))
    steps = max(_LEAST_STEPS, min(round(inputs / (batch * recipe.copies)), recipe.most_steps))
    copies = max(1, min(_MOST_COPIES, round(inputs / (batch * steps))))
    return dataclasses.replace(recipe, steps=steps, batch=batch, copies=copies)


def _rounded(batch: float) -> int:
    """A multiple of an eighth of the power of two below it: more digits would promise too much."""
    unit = max(1.0, 2 ** math.floor(math.log2(batch)) / 8)
    return int(round(batch / unit) * unit)


def _nearest(config: CurriculumConfig, dataset_size: int, num_classes: int | None) -> tuple[Reached, ...]:
    """Results of the same kind of images, the nearest in size, classes and epsilon first; at most two."""

    def distance(reached: Reached) -> float:
        size = abs(math.log(reached.images / dataset_size))
        size += 0.0 if num_classes is None else abs(math.log(reached.classes / num_classes))
        return size + abs(math.log(reached.epsilon / config.privacy.target_epsilon))

    has_public_images = config.public_images.pretrain_dataset_name is not None
    kind = [
        reached
        for reached in REACHED
        if (reached.channels == 3) == config.has_photos and bool(reached.public_photos) == has_public_images
    ]
    return tuple(sorted(kind, key=distance)[:2])


def _without_defaults(config: CurriculumConfig) -> dict[str, dict[str, object]]:
    """Fields that are not as they are by default, and the promise, which no later default may change."""
    unset = CurriculumConfig().to_dict()
    changed = {
        section: {name: value for name, value in fields.items() if name in _PROMISE or value != unset[section][name]}
        for section, fields in config.to_dict().items()
    }
    return {section: fields for section, fields in changed.items() if fields}
