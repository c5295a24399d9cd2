"""A network that somebody trained, as the start of a run: read from its files, checked, and given the run's classes.

Two kinds are known: a network of this package, under EDM preconditioning and without a prior, and a diffusers
`UNet2DModel` that was trained as DDPM, whose scheduler says its noise levels and what it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import SIGMA_DATA
from dp_curriculum.diffusion.model_files import PublicModel, find_file, first_line, read_object, settings_of
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule


INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
NAMES = (INDEX, CONFIG_NAME, f"unet/{CONFIG_NAME}", SCHEDULER, f"scheduler/{SCHEDULER}")
OPTION = "--pretrained_model_name_or_path"
_OURS = "DPCurriculumPipeline"
_COMPONENTS = {"unet", "scheduler", "prior"}  # of a pipeline whose network is all that makes its images
_SCHEDULE_FIELDS = tuple(NoiseSchedule.__dataclass_fields__)
# Options of the section `model` that a network settles.
NETWORK_OPTIONS = (
    *("block_out_channels", "layers_per_block", "patch_size", "attention_resolutions", "resnet_time_scale_shift"),
)


@dataclass(frozen=True)
class PretrainedNetwork(PublicModel):
    """
    A network before its weights are read: all that a plan needs to know of it.

    Args:
        schedule ([`NoiseSchedule`], *optional*): That of a network which began as DDPM.
        patch_size (`int`): Side of the patches of pixels that are one place of it.
        class_names (`tuple[str, ...]`): Its classes, "no class" not among them; none of one without classes.
        has_latents (`bool`): Whether it works with an autoencoder, on its latents.
    """

    schedule: NoiseSchedule | None
    patch_size: int
    class_names: tuple[str, ...]
    has_latents: bool = False

    model_class = UNet2DModel

    @property
    def num_channels(self) -> int:
        """Channels of its images."""
        return int(self.fields["out_channels"]) // self.patch_size**2

    def resolution(self) -> int | None:
        """Side of its images, pixels; `None` of a network that does not say it."""
        side = self.fields.get("sample_size")
        side = side[0] if isinstance(side, list) and side and set(side) == {side[0]} else side
        if side is not None and not isinstance(side, int):
            raise ValueError(f"Expected {self.label} to make square images: its sample_size is {side}.")
        return None if side is None else side * self.patch_size

    def options(self) -> dict[str, Any]:
        """The values of [`NETWORK_OPTIONS`] that describe it."""
        blocks, side = self.fields["down_block_types"], (self.resolution() or 0) // self.patch_size
        attends = [side // 2**level for level, block in enumerate(blocks) if "Attn" in block]
        return {
            "block_out_channels": list(self.fields["block_out_channels"]),
            "layers_per_block": int(self.fields.get("layers_per_block", 2)),
            "patch_size": self.patch_size,
            "attention_resolutions": [size for size in attends if size > 0],
            "resnet_time_scale_shift": str(self.fields.get("resnet_time_scale_shift", "default")),
        }

    def build(self, *, resolution: int, num_classes: int) -> UNet2DModel:
        """The network with random weights, for `num_classes` classes and "no class"."""
        fields = {**self.fields, "sample_size": resolution // self.patch_size, "num_class_embeds": num_classes + 1}
        # Dropout has no weights; noise is what keeps the fine-tuned network from learning rows by heart.
        return UNet2DModel.from_config({**fields, "dropout": 0.0})

    def load_into(self, unet: UNet2DModel, class_names: Sequence[str]) -> None:
        """
        Gives a network that [`~PretrainedNetwork.build`] made the weights of this one.

        Classes of the same names in the same order keep their embeddings. Other classes all begin as "no class", which
        for a network that knew no classes is an embedding of zeros: its samples are unchanged.

        Raises:
            ValueError: If there are no weights as safetensors, one is missing, or one is not finite.
        """
        source = self.load().state_dict()
        embedding = source.pop("class_embedding.weight", None)
        if embedding is None:
            rows = torch.zeros_like(unet.class_embedding.weight)
        elif tuple(class_names) == self.class_names:
            rows = embedding
        else:
            rows = embedding[-1:].expand(len(class_names) + 1, -1).clone()
        unet.load_state_dict({**source, "class_embedding.weight": rows})


def read_network(folder: Path, label: str) -> PretrainedNetwork:
    r"""
    Reads what a folder says of a network. Its weights are not opened, and need not be there.

    Args:
        folder (`Path`): That of a pipeline, or of a `UNet2DModel` beside the configuration of its scheduler.
        label (`str`): The option that named it, with its value, for messages.

    Raises:
        ValueError: If it is another kind of model, or does not say what it was trained for. The message says what to
            do.
    """
    folder = _pipeline_folder(folder)
    index = read_object(folder / INDEX, label) if (folder / INDEX).is_file() else {}
    is_ours = index.get("_class_name") == _OURS
    parts = _check_components(index, label, is_ours=is_ours)
    config = find_file(folder, CONFIG_NAME, "unet")
    if config is None:
        raise ValueError(
            f"Expected {label} to be a pipeline with a UNet2DModel, or a UNet2DModel: it holds no {CONFIG_NAME} and "
            f"no unet/{CONFIG_NAME}. Name the folder within it with --subfolder."
        )
    fields = _network_fields(read_object(config, label), label)
    scheduler = find_file(folder, SCHEDULER, "scheduler")
    if scheduler is None:
        raise ValueError(
            f"Expected {label} to say what its network was trained for: it holds no scheduler/{SCHEDULER}. Put that "
            "of its training there."
        )
    schedule = _schedule(read_object(scheduler, label), label)
    if is_ours and index.get("noise_schedule") is not None:  # ours, which began as DDPM
        schedule = _as_schedule(index["noise_schedule"], label)
    patch_size = int(index.get("patch_size") or 1) if is_ours else 1
    network = PretrainedNetwork(
        label=label,
        fields=fields,
        schedule=schedule,
        patch_size=patch_size,
        class_names=_class_names(index, fields, label, is_ours=is_ours or schedule is None),
        has_latents="vae" in parts,
        folder=folder,
        weights=config.parent / SAFETENSORS_WEIGHTS_NAME,
        others=tuple(path for path in (folder / INDEX, config, scheduler) if path.is_file()),
    )
    network.resolution()
    return network


def check_options(config: CurriculumConfig, network: PretrainedNetwork) -> None:
    """
    Refuses options that ask for another network than the one that is loaded.

    An option at its default asks for nothing: it cannot be told from one that was not given.

    Raises:
        ValueError: The message names the option, and what to do.
    """
    unset, found = type(config.model)(), network.options()
    for name in NETWORK_OPTIONS:
        asked = getattr(config.model, name)
        if asked not in (getattr(unset, name), found[name]):
            shown = " ".join(map(str, asked)) if isinstance(asked, list) else asked
            raise ValueError(
                f"Expected --{name}={shown} to be left out: the network is that of {network.label}, with "
                f"{found[name]}."
            )
    if network.has_latents and not config.has_latents:
        raise ValueError(
            f"Expected --vae_name_or_path to be given: the network of {network.label} works on the latents of its "
            "autoencoder, the folder vae beside it. Name that model, with --vae_subfolder vae."
        )
    side, smaller = network.resolution(), config.autoencoder.vae_downsampling or 1
    if side is not None and side * smaller != config.data.resolution:
        raise ValueError(
            f"Expected --resolution={config.data.resolution} to be {side * smaller}, the side of the images of "
            f"{network.label}: add --resolution {side * smaller}, to which your images are resized, or start from "
            "another network."
        )


def check_channels(config: CurriculumConfig, network: PretrainedNetwork) -> None:
    """
    Refuses images of other channels than those of the network, once they are settled.

    Raises:
        ValueError: The message has what to do.
    """
    asked, found = config.input_shape[0], network.num_channels
    if asked != found and config.has_latents:
        raise ValueError(
            f"Refusing to start from {network.label}: its network has {found} channels, and the latents of "
            f"--vae_name_or_path={config.autoencoder.vae_name_or_path} have {asked}. Start from a network that was "
            "trained on such latents."
        )
    if asked != found:
        raise ValueError(
            f"Expected --num_channels={asked} to be {found}, the channels of the images of {network.label}: add "
            f"--num_channels {found}, to which your images are converted, or start from another network."
        )


def _check_components(index: Mapping[str, Any], label: str, *, is_ours: bool) -> set[str]:
    """Names of the components of a pipeline; refuses one whose network does not make its images, or latents, alone."""
    parts = {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    beyond = sorted(parts - _COMPONENTS - ({"vae"} if is_ours else set()))
    if beyond:
        raise ValueError(
            f"Refusing to start from {label}: it is a {index.get('_class_name')}, whose network works with its "
            f"{beyond[0]}. Start from a pipeline of a UNet2DModel and a scheduler alone, such as a DDPMPipeline."
        )
    if "prior" in parts:
        raise ValueError(
            f"Refusing to start from {label}: its network adds to a prior, the moments of its own images, and is no "
            "start for others. Start from a model that was trained with --shortcut pretrain, or without moments."
        )
    return parts


def _network_fields(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    kind = config.get("_class_name", "model that does not say its class")
    if kind != "UNet2DModel":
        cure = "Start from a UNet2DModel, such as that of a DDPMPipeline or of a model of this package."
        why = ", which is made for text or other conditions" if kind == "UNet2DConditionModel" else ""
        raise ValueError(f"Refusing to start from {label}: its network is a {kind}{why}. {cure}")
    full = settings_of(UNet2DModel, config, label)
    wanted = {"time_embedding_type": "positional", "center_input_sample": False, "class_embed_type": None}
    for name, value in wanted.items():
        if full[name] != value:
            raise ValueError(
                f"Refusing to start from {label}: its network has {name}={full[name]}, and only {value} is a function "
                "of any noise level as it is used here. Start from another one."
            )
    if full["in_channels"] != full["out_channels"]:
        raise ValueError(
            f"Refusing to start from {label}: its network takes {full['in_channels']} channels and gives "
            f"{full['out_channels']}, so it predicts more or less than an image. Start from another one."
        )
    return full


def _schedule(config: Mapping[str, Any], label: str) -> NoiseSchedule | None:
    """The noise schedule that the configuration of a scheduler states; `None` of EDM preconditioning."""
    if str(config.get("_class_name")).startswith("EDM"):
        sigma_data = config.get("sigma_data", 0.5)
        if config.get("prediction_type", "epsilon") != "epsilon" or abs(sigma_data - SIGMA_DATA) > 1e-6:
            raise ValueError(
                f"Refusing to start from {label}: its scheduler has sigma_data={sigma_data} and prediction_type="
                f"{config.get('prediction_type')}, and models of this package have {SIGMA_DATA:.4f} and epsilon."
            )
        return None
    for name in _SCHEDULE_FIELDS:
        if config.get(name) is None:
            cure = ' Add "prediction_type": "epsilon" to a copy of it if the network predicts noise.'
            raise ValueError(
                f"Refusing to start from {label}: its {SCHEDULER} does not say its {name}, and a guess would be wrong "
                f"without a sign.{cure if name == 'prediction_type' else ''}"
            )
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(name):
            raise ValueError(
                f"Refusing to start from {label}: its {SCHEDULER} has {name}, and only schedules by name, with a "
                "finite noise level at each step, are known. Start from another model."
            )
    return _as_schedule({name: config[name] for name in _SCHEDULE_FIELDS}, label)


def _as_schedule(fields: Mapping[str, Any], label: str) -> NoiseSchedule:
    try:
        return NoiseSchedule(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Refusing to start from {label}: {first_line(error)}") from None


def _class_names(index: Mapping[str, Any], fields: Mapping[str, Any], label: str, *, is_ours: bool) -> tuple[str, ...]:
    rows = fields.get("num_class_embeds")
    if rows is None:
        return ()
    if not is_ours:
        raise ValueError(
            f'Refusing to start from {label}: its network has {rows} classes, and nothing says which of them is "no '
            'class". Start from a network without classes, or from a model of this package.'
        )
    names = index.get("id2label") or {}
    return tuple(str(names.get(str(row), row)) for row in range(rows - 1))


def _pipeline_folder(folder: Path) -> Path:
    """The folder of the pipeline where its network was named: what it was trained for is said there."""
    inside = folder.name == "unet" and not (folder / INDEX).is_file()
    return folder.parent if inside and (folder.parent / INDEX).is_file() else folder
