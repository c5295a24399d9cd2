"""The laws of noise and masks, measured on what real steps and real lessons draw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats

from dp_curriculum.audit.findings import ALPHA, Finding, chi_square_score, statistical, variance
from dp_curriculum.audit.frozen import WatchedGenerator
from dp_curriculum.audit.neighbours import dataset
from dp_curriculum.audit.step_audit import StepAudit, watch_gradients
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.lesson import Tensors
from dp_curriculum.lessons.planned import PlannedLesson
from dp_curriculum.privacy.randomness import Mode, SecretGenerator


Array = np.ndarray

_SHAPE_DRAWS = 100_000
_MIN_MASKS = 300
_IMAGES_EACH = 2  # of a person whose coin is looked at
# Standard errors. Means of some hundred products of normals have wider tails than a normal: 8 is 1e-6 for them.
_PARAMETER_LIMIT = 8.0


# --- noise -----------------------------------------------------------------------------------------------------------


def audit_noise_of_steps(audit: StepAudit, secret: SecretGenerator, *, num_draws: int) -> list[Finding]:
    """
    The law of what steps on empty draws release: noise alone, in every coordinate of every parameter.

    Args:
        audit ([`StepAudit`]): The hard stage.
        secret ([`SecretGenerator`]): The real one of a run.
        num_draws (`int`): Coordinates to look at, over all steps.
    """
    nobody = audit.images(0)

    def released() -> torch.Tensor:
        trainer = audit.build(nobody, SecretGenerator(secret.mode))
        gradients = watch_gradients(trainer)
        trainer.step()
        return gradients[0]

    trainer = audit.build(nobody, secret)
    gradients = watch_gradients(trainer)
    shapes = [parameter.shape for parameter in trainer.trained]
    for _ in range(max(2, math.ceil(num_draws / sum(shape.numel() for shape in shapes)))):
        trainer.step()
    std = audit.event.noise_multiplier * audit.bound
    watched = WatchedGenerator(secret.mode)
    audit.build(nobody, watched).step()
    outputs = torch.cat([*watched.outputs, torch.zeros(0)])
    steps = torch.stack(gradients).double().numpy() * (audit.divisor / std)
    return [
        audit_secrecy("DP-SGD", released),
        audit_precision("DP-SGD", outputs),
        *audit_noise("DP-SGD", steps),
        audit_parameters(steps, shapes),
    ]


def audit_noise_of_lesson(
    name: str, planned: PlannedLesson, config: CurriculumConfig, mode: Mode, *, num_classes: int, num_draws: int
) -> list[Finding]:
    """The law of the noise that a lesson draws on no images at all, in units of what its sensitivity asks for."""
    nobody = dataset(torch.zeros(0, *config.input_shape), [], num_classes)
    stds = [mechanism.noise_std for mechanism in planned.mechanisms for _ in range(mechanism.event.num_steps)]

    def release(secret: SecretGenerator) -> Tensors:
        return planned.lesson.release(nobody, config, planned.mechanisms, 1000, secret)

    if not stds:
        return [_reads_nothing(name, release, mode)]

    def released() -> torch.Tensor:
        tensors = release(SecretGenerator(mode))
        return torch.cat([tensor.flatten() for tensor in tensors.values() if tensor.is_floating_point()])

    secrecy = audit_secrecy(name, released)
    rounds: list[Array] = []
    while sum(one.size for one in rounds) < num_draws or len(rounds) < 2:
        secret = WatchedGenerator(mode)
        release(secret)
        if len(secret.outputs) != len(stds):
            return [secrecy, Finding(f"{name}: noise", False, f"{len(secret.outputs)} draws", f"{len(stds)}", "")]
        outputs = [output.double().flatten() for output in secret.outputs]
        draws = [output.numpy() / std for output, std in zip(outputs, stds)]
        rounds += draws if len({draw.size for draw in draws}) == 1 else [np.concatenate(draws)]
    return [secrecy, audit_precision(name, torch.cat(outputs)), *audit_noise(name, np.stack(rounds))]


def _reads_nothing(name: str, release: Callable[[SecretGenerator], Tensors], mode: Mode) -> Finding:
    """A lesson that is charged for nothing may release nothing."""
    secret = WatchedGenerator(mode)
    tensors = release(secret)
    return Finding(
        f"{name}: it is charged for nothing, and releases nothing",
        holds=not (tensors or secret.requests),
        measured=f"{len(tensors)} tensors, {len(secret.requests)} draws",
        allowed="none",
        power="catches any, with certainty",
    )


def audit_noise(name: str, steps: Array) -> list[Finding]:
    """
    Tests that draws are standard normal and independent.

    Args:
        name (`str`): How the findings call it.
        steps (`numpy.ndarray` of shape `(steps, coordinates)`): Noise in units of what it should be.
    """
    flat, count = steps.ravel(), steps.size
    part = flat[:_SHAPE_DRAWS]
    distance = stats.kstest(part, "norm").statistic
    limit = float(stats.kstwo.isf(ALPHA, part.size))
    kurtosis = float(np.mean(flat**4) - 6 * np.mean(flat**2) + 3)
    pairs = steps[1:] * steps[:-1]
    return [
        variance(
            f"{name}: noise has the variance that is charged", float(np.mean(flat**2)), math.sqrt(2 / count),
            count=count,
        ),
        statistical(
            f"{name}: noise has mean zero", float(flat.mean()), count**-0.5, unit="mean, in standard deviations",
            count=count,
        ),
        Finding(
            f"{name}: noise is Gaussian", bool(distance <= limit),
            f"Kolmogorov distance {distance:.4f}", f"at most {limit:.4f}",
            f"n = {part.size:,}, alpha = {ALPHA:g}; catches a distribution function off by {2 * limit:.4f}",
        ),
        statistical(
            f"{name}: noise has the tails of a Gaussian", kurtosis, math.sqrt(24 / count), unit="excess kurtosis",
            count=count,
        ),
        statistical(
            f"{name}: noise of successive draws is independent", float(pairs.mean()), pairs.size**-0.5,
            unit="correlation", count=pairs.size,
        ),
    ]  # fmt: skip


def audit_parameters(steps: Array, shapes: list[torch.Size]) -> Finding:
    """Tests that each parameter has noise of the right size, and no two of equal shape have the same."""
    ends = np.cumsum([shape.numel() for shape in shapes])
    parts = [steps[:, end - shape.numel() : end] for end, shape in zip(ends, shapes)]
    pairs = [(i, j) for i in range(len(parts)) for j in range(i) if shapes[i].numel() == shapes[j].numel()]
    sizes = [chi_square_score(float((part**2).mean()), part.size) for part in parts]
    correlations = [float((parts[i] * parts[j]).mean()) * math.sqrt(parts[i].size) for i, j in pairs]
    worst = max(map(abs, [*sizes, *correlations]), default=0.0)
    smallest = min(part.size for part in parts)
    return Finding(
        "DP-SGD: every parameter has its own noise, of the size that is charged",
        holds=bool(worst <= _PARAMETER_LIMIT),
        measured=f"largest deviation {worst:.2f} standard errors",
        allowed=f"at most {_PARAMETER_LIMIT:g}",
        power=f"{len(parts)} parameters, {len(pairs)} pairs of equal size, n >= {smallest:,}, alpha = {ALPHA:g}; "
        "catches a parameter without noise, and two with the same",
    )


def audit_secrecy(name: str, draw: Callable[[], torch.Tensor]) -> Finding:
    """
    Draws twice with all global generators in one state, as a seed in a configuration would set them.

    Args:
        name (`str`): How the finding calls it.
        draw (`Callable`): Starts from nothing but public constants, and returns what is released of no image.
    """
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    draws = []
    try:
        for _ in range(2):
            _restore(*states)
            draws.append(draw().detach().double().flatten().numpy())
    finally:
        _restore(*states)
    equal = float(np.mean(draws[0] == draws[1]))
    return Finding(
        f"{name}: the same configuration and seed twice release other noise",
        holds=equal < 1,
        measured=f"{equal:.1%} of the numbers are equal",
        allowed="not all",
        power=f"n = {draws[0].size:,}; catches a seed in the configuration, a default seed and a constant key",
    )


def audit_precision(name: str, noise: torch.Tensor) -> Finding:
    """
    Tests that noise is added to a sum before it is rounded to float32, not after.

    Rounded noise lies on a grid; the released value less the true sum does, and less the sum of a neighbour does not.

    Args:
        name (`str`): How the finding calls it.
        noise (`torch.Tensor`): Noise as it was added, to sums that are zero.
    """
    noise = noise.double()
    on_grid = float((noise == noise.float().double()).double().mean()) if len(noise) else 1.0
    return Finding(
        f"{name}: noise is added in float64, and rounded with the sum",
        holds=on_grid <= 0.01,
        measured=f"{on_grid:.1%} of it lies on the grid of float32",
        allowed="at most 1 %",
        power=f"n = {len(noise):,}; catches noise that is rounded first, with certainty",
    )


def _restore(python: Any, numpy: Any, torch_state: torch.Tensor) -> None:
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(torch_state)


# --- masks -----------------------------------------------------------------------------------------------------------


def audit_masks(audit: StepAudit, secret: SecretGenerator, *, num_coins: int) -> Iterator[Finding]:
    """
    The law of the draws of a trainer: each row, or person, by its own coin, at the charged rate, in every step anew.

    Args:
        audit ([`StepAudit`]): The hard stage.
        secret ([`SecretGenerator`]): The real one of a run.
        num_coins (`int`): Rows, or persons, times steps to look at.
    """
    rate = audit.event.sample_rate
    num_rows = int(min(max(200, 20 / rate), num_coins / _MIN_MASKS))
    steps = num_coins // num_rows
    one = audit.images(1).images
    each, what = (_IMAGES_EACH, "person") if audit.unit == "person" else (1, "row")
    owners = torch.arange(num_rows).repeat_interleave(each)
    persons = owners.tolist() if audit.unit == "person" else None
    images = one[:1].expand(len(owners), *one.shape[1:])
    trainer = audit.build(dataset(images, [0] * len(owners), audit.num_classes, persons), secret)
    sizes, rows = np.zeros(steps), np.zeros(num_rows)
    again, last = 0, np.zeros(num_rows, dtype=bool)
    for step in range(steps):
        mask = np.zeros(num_rows, dtype=bool)
        mask[owners[trainer._draw_share()].numpy()] = True
        sizes[step], again = mask.sum(), again + int((mask & last).sum())
        rows += mask
        last = mask
    coins = steps * num_rows
    yield statistical(
        f"Masks: a {what} enters with the charged sample rate", float(sizes.sum() / coins / rate - 1),
        math.sqrt((1 - rate) / rate / coins), unit="relative error of the rate", count=coins,
    )  # fmt: skip
    if rate == 1:
        return
    yield variance(
        "Masks: the size of a draw varies as that of a Poisson sample",
        float(sizes.var(ddof=1) / (num_rows * rate * (1 - rate))), _error(num_rows, rate, steps), count=steps,
    )  # fmt: skip
    spread = float(((rows - steps * rate) ** 2).mean() / (steps * rate * (1 - rate)))
    yield variance(f"Masks: no {what} is favoured", spread, _error(steps, rate, num_rows), count=num_rows)
    pairs = (steps - 1) * num_rows
    joint = rate**2 * (1 - rate**2) + 2 * rate**3 * (1 - rate)  # a row of three steps in a row is in two pairs
    yield statistical(
        "Masks: successive draws are independent", again / pairs - rate**2, math.sqrt(joint / pairs),
        unit=f"excess of {what}s that are drawn twice in a row", count=pairs,
    )  # fmt: skip


def _error(coins: int, rate: float, samples: int) -> float:
    """Standard error of the variance of binomial counts: that of normal ones, and a little for their kurtosis."""
    excess = (1 - 6 * rate * (1 - rate)) / (coins * rate * (1 - rate))
    return math.sqrt((2 + excess) / samples)
