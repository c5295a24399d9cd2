"""The bound of each constant of the guarantee, at both ends of its accepted range; outside, every entry refuses it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor, nn

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.dp_sgd import gradient_engine
from dp_curriculum.dp_sgd.dp_optimizer import SecretNoiseOptimizer
from dp_curriculum.lessons.class_sums import noisy_class_sums
from dp_curriculum.per_image_gradients import PerImageGradients
from dp_curriculum.privacy import limits, randomness
from dp_curriculum.privacy.accounting import GaussianEvent, calibrate_noise_multiplier, compute_epsilon
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.limits import (
    CLIP_NORM,
    DATASET_SIZE,
    DELTA,
    GROUP_SIZE,
    MOMENT_COMPONENTS,
    NOISE_MULTIPLICITY,
    NOISE_MULTIPLIER,
    NUM_STEPS,
    RESIDUAL_NORM,
    SAMPLE_RATE,
    TARGET_EPSILON,
    Range,
)
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.plan import plan_budget


TOLERANCE = 1e-5
ENDS = [CLIP_NORM.low, 1e-3, CLIP_NORM.high]
# From the smallest denormal of float32 to its largest number, and where squares under- and overflow.
SCALES = [1e-45, 1e-42, 1e-38, 1e-30, 1e-23, 1e-22, 1e-21, 1e-20, 1e-19, 1e-18, 1e-13, 1e-10, 1e-6, 1e-3, 1.0,
          1e3, 1e6, 1e10, 1e15, 1e18, 1e19, 1e20, 1e30, 3e38]  # fmt: skip


class Silent(SecretGenerator):
    """No noise."""

    def gaussian(self, shape: Any, std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)


def adversarial_rows(size: int, bound: float) -> Iterator[Tensor]:
    """Gradients `(size,)` of one image: tiny, huge, at the bound, spread out or in one place, and mixtures of all."""
    normal = torch.randn(size, generator=torch.Generator().manual_seed(0))
    at_bound = normal * (bound / float(normal.double().norm()))
    first = torch.zeros(size).index_fill_(0, torch.tensor([0]), 1.0)
    for scale in [*SCALES, bound / math.sqrt(size), 1.0001 * bound / math.sqrt(size), bound]:
        yield normal * scale
        yield torch.full((size,), scale)
        yield first * scale
        yield torch.where(torch.arange(size) % 2 == 0, normal * scale, at_bound)
        yield torch.where(torch.arange(size) < size // 8, torch.full((size,), scale), 2 * at_bound)
    yield torch.logspace(-45, 38, size)
    yield torch.full((size,), math.nan)
    yield torch.full((size,), math.inf)


class ManyParameters(nn.Module):
    """Parameters of several layers, whose gradients for an image are its inputs: any gradient can be asked for."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))

    def forward(self, rows: Tensor) -> Tensor:
        parts = rows.chunk(len(self.layers), dim=1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts)], dim=1).sum(1)


def clipped_sum(
    rows: Tensor, bound: float, *, mode: Any, layers: int = 4, copies: int = 1, bf16: bool = False
) -> Tensor:
    """What images with these gradients `(B, size)` add, in float64, on the device of the rows."""
    model = ManyParameters(layers, rows.shape[1] // layers).to(rows.device)
    with PerImageGradients(model, noise_multiplicity=copies, mode=mode) as engine:
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=bf16):
            losses = model(rows.repeat(copies, 1))
        engine.backward(losses.float())
        engine.accumulate_clipped(bound)
    return torch.cat([parameter.summed_grad.flatten() for parameter in model.parameters()]).double()  # type: ignore[union-attr]


# --- clip norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("bound", ENDS)
def test_no_gradient_adds_more_than_its_bound(bound: float, mode: Any, bf16: bool) -> None:
    reached = 0.0
    for row in adversarial_rows(1024, bound):
        norm = float(clipped_sum(row[None], bound, mode=mode, bf16=bf16).norm())
        assert norm <= bound * (1 + TOLERANCE), f"{norm / bound - 1:.1e} above, by {row[:3].tolist()}"
        reached = max(reached, norm)
    assert reached >= bound * (1 - 1e-3), "the bound is reached, so that the test can fail"


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("bound", [CLIP_NORM.low, CLIP_NORM.high])
def test_the_bound_holds_for_sixteen_million_parameters(bound: float, mode: Any) -> None:
    """The more there are, the smaller is each gradient at the bound, and its square."""
    size = 2**24
    row = torch.full((1, size), 3 * bound / math.sqrt(size))
    found = clipped_sum(row, bound, mode=mode, layers=2)
    assert bound * (1 - 1e-4) <= float(found.norm()) <= bound * (1 + TOLERANCE)


def test_the_bound_is_lost_far_below_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there is a range: without it, an image adds hundreds of times its bound."""
    monkeypatch.setattr(gradient_engine, "check_range", lambda *arguments: None)
    ratios = [float(clipped_sum(torch.full((1, 1024), 1e-23), 1e-24, mode=mode).norm()) / 1e-24 for mode in
              ("materialize", "norms_first")]  # fmt: skip
    assert min(ratios) > 100


@pytest.mark.parametrize("bound", ENDS)
def test_no_contribution_adds_more_than_its_bound(bound: float) -> None:
    """Lessons, in float64: the same rows, and numbers that float32 has not."""
    tiny = [5e-324, 1e-300, 1e-170, 1e-160, 1e-155, 1e154, 1e155, 1e300, 1.7e308]
    rows = [row.double() for row in adversarial_rows(1024, bound)] + [
        torch.full((1024,), v, dtype=torch.float64) for v in tiny
    ]
    reached = 0.0
    for row in rows:
        found = noisy_class_sums(
            torch.zeros(1, 1, 4, 4), torch.tensor([0]), lambda pixels, _, row=row: row[None], (1024,), num_classes=1,
            mechanism=PlannedMechanism("sums", bound, GaussianEvent(1.0)), generator=Silent(),
        )  # fmt: skip
        assert float(found.norm()) <= bound * (1 + TOLERANCE)
        reached = max(reached, float(found.norm()))
    assert reached >= bound * (1 - TOLERANCE)


# --- copies of an image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("copies", [int(NOISE_MULTIPLICITY.low), int(NOISE_MULTIPLICITY.high)])
def test_copies_of_an_image_add_its_bound_once(copies: int, mode: Any) -> None:
    for scale in (1e-38, 1e-20, 1.0, 1e18, 1e30):
        row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) * scale
        found = clipped_sum(row, 0.5, mode=mode, layers=1, copies=copies)
        assert float(found.norm()) <= 0.5 * (1 + TOLERANCE)
        assert scale != 1.0 or float(found.norm()) >= 0.5 * (1 - TOLERANCE)


# --- noise and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [1.0, float(DATASET_SIZE.high)])
@pytest.mark.parametrize("bound", [CLIP_NORM.low, CLIP_NORM.high])
@pytest.mark.parametrize("noise_multiplier", [NOISE_MULTIPLIER.low, NOISE_MULTIPLIER.high])
def test_noise_has_its_variance_at_the_ends(noise_multiplier: float, bound: float, divisor: float) -> None:
    """200,000 draws: a deviation that is off by 1 % is six standard errors away."""
    layer = nn.Linear(400, 500, bias=False)
    optimizer = SecretNoiseOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.0), noise_multiplier=noise_multiplier, max_grad_norm=bound,
        expected_batch_size=divisor, generator=SecretGenerator(),
    )  # fmt: skip
    optimizer.step()
    (gradient,) = (parameter.grad for parameter in optimizer.params)
    assert gradient.isfinite().all()
    assert float(gradient.double().std()) == pytest.approx(noise_multiplier * bound / divisor, rel=0.01)
    sums = noisy_class_sums(
        torch.zeros(0, 1, 4, 4), torch.zeros(0).long(), lambda pixels, _: pixels.new_zeros(0, 200_000), (200_000,),
        num_classes=1, mechanism=PlannedMechanism("sums", bound, GaussianEvent(noise_multiplier)),
        generator=SecretGenerator(),
    )  # fmt: skip
    assert float(sums.std()) == pytest.approx(noise_multiplier * bound, rel=0.01)


@pytest.mark.parametrize("rate", [SAMPLE_RATE.low, 0.3, 1 - 1e-9, SAMPLE_RATE.high])
def test_a_row_is_drawn_with_the_probability_that_is_accounted(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of 64 bits below the rate are in, none above: never more often, and less often by 1e-9 of it at most."""
    last = math.ceil(mpmath.mpf(rate) * 2**64) - 1
    words = [0, int(last * (1 - 1e-9)), last, last + 1, 2**64 - 1]
    monkeypatch.setattr(
        randomness, "_read_words", lambda stream, count: np.array([min(w, 2**64 - 1) for w in words], dtype=np.uint64)
    )
    drawn = SecretGenerator().poisson_sample(len(words), rate).tolist()
    assert {0, 1} <= set(drawn) and (rate == 1 or not {3, 4} & set(drawn))


# --- epsilon ---------------------------------------------------------------------------------------------------------


def exact_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """Of one release of all images (Balle and Wang 2018, Theorem 8)."""
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


def exact_sampled_delta(mu: float, rate: float, epsilon: float) -> mpmath.mpf:
    """Of one release of a Poisson sample: the larger of adding and removing an image, from its thresholds."""
    with mpmath.workdps(60):
        m, q, e = mpmath.mpf(mu), mpmath.mpf(rate), mpmath.exp(mpmath.mpf(epsilon))
        t = (mpmath.log((e - (1 - q)) / q) + m**2 / 2) / m
        added = (1 - q) * mpmath.ncdf(-t) + q * mpmath.ncdf(m - t) - e * mpmath.ncdf(-t)
        ratio = (1 / e - (1 - q)) / q
        if ratio <= 0:
            return added
        t = (mpmath.log(ratio) + m**2 / 2) / m
        return max(added, mpmath.ncdf(t) - e * ((1 - q) * mpmath.ncdf(t) + q * mpmath.ncdf(t - m)))


@pytest.mark.parametrize("delta", [DELTA.low, 1e-6, DELTA.high])
@pytest.mark.parametrize("noise_multiplier", [NOISE_MULTIPLIER.low, 0.03, 1.0, 1e3, NOISE_MULTIPLIER.high])
def test_epsilon_is_never_below_the_exact_one_at_the_ends(noise_multiplier: float, delta: float) -> None:
    """Delta at the epsilon that is claimed, in closed form with 60 digits."""
    claimed = compute_epsilon([GaussianEvent(noise_multiplier)], delta)
    assert exact_delta(1 / noise_multiplier, claimed) <= delta
    for rate in (SAMPLE_RATE.low, 1e-3, 0.5, 0.999):
        claimed = compute_epsilon([GaussianEvent(noise_multiplier, rate)], delta)
        assert exact_sampled_delta(1 / noise_multiplier, rate, max(claimed, 1e-40)) <= delta, f"rate {rate}"


@pytest.mark.parametrize(("rate", "delta"), [(SAMPLE_RATE.low, 1e-8), (0.01, 1e-6), (1.0, DELTA.low)])
def test_a_million_steps_spend_what_one_with_their_noise_would(rate: float, delta: float) -> None:
    """Of all images a closed form; of samples no less than the Gaussian that its steps tend to (Bu et al. 2020)."""
    steps, noise = int(NUM_STEPS.high), 200.0 if rate == 1 else 5.0
    claimed = compute_epsilon([GaussianEvent(noise, rate, steps)], delta)
    mu = math.sqrt(steps) / noise if rate == 1 else rate * math.sqrt(steps * math.expm1(1 / noise**2))
    assert exact_delta(mu, claimed) <= delta * (1 if rate == 1 else 1 + 1e-3)


def exact_group_delta(mu: float, rate: float, size: int, epsilon: float) -> float:
    """Of one sampled step and a group that is added or removed, all of it along one line, from its thresholds."""
    moves = np.arange(size + 1) * mu
    weights = stats.binom.logpmf(np.arange(size + 1), size, rate)

    def loss(y: float) -> float:
        return float(special.logsumexp(weights + moves * y - moves**2 / 2))

    found = [0.0]
    for sign, (low, high) in ((1, (-60.0, moves[-1] + 60.0)), (-1, (-60.0, 60.0))):
        if sign * loss(high if sign > 0 else low) > epsilon:
            t = optimize.brentq(lambda y, sign=sign: sign * loss(y) - epsilon, low, high, xtol=1e-14)
            mixture = np.exp(special.logsumexp(weights + stats.norm.logsf(sign * (t - moves))))
            single = stats.norm.sf(sign * t)
            found.append(mixture - np.exp(epsilon) * single if sign > 0 else single - np.exp(epsilon) * mixture)
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, int(GROUP_SIZE.high)])
def test_a_group_spends_no_less_than_the_exact_epsilon(size: int) -> None:
    delta = 1e-5
    claimed = compute_epsilon([GaussianEvent(float(size), 0.01)], delta, group_size=size)
    assert exact_group_delta(1 / size, 0.01, size, claimed) <= delta
    assert exact_group_delta(1 / size, 0.01, size, claimed * (1 - 1e-3)) > delta, "and little more"


@pytest.mark.parametrize("target", [TARGET_EPSILON.low, 1.0, TARGET_EPSILON.high])
def test_noise_is_calibrated_to_a_target_at_the_ends(target: float) -> None:
    noise = calibrate_noise_multiplier(target_epsilon=target, target_delta=1e-6, sample_rate=1.0, num_steps=1)
    assert 0.9995 * target <= compute_epsilon([GaussianEvent(noise)], 1e-6) <= target


# --- what is outside is refused --------------------------------------------------------------------------------------


OPTIONS = {
    "dp_max_grad_norm": CLIP_NORM,
    "lesson_max_image_norm": CLIP_NORM,
    "moment_max_residual_norm": RESIDUAL_NORM,
    "lesson_noise_multiplier": NOISE_MULTIPLIER,
    "central_sample_rate": SAMPLE_RATE,
    "central_images_per_class": NUM_STEPS,
    "num_dp_steps": NUM_STEPS,
    "noise_multiplicity": NOISE_MULTIPLICITY,
    "moment_components": MOMENT_COMPONENTS,
    "group_size": GROUP_SIZE,
    "target_epsilon": TARGET_EPSILON,
    "target_delta": DELTA,
    "public_dataset_size": DATASET_SIZE,
    "expected_batch_size": DATASET_SIZE,
}


def just_outside(allowed: Range) -> list[float]:
    if isinstance(allowed.high, int):
        return [int(allowed.low) - 1, allowed.high + 1]
    return [math.nextafter(allowed.low, 0), math.nextafter(allowed.high, math.inf), 0.0, -1.0, math.inf, math.nan]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_configuration_takes_the_range_and_no_more(name: str) -> None:
    allowed = OPTIONS[name]
    fields = {"public_dataset_size": None, "expected_batch_size": 1}
    for value in (allowed.low, allowed.high):
        value = int(value) if isinstance(allowed.high, int) else value
        assert CurriculumConfig().replace(**{**fields, name: value})
    for value in just_outside(allowed):
        with pytest.raises(ValueError, match=rf"Expected --{name}=\S+ (in \[|to be)") as caught:
            CurriculumConfig().replace(**{**fields, name: value})
        assert "\n" not in str(caught.value)


def charge(folder: Path, **changes: Any) -> None:
    values = {"noise_multiplier": 1.0, "sample_rate": 0.5, "num_steps": 1, "clip_norm": 1.0, **changes}
    clip_norm = values.pop("clip_norm")
    with PrivacyLedger.open(folder / "ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(**values), stage="dp-sgd", clip_norm=clip_norm)


def query(folder: Path, **changes: Any) -> None:
    values = {"max_norm": 1.0, "noise_multiplier": 1.0, "sample_rate": 0.5, **changes}
    noisy_class_sums(
        torch.zeros(1, 1, 4, 4), torch.tensor([0]), lambda pixels, _: pixels.flatten(1), (16,), num_classes=1,
        mechanism=PlannedMechanism("sums", values.pop("max_norm"), GaussianEvent(**values)),
        generator=SecretGenerator(),
    )  # fmt: skip


def make_optimizer(folder: Path, **changes: Any) -> None:
    adam = torch.optim.Adam(nn.Linear(2, 2).parameters())
    values = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 4.0, **changes}
    SecretNoiseOptimizer(adam, generator=SecretGenerator(), **values)


def clip(folder: Path, max_grad_norm: float) -> None:
    clipped_sum(torch.ones(1, 4), max_grad_norm, mode="materialize")


def make_engine(folder: Path, noise_multiplicity: int) -> None:
    PerImageGradients(nn.Linear(2, 2), noise_multiplicity=noise_multiplicity)


ENTRIES: list[tuple[Callable[..., None], str, Range]] = [
    (charge, "clip_norm", CLIP_NORM),
    (charge, "noise_multiplier", NOISE_MULTIPLIER),
    (charge, "sample_rate", SAMPLE_RATE),
    (charge, "num_steps", NUM_STEPS),
    (query, "max_norm", CLIP_NORM),
    (query, "noise_multiplier", NOISE_MULTIPLIER),
    (query, "sample_rate", SAMPLE_RATE),
    (make_optimizer, "max_grad_norm", CLIP_NORM),
    (make_optimizer, "noise_multiplier", NOISE_MULTIPLIER),
    (make_optimizer, "expected_batch_size", DATASET_SIZE),
    (clip, "max_grad_norm", CLIP_NORM),
    (make_engine, "noise_multiplicity", NOISE_MULTIPLICITY),
]


@pytest.mark.parametrize(("entry", "name", "allowed"), ENTRIES, ids=[f"{e.__name__}-{n}" for e, n, _ in ENTRIES])
def test_every_entry_takes_the_range_and_no_more(
    entry: Callable[..., None], name: str, allowed: Range, tmp_path: Path
) -> None:
    for value in (allowed.low, allowed.high):
        entry(tmp_path, **{name: int(value) if isinstance(allowed.high, int) else value})
    for value in just_outside(allowed):
        if name == "noise_multiplier" and value == 0:  # no privacy, and said to be none
            continue
        with pytest.raises(ValueError, match="Expected ") as caught:
            entry(tmp_path, **{name: value})
        assert "\n" not in str(caught.value)
    charged = tmp_path / "ledger.jsonl"
    assert not charged.exists() or len(charged.read_text().splitlines()) == 3, "what is refused is not charged"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_epsilon": 1e-4, "num_dp_steps": 10**6, "stages": ["dp_sgd"]}, "noise_multiplier=.* stage dp-sgd"),
        ({"target_epsilon": 1e6, "expected_batch_size": 64, "num_dp_steps": 1}, "noise_multiplier=.* stage dp-sgd"),
    ],
)
def test_noise_that_no_bound_was_tested_for_is_refused_by_the_plan(
    fields: dict[str, Any], words: str, make_config: Any
) -> None:
    """It would be refused when the first step is charged: after the lessons were paid."""
    config = make_config(**{"expected_batch_size": 64, "public_dataset_size": 64, **fields})
    with pytest.raises(ValueError, match=words):
        plan_budget(config, dataset_size=64, num_classes=10)


def test_presets_and_defaults_are_well_inside() -> None:
    config = CurriculumConfig()
    for name, allowed in OPTIONS.items():
        (value,) = (section[name] for section in config.to_dict().values() if name in section)
        assert value is None or value in allowed, name
    assert all(
        math.isfinite(value) for r in vars(limits).values() if isinstance(r, Range) for value in vars(r).values()
    )
    assert list(itertools.chain(just_outside(CLIP_NORM)))[0] < CLIP_NORM.low
