"""One gradient per image at the cost of ordinary training, with the noise draws of each image folded in."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from dp_curriculum.dp_sgd.layer_gradients import GradientFunction, UnsupportedModelError, current_backward_pass
from dp_curriculum.dp_sgd.layer_plan import check_model, plan_layers
from dp_curriculum.privacy.limits import CLIP_NORM, NOISE_MULTIPLICITY, check_range


__all__ = ["PerImageGradientError", "PerImageGradients", "UnsupportedModelError"]

_CHUNK_BYTES = 64 * 1024**2  # of one layer's per-image gradients, in "norms_first" mode


class PerImageGradientError(ValueError):
    """A gradient that is not that of its image alone. The message names the parameter or the layer."""


class PerImageGradients:
    r"""
    Gives every trainable parameter one gradient per image during `backward`, instead of one for the batch.

    Inside the `with` block the layers of the model run through functions whose backward computes `p.grad_sample`, the
    attribute that Opacus' `DPOptimizer` clips; `p.grad` stays `None`. On exit, also by an exception, the model is as
    it was. Its class, its state-dict keys and `save_pretrained` do not change meanwhile. Each backward pass replaces
    the gradients of the last; a layer that is called several times in one pass has its uses added up. A parameter
    that the pass did not reach has zero gradients. Modules other than convolution, linear, embedding, group and layer
    normalization run through `torch.func`: exact, but slower.

    Args:
        model (`torch.nn.Module`): The model, not wrapped; tied weights and `use_reentrant=False` checkpointing work.
        noise_multiplicity (`int`, *optional*, defaults to 1): K, the noise draws of an image that share one gradient.
        mode (`str`, *optional*, defaults to `"materialize"`): `"materialize"` sets `p.grad_sample`. `"norms_first"`
            holds no gradient per image: [`~PerImageGradients.accumulate_clipped`] computes them twice, a few images at
            a time, for the norms and for the clipped sum, in memory that does not grow with images times parameters.
            `"auto"` takes the first where the gradients fit in `memory_limit`, else the second: call
            `accumulate_clipped` in either case.
        memory_limit (`int`, *optional*, defaults to 2 GiB): Bytes that `"auto"` lets the per-image gradients take.

    Attributes:
        frozen_parameters (`list[str]`): Names of the parameters that need no gradient, and get none.

    Shapes:
        The model is run on `B * K` rows, and row `k * B + b` is noise draw `k` of image `b`: the order of
        `images.repeat(K, 1, 1, 1)`. The loss has one value per row and is summed. `p.grad_sample` is `(B, *p.shape)`,
        the mean over k of the gradients of the losses `k * B + b`, in float32 or wider also under bf16 autocast.

    Privacy:
        Releases nothing: gradients per image are private until they are clipped, summed and noised. Image `b` alone
        determines `p.grad_sample[b]`, whatever its neighbours hold; a non-finite gradient is replaced by zero.

    Raises:
        ValueError: If the rows are no multiple of `noise_multiplicity`, or nothing is trainable.
        UnsupportedModelError: If a module mixes images (batch normalization) or cannot be run one image at a time.
        PerImageGradientError: In `backward`, if a parameter is used outside of its layer or under reentrant
            checkpointing.

    Example:

    ```python
    >>> import torch
    >>> from dp_curriculum.per_image_gradients import PerImageGradients
    >>> model, images, K = torch.nn.Linear(3, 1), torch.ones(5, 3), 4
    >>> with PerImageGradients(model, noise_multiplicity=K):
    ...     model(images.repeat(K, 1)).sum().backward()
    >>> tuple(model.weight.grad_sample.shape), model.weight.grad
    ((5, 1, 3), None)

    ```
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        noise_multiplicity: int = 1,
        mode: Literal["auto", "materialize", "norms_first"] = "materialize",
        memory_limit: int = 2 * 1024**3,
    ) -> None:
        check_range("noise_multiplicity", noise_multiplicity, NOISE_MULTIPLICITY)
        if mode not in ("auto", "materialize", "norms_first"):
            raise ValueError(f"Expected mode={mode!r} to be 'auto', 'materialize' or 'norms_first'.")
        self.noise_multiplicity, self.mode, self.memory_limit = noise_multiplicity, mode, memory_limit
        check_model(model)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.trainable = [parameter for parameter in self.names if parameter.requires_grad]
        self.frozen_parameters = [name for parameter, name in self.names.items() if not parameter.requires_grad]
        if not self.trainable:
            raise ValueError("Expected a model with at least one parameter that requires a gradient.")
        self.layers = plan_layers(model, self)
        self._hooks: list[Any] = []
        self._backward_pass, self._images, self._is_materialized = -1, 0, True
        self._dtypes: set[torch.dtype] = set()
        self._received: dict[nn.Parameter, Tensor] = {}
        self._calls: dict[nn.Parameter, list[tuple[GradientFunction, Tensor, Tensor]]] = {}

    def __enter__(self) -> PerImageGradients:
        for layer in self.layers:
            layer.attach()
        for parameter in self.trainable:
            refuse = functools.partial(_refuse_direct_use, self.names[parameter])
            self._hooks.append(parameter.register_hook(refuse))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for layer in self.layers:
            layer.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._received.clear()
        self._calls.clear()

    def backward(self, losses: Tensor) -> None:
        r"""
        `losses.sum().backward()`, for losses that hold one value per row.

        Args:
            losses (`torch.Tensor` of shape `(B * K,)`): Unreduced losses.

        Raises:
            ValueError: If `losses` does not have one value per row.
        """
        if losses.dim() != 1:
            raise ValueError(
                f"Expected one loss per row, shape (B * K,), got {tuple(losses.shape)}: do not reduce it."
            )
        images = self.check_rows("loss", losses.shape[0])
        losses.sum().backward()
        if images != self._images:
            raise ValueError(f"Expected one loss per row: {images} images in the losses, {self._images} in the model.")

    @torch.no_grad()
    def accumulate_clipped(self, max_grad_norm: float) -> None:
        r"""
        Adds the clipped gradients of the last backward pass to `p.summed_grad`, and lets go of them.

        Args:
            max_grad_norm (`float`): C, the L2 bound of one image's gradient over all parameters.

        Privacy:
            Adds the sum over images of min(1, C / |g_b|) g_b, of sensitivity C; an image whose gradient norm is not
            finite adds zero. Not yet noised. The numbers that are summed are those whose norm was measured, in float32
            also under autocast: no image adds more than C (1 + 1e-5).

        Raises:
            ValueError: If the norm is out of the [range](`~limits`) in which its bound was tested.
            PerImageGradientError: If there is no backward pass to clip.
        """
        check_range("max_grad_norm", max_grad_norm, CLIP_NORM)
        if self._is_materialized:
            is_ready = all(p.__dict__.get("grad_sample") is not None for p in self.trainable)
        else:
            is_ready = bool(self._calls or self._received) or self._images == 0
        if not is_ready:
            raise PerImageGradientError("Expected a backward pass before accumulate_clipped.")
        with full_precision(), torch.autocast(self.trainable[0].device.type, enabled=False):
            norm = torch.stack([self._norms(parameter) for parameter in self.trainable]).norm(dim=0)
            factors = torch.where(norm.isfinite(), max_grad_norm / norm.clamp_min(max_grad_norm), 0.0)
            is_finite = None if bool(norm.isfinite().all()) else norm.isfinite()
            for parameter in self.trainable:
                total = self._weighted_sum(parameter, factors, is_finite)
                earlier = parameter.__dict__.get("summed_grad")
                parameter.summed_grad = total if earlier is None else earlier.add_(total)  # type: ignore[attr-defined]
                self._calls.pop(parameter, None)
                self._received.pop(parameter, None)
                parameter.grad_sample = None  # type: ignore[attr-defined]

    def set_empty(self) -> None:
        """Sets the gradients of a physical batch without images, which a model with attention cannot run on."""
        self._images, self._is_materialized = 0, True
        self._received.clear()
        self._set_gradients()

    def check_rows(self, layer_name: str, rows: int) -> int:
        """Number of images in `rows` rows."""
        if rows % self.noise_multiplicity:
            raise ValueError(
                f"Expected {rows} rows at layer {layer_name} to be a multiple of "
                f"noise_multiplicity={self.noise_multiplicity}: row k * B + b is noise draw k of image b."
            )
        return rows // self.noise_multiplicity

    def check_pass(self, layer_name: str, forward_pass: int) -> None:
        """Refuses reentrant checkpointing, whose backward passes are nested."""
        # A forward inside a backward pass is a checkpoint's recomputation: it must serve that same pass.
        if forward_pass not in (-1, current_backward_pass()):
            raise PerImageGradientError(
                f"Layer {layer_name} is under reentrant gradient checkpointing: pass use_reentrant=False."
            )

    def receive(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Takes gradients per image, summed over the draws."""
        self._begin(self.names[parameter], gradient.shape[0])
        self._dtypes.add(gradient.dtype)
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if 0 in gradient.stride():  # one zero for all images, from a parameter that a module did not use
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        if self.noise_multiplicity > 1:
            gradient = gradient.mul_(1 / self.noise_multiplicity)
        earlier = self._received.get(parameter)
        self._received[parameter] = gradient if earlier is None else earlier.add_(gradient)

    def receive_call(
        self, functions: list[tuple[nn.Parameter, GradientFunction]], output_gradient: Tensor, layer_input: Tensor
    ) -> None:
        """Takes a layer's input and output gradient, and in `"materialize"` mode uses them at once."""
        images = layer_input.shape[0] // self.noise_multiplicity
        self._begin(self.names[functions[0][0]], images)
        if images == 0:
            return
        for parameter, function in functions:
            if self._is_materialized:
                self.receive(parameter, function(output_gradient, layer_input, self.noise_multiplicity))
            else:
                self._calls.setdefault(parameter, []).append((function, output_gradient, layer_input))

    def _begin(self, name: str, images: int) -> None:
        """Starts a backward pass at the first layer it reaches."""
        if self._backward_pass != current_backward_pass():
            self._backward_pass, self._images = current_backward_pass(), images
            self._received.clear()
            self._calls.clear()
            self._dtypes.clear()
            num_bytes = images * sum(4 * parameter.numel() for parameter in self.trainable)
            fits = self.mode == "auto" and num_bytes <= self.memory_limit
            self._is_materialized = self.mode == "materialize" or fits
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if images != self._images:
            raise PerImageGradientError(
                f"Expected {self._images} images at {name} as in the layers after it, got {images}: "
                "every layer must see one row per input row."
            )

    def _finish(self) -> None:
        """Runs when the backward pass is over."""
        self._backward_pass = -1
        if self._is_materialized:
            self._set_gradients()
            return
        for parameter in self.trainable:
            parameter.grad_sample = None  # type: ignore[attr-defined]

    @torch.no_grad()
    def _set_gradients(self) -> None:
        gradients = []
        for parameter in self.trainable:
            gradient = self._received.pop(parameter, None)
            if gradient is None:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                gradient = parameter.new_zeros(self._images, *parameter.shape, dtype=dtype)
            parameter.grad_sample = gradient  # type: ignore[attr-defined]
            gradients.append(gradient)
        # One norm of each whole tensor finds out whether any image has to be looked at.
        if self._images and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
            norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
            for gradient in gradients:
                gradient[~norms.isfinite()] = 0

    def _chunks(self, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
        """Gradients of a parameter, a few images at a time where they are not kept: the same bits whenever it is run.

        One gradient of the weighted losses would be faster than a sum over images, but rounds differently: an image
        whose terms nearly cancel then adds more than was measured.
        """
        if self._is_materialized:
            yield slice(None), parameter.grad_sample  # type: ignore[attr-defined]
            return
        draws, received, calls = self.noise_multiplicity, self._received.get(parameter), self._calls.get(parameter, [])
        size = max(1, _CHUNK_BYTES // (4 * parameter.numel()))
        for start in range(0, self._images, size) if calls or received is not None else ():
            images = slice(start, start + size)
            parts = [] if received is None else [received[images]]
            for function, gradient, x in calls:
                gradient_rows, rows = (t.unflatten(0, (draws, -1))[:, images].flatten(0, 1) for t in (gradient, x))
                part = function(gradient_rows, rows, draws)
                parts.append(part.to(torch.promote_types(part.dtype, torch.float32)) / draws)
            yield images, sum(parts[1:], parts[0])

    def _norms(self, parameter: nn.Parameter) -> Tensor:
        """Norms `(images,)` of a parameter's gradients."""
        norms = parameter.new_zeros(self._images, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for images, gradients in self._chunks(parameter):
            norms[images] = _norm_per_image(gradients)
        return norms

    def _weighted_sum(self, parameter: nn.Parameter, factors: Tensor, is_finite: Tensor | None) -> Tensor:
        """Sum over images of `factors` times a parameter's gradients."""
        total = parameter.new_zeros(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for images, gradients in self._chunks(parameter):
            rows = gradients.flatten(1)
            if is_finite is not None:
                # A factor of zero would leave NaN.
                rows = rows.where(is_finite[images].view(-1, 1), 0)
            total += (factors[images].to(rows.dtype) @ rows).view_as(total)
        return total


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bf16 in products of float32, and the same bits for the same convolution.

    A norm and a sum must be those of the same numbers, or the clip bound is off.
    """
    cudnn, matmul_precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark}
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(**kept, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


def _norm_per_image(gradients: Tensor) -> Tensor:
    """Norms `(images,)`, true to 1e-6: the CPU's float32 norm of 1e7 elements in one row comes out 4e-4 too small."""
    rows = gradients.flatten(1)
    if rows.shape[1] <= 4096:
        return torch.linalg.vector_norm(rows, dim=1)
    block = math.gcd(rows.shape[1], 4096)
    if rows.shape[1] > 2**16 * block:
        return rows.square().sum(1).sqrt()
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows.unflatten(1, (-1, block)), dim=2), dim=1)


def _refuse_direct_use(name: str, gradient: Tensor | None) -> None:
    # Layers return no gradient for their parameters: a gradient here comes from a use that no layer saw.
    if gradient is not None:
        raise PerImageGradientError(f"Parameter {name} is used outside of its layer's forward: not supported.")
