"""Fields of earlier configurations: what replaced each of them, and how a file that has them is read.

`FIELDS` has one row per field that was removed, renamed or moved, under the section and name that it had. To add one:

* removed, and now a constant: `Former("it is always 1.2", constant=1.2)`;
* moved or renamed, and of the same meaning: `Former("use --new_name", moved_to="section.new_name")`;
* of an exact equivalent, or following from other fields: `Former("use --new_name", translate=function)`. The function
  takes the `Values` of the file and returns the new fields, `{"section.new_name": value}`; `None` where there is none.

The words end the line that refuses the field, so they say what to use. The flag of a removed name is always refused.
A file is read where it means the same as before, because the `config.yaml` of a run names every field. Then add the
field to the tables of `tests/training/test_config_history.py`.

`FLAGS` has the flags of single commands that were no fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dp_curriculum.config_sections import ModelConfig


_UNSET = object()


@dataclass(frozen=True)
class Values:
    """The fields of a file, as `section.name`."""

    given: Mapping[str, Any]

    def get(self, field: str, default: Any) -> Any:
        """The value of a field, or `default`: the value that it had where a file did not name it."""
        return self.given.get(field, default)


@dataclass(frozen=True)
class Former:
    """
    Replacement of a field that was removed, renamed or moved.

    Args:
        instead (`str`): What to use, in words; the end of a sentence that begins with "was removed:".
        constant (*optional*): The value that it always has now.
        moved_to (`str`, *optional*): `section.name` of the field that means the same.
        translate (`Callable`, *optional*): From the values of a file to the new fields; `None` without an equivalent.
    """

    instead: str
    constant: Any = _UNSET
    moved_to: str | None = None
    translate: Callable[[Values], dict[str, Any] | None] | None = None

    def upgraded(self, field: str, values: Values) -> dict[str, Any] | None:
        """The new fields that mean what a file says; `None` if there are none."""
        value = values.given[field]
        if self.moved_to is not None:
            return {self.moved_to: value}
        if self.translate is not None:
            return self.translate(values)
        return {} if _same(value, self.constant) else None


def _number(value: Any) -> float | None:
    """A value of YAML as a number: ints are floats, and `1e-5` is text to YAML 1.1."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _same(value: Any, expected: Any) -> bool:
    is_number = isinstance(expected, (int, float)) and not isinstance(expected, bool)
    if is_number:
        return _number(value) == expected
    return type(value) is type(expected) and bool(value == expected)


_AMOUNTS = {"augment_rotation": 10.0, "augment_translation": 0.08, "augment_scaling": 0.1, "augment_shear": 0.1}
_AUGMENTATIONS = {
    (0.0, 0.0, 0.0, 0.0): "none",
    (0.0, 0.03, 0.05, 0.0): "shift",
    tuple(_AMOUNTS.values()): "affine",
}


def _augmentation(values: Values) -> dict[str, Any] | None:
    amounts = tuple(_number(values.get(f"pretraining.{name}", default)) for name, default in _AMOUNTS.items())
    name = _AUGMENTATIONS.get(amounts)  # type: ignore[arg-type]
    return None if name is None else {"pretraining.augmentation": name}


def _public(values: Values) -> dict[str, Any] | None:
    private = values.given["runtime.hub_private_repo"]
    return {"runtime.public": not private} if isinstance(private, bool) else None


def _derived(name: str) -> Callable[[Values], dict[str, Any] | None]:
    """A field of the model that follows from others; equal to what follows, it says nothing."""

    def translate(values: Values) -> dict[str, Any] | None:
        shape = ("block_out_channels", "attention_resolutions")
        given = {field: values.given[f"model.{field}"] for field in shape if f"model.{field}" in values.given}
        try:
            follows = getattr(ModelConfig(**given), name)
        except (TypeError, ValueError):
            return None
        return {} if _same(values.given[f"model.{name}"], follows) else None

    return translate


_FAMILIES = {"mean": "central", "mode": "central", "moments": "moment", "frequency": "frequency"}
_FORMER_STAGES = ["mean", "dp_sgd"]  # what a file without stages meant


def _for_lessons(
    suffix: str, successor: str, defaults: Mapping[str, Any]
) -> Callable[[Values], dict[str, Any] | None]:
    """A field that each kind of lesson had for itself: its equivalent, where the lessons of the file agree."""

    def translate(values: Values) -> dict[str, Any] | None:
        stages = values.get("curriculum.stages", _FORMER_STAGES)
        if not isinstance(stages, list):
            return None
        families = {_FAMILIES[stage] for stage in stages if stage in _FAMILIES} & set(defaults)
        found = [values.get(f"{name}_images.{name}_{suffix}", defaults[name]) for name in sorted(families)]
        if any(value != found[0] for value in found):
            return None
        shared = suffix == "noise_multiplier" and values.get("curriculum.lesson_budget_share", None) is not None
        named = {} if "curriculum.stages" in values.given else {"curriculum.stages": _FORMER_STAGES}
        return {**named, **({} if shared or not found or found[0] is None else {successor: found[0]})}

    return translate


def _post_process(values: Values) -> dict[str, Any] | None:
    filters = (
        values.get("central_images.central_median_filter", 3), values.get("central_images.central_sharpen", True)
    )  # fmt: skip
    return {(3, True): {}, (1, False): {"lessons.central_post_process": False}}.get(filters)


def _lesson_fields() -> dict[str, Former]:
    """Fields that the sections of single lessons had."""
    every = ("central", "moment", "frequency")
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "noise_multiplier": ("privacy.lesson_noise_multiplier", {"central": 20.0, "moment": 20.0, "frequency": 25.0}),
        "resolution": ("lessons.lesson_resolution", dict.fromkeys(every)),
        "max_image_norm": ("lessons.lesson_max_image_norm", dict.fromkeys(every[:2])),
        "center": ("data.background_level", dict.fromkeys(every[:2], 0.5)),
    }
    fields = {
        f"{name}_images.{name}_{suffix}": Former(
            f"use --{successor.partition('.')[2]}", translate=_for_lessons(suffix, successor, defaults)
        )
        for suffix, (successor, defaults) in rows.items()
        for name in defaults
    }
    moved = (
        "central_images.central_images_per_class", "central_images.central_sample_rate",
        "moment_images.moment_max_residual_norm", "frequency_images.frequency_length_scale",
    )  # fmt: skip
    for field in moved:
        name = field.partition(".")[2]
        fields[field] = Former("it is in the section lessons", moved_to=f"lessons.{name}")
    constants = {
        "central_images.central_num_bins": 2, "moment_images.moment_own_share": 0.5,
        "moment_images.moment_max_rank": 64, "frequency_images.num_frequencies": 5000,
        "frequency_images.frequency_fit_steps": 600, "frequency_images.frequency_fit_batch_size": 32,
        "frequency_images.frequency_learning_rate": 3e-3, "frequency_images.frequency_images_per_class": 1000,
    }  # fmt: skip
    for field, constant in constants.items():
        fields[field] = Former(f"it is always {constant:g}", constant=constant)
    for name in ("central_median_filter", "central_sharpen"):
        fields[f"central_images.{name}"] = Former(
            "use --no_central_post_process to turn both off", translate=_post_process
        )
    return fields


_AUGMENT = "use --augmentation none, shift or affine"
FIELDS: dict[str, Former] = {
    **_lesson_fields(),
    "curriculum.lesson_budget_share": Former("it is in the section privacy", moved_to="privacy.lesson_budget_share"),
    "pretraining.mix_lessons": Former("it is in the section curriculum", moved_to="curriculum.mix_lessons"),
    "pretraining.label_dropout": Former("it is in the section model", moved_to="model.label_dropout"),
    "pretraining.pretrain_ema_decay": Former("it is always 0.999", constant=0.999),
    "pretraining.pretrain_p_std": Former("it is always 1.2; --pretrain_p_mean can be chosen", constant=1.2),
    **{f"pretraining.{name}": Former(_AUGMENT, translate=_augmentation) for name in _AMOUNTS},
    "dp_sgd.dp_p_std": Former("it is always 1.2; --dp_p_mean can be chosen", constant=1.2),
    "dp_sgd.dp_lr_scheduler": Former(
        "the learning rate is constant after its warm-up, --dp_warmup_steps", constant="constant"
    ),
    "model.sigma_data": Former("it is always the square root of 1/3", constant=(1 / 3) ** 0.5),
    "model.attention_head_dim": Former(
        "it follows from --block_out_channels", translate=_derived("attention_head_dim")
    ),
    "model.norm_num_groups": Former("it follows from --block_out_channels", translate=_derived("norm_num_groups")),
    "sampler.s_tmin": Former("it is always 0.05; --s_churn can be chosen", constant=0.05),
    "sampler.s_tmax": Former("it is always 50; --s_churn can be chosen", constant=50.0),
    "sampler.s_noise": Former("it is always 1; --s_churn can be chosen", constant=1.0),
    "sampler.sigma_min": Former("it is always 0.002", constant=0.002),
    "sampler.sigma_max": Former("it is always 80", constant=80.0),
    "runtime.tracker_project_name": Former("the project is always named dp_curriculum", constant="dp_curriculum"),
    "runtime.hub_private_repo": Former(
        "a repository is created as private, or as public with --public", translate=_public
    ),
}

_REMOVED = {
    name: former.instead
    for field, former in FIELDS.items()
    if (name := field.partition(".")[2]) != (former.moved_to or "").partition(".")[2]
}

FLAGS: dict[str, dict[str, str]] = {
    "audit": {"quick": "a quick audit is the default; use --full for a full one"},
    "evaluate": {"stages": "use --each_stage"},
    "train": {"resume": "use --resume_from_checkpoint latest"},
}


def upgrade(values: Mapping[str, Any], *, finished: bool = False) -> dict[str, Any]:
    """
    The sections and fields of a file, those of earlier versions as the present ones that mean the same.

    Args:
        values (`Mapping`): Sections of fields.
        finished (`bool`, *optional*, defaults to `False`): Whether they are of a run that is not trained any further.
            A field without an equivalent is then left out: such a run is still checked, evaluated and shared.

    Raises:
        ValueError: If a field of an earlier version has a value without an equivalent, or stands beside its successor
            with another value.
    """
    sections = {section: dict(fields or {}) for section, fields in values.items()}
    given = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    found = [field for field in given if field in FIELDS]
    new: dict[str, Any] = {}
    for field in found:
        name, value = field.partition(".")[2], given[field]
        fields = FIELDS[field].upgraded(field, Values(given))
        if fields is None and finished:
            continue
        if fields is None:
            raise ValueError(_removed(f"{name}={value}", FIELDS[field].instead))
        for successor, meaning in fields.items():
            if successor in given and given[successor] != meaning:
                raise ValueError(
                    f"Expected {field}={given[field]} to be left out beside {successor}={given[successor]}."
                )
        new.update(fields)
    for field in found:
        section, _, name = field.partition(".")
        del sections[section][name]
    for successor, meaning in new.items():
        section, _, name = successor.partition(".")
        sections.setdefault(section, {})[name] = meaning
    # A section all of whose fields were removed may be one that there is no more.
    return {section: fields for section, fields in sections.items() if fields or not values.get(section)}


def check_not_removed(names: Iterable[str], known: Collection[str]) -> None:
    """
    Refuses the name of a field that was removed or renamed.

    Raises:
        ValueError: If one of `names` is such a field, and not among the `known` ones.
    """
    for name in names:
        if name in _REMOVED and name not in known:
            raise ValueError(_removed(name, _REMOVED[name]))


def check_flags(command: str, args: Iterable[str], known: Collection[str]) -> None:
    """
    Refuses a flag that was removed or renamed.

    Args:
        command (`str`): As in `dp-curriculum COMMAND`.
        args (`Iterable[str]`): The arguments, up to `--`.
        known (`Collection[str]`): Flags that the command has, such as `--num_images`.

    Raises:
        ValueError: If one of `args` is such a flag.
    """
    own = FLAGS.get(command, {})
    for arg in args:
        flag = arg.partition("=")[0]
        if arg == "--":
            return
        if not arg.startswith("--") or flag in known:
            continue
        name = flag.removeprefix("--").replace("-", "_")
        if name in own:
            raise ValueError(_removed(name, own[name]))
        check_not_removed([name, name.removeprefix("no_")], ())


def _removed(option: str, instead: str) -> str:
    return f"The option --{option} was removed: {instead}."
