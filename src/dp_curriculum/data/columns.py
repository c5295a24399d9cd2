"""Columns of images and classes, from the types of a dataset alone: no row has an influence."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import datasets

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import NO_CONTRIBUTION


_LABEL_NAMES = frozenset(("label", "labels", "class", "classes", "class_label", "category", "target", "diagnosis"))
_CHANNELS = {"1": 1, "L": 1, "RGB": 3}  # by the mode that the type of a column may state


@dataclass(frozen=True)
class Columns:
    """
    Columns of images and classes, and the names of the classes.

    Args:
        image (`str`): Column of the images.
        label (`str`, *optional*): Column of the classes; `None` where all images are of one class.
        class_names (`tuple[str, ...]`): One name per class, in the order of their indices.
        unread (`tuple[str, ...]`): Columns that nothing reads.
        num_channels (`int`, *optional*): Channels that the type of the image column states, if it does.
        person (`str`, *optional*): Column of the persons; `None` where images are the unit.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...]
    unread: tuple[str, ...]
    num_channels: int | None = None
    person: str | None = None


def find_columns(features: datasets.Features, config: DataConfig) -> Columns:
    """
    Settles the columns from public metadata.

    Args:
        features (`datasets.Features`): Names and types of all columns.
        config ([`DataConfig`]): What is declared: `image_column`, `label_column`, `class_names`, `num_classes`,
            `person_column`.

    Raises:
        ValueError: If a named column is missing or of another type, none or several fit, or the classes are not known.
    """
    image = _find(features, config.image_column, _holds_images, "image_column")
    if image is None:
        raise ValueError(
            f"Expected --image_column to be given: none of {', '.join(features)} holds images by its type."
        )
    if not (_holds_images(features[image]) or _names_images(features[image])):
        raise ValueError(f"Expected --image_column={image} to hold images: its type is {features[image]}.")
    label = _find(features, config.label_column, lambda kind: isinstance(kind, datasets.ClassLabel), "label_column")
    person = _person_column(features, config, taken=(image, label))
    unread = tuple(name for name in features if name not in (image, label, person))
    num_channels = _CHANNELS.get(getattr(features[image], "mode", None) or "")
    if label is None:
        check_unlabelled(config, unread)
        if config.label_column is None:
            check_no_labels(name for name in unread if _may_be_labels(features[name]))
        return Columns(image, None, ("image",), unread, num_channels, person)
    return Columns(image, label, _class_names(label, features[label], config), unread, num_channels, person)


def _person_column(features: datasets.Features, config: DataConfig, *, taken: tuple[str | None, ...]) -> str | None:
    """The column of the persons, if one is named. A number with a fraction, or that may be missing, names no one."""
    name = config.person_column
    if name is None:
        return None
    if name not in features or name in taken:
        others = ", ".join(column for column in features if column not in taken) or "none beside images and classes"
        raise ValueError(f"Expected --person_column={name} to be a column of persons: the dataset has {others}.")
    kind = str(getattr(features[name], "dtype", ""))
    if not kind.startswith(("string", "large_string", "int", "uint")):
        raise ValueError(
            f"Expected --person_column={name} to hold text or whole numbers: its type is {kind or features[name]}. "
            "Save it as one of these."
        )
    return name


def _may_be_labels(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("string", "large_string", "int", "uint", "float", "bool"))


def _find(features: datasets.Features, given: str | None, fits: Any, flag: str) -> str | None:
    if given == "none":
        return None
    if given is not None:
        if given not in features:
            raise ValueError(f"Expected --{flag}={given} to be a column: the dataset has {', '.join(features)}.")
        return given
    found = [name for name, feature in features.items() if fits(feature)]
    if len(found) > 1:
        raise ValueError(f"Expected --{flag} to be given: the dataset has several candidates, {', '.join(found)}.")
    return found[0] if found else None


def _holds_images(feature: Any) -> bool:
    """The type of images, or what is left of it in a file that another program wrote: bytes and a path."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _names_images(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string", "binary", "large_binary")


def _class_names(label: str, feature: Any, config: DataConfig) -> tuple[str, ...]:
    declared = tuple(config.class_names)
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        if declared and declared != names:
            raise ValueError(
                f"Expected --class_names={' '.join(declared)} to be those of --label_column={label}, in their order: "
                f"{' '.join(names)}."
            )
        if config.num_classes not in (None, len(names)):
            raise ValueError(
                f"Expected --num_classes={config.num_classes} to match the {len(names)} names of the labels."
            )
        return names
    kind = str(getattr(feature, "dtype", ""))
    is_text = kind in ("string", "large_string")
    if not is_text and not kind.startswith(("int", "uint", "float", "bool")):
        raise ValueError(
            f"Expected --label_column={label} to hold names, integers or a ClassLabel: its type is {feature}."
        )
    return declared_classes(label, config, is_text=is_text)


def declared_classes(label: str, config: DataConfig, *, is_text: bool) -> tuple[str, ...]:
    """
    The classes of a column that does not name them itself. Counting those that occur would publish which are empty.

    Raises:
        ValueError: If they are not declared; the message says how.
    """
    if config.class_names:
        return tuple(config.class_names)
    if config.num_classes is None or is_text:
        also = "" if is_text else ", or --num_classes for classes 0, 1, ..."
        raise ValueError(
            f"Expected --class_names to be given: --label_column={label} does not name its classes; list all of them"
            f"{also}."
        )
    return tuple(str(index) for index in range(config.num_classes))


def check_unlabelled(config: DataConfig, unread: Collection[str]) -> None:
    """
    Refuses declared classes if nothing gives the class of an image.

    Raises:
        ValueError: If there are; the message names the columns that there are.
    """
    declared = f"--class_names={' '.join(config.class_names)}" if config.class_names else None
    if config.num_classes is not None and config.num_classes > 1:
        declared = declared or f"--num_classes={config.num_classes}"
    if declared is not None:
        columns = f"one of {', '.join(unread)}" if unread else "but there is no column beside the images"
        raise ValueError(f"Expected {declared} to come with --label_column, {columns}.")


def check_no_labels(columns: Iterable[str]) -> None:
    """
    Refuses to train one class beside a column that is named like one of labels: it would be ignored in silence.

    Raises:
        ValueError: If there is such a column; the message says what to type.
    """
    found = next((name for name in columns if name.casefold() in _LABEL_NAMES), None)
    if found is not None:
        raise ValueError(
            f"Expected --label_column to be given: the column {found} looks like classes, and does not name them. "
            f"Type --label_column {found} --class_names NAME NAME ... with all classes, or --label_column none to "
            "train one class."
        )


def label_index(value: Any, class_names: tuple[str, ...]) -> int:
    """
    The class of one row, or `NO_CONTRIBUTION` where its value is no class. A number is an index; a text is a name, or
    else an index in digits.
    """
    if isinstance(value, str):
        text = value.strip()
        if text in class_names:
            return class_names.index(text)
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    try:
        index = int(value)
    except (TypeError, ValueError, OverflowError):
        return NO_CONTRIBUTION
    return index if 0 <= index < len(class_names) and index == value else NO_CONTRIBUTION
