"""
The accepted range of each constant of the guarantee: that in which its bound was tested
(`tests/privacy/test_limits.py`).

Outside, arithmetic fails in silence. The square of a float32 below 1e-19 underflows: under a clip norm of 1e-24 an
image adds hundreds of times its bound. Learning rates and all else that comes after the noise need no such range.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Range from `low` to `high`, both tested."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


CLIP_NORM = Range(1e-10, 1e10)  # of lessons, in float64, and of DP-SGD, in float32 or wider
RESIDUAL_NORM = Range(1e-5, 1e5)  # its square is a clip norm
NOISE_MULTIPLIER = Range(1e-3, 1e6)
SAMPLE_RATE = Range(1e-9, 1.0)
NUM_STEPS = Range(1, 10**6)
NOISE_MULTIPLICITY = Range(1, 4096)
MOMENT_COMPONENTS = Range(1, 16)
GROUP_SIZE = Range(1, 1024)
TARGET_EPSILON = Range(1e-4, 1e6)
DELTA = Range(1e-12, 0.1)
DATASET_SIZE = Range(1, 10**9)


def check_range(name: str, value: float, allowed: Range) -> None:
    """
    Refuses a constant under which no bound was tested.

    Raises:
        ValueError: If `value` is not in `allowed`, or no number.
    """
    if value not in allowed:
        raise ValueError(f"Expected {name}={value} in {allowed}, the range in which its bound was tested.")


def check_mechanism(
    *, clip_norm: float, noise_multiplier: float, sample_rate: float = 1.0, num_steps: int = 1
) -> None:
    """
    Refuses a Gaussian mechanism with a constant out of its range.

    Raises:
        ValueError: Naming the constant. Noise of 0 is let through: it is no privacy, and is called so.
    """
    check_range("clip_norm", clip_norm, CLIP_NORM)
    if noise_multiplier != 0:
        check_range("noise_multiplier", noise_multiplier, NOISE_MULTIPLIER)
    check_range("sample_rate", sample_rate, SAMPLE_RATE)
    check_range("num_steps", num_steps, NUM_STEPS)
