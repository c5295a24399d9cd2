"""Which layers of a model the engine runs, and which models it refuses."""

from __future__ import annotations

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dp_curriculum.dp_sgd.layer_gradients import (
    ConvLayer,
    EmbeddingLayer,
    GradientSink,
    GroupNormLayer,
    Layer,
    LayerNormLayer,
    LinearLayer,
    UnsupportedModelError,
    describe_module,
)
from dp_curriculum.dp_sgd.opaque_layer import OpaqueLayer


# Exact types: a subclass may compute something else with the same weights.
_LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.Linear: LinearLayer,
    nn.Embedding: EmbeddingLayer,
    nn.GroupNorm: GroupNormLayer,
    nn.LayerNorm: LayerNormLayer,
}


def check_model(model: nn.Module) -> None:
    """Refuses what could only fail later, with less of a reason."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModelError(
            f"{describe_module(model, '')} is wrapped: pass model.module, and add up the clipped sums of the "
            "processes yourself; what wraps it waits for gradients of the batch, which there are none of."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UnsupportedModelError(f"Parameter {name} has no shape yet: run the model once before.")
        if parameter.requires_grad and not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"Parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: gradients per image are those of "
                "real parameters; keep real and imaginary part in two."
            )


def plan_layers(model: nn.Module, sink: GradientSink) -> list[Layer]:
    """
    The layers that own the trainable parameters; a module of an unknown kind is one layer with all it contains. Frozen
    convolutions are among them, because torch's own would keep their inputs for a gradient that nobody takes.
    """
    for name, module in model.named_modules():
        # Running statistics are also a copy of private data that nobody adds noise to.
        mixes = isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats)
        if mixes:
            raise UnsupportedModelError(
                f"{describe_module(module, name)} mixes the images of a batch: use GroupNorm instead."
            )
    layers: list[Layer] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        kind = _LAYERS.get(type(module))
        is_plain = set(module._parameters) <= {"weight", "bias"} and "forward" not in module.__dict__
        is_trained = any(p is not None and p.requires_grad for p in module._parameters.values())
        if kind is not None and is_plain and (is_trained or kind is ConvLayer):
            layers.append(kind(module, name, sink))
        elif is_trained:
            layers.append(OpaqueLayer(module, name, sink))
        else:
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return layers
