"""
Generators that an audit can look into, and masks and noise that stand still. No run of a user reaches them.

They say that they are not private, and a run that is given one is marked so for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dp_curriculum.privacy.randomness import Mode, SecretGenerator


_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_CONVERSIONS = {"to", "double", "float"}
_INCLUSION = 0.7  # of a row in a frozen mask, whatever rate was asked for
_MAX_ROWS = 4096
_MAX_WORDS = 2**16


class _WatchedNoise(Tensor):
    """Noise that shows its generator what it is added to, and lets it decide what comes out."""

    owner: WatchedGenerator
    number: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        noise = next(arg for arg in args if isinstance(arg, cls))
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        name = getattr(func, "__name__", "")
        if name in _ADDITIONS:
            other = next(arg for arg in args if not isinstance(arg, cls))
            before = other.detach().double().clone() if isinstance(other, Tensor) else torch.tensor(float(other))
            result = func(*plain, **(kwargs or {}))
            return noise.owner.release(noise.number, before, result)
        result = func(*plain, **(kwargs or {}))
        if name in _CONVERSIONS and args[0] is noise:
            result = noise.owner.watch(result, noise.number)
        return result


class WatchedGenerator(SecretGenerator):
    r"""
    Draws as its parent does, and keeps what was asked for, what noise was added to, and what came out.

    Attributes:
        requests (`list[tuple]`): `("noise", shape, std)` and `("mask", sample_rate)`, in order.
        sums (`list[torch.Tensor]`): What each noise was added to: private.
        outputs (`list[torch.Tensor]`): The sums with their noise.
    """

    def __init__(self, mode: Mode = "secure") -> None:
        super().__init__(mode)
        self.requests: list[tuple[Any, ...]] = []
        self.sums: list[Tensor] = []
        self.outputs: list[Tensor] = []

    @property
    def is_private(self) -> bool:
        return False

    @property
    def stds(self) -> list[float]:
        """Standard deviations of the noise that was asked for."""
        return [request[2] for request in self.requests if request[0] == "noise"]

    @property
    def rates(self) -> list[float]:
        """Sample rates that were asked for."""
        return [request[1] for request in self.requests if request[0] == "mask"]

    def gaussian(self, shape: int | Sequence[int], std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        number = len(self.stds)
        self.requests.append(("noise", sizes, float(std)))
        return self.watch(self.draw_noise(sizes, std, dtype, number), number)

    def poisson_sample(self, num_rows: int, sample_rate: float) -> Tensor:
        self.requests.append(("mask", float(sample_rate)))
        return self.draw_mask(num_rows, sample_rate, len(self.rates) - 1)

    def draw_noise(self, sizes: tuple[int, ...], std: float, dtype: torch.dtype, number: int) -> Tensor:
        """The noise of request `number`."""
        return super().gaussian(sizes, std, dtype=dtype)

    def draw_mask(self, num_rows: int, sample_rate: float, number: int) -> Tensor:
        """The rows of mask `number`."""
        return super().poisson_sample(num_rows, sample_rate)

    def watch(self, noise: Tensor, number: int) -> Tensor:
        """`noise` as a tensor that reports to this generator."""
        watched = noise.as_subclass(_WatchedNoise)  # type: ignore[attr-defined]
        watched.owner, watched.number = self, number
        return watched

    def release(self, number: int, before: Tensor, result: Tensor) -> Tensor:
        """Called with a sum before and after noise `number` was added to it; returns what is released."""
        self.sums.append(before)
        self.outputs.append(result.detach().clone())
        return result


class FrozenGenerator(WatchedGenerator):
    r"""
    Masks by a constant rule and noise of constant values.

    Unit i is in mask t, or is not, whatever the others are; a rate of 1 takes all. The order in which the images of
    persons are taken stands still, too: a person more, after all others, changes it for none of them.

    Args:
        always (`int`, *optional*): A unit that is in every mask: the worst case for what is looked at.
        recorded ([`FrozenGenerator`], *optional*): A run on a neighbour. Whatever came out there comes out again, so
            that all that follows must be the same; what noise was added to is still kept in `sums`.
    """

    def __init__(self, *, always: int | None = None, recorded: FrozenGenerator | None = None) -> None:
        super().__init__()
        self.always, self.recorded = always, recorded

    def draw_noise(self, sizes: tuple[int, ...], std: float, dtype: torch.dtype, number: int) -> Tensor:
        source = torch.Generator().manual_seed(number)
        return (torch.randn(sizes, dtype=torch.float64, generator=source) * std).to(dtype)

    def draw_mask(self, num_rows: int, sample_rate: float, number: int) -> Tensor:
        coins = torch.rand(_MAX_ROWS, generator=torch.Generator().manual_seed(number))[:num_rows]
        inside = coins < (1.0 if sample_rate == 1 else _INCLUSION)
        if self.always is not None and self.always < num_rows:
            inside[self.always] = True
        return inside.nonzero().flatten()

    def random_words(self, count: int) -> Tensor:
        if count > _MAX_WORDS:
            raise ValueError(f"Expected count={count} to be at most {_MAX_WORDS}.")
        source = torch.Generator().manual_seed(len(self.rates))
        return torch.randint(2**62, (_MAX_WORDS,), generator=source)[:count]

    def release(self, number: int, before: Tensor, result: Tensor) -> Tensor:
        past = [] if self.recorded is None else self.recorded.outputs
        if number < len(past) and past[number].shape == result.shape:
            result.copy_(past[number])
        return super().release(number, before, result)
