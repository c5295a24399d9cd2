"""Time and memory of a run before it starts, measured on random inputs on this machine. It reads no data."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import build_unet, edm_loss
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradients
from dp_curriculum.dp_sgd.memory import gradient_limit, usual_rows


_PROBE_ROWS = 64
# What a process on the CPU takes beyond its tensors, for workspaces and holes between them: benchmarks/memory.py.
_CPU_OVERHEAD, _CPU_WORKSPACE = 1.35, 50e6


@dataclass(frozen=True)
class CostEstimate:
    """
    Time and memory that a run will take.

    Args:
        num_parameters (`int`): Parameters of the network.
        pretraining_seconds (`float`): All lessons together.
        dp_sgd_seconds (`float`): The hard stage.
        memory_bytes (`int`): At the peak of the hard stage; the libraries and the dataset come on top.
    """

    num_parameters: int
    pretraining_seconds: float
    dp_sgd_seconds: float
    memory_bytes: int


def estimate_cost(config: CurriculumConfig, *, num_classes: int, device: torch.device) -> CostEstimate:
    """Times one small physical batch of each stage on random inputs, and counts the bytes that it keeps."""
    data, options, runtime = config.data, config.dp_sgd, config.runtime
    unet = build_unet(
        config.model, resolution=data.resolution, num_channels=data.channels, num_classes=num_classes
    ).to(device)
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    most_rows = runtime.max_physical_batch_size or usual_rows(device)
    images = min(max(1, most_rows // options.noise_multiplicity), options.expected_batch_size)
    probe_images = max(1, min(images, _PROBE_ROWS // options.noise_multiplicity))
    engine = PerImageGradients(
        unet,
        noise_multiplicity=options.noise_multiplicity,
        mode=runtime.per_image_gradients,
        memory_limit=gradient_limit(device, runtime.gradient_memory_limit) * probe_images // images,
    )

    def dp_backward(losses: torch.Tensor) -> None:
        engine.backward(losses)
        engine.accumulate_clipped(options.dp_max_grad_norm)

    rows = options.noise_multiplicity
    with engine:
        seconds, peak = _probe(unet, probe_images * rows, dp_backward, config)
    fewer, slope = (probe_images + 1) // 2, 0.0
    if fewer < probe_images:
        with engine:  # anew, for it keeps the memory of gradients from pass to pass
            slope = (peak - _probe(unet, fewer * rows, dp_backward, config)[1]) / (probe_images - fewer)
    plain_seconds, _ = _probe(unet, config.pretraining.pretrain_batch_size, lambda loss: loss.sum().backward(), config)
    # Weights, two moments and average in float32; beside them a pass, or the update after it: the sum, the gradient,
    # and noise and noisy sum in float64.
    passing, updating = peak + slope * (images - probe_images), (2 * 4 + 2 * 8) * num_parameters
    memory = 4 * 4 * num_parameters + max(passing, updating)
    if device.type == "cpu":
        memory = _CPU_OVERHEAD * memory + _CPU_WORKSPACE
    return CostEstimate(
        num_parameters=num_parameters,
        pretraining_seconds=plain_seconds * config.pretraining.pretrain_steps * len(config.curriculum.lessons),
        dp_sgd_seconds=seconds / probe_images * options.num_dp_steps * options.expected_batch_size,
        memory_bytes=int(memory),
    )


def _probe(
    unet: UNet2DModel, rows: int, backward: Callable[[torch.Tensor], None], config: CurriculumConfig
) -> tuple[float, int]:
    """Seconds of one forward and backward pass over `rows` rows, and the most bytes that its tensors take at once."""
    data, device = config.data, unet.device
    inputs = torch.randn(rows, data.channels, data.resolution, data.resolution, device=device)
    sigma, labels = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)

    def once() -> None:
        with autocast(device, config.runtime.mixed_precision):
            losses = edm_loss(unet, inputs, inputs, sigma, labels)
        backward(losses)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    unet.zero_grad(set_to_none=True)
    with _PeakBytes() as tracked:
        once()
    start = time.perf_counter()
    once()
    return time.perf_counter() - start, tracked.peak


class _PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the context take at once, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._current = 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._current += size
        self.peak = max(self.peak, self._current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._current -= size
