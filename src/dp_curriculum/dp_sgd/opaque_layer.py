"""Modules that the engine knows nothing of: any layer that can be run one image at a time, through `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dp_curriculum.dp_sgd.layer_gradients import (
    GradientSink,
    Layer,
    UnsupportedModelError,
    current_backward_pass,
    describe_module,
)


class _OpaqueFunction(torch.autograd.Function):
    """One call of a module known only by its forward: backward runs it again, image by image, through `torch.func`."""

    @staticmethod
    def forward(ctx: Any, layer: OpaqueLayer, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.layer, ctx.call, ctx.forward_pass = layer, call, current_backward_pass()
        ctx.save_for_backward(*tensors[: call.num_inputs])
        outputs = layer.compute(call, layer.detached(), tensors[: call.num_inputs])
        ctx.mark_non_differentiable(*[output for output in outputs if not output.is_floating_point()])
        ctx.is_float = [output.is_floating_point() for output in outputs]
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer, call = ctx.layer, ctx.call
        layer.sink.check_pass(layer.name, ctx.forward_pass)
        gradients = [gradient for gradient, flag in zip(output_gradients, ctx.is_float) if flag]
        parameter_gradients, input_gradients = layer.gradients(call, gradients, ctx.saved_tensors)
        for key, gradient in parameter_gradients.items():
            layer.sink.receive(layer.trainable[key], gradient)
        return None, None, *input_gradients, *[None] * len(layer.trainable)


class _Call:
    """
    One call of a module: its arguments without the tensors that hold one row per input, and its result without its
    tensors.
    """

    def __init__(self, layer: OpaqueLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = describe_module(layer.module, layer.name)
        leaves, self.structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
        self.rows = tensors[0].shape[0] if tensors else 0
        self.slots = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape[:1] == (self.rows,)
        ]
        self.inputs = [leaves[i] for i in self.slots]
        self.num_inputs = len(self.inputs)
        self.leaves = [None if i in self.slots else leaf for i, leaf in enumerate(leaves)]
        if not tensors or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self.leaves):
            raise UnsupportedModelError(f"{self.module} has an input without one row per image: not supported.")
        kind = self.inputs[0].device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.result_leaves: list[Any] = []
        self.result_structure: TreeSpec | None = None

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        for slot, tensor in zip(self.slots, inputs):
            leaves[slot] = tensor
        return tree_unflatten(leaves, self.structure)

    def tensors_of(self, result: Any, *, rows: int) -> tuple[Tensor, ...]:
        """The tensors of a result, such as a tuple or a dictionary; the rest of it is kept."""
        leaves, self.result_structure = tree_flatten(result)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.result_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.result_slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not tensors or any(shape[:1] != (rows,) for shape in shapes):
            returned = f"tensors of shapes {shapes}" if tensors else f"{type(result).__name__}, which holds no tensor"
            raise UnsupportedModelError(
                f"{self.module} returns {returned}: expected {rows} rows, one per image, in the first dimension of "
                "each tensor."
            )
        return tensors

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The result again, with these tensors in it."""
        assert self.result_structure is not None, "the module has been called"
        leaves = list(self.result_leaves)
        for slot, tensor in zip(self.result_slots, tensors):
            leaves[slot] = tensor
        return tree_unflatten(leaves, self.result_structure)


class _ForwardOf(nn.Module):
    """A module whose call is another module's own forward: neither its hooks nor its instance attribute run."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.own_forward = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_forward(*args, **kwargs)


class OpaqueLayer(Layer):
    """Any other module: exact where each row of its outputs depends on the same row of its inputs, else refused."""

    def __init__(self, module: nn.Module, name: str, sink: GradientSink) -> None:
        super().__init__(module, name, sink)
        self.runner = _ForwardOf(module, self.original_forward)
        self.is_checked = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self, args, kwargs)
        self.sink.check_rows(self.name, call.rows)
        outputs = _OpaqueFunction.apply(self, call, *call.inputs, *self.trainable.values())
        del call.inputs  # saved by the function, where checkpointing can drop them
        return call.result(outputs)

    def detached(self) -> dict[str, Tensor]:
        return {key: parameter.detach() for key, parameter in self.trainable.items()}

    def compute(self, call: _Call, parameters: dict[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = call.arguments(inputs)
        named = {f"module.{key}": value for key, value in parameters.items()}
        kind, dtype, enabled = call.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            result = torch.func.functional_call(self.runner, named, args, kwargs)
        return call.tensors_of(result, rows=inputs[0].shape[0])

    def gradients(
        self, call: _Call, output_gradients: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Per-image gradients of the parameters, summed over the draws, and the gradients of the inputs."""
        draws = self.sink.noise_multiplicity
        is_float = [tensor.is_floating_point() for tensor in inputs]

        def one_image(gradients: list[Tensor], rows: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            def forward(parameters: dict[str, Tensor], floats: list[Tensor]) -> list[Tensor]:
                remaining = iter(floats)
                merged = [next(remaining) if flag else row for flag, row in zip(is_float, rows)]
                return [output for output in self.compute(call, parameters, merged) if output.is_floating_point()]

            floats = [row for flag, row in zip(is_float, rows) if flag]
            return torch.func.vjp(forward, self.detached(), floats)[1](gradients)

        folded = [[tensor.unflatten(0, (draws, -1)) for tensor in kind] for kind in (output_gradients, inputs)]
        try:
            if not self.is_checked:
                self.check(call, inputs)
            parameter_gradients, float_gradients = torch.func.vmap(one_image, in_dims=1, out_dims=(0, 1))(*folded)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{call.module} cannot run one image at a time: {error}") from error
        remaining = iter(float_gradients)
        return parameter_gradients, [next(remaining).flatten(0, 1) if flag else None for flag in is_float]

    def check(self, call: _Call, inputs: Sequence[Tensor]) -> None:
        """Once per module: a row alone gives the outputs that it gives among the others."""
        together = self.compute(call, self.detached(), inputs)
        alone = self.compute(call, self.detached(), [tensor[:1] for tensor in inputs])
        if not all(_is_row_of(one, all_rows) for one, all_rows in zip(alone, together)):
            raise UnsupportedModelError(
                f"{call.module} gives an image another output when it is alone: it mixes images or is random, so "
                "per-image gradients are not defined. Images belong in the first dimension; a dropout inside it, to 0."
            )
        self.is_checked = True


def _is_row_of(alone: Tensor, together: Tensor) -> bool:
    if not together.is_floating_point():
        return torch.equal(alone, together[:1])
    scale = together[:1].abs().max().clamp(min=1e-12)
    tolerance = 1e-9 if together.dtype == torch.float64 else 10 * torch.finfo(together.dtype).eps ** 0.75
    return bool(((together[:1] - alone).abs().max() / scale) < tolerance)
