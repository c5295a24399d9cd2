"""What a step releases: a sum that one image moves by at most C, and noise in every coordinate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from scipy import stats
from torch import Tensor

from dp_curriculum.dp_sgd.dp_optimizer import SecretNoiseOptimizer
from dp_curriculum.per_image_gradients import PerImageGradients
from dp_curriculum.privacy.randomness import SecretGenerator


BOUND = 0.5
DIVISOR = 8.0
MODES = ["materialize", "auto", "norms_first"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.GroupNorm(1, 5), nn.Tanh(), nn.Linear(5, 2))
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    return model


def make_optimizer(model: nn.Module, noise_multiplier: float = 0.0) -> SecretNoiseOptimizer:
    return SecretNoiseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=BOUND,
        expected_batch_size=DIVISOR,
        generator=SecretGenerator(),
    )


def released(optimizer: SecretNoiseOptimizer) -> Tensor:
    """What a step hands to the optimizer it wraps, times the divisor."""
    optimizer.step()
    result = torch.cat([p.grad.flatten() for p in optimizer.params]) * DIVISOR
    optimizer.zero_grad(set_to_none=True)
    return result


def step(
    images: Tensor, *, splits: int = 1, noise_multiplicity: int = 1, mode: Any = "materialize", model: Any = None
) -> Tensor:
    """One noiseless step on `(B, K, 6)` draws of B images, in `splits` physical batches."""
    model = make_model() if model is None else model
    optimizer = make_optimizer(model)
    with PerImageGradients(model, noise_multiplicity=noise_multiplicity, mode=mode) as engine:
        for part in images.chunk(splits) if len(images) else ():
            engine.backward(model(part.transpose(0, 1).flatten(0, 1)).square().sum(1))
            engine.accumulate_clipped(optimizer.max_grad_norm)
    return released(optimizer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("noise_multiplicity", [1, 3])
@pytest.mark.parametrize("kind", ["ordinary", "far_out", "nan", "inf", "huge"])
def test_one_image_moves_the_sum_by_at_most_max_grad_norm(kind: str, noise_multiplicity: int, mode: Any) -> None:
    """Neighbours: the same images without one, whatever that one holds."""
    images = normal(7, noise_multiplicity, 6)
    values = {"ordinary": images[-1], "far_out": 1e4 * images[-1]}
    # One draw is enough to spoil an image.
    images[-1, 0] = values[kind][0] if kind in values else {"nan": torch.nan, "inf": torch.inf, "huge": 3e38}[kind]
    options: dict[str, Any] = {"noise_multiplicity": noise_multiplicity, "mode": mode}
    with_it, without = step(images, **options), step(images[:-1], **options)
    assert with_it.isfinite().all()
    assert (with_it - without).norm() <= BOUND + 1e-6
    if kind == "ordinary":
        assert (with_it - without).norm() > 0.9 * BOUND, "the bound is reached, so that the test can fail"
    if kind in ("nan", "inf", "huge"):
        torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_an_image_are_averaged_and_clipped_once(mode: Any) -> None:
    """K = 4 draws of one image add C together, and the direction of their mean."""
    draws = normal(1, 4, 6)
    total = step(draws, noise_multiplicity=4, mode=mode)
    model = make_model()
    model(draws[0]).square().sum(1).mean().backward()
    mean = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert mean.norm() > BOUND
    torch.testing.assert_close(total, BOUND * mean / mean.norm())
    clipped_each = step(draws.transpose(0, 1), mode=mode)
    assert (clipped_each - total).norm() > BOUND / 10, "four images of one draw each are something else"


@pytest.mark.parametrize("mode", MODES)
def test_small_gradients_are_not_scaled_up(mode: Any) -> None:
    images, model = normal(5, 1, 6), make_model()
    model[3].weight.data *= 1e-4
    model[3].bias.data.zero_()
    expected = make_model()
    expected.load_state_dict(model.state_dict())
    expected(images[:, 0]).square().sum().backward()
    whole = torch.cat([p.grad.flatten() for p in expected.parameters()])
    torch.testing.assert_close(step(images, mode=mode, model=model), whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splits", [2, 7])
def test_physical_batches_change_nothing(splits: int, mode: Any) -> None:
    images = normal(7, 2, 6)
    options: dict[str, Any] = {"noise_multiplicity": 2, "mode": mode}
    torch.testing.assert_close(step(images, splits=splits, **options), step(images, **options), rtol=1e-5, atol=1e-6)


def noise_is_right(steps: Tensor, std: float) -> bool:
    """Every coordinate has variance `std**2`, and no two move together. Cries wolf once in 10,000 runs."""
    count, dimensions = steps.shape
    statistic = (steps.double() / std).square().sum(0).numpy()
    tail = 2 * stats.chi2(count).sf(statistic).clip(max=0.5)
    tail = tail.clip(max=2 * stats.chi2(count).cdf(statistic))
    correlation = torch.corrcoef(steps.T) - torch.eye(dimensions)
    # Correlations of independent noise are normal with deviation count**-0.5; there are dimensions**2 / 2 of them.
    limit = stats.norm.isf(1e-4 / 2 / dimensions**2) * count**-0.5
    return bool(tail.min() > 1e-4 / 2 / dimensions) and bool(correlation.abs().max() < limit)


def empty_steps(optimizer: SecretNoiseOptimizer, count: int = 400) -> Tensor:
    return torch.stack([released(optimizer) for _ in range(count)])


@pytest.mark.statistical
def test_an_empty_step_is_noise_of_the_accounted_size_in_every_coordinate() -> None:
    """Each call of `step` without gradients is one more release of noise alone: nothing is left of the last."""
    model = make_model()
    steps = empty_steps(make_optimizer(model, noise_multiplier=3.0))
    assert steps.shape[1] == sum(p.numel() for p in model.parameters())
    assert noise_is_right(steps, 3.0 * BOUND)


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_of_another_size_is_found_out(factor: float) -> None:
    """Negative control of the size."""
    assert not noise_is_right(empty_steps(make_optimizer(make_model(), noise_multiplier=3.0 * factor)), 3.0 * BOUND)


@pytest.mark.statistical
@pytest.mark.parametrize("coordinates", [slice(0, 0), slice(-1, None)])
def test_noise_that_misses_or_repeats_a_coordinate_is_found_out(
    coordinates: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: no noise in the first coordinate; the noise of the last one there instead."""
    right = SecretGenerator.gaussian

    def wrong(self: SecretGenerator, shape: Any, std: float, **options: Any) -> Tensor:
        noise = right(self, shape, std, **options)
        noise[0] = noise[coordinates].sum()
        return noise

    monkeypatch.setattr(SecretGenerator, "gaussian", wrong)
    assert not noise_is_right(empty_steps(make_optimizer(make_model(), noise_multiplier=3.0)), 3.0 * BOUND)


def test_noise_is_added_to_the_sum_and_not_to_each_physical_batch() -> None:
    """One draw of noise a step, of as many normals as there are parameters, whatever the number of batches."""

    class Recorder(SecretGenerator):
        def gaussian(self, shape: Any, std: float, **options: Any) -> Tensor:
            calls.append((tuple(shape), std))
            return torch.full(shape, 2.0)

    calls: list[tuple[tuple[int, ...], float]] = []
    model, images = make_model(), normal(6, 1, 6)
    optimizer = make_optimizer(model, noise_multiplier=4.0)
    optimizer._secret = Recorder()
    with PerImageGradients(model) as engine:
        for part in images.split(2):
            engine.backward(model(part[:, 0]).square().sum(1))
            engine.accumulate_clipped(BOUND)
    torch.testing.assert_close(released(optimizer), step(images) + 2.0)
    assert calls == [((sum(p.numel() for p in model.parameters()),), 4.0 * BOUND)]


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_the_divisor_is_public(drawn: int) -> None:
    """The sum is divided by the expected batch size, however many images were drawn: here a sum of multiples of C."""
    model = nn.Linear(6, 1, bias=False)
    optimizer = make_optimizer(model)
    image = torch.tensor([[BOUND, 0, 0, 0, 0, 0]])
    with PerImageGradients(model) as engine:
        for _ in range(drawn):
            engine.backward(model(image).sum(1))
            engine.accumulate_clipped(BOUND)
    optimizer.step()
    assert model.weight.grad[0, 0] == pytest.approx(drawn * BOUND / DIVISOR) and not model.weight.grad[0, 1:].any()


def test_the_second_step_without_gradients_is_nothing_but_noise() -> None:
    """No sum and no gradient of an image outlives its step, also where nobody calls `zero_grad`."""
    model = make_model()
    optimizer = make_optimizer(model)
    with PerImageGradients(model) as engine:
        engine.backward(model(normal(4, 6)).square().sum(1))
        engine.accumulate_clipped(BOUND)
    optimizer.step()
    assert all(p.grad.any() and p.grad_sample is None and p.summed_grad is None for p in model.parameters())
    optimizer.step()
    assert not any(p.grad.any() for p in model.parameters())


def test_gradients_that_nobody_clipped_stop_the_step() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    with PerImageGradients(model) as engine:
        engine.backward(model(normal(4, 6)).square().sum(1))
        with pytest.raises(RuntimeError, match="accumulate_clipped after each backward"):
            optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_opacus_own_clip_is_out_of_reach() -> None:
    with pytest.raises(NotImplementedError, match="Expected PerImageGradients.accumulate_clipped to clip"):
        make_optimizer(make_model()).clip_and_accumulate()


def test_one_parameter_that_nobody_clipped_stops_the_step() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.params[-1].grad_sample = torch.ones(3, *optimizer.params[-1].shape)
    with pytest.raises(RuntimeError, match="accumulate_clipped"):
        optimizer.step()


def test_opacus_hook_is_called_once_a_step_after_the_noise() -> None:
    model = make_model()
    optimizer = make_optimizer(model, noise_multiplier=1.0)
    seen: list[float] = []
    optimizer.attach_step_hook(lambda given: seen.append(float(given.params[0].grad.abs().sum())))
    optimizer.step()
    assert len(seen) == 1 and seen[0] > 0
