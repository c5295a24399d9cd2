"""Time and memory of a run before it starts, measured on random inputs on this machine. It reads no data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.edm import build_unet, edm_loss
from dp_curriculum.per_image_gradients import PerImageGradients


_PROBE_ROWS = 64


@dataclass(frozen=True)
class CostEstimate:
    """
    What a run will take.

    Args:
        num_parameters (`int`): Of the network.
        pretraining_seconds (`float`): All lessons together.
        dp_sgd_seconds (`float`): The hard stage.
        memory_bytes (`int`): Of tensors at the peak of the hard stage; the libraries and the dataset come on top.
    """

    num_parameters: int
    pretraining_seconds: float
    dp_sgd_seconds: float
    memory_bytes: int


def estimate_cost(config: CurriculumConfig, *, num_classes: int, device: torch.device) -> CostEstimate:
    """Times one small physical batch of each stage on random inputs, and counts the bytes that it keeps."""
    data, options, runtime = config.data, config.dp_sgd, config.runtime
    unet = build_unet(
        config.model, resolution=data.resolution, num_channels=data.num_channels, num_classes=num_classes
    ).to(device)
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    images = min(max(1, runtime.max_physical_batch_size // options.noise_multiplicity), options.expected_batch_size)
    probe_images = max(1, min(images, _PROBE_ROWS // options.noise_multiplicity))
    engine = PerImageGradients(
        unet,
        noise_multiplicity=options.noise_multiplicity,
        mode=runtime.per_image_gradients,
        memory_limit=runtime.gradient_memory_limit * 1024**2 * probe_images // images,
    )

    def dp_backward(losses: torch.Tensor) -> None:
        engine.backward(losses)
        engine.accumulate_clipped(options.dp_max_grad_norm)

    with engine:
        seconds, saved_bytes = _probe(unet, probe_images * options.noise_multiplicity, dp_backward, config)
    plain_seconds, _ = _probe(unet, config.pretraining.pretrain_batch_size, lambda loss: loss.sum().backward(), config)
    # Weights, gradient, sum, two moments and average in float32; the noise in float64.
    memory = (6 * 4 + 8) * num_parameters + saved_bytes * images / probe_images
    gradients = 4 * num_parameters * images
    fits = gradients <= runtime.gradient_memory_limit * 1024**2
    if runtime.per_image_gradients == "materialize" or (runtime.per_image_gradients == "auto" and fits):
        memory += gradients
    return CostEstimate(
        num_parameters=num_parameters,
        pretraining_seconds=plain_seconds * config.pretraining.pretrain_steps * len(config.curriculum.lessons),
        dp_sgd_seconds=seconds / probe_images * options.num_dp_steps * options.expected_batch_size,
        memory_bytes=int(memory),
    )


def _probe(
    unet: UNet2DModel, rows: int, backward: Callable[[torch.Tensor], None], config: CurriculumConfig
) -> tuple[float, int]:
    """Seconds of one forward and backward pass over `rows` rows, and bytes kept between the two."""
    data, device = config.data, unet.device
    inputs = torch.randn(rows, data.num_channels, data.resolution, data.resolution, device=device)
    sigma, labels = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.runtime.mixed_precision == "bf16"):
            losses = edm_loss(unet, inputs, inputs, sigma, labels, sigma_data=config.model.sigma_data)
        backward(losses)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        once()
    start = time.perf_counter()
    once()
    return time.perf_counter() - start, sum(saved.values())
