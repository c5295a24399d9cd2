"""The fastest way to the weight gradient of a convolution on this device: found by measuring, once for each shape."""

from __future__ import annotations

import functools
import logging
import time
from typing import NamedTuple

import torch
from torch import Tensor

from dp_curriculum.dp_sgd.full_precision import full_precision
from dp_curriculum.dp_sgd.weight_gradients import CANDIDATES, Geometry, candidates_for, relative_error


logger = logging.getLogger(__name__)

MEASURED_DEVICES = {"cuda"}  # on CPUs `grouped` was the fastest for every 3x3 convolution of the presets
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_LOW_TOLERANCE = 1e-2  # of bfloat16 and float16, to which a method may round what it gives
_REPEATS, _MOST_ROWS = 5, 2048


class ShapeError(RuntimeError):
    """A shape for which no way to the gradient gives the right numbers."""


class Shape(NamedTuple):
    """What the choice hangs on; `images` is rounded up to a power of two, and at most as many as are measured."""

    geometry: Geometry
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]
    images: int
    draws: int
    dtype: torch.dtype
    device: torch.device


def weight_gradient(inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int) -> Tensor:
    r"""
    Weight gradients `(B, N, C, kh, kw)` by the method that is the fastest for their shape, in float32 or wider.

    Args:
        inputs (`torch.Tensor` of shape `(K * B, C, H, W)`): Row `k * B + b` is draw `k` of image `b`.
        output_gradients (`torch.Tensor` of shape `(K * B, N, H', W')`): Of the convolution.
        geometry ([`Geometry`]): The convolution.
        draws (`int`): K.

    Privacy:
        The choice is made on random numbers, by shape alone. Methods round differently, so a sum over images must be
        one of the very gradients whose norms were measured: kept, and not computed again.

    Raises:
        ShapeError: If no method gives the numbers of float64.
    """
    images = len(inputs) // draws
    shape = Shape(
        geometry,
        tuple(inputs.shape[1:]),  # type: ignore[arg-type]
        tuple(output_gradients.shape[1:]),  # type: ignore[arg-type]
        max(1, min(1 << (images - 1).bit_length(), _MOST_ROWS // draws)),
        draws,
        inputs.dtype,
        inputs.device,
    )
    with torch.autocast(inputs.device.type, enabled=False):
        return CANDIDATES[fastest(shape)](inputs, output_gradients, geometry, draws)


@functools.cache
@torch.no_grad()
def fastest(shape: Shape) -> str:
    """Name of the method: of those that give the numbers of float64, the one with the shortest median time."""
    source = torch.Generator(shape.device).manual_seed(0)
    rows = shape.draws * shape.images

    def random(*sizes: int) -> Tensor:
        return torch.randn(rows, *sizes, dtype=shape.dtype, device=shape.device, generator=source)

    inputs, gradients = random(*shape.inputs), random(*shape.outputs)
    seconds: dict[str, float] = {}
    for name in candidates_for(shape.geometry):
        try:
            if _is_right(name, shape, inputs, gradients):
                seconds[name] = _median_seconds(name, shape, inputs, gradients)
        except NotImplementedError:
            continue
        except Exception as error:  # no memory for it, or a kernel that does not compile there
            logger.info(f"weight gradient {name} of {shape} is left out: {error}")
    if not seconds:
        raise ShapeError(f"Expected a way to the weight gradient of {shape}: none gives the numbers of float64.")
    logger.debug(f"weight gradient of {shape}: {seconds}")
    return min(seconds, key=lambda name: seconds[name])


def _is_right(name: str, shape: Shape, inputs: Tensor, gradients: Tensor) -> bool:
    """Whether a method gives the numbers of float64, for the first two images."""
    few = min(2, shape.images)
    first, second = (tensor.unflatten(0, (shape.draws, -1))[:, :few].flatten(0, 1) for tensor in (inputs, gradients))
    with full_precision():
        error = relative_error(CANDIDATES[name], first, second, shape.geometry, shape.draws)
    if not error <= _TOLERANCE.get(shape.dtype, _LOW_TOLERANCE):
        logger.warning(f"weight gradient {name} of {shape} is off by {error:.1e} from float64: left out")
        return False
    return True


def _median_seconds(name: str, shape: Shape, inputs: Tensor, gradients: Tensor) -> float:
    method, times = CANDIDATES[name], []
    for _ in range(2):
        method(inputs, gradients, shape.geometry, shape.draws)
    for _ in range(_REPEATS):
        started = _now(shape.device)
        method(inputs, gradients, shape.geometry, shape.draws)
        times.append(_now(shape.device) - started)
    return sorted(times)[_REPEATS // 2]


def _now(device: torch.device) -> float:
    """Seconds, after all that was begun on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
