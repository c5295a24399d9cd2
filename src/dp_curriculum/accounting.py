"""Epsilon, delta and noise multipliers of sampled Gaussian mechanisms: the accountant."""

from __future__ import annotations

from dp_curriculum.privacy.accounting import (
    ADJACENCIES,
    DISCRETIZATION,
    Adjacency,
    Events,
    GaussianEvent,
    PrivacyBudgetExceeded,
    calibrate_noise_multiplier,
    choose_discretization,
    compute_delta,
    compute_epsilon,
    compute_gdp_mu,
    round_up,
)


__all__ = [
    "ADJACENCIES",
    "Adjacency",
    "DISCRETIZATION",
    "Events",
    "GaussianEvent",
    "PrivacyBudgetExceeded",
    "calibrate_noise_multiplier",
    "choose_discretization",
    "compute_delta",
    "compute_epsilon",
    "compute_gdp_mu",
    "round_up",
]
