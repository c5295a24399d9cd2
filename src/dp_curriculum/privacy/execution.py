"""Execution of the steps of a run, as far as the guarantee depends on it, and the weakest way that was used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


Gradients = Literal["unchecked", "checked", "not taken"]

# Weakest first. A name that is not listed is weaker than all.
_GENERATORS = ("torch-philox", "numpy-philox", "chacha20", "none")
_PRECISIONS = ("bfloat16", "float32", "float64", "none")
_GRADIENTS: tuple[Gradients, ...] = ("unchecked", "checked", "not taken")


@dataclass(frozen=True, kw_only=True)
class Execution:
    r"""
    Way in which the steps of a reservation are computed. All of it is published.

    Args:
        randomness (`Mapping`): Source of masks and noise, as `SecretGenerator.describe()` has it.
        device (`str`): Type of the device, e.g. `"cuda"`; several are joined by commas.
        precision (`str`): `"float64"` sums of a lesson; `"float32"` or `"bfloat16"` passes of DP-SGD.
        gradients (`str`): Whether gradients of single images were taken, and compared with autograd before.
        max_gradient_error (`float`, *optional*): Largest relative error that this comparison found.
    """

    randomness: Mapping[str, Any]
    device: str
    precision: str
    gradients: Gradients
    max_gradient_error: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Execution:
        """Inverse of [`~Execution.to_dict`]; raises `KeyError` or `TypeError` for other values."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "randomness": dict(self.randomness)}


_UNKNOWN = {"generator": "unknown", "mask_generator": "unknown", "seed_source": "unknown", "mode": "unknown"}
UNKNOWN = Execution(randomness=_UNKNOWN, device="unknown", precision="unknown", gradients="unchecked")
_NOTHING_DRAWN = {"generator": "none", "mask_generator": "none", "seed_source": "nothing was drawn", "secret": True}
NOTHING_EXECUTED = Execution(randomness=_NOTHING_DRAWN, device="none", precision="none", gradients="not taken")


def weakest_execution(executions: Iterable[Execution]) -> Execution:
    """
    The weakest randomness, precision and check of gradients of any of them, and all their devices.

    Args:
        executions (`Iterable[Execution]`): One per reservation; [`UNKNOWN`] where that does not say.

    Returns:
        [`Execution`]: [`NOTHING_EXECUTED`] if there are none.
    """
    found = list(executions) or [NOTHING_EXECUTED]
    errors = [one.max_gradient_error for one in found if one.max_gradient_error is not None]
    return Execution(
        randomness=min((one.randomness for one in found), key=_strength),
        device=", ".join(sorted({one.device for one in found})),
        precision=min((one.precision for one in found), key=lambda name: _rank(name, _PRECISIONS)),
        gradients=min((one.gradients for one in found), key=lambda name: _rank(name, _GRADIENTS)),
        max_gradient_error=max(errors, default=None),
    )


def _rank(name: Any, names: tuple[str, ...]) -> int:
    return names.index(name) if name in names else -1


def _strength(randomness: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Rank of a source of randomness: whether it is secret, then its noise, then its masks."""
    noise, masks = (_rank(randomness.get(name), _GENERATORS) for name in ("generator", "mask_generator"))
    return randomness.get("secret") is True, noise, masks
