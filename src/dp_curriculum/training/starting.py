"""The model that a run starts from: found, checked, pinned to a revision, and told on the card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.places import is_folder_name
from dp_curriculum.diffusion.pretrained import OPTION, PretrainedNetwork, check_channels, check_options
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule
from dp_curriculum.sharing.model_card import LOCAL_FOLDER
from dp_curriculum.sharing.model_source import NETWORK, ModelSource, open_source
from dp_curriculum.sharing.starting_words import (
    NAMES_THE_DATASET,
    NO_GUARANTEE,
    PUBLIC_ONLY,
    SPENT_ON_THE_SAME,
    spent_before,
    starting_weights,
)


@dataclass(frozen=True)
class Start:
    """
    A model that a run starts from.

    Args:
        network ([`PretrainedNetwork`]): Its network.
        facts (`Mapping[str, str]`): What the report says of it, among the public data.
        warnings (`tuple[str, ...]`): What its owner should hear before anything is spent.
    """

    network: PretrainedNetwork
    facts: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def schedule(self) -> NoiseSchedule | None:
        """Noise schedule of a network that began as DDPM."""
        return self.network.schedule

    def check_channels(self, config: CurriculumConfig) -> None:
        """Refuses images of other channels, once they are settled."""
        check_channels(config, self.network)

    def build(self, config: CurriculumConfig, num_classes: int) -> UNet2DModel:
        """The network with random weights, in the shape of the run."""
        self.check_channels(config)
        return self.network.build(resolution=config.input_shape[1], num_classes=num_classes)

    def describe(self) -> str:
        """A line that says what is loaded."""
        kind = "EDM" if self.schedule is None else f"DDPM, {self.schedule.prediction_type}"
        found = self.network.options()
        return (
            f"start: {self.network.label}, revision {self.facts['revision']}, licence {self.facts['license']}; "
            f"{kind}, block_out_channels {' '.join(map(str, found['block_out_channels']))}"
        )


def settle_start(config: CurriculumConfig, *, has_weights: bool = True) -> tuple[CurriculumConfig, Start | None]:
    r"""
    Opens the model that a configuration names, and settles the options that follow from it.

    The configuration that is returned has the options of its network, and the commit of the Hub or the sha256 of a
    folder as its `revision`: a resumed run that finds another one is refused, as for any changed option.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        has_weights (`bool`, *optional*, defaults to `True`): Whether the weights are needed; a plan needs none.

    Raises:
        ValueError: If there is no such model, it is none to start from, or an option contradicts it; nothing is spent.
    """
    options = config.start
    if options.pretrained_model_name_or_path is None:
        return config, None
    source = open_source(
        options.pretrained_model_name_or_path,
        NETWORK,
        revision=options.revision,
        subfolder=options.subfolder,
        has_weights=has_weights,
    )
    check_options(config, source.model)
    settled = config.replace(
        pretrained_model_name_or_path=source.name, revision=source.revision, **source.model.options()
    )
    if config.data.num_channels is not None or config.has_latents:
        check_channels(settled, source.model)
    facts, warnings = _provenance(source, config.data)
    return settled, Start(source.model, facts, tuple(warnings))


def _provenance(source: ModelSource[Any], private: DataConfig) -> tuple[dict[str, str], list[str]]:
    """The facts of a report, and warnings, from what is published beside a model."""
    facts = starting_weights(
        name=LOCAL_FOLDER if source.is_local else source.name, revision=source.revision, license=source.license
    )
    warnings = []
    if names_dataset(source, private):
        facts["warning"] = NAMES_THE_DATASET
        warnings.append(warning_of_name(f"{OPTION}={source.name}"))
    report = source.report
    if report is None:
        return facts, warnings
    facts["privacy"] = _own_privacy(report)
    if not _is_same_dataset(report, private):
        return facts, warnings
    if report.get("private") is not True:
        raise ValueError(
            f"Refusing to start from {OPTION}={source.name}: by its own report it was trained on the same dataset "
            "without a guarantee, so nothing would protect your images. Start from another model."
        )
    if report.get("mechanisms"):
        facts["warning"] = SPENT_ON_THE_SAME
        warnings.append(
            f"{OPTION}={source.name}: by its own report it spent epsilon {report.get('epsilon')} on the same dataset. "
            "Both budgets add up, and the report of this run counts its own alone. A dataset ledger counts all "
            "(docs/officer.md)."
        )
    return facts, warnings


def warning_of_name(label: str) -> str:
    """A warning for the owner of the images, about a public model whose card names them."""
    return (
        f"{label}: its card, or its report, names the dataset that is private here. If it was trained on your images, "
        "nothing protects them. The card of this run says so."
    )


def _own_privacy(report: Mapping[str, Any]) -> str:
    """A phrase on what its own report says of the images that it was trained on. It is not checked here."""
    epsilon, delta = report.get("epsilon"), report.get("delta")
    if report.get("private") is not True or not isinstance(epsilon, float) or not isinstance(delta, float):
        return NO_GUARANTEE
    return spent_before(epsilon, delta) if report.get("mechanisms") else PUBLIC_ONLY


def _is_same_dataset(report: Mapping[str, Any], private: DataConfig) -> bool:
    protected = report.get("protected_dataset")
    name = protected.get("name") if isinstance(protected, Mapping) else None
    return isinstance(name, str) and _short(name) in _private_names(private)


def names_dataset(source: ModelSource[Any], private: DataConfig) -> bool:
    """True if a card, or the public data of a report, names the private dataset; one of the Hub also in its text."""
    wanted, found = _private_names(private), set(_datasets(source))
    if wanted & found:
        return True
    on_hub = private.train_data_dir is None and not private.is_embedded and not is_folder_name(private.dataset_name)
    words = re.findall(r"[\w./-]+", source.card) if on_hub else []
    return bool(wanted & {_short(word.rstrip(".")) for word in words})


def _datasets(source: ModelSource[Any]) -> Iterator[str]:
    named = source.metadata.get("datasets")
    for name in [named] if isinstance(named, str) else named if isinstance(named, list) else []:
        yield _short(str(name))
    public = source.report.get("public_data") if source.report is not None else None
    for data in public if isinstance(public, list) else []:
        if isinstance(data, Mapping) and data.get("name") != LOCAL_FOLDER:
            yield _short(str(data.get("name")))


def _private_names(private: DataConfig) -> set[str]:
    """The last part of the name of the private images, as [`~places.share_images`] compares them."""
    return set() if private.has_no_images else {_short(private.train_data_dir or private.dataset_name)}


def _short(name: str) -> str:
    return re.sub("[-_.]", "", Path(name).name).casefold()
