"""One gradient per image at the cost of ordinary training, with the noise draws of each image folded in."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from dp_curriculum.dp_sgd.flat_gradients import FlatGradients, clip_factors, make_finite, norm_per_image
from dp_curriculum.dp_sgd.full_precision import full_precision
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
            `accumulate_clipped` in either case, and leave `p.grad_sample` alone.
        memory_limit (`int`, *optional*, defaults to 2 GiB): Bytes that `"auto"` lets the per-image gradients take.

    Attributes:
        frozen_parameters (`list[str]`): Names of the parameters that need no gradient, and get none.

    Shapes:
        The model is run on `B * K` rows, and row `k * B + b` is noise draw `k` of image `b`: the order of
        `images.repeat(K, 1, 1, 1)`. The loss has one value per row and is summed. `p.grad_sample` is `(B, *p.shape)`,
        the mean over k of the gradients of the losses `k * B + b`, in float32 or wider also under bf16 autocast.

    Privacy:
        Releases nothing: gradients per image are private until they are clipped, summed and noised. Image `b` alone
        determines `p.grad_sample[b]`, whatever its neighbours hold; a non-finite gradient is replaced by zero, in
        `"auto"` mode by `accumulate_clipped` alone.

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
        self._flat = FlatGradients(self.trainable)
        self._hooks: list[Any] = []
        self._depth = 0
        self._backward_pass, self._images, self._is_materialized = -1, 0, True
        # Whether the pass under way, or to come, has 1 / K in it already, and what is left to multiply by.
        self._begins_with_mean, self._scale = False, 1.0
        self._is_out = False  # whether the parameters hold the gradients of the last pass
        self._sum: Tensor | None = None
        self._sum_views: list[Tensor] = []
        self._dtypes: set[torch.dtype] = set()
        self._received: dict[nn.Parameter, Tensor] = {}
        self._calls: dict[nn.Parameter, list[tuple[GradientFunction, Tensor, Tensor]]] = {}

    def __enter__(self) -> PerImageGradients:
        self._depth += 1
        if self._depth > 1:  # within a block of steps, each of which enters too
            return self
        for layer in self.layers:
            layer.attach()
        for parameter in self.trainable:
            refuse = functools.partial(_refuse_direct_use, self.names[parameter])
            self._hooks.append(parameter.register_hook(refuse))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        for layer in self.layers:
            layer.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.let_go()
        self._sum, self._sum_views = None, []

    def let_go(self) -> None:
        """Lets go of the last pass, also of one that failed, and of the memory for gradients. What `p.grad_sample`
        holds stays as it is."""
        self._received.clear()
        self._calls.clear()
        self._flat.forget()

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Under autocast, weights are cast once instead of in every call: the caller changes none of them inside."""
        for layer in self.layers:
            layer.kept_casts = {}
        try:
            yield
        finally:
            for layer in self.layers:
                layer.kept_casts = None

    def backward(self, losses: Tensor) -> None:
        r"""
        `losses.sum().backward()`, for losses that hold one value per row.

        It begins with the gradient 1 / K instead of 1, which makes means of the sums over draws at no cost.

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
        self._begins_with_mean = True
        try:
            losses.backward(torch.full_like(losses, 1 / self.noise_multiplicity))
        finally:
            self._begins_with_mean = False
        if images != self._images:
            raise ValueError(f"Expected one loss per row: {images} images in the losses, {self._images} in the model.")

    @torch.no_grad()
    def accumulate_clipped(self, max_grad_norm: float, *, counted: Tensor | None = None) -> None:
        r"""
        Adds the clipped gradients of the last backward pass to `p.summed_grad`, and takes them back: the next pass
        writes over what `p.grad_sample` was.

        Args:
            max_grad_norm (`float`): C, the L2 bound of one image's gradient over all parameters.
            counted (`torch.BoolTensor` of shape `(B,)`, *optional*): Images that count; all if unset. The others fill
                up a batch to its size, and add exactly zero whatever their gradients are.

        Privacy:
            Adds the sum over images of min(1, C / |g_b|) g_b, of sensitivity C; an image whose gradient norm is not
            finite adds zero. Not yet noised. The numbers that are summed are those whose norm was measured, in float32
            also under autocast: no image adds more than C (1 + 1e-5). Either all of it is added, or nothing.

        Raises:
            ValueError: If the norm is out of the range (`privacy/limits.py`) in which its bound was tested.
            PerImageGradientError: If there is no backward pass to clip, or its gradients were exchanged.
        """
        check_range("max_grad_norm", max_grad_norm, CLIP_NORM)
        if not self._is_ready():
            raise PerImageGradientError(
                "Expected a backward pass before accumulate_clipped, as it left its gradients."
            )
        with full_precision(), torch.autocast(self.trainable[0].device.type, enabled=False):
            norms = self._norms()
            factors = clip_factors(norms, max_grad_norm, counted)
            self._add(self._weighted_sum(factors))
        self._calls.clear()
        self._received.clear()
        self._take_back()

    def set_empty(self) -> None:
        """Sets the gradients of a physical batch without images, which a model with attention cannot run on."""
        self._start(0, is_materialized=True)
        self._set_gradients()

    @property
    def holds_gradients(self) -> bool:
        return self._is_materialized

    def num_bytes(self, images: int) -> int:
        """Bytes that the gradients of so many images take, where they are held."""
        return self._flat.num_bytes(images)

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
        if self._is_materialized:
            self._flat.write(parameter, gradient)
            return
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        earlier = self._received.get(parameter)
        self._received[parameter] = gradient if earlier is None else earlier + gradient

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
            self._backward_pass = current_backward_pass()
            fits = self.mode == "auto" and self._flat.num_bytes(images) <= self.memory_limit
            self._start(images, is_materialized=self.mode == "materialize" or fits)
            self._scale = 1.0 if self._begins_with_mean else 1 / self.noise_multiplicity
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if images != self._images:
            raise PerImageGradientError(
                f"Expected {self._images} images at {name} as in the layers after it, got {images}: "
                "every layer must see one row per input row."
            )

    def _start(self, images: int, *, is_materialized: bool) -> None:
        self._images, self._is_materialized = images, is_materialized
        self._received.clear()
        self._calls.clear()
        self._dtypes.clear()
        if self._is_out or not is_materialized:  # the gradients of the last pass may be in use
            self._flat.forget()
        self._take_back()
        if is_materialized:
            self._flat.begin(images)

    def _finish(self) -> None:
        """Runs when the backward pass is over."""
        self._backward_pass = -1
        if self._is_materialized:
            self._set_gradients()

    @torch.no_grad()
    def _set_gradients(self) -> None:
        """Puts the gradients on their parameters, with zero in place of those of an image that has none."""
        self._flat.finish()
        if self._scale != 1:
            self._flat.rows.mul_(self._scale)
        if self.mode == "materialize":  # whoever reads them may clip in another way
            self._flat.drop_broken_images()
        for parameter, view in self._flat.views.items():
            parameter.grad_sample = view  # type: ignore[attr-defined]
        self._is_out = True

    def _take_back(self) -> None:
        """Takes the gradients from their parameters."""
        for parameter in self.trainable:
            parameter.grad_sample = None  # type: ignore[attr-defined]
        self._is_out = False

    def _is_ready(self) -> bool:
        if not self._is_materialized:
            return bool(self._calls or self._received) or self._images == 0
        return self._is_out and all(p.__dict__.get("grad_sample") is self._flat.views[p] for p in self.trainable)

    def _chunks(self, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
        """Rows `(images, -1)` of gradients that are not kept, a few images at a time: the same bits in each run.

        One gradient of the weighted losses would be faster than a sum over images, but rounds differently: an image
        whose terms nearly cancel then adds more than was measured.
        """
        draws, received, calls = self.noise_multiplicity, self._received.get(parameter), self._calls.get(parameter, [])
        size = max(1, _CHUNK_BYTES // (4 * parameter.numel()))
        for start in range(0, self._images, size) if calls or received is not None else ():
            images = slice(start, start + size)
            parts = [] if received is None else [received[images]]
            for function, gradient, x in calls:
                gradient_rows, rows = (t.unflatten(0, (draws, -1))[:, images].flatten(0, 1) for t in (gradient, x))
                part = function(gradient_rows, rows, draws)
                parts.append(part.to(torch.promote_types(part.dtype, torch.float32)))
            total = sum(parts[1:], parts[0])
            yield images, make_finite(total * self._scale if self._scale != 1 else total).flatten(1)

    def _norms(self) -> Tensor:
        """Norms `(images,)` of the images' gradients."""
        if self._is_materialized:
            return norm_per_image(self._flat.rows)
        norms = torch.zeros(len(self.trainable), self._images, dtype=self._flat.dtype, device=self._flat.device)
        for number, parameter in enumerate(self.trainable):
            for images, rows in self._chunks(parameter):
                norms[number, images] = norm_per_image(rows)
        return norms.norm(dim=0)

    def _weighted_sum(self, factors: Tensor) -> Tensor:
        """Sum `(width,)` over images of `factors` times their gradients."""
        if self._is_materialized:
            return factors @ self._flat.rows
        total = torch.zeros(self._flat.width, dtype=self._flat.dtype, device=self._flat.device)
        for parameter, part in zip(self.trainable, self._flat.columns(total)):
            for images, rows in self._chunks(parameter):
                part += (factors[images].to(rows.dtype) @ rows).view_as(part)
        return total

    def _add(self, total: Tensor) -> None:
        """Adds to what `p.summed_grad` holds, at once where it is all from here. The last thing that could fail."""
        earlier = [parameter.__dict__.get("summed_grad") for parameter in self.trainable]
        if self._sum is not None and all(own is given for own, given in zip(self._sum_views, earlier)):
            self._sum.add_(total)
            return
        self._sum, self._sum_views = None, []
        parts = self._flat.columns(total)
        if all(given is None for given in earlier):
            dtypes = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self.trainable]
            parts = [part.to(dtype) for part, dtype in zip(parts, dtypes)]
            self._sum, self._sum_views = (total, parts) if set(dtypes) == {total.dtype} else (None, [])
        for parameter, part, given in zip(self.trainable, parts, earlier):
            parameter.summed_grad = part if given is None else given.add_(part)  # type: ignore[attr-defined]


def _refuse_direct_use(name: str, gradient: Tensor | None) -> None:
    # Layers return no gradient for their parameters: a gradient here comes from a use that no layer saw.
    if gradient is not None:
        raise PerImageGradientError(f"Parameter {name} is used outside of its layer's forward: not supported.")
