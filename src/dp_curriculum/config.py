"""The configuration of a run: its sections together, and how they are read, changed and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dp_curriculum.config_history import check_not_removed, upgrade
from dp_curriculum.config_sections import (
    DEFAULT_CLOSED_FORM_SHARE,
    DEFAULT_LESSON_SHARE,
    AutoencoderConfig,
    DataConfig,
    DPSGDConfig,
    LessonsConfig,
    ModelConfig,
    PretrainConfig,
    PrivacyBudget,
    PublicImagesConfig,
    RuntimeConfig,
    SamplerConfig,
    StagesConfig,
    StartConfig,
    require,
)


__all__ = [
    "AutoencoderConfig",
    "CurriculumConfig",
    "DataConfig",
    "DPSGDConfig",
    "LessonsConfig",
    "ModelConfig",
    "PretrainConfig",
    "PrivacyBudget",
    "PublicImagesConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "StagesConfig",
    "StartConfig",
    "read_yaml",
]

# Values per image, of closed_form_prior.py, which is not imported: it loads torch.
MAX_CLAMPED_VALUES, MAX_PRIOR_VALUES = 1024, 12_288

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """All sections of a run. Each field of each section is also a command-line flag of the same name."""

    data: DataConfig = field(default_factory=DataConfig)
    privacy: PrivacyBudget = field(default_factory=PrivacyBudget)
    curriculum: StagesConfig = field(default_factory=StagesConfig)
    lessons: LessonsConfig = field(default_factory=LessonsConfig)
    public_images: PublicImagesConfig = field(default_factory=PublicImagesConfig)
    start: StartConfig = field(default_factory=StartConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretraining: PretrainConfig = field(default_factory=PretrainConfig)
    dp_sgd: DPSGDConfig = field(default_factory=DPSGDConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        if self.autoencoder.is_settled:  # else it is checked when the autoencoder has been opened
            self._check_sizes()
        size = self.privacy.public_dataset_size
        require(
            size is None or "dp_sgd" not in self.curriculum.stages or self.dp_sgd.expected_batch_size <= size,
            "expected_batch_size",
            self.dp_sgd.expected_batch_size,
            f"to be at most the number of {self.data.unit}s, --public_dataset_size={size}",
        )
        require(
            self.runtime.dataset_ledger is None or not self.privacy.non_private,
            "dataset_ledger",
            self.runtime.dataset_ledger,
            "to come without --non_private: training without noise would spend any budget",
        )
        name, stages = self.public_images.pretrain_dataset_name, self.curriculum.stages
        named, used = name is not None, "public" in stages
        require(named or not used, "stages", stages, "to come with --pretrain_dataset_name: public names no dataset")
        require(used or not named, "pretrain_dataset_name", name, "to come with the stage public in --stages")
        way = self.public_images.pretrain_dataset_matching
        require(
            way != "moments" or (used and self.has_prior and (self.has_photos or self.has_latents)),
            "pretrain_dataset_matching",
            way,
            "to come with the stage public after moments in closed form, and with photos of more than "
            f"{MAX_CLAMPED_VALUES:,} values or latents",
        )
        count = self.lessons.moment_components
        require(
            count == 1 or (self.has_prior and not self.has_photos and not self.has_latents),
            "moment_components",
            count,
            f"to come with moments in closed form, and images, no latents, of at most {MAX_CLAMPED_VALUES:,} values",
        )
        require(
            self.pretraining.pretrain_steps > 0 or self.has_prior or "dp_sgd" in stages,
            "pretrain_steps",
            0,
            "to be positive without a prior and without dp_sgd: nothing would be learned",
        )
        self._check_start()
        if self.has_latents:
            self._check_latents()

    def _check_sizes(self) -> None:
        """Refuses what does not go with the size of the images, or of their latents."""
        factor, smaller, side = self.model.total_downsampling, self.autoencoder.vae_downsampling or 1, self._side
        of_latents = f", and the autoencoder makes images {smaller} times smaller" if self.has_latents else ""
        require(
            self.data.resolution % (factor * smaller) == 0,
            "resolution",
            self.data.resolution,
            f"to be a multiple of {factor * smaller}: --block_out_channels={self.model.block_out_channels} halves it "
            f"{len(self.model.block_out_channels) - 1} times, after --patch_size={self.model.patch_size}{of_latents}",
        )
        small = self.lessons.lesson_resolution
        largest = f"{side}, the side of the latents" if self.has_latents else "--resolution"
        require(small is None or small <= side, "lesson_resolution", small, f"to be at most {largest}")
        require(
            self.curriculum.shortcut != "closed_form" or self._num_values <= MAX_PRIOR_VALUES,
            "shortcut",
            "closed_form",
            f"to come with at most {MAX_PRIOR_VALUES:,} values per image, num_channels * resolution^2: there are "
            f"{self._num_values:,}; --shortcut pretrain takes any number",
        )
        trainable = self.dp_sgd.trainable
        require(
            trainable == "all" or self.trains_before_noise,
            "trainable",
            trainable,
            "to come with a stage that trains the whole network first, such as public or --shortcut pretrain: what "
            "stays frozen would be random",
        )

    def _check_latents(self) -> None:
        """Refuses what is meant for pixels. An option at its default asks for nothing."""
        name = f"to be left out with --vae_name_or_path={self.autoencoder.vae_name_or_path}"
        level, ways, stages = self.data.background_level, self.pretraining.augmentation, self.curriculum.stages
        require("mode" not in stages, "stages", stages, f"without mode, {name}: it counts black and white pixels")
        require(level == 0.5, "background_level", level, f"{name}: latents lie around their middle")
        require(
            ways in ("affine", "none") and not self.pretraining.augment_flip,
            "augmentation" if ways == "shift" else "augment_flip",
            ways if ways == "shift" else True,
            f"{name}: moved latents are not those of a moved image",
        )

    @property
    def has_latents(self) -> bool:
        """True if images are encoded, and all that is trained on are their latents."""
        return self.autoencoder.vae_name_or_path is not None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """
        Channels, height and width of what lessons and network work on: of the images, or of their latents.

        Raises:
            ValueError: If the channels, or the autoencoder, are not settled yet.
        """
        if not self.autoencoder.is_settled:
            raise ValueError(
                f"Expected --vae_name_or_path={self.autoencoder.vae_name_or_path} to have been opened: the shape of "
                "its latents is not known. Call training.encoding.settle_autoencoder first."
            )
        return self.autoencoder.vae_latent_channels or self.data.channels, self._side, self._side

    @property
    def lesson_share(self) -> float:
        """Fraction of the budget that the lessons may spend: all of it if no noisy steps come after them."""
        if self.privacy.lesson_budget_share is not None:
            return self.privacy.lesson_budget_share
        if "dp_sgd" not in self.curriculum.stages:
            return 1.0
        return DEFAULT_CLOSED_FORM_SHARE if self.has_prior else DEFAULT_LESSON_SHARE

    @property
    def trains_before_noise(self) -> bool:
        """True if the network has been trained when the hard stage begins."""
        is_pretrained = self.start.pretrained_model_name_or_path is not None
        is_taught = self.pretraining.pretrain_steps > 0 and len(self.curriculum.lessons) > self.has_prior
        return is_pretrained or is_taught

    def _check_start(self) -> None:
        """Refuses what does not go with a pretrained network, or with public images alone."""
        start, data, stages = self.start.pretrained_model_name_or_path, self.data, self.curriculum.stages
        require(
            start is None or self.curriculum.shortcut != "closed_form",
            "shortcut",
            "closed_form",
            f"to be left out with --pretrained_model_name_or_path={start}: a network on top of a prior takes what the "
            "prior makes of an image beside it, and that one was trained without",
        )
        if data.has_no_images:
            require(stages == ["public"], "dataset_name", data.dataset_name, "to come with --stages public alone")
            others = {"dataset_ledger": self.runtime.dataset_ledger, "holdout": data.holdout}
            others |= {"public_dataset_size": self.privacy.public_dataset_size, "person_column": data.person_column}
            for name, value in others.items():
                require(value is None, name, value, "to be left out with --dataset_name=none: no image is private")

    @property
    def has_prior(self) -> bool:
        """True if the moments are a prior under the network; otherwise it is pretrained on them."""
        if self.start.pretrained_model_name_or_path is not None:
            return False
        if self.curriculum.shortcut is not None:
            return self.curriculum.shortcut == "closed_form"
        return self.curriculum.stages[0] == "moments" and self._num_values <= MAX_PRIOR_VALUES

    @property
    def has_photos(self) -> bool:
        """True if images are so large that their moments are taken as those of photos are; latents are none."""
        return self._num_values > MAX_CLAMPED_VALUES and not self.has_latents

    @property
    def matches_public_images(self) -> bool:
        """True if public images of other classes are moved to the released moments."""
        way = self.public_images.pretrain_dataset_matching
        return way == "moments" or (way is None and self.has_prior and self.has_photos)

    @property
    def _side(self) -> int:
        """Side of what lessons and network work on; of the images as long as the autoencoder is not settled."""
        return self.data.resolution // (self.autoencoder.vae_downsampling or 1)

    @property
    def _num_values(self) -> int:
        """Per image, or its latents; of grey images as long as the channels are not settled."""
        return (self.autoencoder.vae_latent_channels or self.data.num_channels or 1) * self._side**2

    @classmethod
    def sections(cls) -> dict[str, type]:
        """Name and dataclass of each section, in order."""
        return {f.name: f.default_factory for f in dataclasses.fields(cls)}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, finished: bool = False) -> CurriculumConfig:
        """
        Builds a configuration from nested dictionaries. Those of an earlier version are read where they mean the same.

        Args:
            values (`Mapping`): Sections of fields.
            finished (`bool`, *optional*, defaults to `False`): Whether they are of a run that is not trained any
                further. Removed fields are then left out where they have no equivalent.

        Raises:
            ValueError: If a section or field is unknown, or an earlier version had it and its value has no equivalent.
        """
        sections, values = cls.sections(), upgrade(values, finished=finished)
        _check_known("section", values, sections)
        return cls(**{name: _build(sections[name], values[name] or {}, name) for name in values})

    @classmethod
    def from_yaml(cls, path: str | Path, *, finished: bool = False) -> CurriculumConfig:
        """Reads a YAML file of sections and fields, as `from_dict` does."""
        return cls.from_dict(read_yaml(path), finished=finished)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested dictionaries of JSON types; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    def to_yaml(self, path: str | Path) -> None:
        """Writes the configuration so that `from_yaml` reads the same again."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def replace(self, **fields: Any) -> CurriculumConfig:
        """A copy with single fields of any section changed, as flags do; an unknown field raises `ValueError`."""
        known = {f.name: name for name, section in self.sections().items() for f in dataclasses.fields(section)}
        check_not_removed(fields, known)
        _check_known("field", fields, known)
        values = self.to_dict()
        for name, value in fields.items():
            values[known[name]][name] = value
        return self.from_dict(values)


def read_yaml(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads nested sections from YAML; numbers such as `1e-5`, a string to YAML 1.1, are read as numbers later on."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"Expected --config={path} to exist: give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"Expected --config={path} to be YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(v, dict) or v is None for v in loaded.values()):
        raise ValueError(
            f"Expected --config={path} to hold sections of fields, such as 'privacy: {{target_epsilon: 10}}'."
        )
    return loaded


def _check_known(kind: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(set(given) - set(known), key=str)
    if unknown:
        raise ValueError(f"Unknown {kind} {unknown[0]!r} in the configuration: expected one of {', '.join(known)}.")


def _build(section: type[Section], values: Mapping[str, Any], name: str) -> Section:
    # Not the types of dataclasses.fields: HfArgumentParser replaces those of an optional field.
    annotations = section.__annotations__
    _check_known(f"field of section {name!r}:", values, annotations)
    return section(**{key: _coerce(key, value, annotations[key]) for key, value in values.items()})


def _coerce(name: str, value: Any, annotation: str) -> Any:
    """Checks a YAML value against the field's annotation; ints pass as floats, and '1e-5' is a number."""
    if value is None and "None" in annotation:
        return None
    kind = annotation.split(" |")[0]
    if kind.startswith("list[") and isinstance(value, list):
        return [_coerce(name, entry, kind.removeprefix("list[").removesuffix("]")) for entry in value]
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind.startswith(("str", "Literal")) and isinstance(value, (str, int, float)) and value is not True:
        # YAML reads a bare `no` as false, and `mixed_precision: no` is what a person writes.
        return "no" if value is False else str(value)
    try:
        if kind == "float" and not isinstance(value, bool):
            return float(value)
        if kind == "int" and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"Expected --{name}={value} to be of type {annotation}.")
