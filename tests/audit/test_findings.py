"""Limits that the audits hold their statistics to: few false alarms, and the fault that is named is caught."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dp_curriculum.audit.findings import ALPHA, POWER, Finding, all_hold, detectable, failed, statistical, variance


def finding(holds: bool) -> Finding:
    return Finding("claim", holds, "measured", "allowed", "power")


def test_no_finding_is_no_success() -> None:
    assert not all_hold([])
    assert all_hold([finding(True)]) and not all_hold([finding(True), finding(False)])
    assert failed([finding(True), finding(False)]) == ["claim: measured"]


@pytest.mark.statistical
def test_a_false_alarm_is_rare_and_the_fault_that_is_named_is_caught() -> None:
    """On draws of the statistic's own law: no alarm in 2,000, and at least 99.5 % of the smallest fault caught."""
    source = np.random.default_rng(0)
    normals = source.standard_normal(2000)
    holds = [statistical("", value * 0.01, 0.01, unit="", count=1).holds for value in normals]
    assert all(holds)
    fault = detectable() * 0.01
    caught = [not statistical("", value * 0.01 + fault, 0.01, unit="", count=1).holds for value in normals]
    assert np.mean(caught) >= POWER - 0.004
    assert not statistical("", math.nan, 0.01, unit="", count=1).holds


@pytest.mark.statistical
@pytest.mark.parametrize("count", [200, 10_000])
def test_a_variance_is_held_to_the_law_of_chi_square(count: int) -> None:
    source, error = np.random.default_rng(0), math.sqrt(2 / count)
    ratios = source.chisquare(count, 2000) / count
    assert all(variance("", ratio, error, count=count).holds for ratio in ratios)
    named = float(variance("", 1.0, error, count=count).power.split("that is ")[1].split()[0])
    caught = [not variance("", ratio * (1 + named * 1.01), error, count=count).holds for ratio in ratios]
    assert np.mean(caught) >= POWER - 0.005
    assert detectable() * error < named < 2 * detectable() * error
    assert not variance("", 0.0, error, count=count).holds
    assert not variance("", math.nan, error, count=count).holds
    assert ALPHA <= 1e-6
