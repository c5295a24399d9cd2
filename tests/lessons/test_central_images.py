"""Central images: how far one image moves what is released, how much noise stands against it, and what they show.

Every sensitivity is measured in the noise that was drawn for it, so a check cannot be passed by a wrong divisor. A
port of the published mistake (a mean over the realised class count, noise for an assumed one) fails the same check.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dp_curriculum.config import DataConfig
from dp_curriculum.data import NO_CONTRIBUTION, load_images
from dp_curriculum.lessons import central_images
from dp_curriculum.lessons.central_images import (
    CentralImages,
    Statistic,
    central_image_norm,
    median_filter,
    sharpen,
)
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator


NUM_CLASSES = 3
PUBLIC_SIZE = 60
STATISTICS: list[Statistic] = ["mean", "mode"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Public constants of a query."""

    noise_multiplier: float = 20.0
    sample_rate: float = 1.0
    num_rounds: int = 1
    max_image_norm: float | None = None
    background_level: float = 0.5
    num_levels: int = 2
    post_process: bool = True

    @property
    def event(self) -> GaussianEvent:
        return GaussianEvent(self.noise_multiplier, self.sample_rate, self.num_rounds)

    def norm(self, statistic: Statistic, num_values: int) -> float:
        level, norm = self.background_level, self.max_image_norm
        return central_image_norm(statistic, num_values=num_values, background_level=level, max_image_norm=norm)


def query_central_images(images: Tensor, labels: Tensor, options: Options, **given: Any) -> CentralImages:
    """The query with the mechanism that a plan makes of these options."""
    side = given.get("resolution")
    size = (side, side) if side else [max(1, length // 2) for length in images.shape[2:]]
    norm = options.norm(given.get("statistic", "mean"), images.shape[1] * math.prod(size))
    given |= {name: getattr(options, name) for name in ("background_level", "num_levels", "post_process")}
    mechanism = PlannedMechanism("central-images", norm, options.event)
    return central_images.query_central_images(images, labels, mechanism, **given)


# --- measuring ---------------------------------------------------------------------------------------------------


class SumProbe(Tensor):
    """Zeros in place of the noise. It keeps the first other tensor of its shape that it meets: what is released."""

    seen: list[Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        probe = next(arg for arg in args if isinstance(arg, SumProbe))
        others = [arg for arg in args if isinstance(arg, Tensor) and not isinstance(arg, SumProbe)]
        result = super().__torch_function__(func, types, args, kwargs or {})
        if others and others[0].shape == probe.shape:
            probe.seen.append(others[0].detach().double().clone())
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


class FrozenGenerator(SecretGenerator):
    """No noise, and masks by a constant rule: row i is in round r or is not, whatever the other rows are."""

    def __init__(self, always: int | None = None) -> None:
        super().__init__()
        self.always = always
        self.stds: list[float] = []
        self.sums: list[Tensor] = []
        self.rounds = 0

    @property
    def is_private(self) -> bool:
        return False

    def poisson_sample(self, num_rows: int, sample_rate: float) -> Tensor:
        self.rounds += 1
        coins = torch.rand(1000, generator=torch.Generator().manual_seed(self.rounds))
        if self.always is not None:
            coins[self.always] = 0.0
        return (coins[:num_rows] < sample_rate).nonzero().flatten()

    def gaussian(self, shape: int | Sequence[int], std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        self.stds.append(std)
        probe = torch.zeros(sizes, dtype=dtype).as_subclass(SumProbe)
        probe.seen = self.sums
        return probe


Query = Callable[..., CentralImages]


def noiseless(query: Query, images: Tensor, labels: Tensor, config: Options, **options: Any) -> Any:
    """What the query would release but for the noise, `(rounds, …)`, and the noise that it asked for."""
    generator = FrozenGenerator(options.pop("always", None))
    options = {"num_classes": NUM_CLASSES, "public_dataset_size": PUBLIC_SIZE, **options}
    query(images, labels, config, generator=generator, **options)
    assert len(generator.sums) == len(generator.stds) == config.num_rounds
    assert len(set(generator.stds)) == 1
    return torch.stack(generator.sums), generator.stds[0]


def check_sensitivity(query: Query, pair: Any, config: Options, *, factor: float, **options: Any) -> Any:
    """
    Asserts that two neighbours are no further apart than the event says, in units of the noise: at most `factor /
    noise_multiplier` in each round. Returns the largest distance, in units of the sensitivity.
    """
    (images, labels), (other_images, other_labels) = pair
    here, std = noiseless(query, images, labels, config, **options)
    there, other_std = noiseless(query, other_images, other_labels, config, **options)
    assert std == other_std, "the noise does not depend on the images"
    assert here.isfinite().all() and there.isfinite().all(), "what is released is a number"
    event = config.event
    assert event.num_steps == len(here) and event.sample_rate == config.sample_rate
    sensitivity = std / event.noise_multiplier
    distance = (here - there).flatten(1).norm(dim=1).max().item() / sensitivity
    assert distance <= factor * (1 + 1e-6), f"one image moves the release by {distance:.3f} times its sensitivity"
    return distance


# --- neighbours --------------------------------------------------------------------------------------------------


def base(channels: int = 1) -> tuple[Tensor, Tensor]:
    """Fourteen images of two of three classes; the last one is a lone member of its class."""
    images = torch.rand(15, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 10 + [1] * 4 + [2])
    return images, labels


def extra(kind: str, channels: int = 1) -> tuple[Tensor, int]:
    """One image that comes, goes or takes another's place, and its label."""
    ordinary = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    spoiled = ordinary.clone()
    spoiled[..., 0, :] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30] * 2)
    return {
        "ordinary": (ordinary, 0),
        "all white": (torch.ones_like(ordinary), 0),
        "all black": (torch.zeros_like(ordinary), 0),
        "bytes": (255 * torch.ones_like(ordinary), 0),
        "ten times out of range": (20 * ordinary - 10, 1),
        "NaN": (spoiled, 1),
        "only member of its class": (torch.ones_like(ordinary), 2),
        "label out of range": (torch.ones_like(ordinary), NUM_CLASSES),
        "no contribution": (torch.ones_like(ordinary), NO_CONTRIBUTION),
    }[kind]


KINDS = [
    "ordinary",
    "all white",
    "all black",
    "bytes",
    "ten times out of range",
    "NaN",
    "only member of its class",
    "label out of range",
    "no contribution",
]


def neighbours(kind: str, change: str, channels: int = 1) -> Any:
    """Two datasets that differ in their row 3. The rows of the others are the same in both."""
    (images, labels), (image, label) = base(channels), extra(kind, channels)
    if kind == "only member of its class":
        images, labels = images[:-1], labels[:-1]
    # The row that comes or goes is the last one: the masks of the others stay.
    with_it = torch.cat([images, image]), torch.cat([labels, torch.tensor([label])])
    if change == "add":
        return (images, labels), with_it
    if change == "remove":
        return with_it, (images, labels)
    instead = torch.cat([images, torch.zeros_like(image)]), torch.cat([labels, torch.tensor([1])])
    return with_it, instead


def opposite() -> Any:
    """An all-white image takes the place of an all-black one of its class."""
    with_it, (images, labels) = neighbours("all white", "replace")
    return with_it, (images, torch.cat([labels[:-1], torch.tensor([0])]))


CONFIGS = {
    "all rows": Options(),
    "sampled, several rounds": Options(sample_rate=0.5, num_rounds=3),
    "small bound": Options(max_image_norm=0.25, noise_multiplier=3.0),
    "bound that is never reached": Options(max_image_norm=100.0),
    "centred at black": Options(background_level=0.0, num_levels=5),
    "centred near white": Options(background_level=0.9),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("change", ["add", "remove", "replace"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_image_moves_the_sums_by_at_most_the_norm(kind: str, change: str, name: str, statistic: Statistic) -> None:
    """Twice the norm where it is replaced. The changed row is in every sample: the worst case of the coin tosses."""
    config, pair = CONFIGS[name], neighbours(kind, change)
    changed = len(pair[0][0]) - (change != "add")
    factor = 2.0 if change == "replace" else 1.0
    distance = check_sensitivity(
        query_central_images, pair, config, factor=factor, statistic=statistic, resolution=4, always=changed
    )
    if "out of range" in kind and "label" in kind and change != "replace":
        assert distance == 0
    norm = config.norm(statistic, 16)
    images, labels = pair[0]
    _, std = noiseless(query_central_images, images, labels, config, statistic=statistic, resolution=4)
    assert std == config.noise_multiplier * norm, "the sensitivity that is published is the one that is noised"


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_bound_is_reached_so_that_the_check_can_fail(statistic: Statistic) -> None:
    config = Options(background_level=0.5)
    for pair, factor in ((neighbours("all white", "add"), 1.0), (opposite(), 2.0)):
        distance = check_sensitivity(query_central_images, pair, config, factor=factor, statistic=statistic)
        assert distance > 0.99 * (math.sqrt(factor) if statistic == "mode" else factor)
    with pytest.raises(AssertionError, match="moves the release by 2.000 times"):
        check_sensitivity(query_central_images, opposite(), config, factor=1.0, statistic="mean")


def test_images_within_the_bound_are_added_as_they_are_and_others_scaled_to_it() -> None:
    """The clip is no normalization: of two grey levels, one has half the norm that is allowed, one twice."""
    config = Options(max_image_norm=1.0)
    images = torch.tensor([0.5 + 0.125, 0.5 - 0.5]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    sums, _ = noiseless(query_central_images, images, torch.tensor([0, 1]), config, resolution=4)
    torch.testing.assert_close(sums[0, 0], torch.full((1, 4, 4), 0.125, dtype=torch.float64))
    torch.testing.assert_close(sums[0, 1], torch.full((1, 4, 4), -0.25, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["NaN", "ten times out of range", "bytes"])
def test_colour_images_are_bounded_over_all_channels(kind: str) -> None:
    for statistic in STATISTICS:
        pair = neighbours(kind, "add", channels=3)
        check_sensitivity(query_central_images, pair, Options(), factor=1.0, statistic=statistic)
        images, labels = pair[1]
        assert query_central_images(
            images, labels, Options(), num_classes=3, public_dataset_size=60, statistic=statistic
        ).images.shape == (3, 3, 8, 8)


# --- the published mistake ---------------------------------------------------------------------------------------


def mean_over_the_realised_count(
    images: Tensor,
    labels: Tensor,
    config: Options,
    *,
    num_classes: int,
    public_dataset_size: int,
    generator: SecretGenerator,
    expected_batch: float | None = None,
    bounded: bool = True,
) -> CentralImages:
    """
    The query as it was published, written from its description: the mean of the images of a class that were drawn,
    with noise scaled to sqrt(d) / 2 over an assumed number of images of the class.
    """
    images = images.clamp(0, 1) if bounded else images
    expected = config.sample_rate * public_dataset_size if expected_batch is None else expected_batch
    means = []
    for _ in range(config.num_rounds):
        drawn = generator.poisson_sample(len(images), config.sample_rate)
        small = F.interpolate(images[drawn], scale_factor=0.5)
        mean = torch.stack([small[labels[drawn] == label].mean(dim=0) for label in range(num_classes)])
        sensitivity = math.sqrt(0.25 * mean[0].numel()) / (expected // num_classes)
        noise = generator.gaussian(mean.shape, std=config.noise_multiplier * sensitivity)
        means.append((mean + noise).clamp(0, 1))
    all_labels = torch.arange(num_classes).repeat(config.num_rounds)
    return CentralImages(torch.cat(means), all_labels)


@pytest.mark.parametrize("change", ["add", "remove"])
def test_the_published_mean_over_the_realised_count_fails_the_same_check(change: str) -> None:
    """One more image of a class that drew fewer than expected moves its mean further than the noise allows for."""
    config = Options()
    pair = neighbours("all white", change)
    check_sensitivity(query_central_images, pair, config, factor=1.0)
    with pytest.raises(AssertionError, match="one image moves the release by"):
        check_sensitivity(mean_over_the_realised_count, pair, config, factor=1.0)
    # With as many images as assumed in each class it would have passed: no test on balanced data finds it.
    full = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(60) % 3
    more = torch.cat([full[0], torch.ones(1, 1, 8, 8)]), torch.cat([full[1], torch.tensor([0])])
    check_sensitivity(mean_over_the_realised_count, (full, more), config, factor=1.0)


@pytest.mark.parametrize("change", ["add", "remove"])
def test_the_published_mean_of_an_empty_class_fails_the_same_check(change: str) -> None:
    pair = neighbours("only member of its class", change)
    check_sensitivity(query_central_images, pair, Options(), factor=1.0)
    with pytest.raises(AssertionError, match="what is released is a number"):
        check_sensitivity(mean_over_the_realised_count, pair, Options(), factor=1.0)


def test_the_published_mean_of_unbounded_pixels_fails_the_same_check() -> None:
    full = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(60) % 3
    more = torch.cat([full[0], torch.full((1, 1, 8, 8), 255.0)]), torch.cat([full[1], torch.tensor([0])])
    check_sensitivity(query_central_images, (full, more), Options(), factor=1.0)

    def unbounded(*args: Any, **options: Any) -> CentralImages:
        return mean_over_the_realised_count(*args, bounded=False, **options)

    with pytest.raises(AssertionError, match="one image moves the release by"):
        check_sensitivity(unbounded, (full, more), Options(), factor=1.0)


# --- the divisor and the shapes ----------------------------------------------------------------------------------

# With all post-processing off and the image's own resolution, what is released is center + sum / divisor.
PLAIN = Options(post_process=False)


def test_the_divisor_is_the_public_constant_whatever_the_realised_counts_are() -> None:
    """Three all-white images add the same to a class of 3, of 30, and of all."""
    for config in (PLAIN, dataclasses.replace(PLAIN, sample_rate=0.5)):
        for count in (3, 30, 300):
            images = torch.cat([torch.ones(3, 1, 8, 8), torch.full((count - 3, 1, 8, 8), 0.5)])
            generator = FrozenGenerator()
            released = query_central_images(
                images,
                torch.zeros(count, dtype=torch.int64),
                config,
                num_classes=NUM_CLASSES,
                public_dataset_size=PUBLIC_SIZE,
                resolution=8,
                generator=generator,
            )
            drawn = int((FrozenGenerator().poisson_sample(3, config.sample_rate) < 3).sum())
            share = drawn * 0.5 / (config.sample_rate * PUBLIC_SIZE / NUM_CLASSES)
            torch.testing.assert_close(released.images[0], torch.full((1, 8, 8), 0.5 + share))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_shape_or_noise_depends_on_the_number_of_rows(statistic: Statistic) -> None:
    """Down to no rows at all: what is published is the same in form, and the noise has the same scale."""
    config = Options(num_rounds=2, sample_rate=0.5)
    images, labels = base()
    seen = set()
    for count in (0, 1, 14, 15):
        generator = FrozenGenerator()
        released = query_central_images(
            images[:count],
            labels[:count],
            config,
            num_classes=NUM_CLASSES,
            public_dataset_size=PUBLIC_SIZE,
            statistic=statistic,
            generator=generator,
        )
        seen.add((released.images.shape, tuple(released.labels.tolist()), tuple(generator.stds)))
    assert len(seen) == 1
    shape, all_labels, _ = seen.pop()
    assert shape == (6, 1, 8, 8) and all_labels == (0, 1, 2, 0, 1, 2)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_empty_class_releases_noise_like_any_other(statistic: Statistic) -> None:
    images, labels = base()
    config = Options()
    kept = labels != 2
    sums, _ = noiseless(query_central_images, images[kept], labels[kept], config, statistic=statistic)
    assert (sums[0, 2] == 0).all() and (sums[0, 0] != 0).any()
    released = query_central_images(
        images[kept], labels[kept], config, num_classes=NUM_CLASSES, public_dataset_size=60, statistic=statistic
    )
    assert released.images.isfinite().all() and released.images[2].std() > 0


# --- the noise ---------------------------------------------------------------------------------------------------


class ScaledGenerator(SecretGenerator):
    """A broken twin: noise of another scale than it was asked for."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def gaussian(self, shape: int | Sequence[int], std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().gaussian(shape, self.factor * std, dtype=dtype)


def measured_noise(generator: SecretGenerator, config: Options, size: int) -> Tensor:
    """The noise of the released images of a dataset whose sums are zero, in units of the sums."""
    grey = torch.full((5, 1, 8, 8), config.background_level)
    released = query_central_images(
        grey, torch.arange(5) % 3, config, num_classes=10, public_dataset_size=size, resolution=8, generator=generator
    )
    assert released.images.min() > 0 and released.images.max() < 1, "nothing was clamped"
    return (released.images.double() - config.background_level) * config.sample_rate * size / 10


@pytest.mark.statistical
@pytest.mark.parametrize("norm", [None, 0.37])
def test_noise_has_the_multiplier_times_the_norm_as_its_scale(norm: float | None) -> None:
    """12,800 draws: their standard deviation is within 3 % (false alarm: 5e-7), with twins at 0.93 and 1.07."""
    config = dataclasses.replace(PLAIN, num_rounds=20, max_image_norm=norm, noise_multiplier=2.5)
    expected = 2.5 * config.norm("mean", 64)
    assert expected == 2.5 * (norm or 4.0)
    size = int(2000 * expected)

    def scale_fits(generator: SecretGenerator) -> bool:
        noise = measured_noise(generator, config, size)
        assert noise.numel() == 12_800
        return abs(noise.std().item() / expected - 1) < 0.03 and abs(noise.mean().item()) < 0.05 * expected

    assert scale_fits(SecretGenerator())
    assert not scale_fits(ScaledGenerator(0.93))
    assert not scale_fits(ScaledGenerator(1.07))


def test_noise_is_fresh_in_every_round_class_and_call() -> None:
    config = dataclasses.replace(PLAIN, num_rounds=3)
    first, second = (measured_noise(SecretGenerator(), config, 100_000).flatten(1) for _ in range(2))
    together = torch.cat([first, second])
    assert len(together.unique(dim=0)) == len(together)
    assert torch.corrcoef(together).fill_diagonal_(0).abs().max() < 0.75


@pytest.mark.statistical
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_each_round_draws_its_own_poisson_sample(rate: float) -> None:
    """The size of 200 samples of 1000 rows: mean and variance of a binomial, within five standard errors."""

    class Counting(FrozenGenerator):
        def poisson_sample(self, num_rows: int, sample_rate: float) -> Tensor:
            return SecretGenerator.poisson_sample(self, num_rows, sample_rate)

    config = Options(sample_rate=rate, num_rounds=200, background_level=0.0)
    generator = Counting()
    query_central_images(
        torch.ones(1000, 1, 2, 2),
        torch.zeros(1000, dtype=torch.int64),
        config,
        num_classes=1,
        public_dataset_size=1000,
        generator=generator,
    )
    counts = torch.stack(generator.sums).flatten()
    variance = 1000 * rate * (1 - rate)
    assert abs(counts.mean().item() - 1000 * rate) <= 5 * math.sqrt(variance / 200)
    assert abs(counts.var().item() - variance) <= 5 * variance * math.sqrt(2 / 199)


# --- what is released ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_bytes_and_floats_give_the_same_sums(statistic: Statistic, channels: int) -> None:
    """Grey levels are multiples of 16 and levels an odd number: no value lies on the border between two."""
    stored = 16 * torch.randint(16, (9, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 3
    config = Options(num_levels=3)
    results = [
        noiseless(query_central_images, images, labels, config, statistic=statistic, resolution=4)[0]
        for images in (stored.to(torch.uint8), stored.float() / 255, stored.double() / 255)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)


def test_the_mode_is_the_level_that_most_images_have() -> None:
    config = dataclasses.replace(PLAIN, num_levels=3)
    images = torch.tensor([0.1, 0.5, 0.45, 0.9]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    sums, _ = noiseless(
        query_central_images, images, torch.zeros(4, dtype=torch.int64), config, statistic="mode", resolution=4
    )
    assert sums.shape == (1, NUM_CLASSES, 3, 1, 4, 4)
    assert sums[0, 0, :, 0, 0, 0].tolist() == [1.0, 2.0, 1.0]
    released = query_central_images(
        images,
        torch.zeros(4, dtype=torch.int64),
        config,
        num_classes=1,
        public_dataset_size=4,
        statistic="mode",
        resolution=4,
        generator=FrozenGenerator(),
    )
    assert (released.images == 0.5).all()


def test_post_processing_is_a_function_of_the_release_alone() -> None:
    """The same noise twice gives the same images; without noise, the images of one dataset are one."""
    images, labels = base()
    options: dict[str, Any] = {"num_classes": NUM_CLASSES, "public_dataset_size": PUBLIC_SIZE}
    first, second = (
        query_central_images(images, labels, Options(), generator=FrozenGenerator(), **options) for _ in range(2)
    )
    assert torch.equal(first.images, second.images)
    fresh = query_central_images(images, labels, Options(), **options)
    assert not torch.equal(fresh.images, first.images), "and the real noise is never the same"


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("channels", "side", "resolution"), [(1, 8, None), (3, 8, 3), (1, 7, None), (3, 2, 1)])
def test_images_come_back_in_their_own_size_and_in_range(
    channels: int, side: int, resolution: int | None, statistic: Statistic
) -> None:
    images = torch.rand(20, channels, side, side, generator=torch.Generator().manual_seed(0))
    released = query_central_images(
        images,
        torch.arange(20) % 2,
        Options(num_rounds=2),
        num_classes=2,
        public_dataset_size=20,
        statistic=statistic,
        resolution=resolution,
    )
    assert released.images.shape == (4, channels, side, side) and released.images.dtype == torch.float32
    assert released.images.min() >= 0 and released.images.max() <= 1
    assert released.labels.tolist() == [0, 1, 0, 1]


def test_shapes_that_disagree_are_refused() -> None:
    options: dict[str, Any] = {"num_classes": 2, "public_dataset_size": 4}
    for images, labels in ((torch.rand(4, 8, 8), torch.zeros(4)), (torch.rand(4, 1, 8, 8), torch.zeros(3))):
        with pytest.raises(ValueError, match=r"Expected images \(N, C, H, W\) and labels \(N,\): they have shapes"):
            query_central_images(images, labels.long(), Options(), **options)


@pytest.mark.parametrize(("statistic", "least"), [("mean", 0.85), ("mode", 0.75)])
def test_central_images_of_the_digits_look_like_digits(statistic: Statistic, least: float) -> None:
    """A classifier that knows ten central images of low noise names most of the test digits: 91 % and 85 %."""
    config = Options(noise_multiplier=1.0, background_level=0.3, post_process=False)
    train, test = (load_images(DataConfig(resolution=8), split) for split in ("train", "test"))
    released = query_central_images(
        train.images,
        train.labels,
        config,
        num_classes=10,
        public_dataset_size=len(train),
        statistic=statistic,
        resolution=8,
    )
    pixels = test.images.float().flatten(1) / 255
    nearest = torch.cdist(pixels, released.images.flatten(1)).argmin(dim=1)
    accuracy = (released.labels[nearest] == test.labels).float().mean().item()
    assert accuracy > least
    shuffled = (released.labels[nearest.roll(1)] == test.labels).float().mean().item()
    assert shuffled < 0.3, "the figure can be missed"


class Nothing(SecretGenerator):
    """All rows, no noise."""

    def gaussian(self, shape: Any, std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)


def released_of(image: Tensor, statistic: Statistic = "mean", **options: Any) -> Tensor:
    """What one image `(C, H, W)` releases without noise: itself, but for what comes afterwards."""
    config = {"post_process": False, "max_image_norm": 1e6, **options}
    return query_central_images(
        image[None],
        torch.zeros(1, dtype=torch.int64),
        Options(**config),
        num_classes=1,
        public_dataset_size=1,
        statistic=statistic,
        resolution=image.shape[1] if image.shape[1] == image.shape[2] else None,
        generator=Nothing(),
    ).images[0]


def test_sharpening_takes_from_each_pixel_what_its_four_neighbours_have() -> None:
    """Five times the pixel less the four beside it; the border counts as repeated."""
    image = torch.full((2, 5, 5), 0.5)
    image[0, 2, 2], image[1, 0, 0] = 0.6, 0.45
    expected = torch.full((2, 5, 5), 0.5)
    expected[0, 2, 2] += 0.5
    for row, column in ((1, 2), (3, 2), (2, 1), (2, 3)):
        expected[0, row, column] -= 0.1
    expected[1, 0, 0] += -0.25 + 0.1  # two of its neighbours are itself
    for row, column in ((0, 1), (1, 0)):
        expected[1, row, column] += 0.05
    torch.testing.assert_close(sharpen(image[None])[0], expected)


def test_the_median_of_each_neighbourhood_takes_single_pixels_away() -> None:
    image = torch.full((1, 7, 7), 0.3)
    image[0, 3, 3] = 1.0
    torch.testing.assert_close(median_filter(image[None])[0], torch.full((1, 7, 7), 0.3))


def test_without_a_resolution_images_are_aggregated_at_half_of_each_side() -> None:
    """What is left of an image of another height than width is the mean of each two by two pixels, enlarged."""
    image = torch.rand(1, 8, 6, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.interpolate(image[None], size=(4, 3), mode="area")
    large = torch.nn.functional.interpolate(small, size=(8, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(released_of(image), large[0])
    assert released_of(torch.rand(1, 1, 2)).shape == (1, 1, 2)


def test_the_levels_of_the_mode_reach_from_black_to_white() -> None:
    image = torch.tensor([[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0], [0.1, 0.5, 0.9]]])
    levels = (image * 3).long().clamp_max(2) / 2
    torch.testing.assert_close(released_of(image, "mode", num_levels=3), levels)


@pytest.mark.parametrize(("height", "width", "values"), [(8, 6, 12), (8, 4, 8), (1, 1, 1), (1, 8, 4), (8, 1, 4)])
def test_noise_fits_the_number_of_values_that_are_released(height: int, width: int, values: int) -> None:
    """At half of each side, but never less than one pixel: no image is further than 1/2 from grey in each value."""
    generator, config = FrozenGenerator(), Options(noise_multiplier=3.0)
    query_central_images(
        torch.rand(4, 1, height, width),
        torch.zeros(4, dtype=torch.int64),
        config,
        num_classes=1,
        public_dataset_size=4,
        generator=generator,
    )
    assert generator.stds == [pytest.approx(3.0 * 0.5 * math.sqrt(values))]
    assert generator.sums[0].numel() == values
