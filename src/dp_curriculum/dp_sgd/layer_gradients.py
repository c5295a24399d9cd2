"""Gradients of one layer's parameters, one gradient per image, with the noise draws of the image summed.

A batch holds `noise_multiplicity` draws of every image, draw by draw: row `k * B + b` is draw `k` of image `b`.
Contiguous `(K * B, C, H, W)` activations are therefore a `(K, B * C, H, W)` view for free, which is what turns the
gradients of `B` images into one grouped convolution whose batch is the draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dp_curriculum.dp_sgd import gradient_choice
from dp_curriculum.dp_sgd.weight_gradients import Geometry


_WIDENS_NORMALIZATION = {"cuda"}  # devices whose autocast does


class UnsupportedModelError(ValueError):
    """A module whose per-image gradients are not defined, or cannot be computed exactly. The message names it."""


def describe_module(module: nn.Module, name: str) -> str:
    """A module as a message names it; the model itself has no name."""
    return f"Module {name} ({type(module).__name__})" if name else f"The model ({type(module).__name__})"


# (output gradient, input, noise multiplicity) -> (images, *parameter shape), summed over the draws.
GradientFunction = Callable[[Tensor, Tensor, int], Tensor]


class GradientSink(Protocol):
    """What a layer reports to: the engine that collects the gradients of one backward pass."""

    noise_multiplicity: int

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients are kept until they are summed, rather than computed again for that."""

    def check_rows(self, layer_name: str, rows: int) -> int:
        """Validates the number of rows a layer was given, and returns the number of images."""

    def check_pass(self, layer_name: str, forward_pass: int) -> None:
        """Refuses a backward pass nested in another one."""

    def receive(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Takes the gradients `(images, *shape)` of a parameter, summed over the draws."""

    def receive_call(
        self, functions: list[tuple[nn.Parameter, GradientFunction]], output_gradient: Tensor, layer_input: Tensor
    ) -> None:
        """Takes what the gradients of a layer's parameters can be computed from."""


def current_backward_pass() -> int:
    """Number of the backward pass under way on this thread, -1 outside of any."""
    return torch._C._current_graph_task_id()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would lower `tensor`, or None where it would leave it alone."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def draws_inside(tensor: Tensor, draws: int) -> Tensor:
    """`(draws * images, *rest)` to `(images, draws, *rest)`, a view."""
    return tensor.unflatten(0, (draws, -1)).transpose(0, 1)


def sum_of_products(left: Tensor, right: Tensor, draws: int) -> Tensor:
    """`(rows, m, positions)` and `(rows, n, positions)` to `(images, m, n)`, summed over positions and draws."""
    left, right = left.unflatten(0, (draws, -1)), right.unflatten(0, (draws, -1))
    is_exact = left.dtype in (torch.float32, torch.float64) and autocast_dtype(left) is None
    if left.device.type == "cpu" and is_exact and left.shape[-1] >= 32:
        # Draw by draw, without the copies that bring the draws next to the positions: up to twice as fast. Not on a
        # GPU, where launches count, nor in bf16, which would round after each draw.
        total = torch.bmm(left[0], right[0].mT)
        for left_rows, right_rows in zip(left[1:], right[1:]):
            total.baddbmm_(left_rows, right_rows.mT)
        return total
    left, right = left.permute(1, 2, 0, 3).flatten(2), right.permute(1, 2, 0, 3).flatten(2)
    return torch.bmm(left, right.mT)


class Layer:
    """A layer under the engine: runs its own forward, and knows the gradients of its parameters image by image."""

    def __init__(self, module: nn.Module, name: str, sink: GradientSink) -> None:
        self.module, self.name, self.sink = module, name, sink
        self.original_forward = module.forward
        self._instance_forward = module.__dict__.get("forward")
        self.trainable = {key: p for key, p in module.named_parameters() if p.requires_grad}
        # Parameters in the dtype of autocast, for as long as they stand still; None where they may change.
        self.kept_casts: dict[tuple[str, torch.dtype], Tensor] | None = None

    def lowered(self, key: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter in `dtype`: cast once for as long as the weights stand still, else anew."""
        if parameter.dtype == dtype or self.kept_casts is None:
            return parameter.detach().to(dtype)
        if (key, dtype) not in self.kept_casts:
            self.kept_casts[key, dtype] = parameter.detach().to(dtype)
        return self.kept_casts[key, dtype]

    # A compiled model runs its layers uncompiled, and compiles what lies between them.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without a graph there is no backward pass to serve: validation, sampling and checkpointed first passes.
        if not torch.is_grad_enabled():
            return self.original_forward(*args, **kwargs)
        return self.run(*args, **kwargs)

    def attach(self) -> None:
        self.module.__dict__["forward"] = self

    def restore(self) -> None:
        self.module.__dict__.pop("forward", None)
        if self._instance_forward is not None:
            self.module.__dict__["forward"] = self._instance_forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        # The copy's forward would go on using this model's weights.
        raise RuntimeError("Copy the model outside of the PerImageGradients block: its layers report to this block.")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _LayerFunction(torch.autograd.Function):
    """One layer call whose backward reports the layer's input and output gradient, and returns the input's gradient.

    The weight is an argument so that backward is reached where the input needs no gradient; its own gradient is
    returned as None, so autograd never computes the sum over the batch that nobody reads.
    """

    @staticmethod
    def forward(ctx: Any, layer: WeightedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.forward_pass = layer, current_backward_pass()
        if autocast_dtype(weight) is not None and x.is_floating_point():
            weight = layer.lowered("weight", weight, x.dtype)
            bias = None if bias is None else layer.lowered("bias", bias, x.dtype)
        # Of a frozen weight no gradient is taken, which alone reads the input: its shape is all that is kept.
        ctx.save_for_backward(x if "weight" in layer.trainable else x.new_zeros(()).expand(x.shape), weight)
        return layer.compute(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        layer.sink.check_pass(layer.name, ctx.forward_pass)
        functions = layer.functions()
        if functions:
            layer.sink.receive_call(functions, output_gradient, x)
        input_gradient = layer.input_gradient(output_gradient, x, weight) if ctx.needs_input_grad[1] else None
        return None, input_gradient, None, None


class WeightedLayer(Layer):
    """A layer with a `weight` and maybe a `bias`."""

    minimum_dims = 2

    def run(self, x: Tensor) -> Tensor:
        if x.dim() < self.minimum_dims:
            raise ValueError(f"Expected a batched input at layer {self.name}, got shape {tuple(x.shape)}.")
        if self.trainable:
            self.sink.check_rows(self.name, x.shape[0])
        dtype = autocast_dtype(x)
        x = self.prepare(x if dtype is None else x.to(dtype))
        return _LayerFunction.apply(self, x, self.module.weight, self.module._parameters.get("bias"))

    def functions(self) -> list[tuple[nn.Parameter, GradientFunction]]:
        known = {"weight": self.weight_gradient, "bias": self.bias_gradient}
        return [(parameter, known[key]) for key, parameter in self.trainable.items()]

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, output_gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        raise NotImplementedError

    def weight_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        raise NotImplementedError

    def bias_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        raise NotImplementedError


class LinearLayer(WeightedLayer):
    """`nn.Linear` over the last of any number of dimensions."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, output_gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return output_gradient.matmul(weight)

    def weight_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        rows = x.shape[0]
        x, output_gradient = (
            x.reshape(rows, -1, x.shape[-1]),
            output_gradient.reshape(rows, -1, output_gradient.shape[-1]),
        )
        return sum_of_products(output_gradient.mT, x.mT, draws)

    def bias_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        return draws_inside(output_gradient, draws).flatten(1, -2).sum(1, dtype=dtype)


class EmbeddingLayer(WeightedLayer):
    """`nn.Embedding`."""

    minimum_dims = 1

    def __init__(self, module: nn.Embedding, name: str, sink: GradientSink) -> None:
        super().__init__(module, name, sink)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            # Each of these makes one image's gradient depend on the other images of the batch, or is not dense.
            raise UnsupportedModelError(
                f"Embedding {name} uses max_norm, scale_grad_by_freq or sparse: its gradients mix images; unset them."
            )
        self.num_embeddings, self.padding_idx = module.num_embeddings, module.padding_idx

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight, self.padding_idx)

    def input_gradient(self, output_gradient: Tensor, x: Tensor, weight: Tensor) -> None:
        return None

    def weight_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        images, width = x.shape[0] // draws, output_gradient.shape[-1]
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        gradient = output_gradient.new_zeros(images * self.num_embeddings, width, dtype=dtype)
        # Row r belongs to image r % images, and writes in that image's own copy of the table.
        image = torch.arange(x.shape[0], device=x.device).remainder(images).view(-1, *[1] * (x.dim() - 1))
        index = (x + image * self.num_embeddings).flatten()
        rows = output_gradient.reshape(-1, width).to(dtype)
        if gradient.is_cuda:
            # There index_add_ sums in an order that changes from run to run; here index_put_ would.
            gradient.index_put_((index,), rows, accumulate=True)
        else:
            gradient.index_add_(0, index, rows)
        gradient = gradient.view(images, self.num_embeddings, width)
        if self.padding_idx is not None:
            gradient[:, self.padding_idx] = 0
        return gradient


class ConvLayer(WeightedLayer):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, of any stride, dilation, padding and number of groups."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, name: str, sink: GradientSink) -> None:
        super().__init__(module, name, sink)
        self.minimum_dims, self.weight_shape = module.weight.dim(), module.weight.shape
        self.stride, self.dilation, self.groups = list(module.stride), list(module.dilation), module.groups
        self.kernel_size = list(module.kernel_size)
        self.explicit_padding: list[int] | None = None
        self.padding = [0] * len(self.stride)
        if module.padding_mode != "zeros" or module.padding == "same":
            # Also asymmetric, for an even kernel: padded ahead of the convolution, by an operation without weights.
            self.explicit_padding = list(module._reversed_padding_repeated_twice)
        elif not isinstance(module.padding, str):
            self.padding = list(module.padding)
        self.padding_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        self.geometry: Geometry | None = None
        if module.weight.dim() == 4:
            kernel, stride, padding, dilation = (
                (sizes[0], sizes[1]) for sizes in (self.kernel_size, self.stride, self.padding, self.dilation)
            )
            self.geometry = Geometry(kernel, stride, padding, dilation, self.groups)

    def prepare(self, x: Tensor) -> Tensor:
        # Attention emits channels_last tensors, whose rows are not blocks of channels. Copied here once, not again in
        # every normalization and gradient behind it.
        x = x.contiguous()
        return x if self.explicit_padding is None else F.pad(x, self.explicit_padding, mode=self.padding_mode)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        no_output_padding = [0] * len(self.stride)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, no_output_padding, self.groups
        )

    def backward(self, output_gradient: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]) -> Any:
        no_output_padding = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            output_gradient, x, weight, None, self.stride, self.padding, self.dilation, False, no_output_padding,
            groups, mask,
        )  # fmt: skip

    def input_gradient(self, output_gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self.backward(output_gradient, x, weight, self.groups, [True, False, False])[0]

    def weight_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        images, shape = x.shape[0] // draws, self.weight_shape
        is_pointwise = all(k == s == 1 and p == 0 for k, s, p in zip(self.kernel_size, self.stride, self.padding))
        if is_pointwise and self.groups == 1:
            return sum_of_products(output_gradient.flatten(2), x.flatten(2), draws).view(images, *shape)
        is_measured = self.sink.holds_gradients and x.device.type in gradient_choice.MEASURED_DEVICES
        if is_measured and self.geometry is not None:
            return gradient_choice.weight_gradient(x, output_gradient, self.geometry, draws)
        x = x.contiguous().view(draws, images * x.shape[1], *x.shape[2:])
        output_gradient = output_gradient.contiguous().view(draws, images * shape[0], *output_gradient.shape[2:])
        weight = x.new_empty(images * shape[0], *shape[1:])  # only its shape is read
        gradient = self.backward(output_gradient, x, weight, images * self.groups, [False, True, False])[1]
        return gradient.view(images, *shape)

    def bias_gradient(self, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        return draws_inside(output_gradient.flatten(2), draws).sum((1, 3), dtype=dtype)


class _Repeat(torch.autograd.Function):
    """A parameter repeated once per image: autograd's own gradient of the copies is the gradient per image."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, key: str, parameter: nn.Parameter, images: int, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.parameter, ctx.forward_pass = layer, parameter, current_backward_pass()
        return layer.lowered(key, parameter, dtype).expand(images, *parameter.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        layer = ctx.layer
        layer.sink.check_pass(layer.name, ctx.forward_pass)
        layer.sink.receive(ctx.parameter, gradient)
        return None, None, None, None, None


class AffineNormLayer(Layer):
    """What `nn.GroupNorm` and `nn.LayerNorm` share: parameters small enough to be repeated for every image."""

    def repeated(self, key: str, images: int, dtype: torch.dtype | None = None) -> Tensor | None:
        parameter = self.module._parameters.get(key)
        if parameter is None:
            return None
        dtype = parameter.dtype if dtype is None else dtype
        if key in self.trainable:
            return _Repeat.apply(self, key, parameter, images, dtype)
        return self.lowered(key, parameter, dtype).expand(images, *parameter.shape)


class GroupNormLayer(AffineNormLayer):
    """`nn.GroupNorm`, run over `(draws, images * channels)` with `images * num_groups` groups: the same numbers."""

    def run(self, x: Tensor) -> Tensor:
        images = self.sink.check_rows(self.name, x.shape[0])
        module: Any = self.module
        if images == 0:
            weight, bias = _detached(module.weight), _detached(module.bias)
            return torch.group_norm(x, module.num_groups, weight, bias, module.eps)
        # A GPU's autocast would run this and the activation behind it in float32, for three times the memory traffic;
        # statistics are float32 within the kernel. It takes one dtype for all, where a CPU mixes two.
        kind, is_low = x.device.type, autocast_dtype(x) == x.dtype and x.device.type in _WIDENS_NORMALIZATION
        weight, bias = (self.repeated(key, images, x.dtype if is_low else None) for key in ("weight", "bias"))
        # A view wherever x is contiguous. Not F.group_norm, which checks sizes that are not the layer's own.
        folded = x.reshape(self.sink.noise_multiplicity, images * x.shape[1], *x.shape[2:])
        groups = images * module.num_groups
        with torch.autocast(kind, enabled=False) if is_low else contextlib.nullcontext():
            folded = torch.group_norm(folded, groups, _flat(weight), _flat(bias), module.eps)
        return folded.view(x.shape)


class LayerNormLayer(AffineNormLayer):
    """`nn.LayerNorm`: the normalization alone, then an affine map per image."""

    def run(self, x: Tensor) -> Tensor:
        images = self.sink.check_rows(self.name, x.shape[0])
        module: Any = self.module
        y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        y = y.unflatten(0, (self.sink.noise_multiplicity, images))
        between = [1] * (x.dim() - 1 - len(module.normalized_shape))
        for key in ("weight", "bias"):
            repeated = self.repeated(key, images)
            if repeated is not None:
                repeated = repeated.view(images, *between, *module.normalized_shape)
                y = y * repeated if key == "weight" else y + repeated
        return y.flatten(0, 1)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
