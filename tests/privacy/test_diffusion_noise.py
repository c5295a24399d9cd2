"""Diffusion noise: standard normal, other in each call, and of no seed that a user gave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dp_curriculum.privacy import diffusion_noise
from dp_curriculum.privacy.diffusion_noise import DiffusionNoise


def test_it_has_the_shape_and_the_scale_that_are_asked_for() -> None:
    noise = DiffusionNoise(torch.device("cpu"))
    assert noise.gaussian(5).shape == (5,) and noise.gaussian((2, 0, 3)).shape == (2, 0, 3)
    draws = noise.gaussian((400, 250), 3.0)
    assert draws.dtype == torch.float32 and draws.is_contiguous()
    assert float(draws.std()) == pytest.approx(3, rel=6 / np.sqrt(2 * draws.numel()))


@pytest.mark.statistical
def test_it_is_standard_normal() -> None:
    """Kolmogorov-Smirnov at one in ten thousand; normals of one per cent more are seen."""
    draws = DiffusionNoise(torch.device("cpu")).gaussian(2**20).double().numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-4
    assert stats.kstest(1.01 * draws, "norm").pvalue < 1e-4


def test_no_two_calls_and_no_seed_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, kept = DiffusionNoise(torch.device("cpu")), []
    for _ in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)
            kept.append(noise.gaussian(1000))
    assert all(abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2 for a, b in zip(kept, kept[1:]))
    monkeypatch.setattr(diffusion_noise.os, "urandom", bytes)
    assert torch.equal(noise.gaussian(10), noise.gaussian(10)), "the operating system is its only source"
