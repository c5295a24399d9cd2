"""Files of a model that somebody published: what they say is checked, and its weights are safetensors alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.utils import CONFIG_NAME


@dataclass(frozen=True)
class PublicModel:
    """
    A model before its weights are read.

    Args:
        label (`str`): The option that named it, with its value, for messages.
        fields (`Mapping`): Its configuration.
        folder (`Path`): Where its files lie, on the machine that opened it.
        weights (`Path`): File of its weights, there or not.
        others (`tuple[Path, ...]`): The other files that it is made from.
    """

    label: str
    fields: Mapping[str, Any]
    folder: Path
    weights: Path
    others: tuple[Path, ...]

    model_class: ClassVar[type[ModelMixin]]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is made from, as far as they are there."""
        return (*self.others, *([self.weights] if self.weights.is_file() else []))

    def load(self) -> Any:
        """
        The model as it is on disk, in float32; its names of weights are those of this version of diffusers.

        Raises:
            ValueError: If there are no weights as safetensors, one is missing, or one is not finite.
        """
        try:
            model, info = self.model_class.from_pretrained(
                self.weights.parent,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                torch_dtype=torch.float32,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"Expected {self.label} to hold its weights: {first_line(error)}") from None
        odd = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if odd:
            raise ValueError(
                f"Expected the weights of {self.label} to be those of its {CONFIG_NAME}: {odd[0]} is missing, or "
                "belongs to another network."
            )
        for name, value in model.state_dict().items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"Expected the weights of {self.label} to be finite: {name} is not.")
        return model


def check_weights(model: PublicModel, names: Iterable[str]) -> None:
    """
    Refuses a model without weights as safetensors, in one file.

    Args:
        model ([`PublicModel`]): The model.
        names (`Iterable[str]`): Names of all files that its owner put beside its configuration.

    Raises:
        ValueError: It says if they are there as pickles.
    """
    parts = sorted(model.weights.parent.glob("*.index.json"))
    if parts:  # diffusers would go by the list, which may name pickles
        raise ValueError(
            f"Refusing to load {model.label}: {parts[0].name} says that its weights are in several files. Save it "
            "in one with save_pretrained(folder, max_shard_size='1TB')."
        )
    if model.weights.is_file():
        return
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if not pickles:
        raise ValueError(f"Expected {model.label} to hold {model.weights.name} beside its {CONFIG_NAME}.")
    raise ValueError(
        f"Refusing to load {model.label}: it has its weights as pickles alone ({pickles[0]}), which can run code "
        "and are never read. Ask its owner for safetensors, or convert it where you trust it: "
        f"{model.model_class.__name__}.from_pretrained(folder).save_pretrained(other_folder)."
    )


def find_file(folder: Path, name: str, room: str) -> Path | None:
    """A file of a component, in the room of that component or, as diffusers allows, in the folder itself."""
    return next((path for path in (folder / room / name, folder / name) if path.is_file()), None)


def read_object(path: Path, label: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {path.name} of {label} to be JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path.name} of {label} to hold a JSON object.")
    return values


def settings_of(model_class: type[ModelMixin], config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """
    All settings of a model by name, those that its configuration leaves out at their defaults; lists for tuples.

    Raises:
        ValueError: If it has a setting that this version of diffusers does not know.
    """
    known = {
        name: value for name, value in inspect.signature(model_class.__init__).parameters.items() if name != "self"
    }
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"Expected {label} to be of this version of diffusers: its configuration has a {unknown[0]}.")
    full = {name: given.get(name, known[name].default) for name in sorted(known)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in full.items()}


def first_line(error: BaseException) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
