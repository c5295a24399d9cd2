"""The self-check of the engine: its gradients beside those of autograd, image by image, before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from dp_curriculum.dp_sgd.full_precision import full_precision
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradientError, PerImageGradients
from dp_curriculum.dp_sgd.layer_gradients import UnsupportedModelError, describe_module
from dp_curriculum.dp_sgd.opaque_layer import OpaqueLayer


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def check_per_image_gradients(
    model: nn.Module,
    losses: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    noise_multiplicity: int = 1,
    tolerance: float | None = None,
) -> dict[str, Any]:
    r"""
    Compares the engine with autograd run on one row at a time, for this very model, dtype and device.

    Run it once before anything is spent, on random inputs: two images are enough. Weights, gradients, modes and random
    state are left as they were; dropout is off meanwhile. Gradients of images are also compared between the two modes.

    Args:
        model (`torch.nn.Module`): The model that will be trained.
        losses (`Callable`): `losses(*rows_of_inputs)` gives one loss per row through `model`, at random in nothing.
        inputs (`Sequence[torch.Tensor]`): Tensors with `B * K` rows each, row `k * B + b` for draw `k` of image `b`.
        noise_multiplicity (`int`, *optional*, defaults to 1): K.
        tolerance (`float`, *optional*): Largest relative error of a parameter; by default 1e-10 in float64, 1e-4 in
            float32, 2e-2 in float16 and 5e-2 in bfloat16, the coarsest dtype in which a gradient was computed.

    Returns:
        `dict`: JSON values `max_relative_error`, `max_clipped_sum_error`, `worst_parameter`, `num_parameters`,
        `num_images`, `noise_multiplicity`, `tolerance`, `dtype`, `frozen_parameters`, and `unverified_parameters`:
        those whose gradient was exactly zero, so that nothing could be compared.

    Privacy:
        Reads no private data as long as `inputs` holds none.

    Raises:
        UnsupportedModelError: If the gradients of a module outside the known kinds are wrong, or not defined, or the
            model cannot be run on one row; names the module.
        PerImageGradientError: If the gradient of another parameter is wrong; names the parameter.

    Example:

    ```python
    >>> import torch
    >>> from dp_curriculum.per_image_gradients import check_per_image_gradients
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> found = check_per_image_gradients(model, lambda x: model(x).square().sum(1), [torch.randn(2, 3)])
    >>> found["max_relative_error"] < found["tolerance"], found["num_parameters"]
    (True, 4)

    ```
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    saved = [dict(p.__dict__) for p in parameters]
    dropouts = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.training]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    engine = PerImageGradients(model, noise_multiplicity=noise_multiplicity)
    try:
        for module in dropouts:
            module.training = False
        with torch.random.fork_rng(devices), full_precision(), torch.enable_grad():
            with engine:
                engine.backward(losses(*inputs))
            actual = [p.grad_sample for p in parameters]  # type: ignore[attr-defined]
            expected = _reference(parameters, losses, inputs, noise_multiplicity)
            result = _compare(engine, actual, expected, tolerance)
            result["max_clipped_sum_error"] = _check_modes(model, losses, inputs, engine, actual, result["tolerance"])
    finally:
        for module in dropouts:
            module.training = True
        for parameter, attributes in zip(parameters, saved):
            parameter.__dict__.clear()
            parameter.__dict__.update(attributes)
    return result


def _reference(
    parameters: list[nn.Parameter], losses: Callable[..., Tensor], inputs: Sequence[Tensor], draws: int
) -> list[Tensor]:
    """Gradients per image from autograd, one row at a time."""
    images = inputs[0].shape[0] // draws
    result = [p.new_zeros(images, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    for row in range(images * draws):
        try:
            loss = losses(*[tensor[row : row + 1] for tensor in inputs]).sum()
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedModelError(
                f"The model does not run on one row alone, so nothing says what a gradient per image is: {error}"
            ) from error
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(result, gradients):
            if gradient is not None:
                total[row % images] += gradient / draws
    return result


def _compare(
    engine: PerImageGradients, actual: list[Tensor], expected: list[Tensor], tolerance: float | None
) -> dict[str, Any]:
    """The result of the self-check, or its error. A gradient that is nil is compared on the scale of the whole one."""
    coarsest = max(engine._dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = _TOLERANCE[coarsest] if tolerance is None else tolerance
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in expected])
    # In low precision only the direction of the whole gradient is reproducible.
    floor = 1e-3 if torch.finfo(coarsest).eps < 1e-6 else 1e-1
    errors = torch.stack([(a - e).flatten(1).norm(dim=1) for a, e in zip(actual, expected)])
    errors = (errors / torch.maximum(norms, floor * norms.norm(dim=0)).clamp_min(1e-30)).amax(dim=1)
    worst = int(errors.nan_to_num(nan=torch.inf).argmax())
    name = engine.names[engine.trainable[worst]]
    if not bool(errors[worst] <= tolerance):
        message = (
            f"off by {float(errors[worst]):.1e} from autograd's, more than {tolerance:.0e}: do not train with it."
        )
        for layer in engine.layers:
            if isinstance(layer, OpaqueLayer) and engine.trainable[worst] in set(layer.trainable.values()):
                module = describe_module(layer.module, layer.name)
                raise UnsupportedModelError(f"{module} has a gradient per image {message}")
        raise PerImageGradientError(f"Parameter {name} has a gradient per image {message}")
    return {
        "max_relative_error": float(errors[worst]),
        "worst_parameter": name,
        "num_parameters": len(expected),
        "num_images": expected[0].shape[0],
        "noise_multiplicity": engine.noise_multiplicity,
        "tolerance": tolerance,
        "dtype": str(coarsest).removeprefix("torch."),
        "frozen_parameters": engine.frozen_parameters,
        "unverified_parameters": [engine.names[p] for p, n in zip(engine.trainable, norms) if not bool(n.any())],
    }


def _check_modes(
    model: nn.Module,
    losses: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    engine: PerImageGradients,
    gradients: list[Tensor],
    tolerance: float,
) -> float:
    """Largest relative difference of the clipped sums of both modes from the plain sum of the given gradients."""
    norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    max_grad_norm = float(norm.median()) or 1.0  # clips some images and not others
    factors = max_grad_norm / norm.clamp_min(max_grad_norm)
    expected = [torch.einsum("b,b...->...", factors.to(gradient.dtype), gradient) for gradient in gradients]
    scale = torch.stack([total.norm() for total in expected]).norm()
    largest = 0.0
    modes: tuple[Literal["materialize", "norms_first"], ...] = ("materialize", "norms_first")
    for mode in modes:
        for parameter in engine.trainable:
            parameter.summed_grad = None  # type: ignore[attr-defined]
        with PerImageGradients(model, noise_multiplicity=engine.noise_multiplicity, mode=mode) as other:
            other.backward(losses(*inputs))
            other.accumulate_clipped(max_grad_norm)
        sums = [parameter.summed_grad for parameter in engine.trainable]  # type: ignore[attr-defined]
        errors = torch.stack([(total - own).norm() for total, own in zip(sums, expected)]) / scale.clamp_min(1e-30)
        worst = int(errors.nan_to_num(nan=torch.inf).argmax())
        if not bool(errors[worst] <= tolerance):
            name = engine.names[engine.trainable[worst]]
            raise PerImageGradientError(
                f"Parameter {name} has another clipped sum in {mode} mode: do not train with it."
            )
        largest = max(largest, float(errors[worst]))
    return largest
