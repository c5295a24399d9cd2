"""Pretraining: it learns from what it is given alone, ends with averaged weights, and moves images gently."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_curriculum.config import CurriculumConfig, PretrainConfig
from dp_curriculum.diffusion.edm import SIGMA_DATA, build_unet, noise_levels
from dp_curriculum.lessons import pretraining
from dp_curriculum.lessons.pretraining import (
    AUGMENTATIONS,
    CHECK_IMAGES,
    CHECK_STEPS,
    Augmentation,
    augment,
    augmentation,
    mixed,
    pretrain,
)


MakeConfig = Callable[..., CurriculumConfig]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_unet(config: CurriculumConfig) -> Any:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return build_unet(config.model, resolution=8, num_channels=config.data.channels, num_classes=2)


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two classes: left half white, right half white."""
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.zeros(count, 1, 8, 8)
    images[labels == 0, :, :, :4] = 1
    images[labels == 1, :, :, 4:] = 1
    return images, labels


def weights(unet: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in unet.parameters()]


def run(unet: Any, config: CurriculumConfig, **options: Any) -> None:
    pretrain(unet, options.pop("draw", draw), config, generator=seeded(), disable_progress_bar=True, **options)


# --- training ------------------------------------------------------------------------------------------------------


def test_all_weights_move_and_the_loss_falls(make_config: MakeConfig) -> None:
    config = make_config(pretrain_steps=100, pretrain_batch_size=32, pretrain_learning_rate=3e-3, label_dropout=0.5)
    unet, losses = make_unet(config), []
    before = weights(unet)
    run(unet, config, on_step=lambda step, loss: losses.append((step, loss)))
    for (name, parameter), old in zip(unet.named_parameters(), before):
        assert not torch.equal(parameter, old), name
    assert [step for step, _ in losses] == [50, 100]
    assert all(math.isfinite(loss) for _, loss in losses) and losses[-1][1] < losses[0][1]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_what_is_left_are_the_averaged_weights(
    decay: float, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged by the law of `EMAModel`: the decay rises from 2 / 11 with the steps, to `EMA_DECAY`."""
    monkeypatch.setattr(pretraining, "EMA_DECAY", decay)
    config = make_config(pretrain_steps=6, pretrain_learning_rate=1e-2)
    unet, course = make_unet(config), []
    average = weights(unet)
    run(unet, config, should_stop=lambda: course.append(weights(unet)) is not None)
    assert len(course) == 6
    for step, raw in enumerate(course):
        rate = min(decay, (1 + step) / (10 + step)) if step > 0 else 0.0
        average = [rate * old + (1 - rate) * new for old, new in zip(average, raw)]
    for kept, expected in zip(weights(unet), average):
        torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-5)
    same = all(torch.equal(kept, raw) for kept, raw in zip(weights(unet), course[-1]))
    assert same == (decay == 0.0)


def test_it_stops_where_it_is_told_to(make_config: MakeConfig) -> None:
    config, asked, drawn = make_config(pretrain_steps=50), [], []
    unet = make_unet(config)
    before = weights(unet)

    def counted(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn.append(count)
        return draw(count, generator)

    run(unet, config, draw=counted, should_stop=lambda: asked.append(1) is None and len(asked) == 3)
    assert drawn == [4, 4, 4]
    assert not torch.equal(weights(unet)[0], before[0]), "and leaves the averaged weights of what it did"


def swapped(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The classes the other way round: the better `draw` is learned, the worse these fit."""
    images, labels = draw(count, generator)
    return images, 1 - labels


@pytest.mark.parametrize(("check_draw", "ends"), [(swapped, True), (draw, False)])
def test_a_lesson_ends_once_what_is_held_out_gets_no_better_and_leaves_the_best(
    check_draw: Any, ends: bool, make_config: MakeConfig
) -> None:
    config = make_config(
        pretrain_steps=400, pretrain_batch_size=16, pretrain_learning_rate=3e-3, pretrain_patience=2,
        augmentation="none", label_dropout=0.0,
    )  # fmt: skip
    unet, course, checked = make_unet(config), [], []

    def counted(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        checked.append(count)
        return check_draw(count, generator)

    run(unet, config, check_draw=counted, should_stop=lambda: course.append(1) is not None)
    assert checked == [CHECK_IMAGES], "one batch, for all checks"
    taken = len(course)
    assert taken % CHECK_STEPS == 0 and (taken < 400) == ends

    def weights_after(steps: int) -> list[Tensor]:
        other = make_unet(config)
        run(other, config.replace(pretrain_patience=None), num_steps=steps)
        return weights(other)

    best = taken - 2 * CHECK_STEPS if ends else taken
    assert all(torch.equal(kept, expected) for kept, expected in zip(weights(unet), weights_after(best)))


def test_public_randomness_decides_everything(make_config: MakeConfig) -> None:
    """The same generator twice gives the same weights; the global one is neither read nor moved."""
    config, state = make_config(), torch.random.get_rng_state()
    first, second = make_unet(config), make_unet(config)
    run(first, config)
    torch.rand(3)
    state = torch.random.get_rng_state()
    run(second, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second)))


def test_labels_are_withheld_at_the_rate_and_none_is_the_last_class(make_config: MakeConfig) -> None:
    seen: list[Tensor] = []
    for rate in (0.0, 0.5):
        config = make_config(pretrain_steps=2, pretrain_batch_size=200, label_dropout=rate)
        unet = make_unet(config)
        unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
        )
        run(unet, config)
    without, half = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert (without == 2).sum() == 0 and 140 < (half == 2).sum() < 260
    assert set(half.tolist()) == {0, 1, 2}


def test_the_network_gets_images_in_its_own_range(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of [0, 1] become [-1, 1]: with hardly any noise, what goes in over c_in is the image."""
    given: list[Tensor] = []
    monkeypatch.setattr(pretraining, "noise_levels", functools.partial(noise_levels, p_std=1e-3))
    config = make_config(pretrain_p_mean=-9.0, pretrain_steps=1, pretrain_batch_size=64)
    unet = make_unet(config)
    unet.register_forward_pre_hook(lambda module, args: given.append(args[0].detach().clone()))
    run(unet, config)
    images = given[0] * SIGMA_DATA
    assert images.min().item() == pytest.approx(-1, abs=0.01) and images.max().item() == pytest.approx(1, abs=0.01)


@pytest.mark.usefixtures("bf16_hardware")
def test_bf16_trains_the_same_weights_roughly(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "EMA_DECAY", 0.0)
    config = make_config(pretrain_steps=2)
    exact, rough = make_unet(config), make_unet(config)
    run(exact, config)
    run(rough, config.replace(mixed_precision="bf16"))
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in rough.parameters())
    difference = sum((a - b).square().sum() for a, b in zip(weights(exact), weights(rough))) ** 0.5
    moved = sum((a - b).square().sum() for a, b in zip(weights(exact), weights(make_unet(config)))) ** 0.5
    assert 0 < difference < moved


# --- several lessons at once ---------------------------------------------------------------------------------------


def constant(value: float) -> Any:
    """A lesson of one grey, whose images are all of class `value`."""
    return lambda count, generator: (torch.full((count, 1, 8, 8), value), torch.full((count,), int(value)))


def test_mixed_lessons_give_alike_and_keep_image_and_label_together() -> None:
    both = mixed([constant(0.0), constant(1.0), constant(2.0)])
    generator, counts = seeded(), torch.zeros(3)
    for _ in range(300):
        images, labels = both(4, generator)
        assert images.shape == (4, 1, 8, 8) and torch.equal(images.amax((1, 2, 3)).long(), labels)
        found = labels.bincount(minlength=3)
        assert found.min() == 1 and found.max() == 2
        counts += found
    assert (counts - 400).abs().max() < 50, "whose turn it is to give one more is chance"
    assert both(9, generator)[1].bincount().tolist() == [3, 3, 3]
    assert len(both(1, generator)[1]) == 1, "fewer images than lessons"


def test_one_lesson_is_not_mixed() -> None:
    alone = constant(1.0)
    assert mixed([alone]) is alone


def test_the_number_of_steps_can_be_told(make_config: MakeConfig) -> None:
    counted: list[int] = []

    def counting(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        counted.append(count)
        return draw(count, generator)

    config = make_config(pretrain_steps=3)
    run(make_unet(config), config, draw=counting, num_steps=5)
    assert len(counted) == 5
    run(make_unet(config), config, draw=counting)
    assert len(counted) == 8


# --- augmentation --------------------------------------------------------------------------------------------------


def test_without_any_movement_the_image_is_itself() -> None:
    images = torch.rand(5, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(
        augment(images, augmentation(PretrainConfig(augmentation="none")), seeded()), images, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("num_channels", [1, 3])
def test_moved_images_stay_in_range_and_each_moves_by_itself(num_channels: int) -> None:
    strong = Augmentation(rotation=180.0, translation=0.5, scaling=0.9, shear=1.0, flip=True)
    images = torch.rand(1, num_channels, 8, 8, generator=seeded()).expand(100, -1, -1, -1)
    for largest in (AUGMENTATIONS["shift"], AUGMENTATIONS["affine"], strong):
        moved = augment(images, largest, seeded())
        assert moved.shape == images.shape and moved.isfinite().all()
        assert moved.min() >= 0 and moved.max() <= 1
        assert len(moved.flatten(1).unique(dim=0)) == 100
        assert torch.equal(augment(images, largest, seeded()), moved)


def left_half_white(count: int) -> Tensor:
    images = torch.zeros(count, 1, 16, 16)
    images[..., :8] = 1
    return images


def is_mirrored(images: Tensor) -> Tensor:
    return images[..., :8].mean(dim=(1, 2, 3)) < images[..., 8:].mean(dim=(1, 2, 3))


def test_images_are_never_mirrored_unless_asked() -> None:
    """500 of them; half are where it is asked, within five standard errors."""
    images = left_half_white(500)
    assert not is_mirrored(augment(images, augmentation(PretrainConfig()), seeded())).any()
    largest = augmentation(PretrainConfig(augment_flip=True))
    mirrored = is_mirrored(augment(images, largest, seeded())).sum().item()
    assert abs(mirrored - 250) < 5 * math.sqrt(125)


@pytest.mark.parametrize("flip", [False, True])
def test_a_turned_disk_is_the_same_disk(flip: bool) -> None:
    """Rotations keep shapes, mirrored or not: nothing is squeezed."""
    axis = (torch.arange(32) - 15.5) / 16
    disk = (0.5 - 16 * ((axis.square().view(-1, 1) + axis.square()).sqrt() - 0.6)).clamp(0, 1).view(1, 1, 32, 32)
    moved = augment(disk.expand(50, -1, -1, -1), Augmentation(rotation=180.0, flip=flip), seeded())
    assert (moved - disk).abs().mean(dim=(1, 2, 3)).max() < 0.02


def test_shifts_and_sizes_keep_to_their_limits() -> None:
    """The centre of a spot moves by at most the fraction of a side that is allowed, and nearly that far."""
    spot = torch.zeros(1, 1, 33, 33)
    spot[..., 14:19, 14:19] = 1
    moved = augment(spot.expand(300, -1, -1, -1), Augmentation(translation=0.2), seeded())
    place = torch.arange(33.0)
    centre = (moved.sum(dim=(1, 2)) * place).sum(dim=1) / moved.sum(dim=(1, 2, 3)) - 16
    assert 0.17 * 33 < centre.abs().max() <= 0.2 * 33 + 0.1
    sides = augment(spot.expand(300, -1, -1, -1), Augmentation(scaling=0.3), seeded()).sum(dim=(1, 2, 3)).sqrt() / 5
    assert 0.65 < sides.min() < 0.8 and 1.2 < sides.max() < 1.35
