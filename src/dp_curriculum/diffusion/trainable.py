"""Weights that the hard stage trains: all, or a part of them, or matrices of low rank beside them (LoRA).

What is frozen stays what lessons and public training left. The class embedding is never frozen, because a class that
no lesson has shown can be learned nowhere else: public images of other classes are learned without one. LoRA is that
of Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from dp_curriculum.config import DPSGDConfig


ADAPTER = "default"
_PROJECTIONS, _CONVOLUTIONS = ("to_q", "to_k", "to_v", "to_out.0"), ("conv1", "conv2")
_NORMS = (nn.GroupNorm, nn.LayerNorm)
_CLASSES = "class_embedding"


def choose_weights(unet: UNet2DModel, options: DPSGDConfig, *, seed: int | None = None) -> list[nn.Parameter]:
    r"""
    Freezes what the hard stage does not train, in place. [`merge_weights`] makes the network whole again.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network.
        options ([`DPSGDConfig`]): Its `trainable`, and what LoRA is like.
        seed (`int`, *optional*, defaults to 0): Of the first matrix of each pair of LoRA. The second starts at zero,
            so that the network is at first what it was.

    Returns:
        `list[torch.nn.Parameter]`: What is trained, in the order of the network.

    Privacy:
        Reads no image. The matrices that LoRA starts from are public, the same on all processes.

    Raises:
        ValueError: If the network has no attention to train, there are no layers of the names that LoRA is to have,
            its rank is larger than such a layer, or peft is not installed.
    """
    if options.trainable == "lora":
        _add_lora(unet, options, 0 if seed is None else seed)
    elif options.trainable != "all":
        chosen = _chosen_names(unet, options)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name in chosen)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def merge_weights(unet: UNet2DModel) -> None:
    """Adds the matrices of LoRA to the weights beside them, and thaws what was frozen: a stock network again."""
    _remove_lora(unet, merge=True)


@contextmanager
def weights_to_check(unet: UNet2DModel, options: DPSGDConfig) -> Iterator[None]:
    """
    The network as the hard stage trains it, for the self-check of the gradients; as it was afterwards.

    The second matrices of LoRA are not zero inside, or the gradients of the first ones would be, and a wrong one would
    pass.
    """
    choose_weights(unet, options)
    try:
        generator = torch.Generator().manual_seed(1)
        for layer in lora_layers(unet).values():
            _fill(layer.lora_B[ADAPTER].weight, generator)
        yield
    finally:
        _remove_lora(unet, merge=False)


def num_trained(unet: UNet2DModel, options: DPSGDConfig) -> int:
    """Number of weights of a whole network that the hard stage trains."""
    chosen = _chosen_names(unet, options)
    count = sum(parameter.numel() for name, parameter in unet.named_parameters() if name in chosen)
    if options.trainable == "lora":
        count += sum(options.rank * sum(_sides(layer)) for layer in _layers_to_extend(unet, options).values())
    return count


def describe_weights(unet: UNet2DModel, options: DPSGDConfig) -> str | None:
    """Weights that the hard stage trains, as a card states them; `None` if those are all."""
    if options.trainable == "all":
        return None
    named = {"attention": "the attention blocks", "bias_norm": "biases and normalization"}
    if options.trainable == "lora":
        targets = ", ".join(_targets(unet, options))
        kind = f"LoRA of rank {options.rank} and scale {options.lora_scale:g} on {targets}"
    else:
        kind = named[options.trainable]
    classes = " and the class embedding" if _has_classes(unet) else ""
    return f"{kind}{classes}: {num_trained(unet, options):,} weights; the others are as the stages before left them"


def lora_layers(unet: nn.Module) -> dict[str, Any]:
    """Layers of peft that hold matrices of LoRA, by name; none in a network without them."""
    if not hasattr(unet, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def adapter_tensors(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """Matrices of LoRA and the class embedding, under the names that peft gives them in a file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(unet).items():
        tensors |= {f"{name}.lora_{key}.weight": getattr(layer, f"lora_{key}")[ADAPTER].weight for key in "AB"}
    if _has_classes(unet):
        tensors |= {f"{_CLASSES}.{key}": value for key, value in unet.class_embedding.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def lora_config(unet: UNet2DModel, options: DPSGDConfig) -> Any:
    """Adapter that is to be trained, as a `LoraConfig` of peft."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError(
            "Expected --trainable=lora to come with the library peft: pip install 'dp_curriculum[lora]'."
        ) from None
    alpha: Any = options.lora_scale * options.rank  # peft divides it by the rank; it need not be whole
    return LoraConfig(
        r=options.rank,
        lora_alpha=alpha,
        target_modules=list(_targets(unet, options)),
        modules_to_save=[_CLASSES] if _has_classes(unet) else None,
    )


def _add_lora(unet: UNet2DModel, options: DPSGDConfig, seed: int) -> None:
    _layers_to_extend(unet, options)  # refuses what peft would pass over
    config = lora_config(unet, options)
    from peft import inject_adapter_in_model

    config.modules_to_save = None  # it is trained in its place, and need not be a copy
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what it draws is replaced
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(unet).values():
        _fill(layer.lora_A[ADAPTER].weight, generator)
        nn.init.zeros_(layer.lora_B[ADAPTER].weight)
    if _has_classes(unet):
        unet.class_embedding.requires_grad_(True)


@torch.no_grad()
def _fill(weight: nn.Parameter, generator: torch.Generator) -> None:
    """The usual initial weights of a layer, uniform up to one over the root of its inputs."""
    bound = 1 / math.sqrt(weight[0].numel())
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def _remove_lora(unet: UNet2DModel, *, merge: bool) -> None:
    for name, layer in lora_layers(unet).items():
        if merge:
            layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(unet.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(unet, "peft_config"):
        del unet.peft_config
    unet.requires_grad_(True)


def _chosen_names(unet: UNet2DModel, options: DPSGDConfig) -> set[str]:
    """Names of the network's own weights that are trained."""
    names = {name for name, _ in unet.named_parameters()}
    classes = {name for name in names if name.split(".")[0] == _CLASSES}
    if options.trainable == "all":
        return names
    if options.trainable == "lora":
        return classes
    if options.trainable == "bias_norm":
        norms = {name for name, module in unet.named_modules() if isinstance(module, _NORMS)}
        return classes | {n for n in names if n.endswith(".bias") or n.rpartition(".")[0] in norms}
    blocks = _attention_blocks(unet)
    if not blocks:
        raise ValueError(
            "Expected --trainable=attention to come with a network that has attention blocks: this one has none. Use "
            "bias_norm or lora."
        )
    return classes | {name for name in names if any(name.startswith(f"{block}.") for block in blocks)}


def _attention_blocks(unet: UNet2DModel) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, Attention)]


def _has_classes(unet: UNet2DModel) -> bool:
    return any(True for _ in unet.class_embedding.parameters()) if unet.class_embedding is not None else False


def _targets(unet: UNet2DModel, options: DPSGDConfig) -> Sequence[str]:
    """Ends of the names of the layers that LoRA is added to."""
    if options.lora_target_modules:
        return options.lora_target_modules
    return _PROJECTIONS if _attention_blocks(unet) else _CONVOLUTIONS


def _layers_to_extend(unet: UNet2DModel, options: DPSGDConfig) -> dict[str, nn.Module]:
    """Layers that LoRA is added to, by name."""
    known = {name: module for name, module in unet.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    found: dict[str, nn.Module] = {}
    for target in _targets(unet, options):
        layers = {name: layer for name, layer in known.items() if f".{name}".endswith(f".{target}")}
        if not layers:
            there = ", ".join(sorted({_end_of(name) for name in known}))
            raise ValueError(
                f"Expected --lora_target_modules={target} to name linear layers or convolutions of the network. It "
                f"has: {there}."
            )
        found |= layers
    for name, layer in found.items():
        if options.rank > min(_sides(layer)):
            raise ValueError(
                f"Expected --lora_rank={options.rank} to be at most {min(_sides(layer))}, the smaller side of {name}: "
                "no change of the layer has a larger rank."
            )
    return found


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs of a layer, as those of a matrix."""
    weight: Any = layer.weight
    return weight[0].numel(), weight.shape[0]


def _end_of(name: str) -> str:
    """The last part of a name; the last two where the last is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
