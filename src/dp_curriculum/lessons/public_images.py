"""Public images: a dataset that anybody may see, as the first lesson. Nothing private is read, nothing is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import ImageSource, PrivateImages
from dp_curriculum.data.places import DIGITS, is_folder_name, share_images
from dp_curriculum.lessons.lesson import Lesson, Tensors, draw_rows
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.runtime.processes import get_logger, process_state


logger = get_logger(__name__)


def check_not_private(config: CurriculumConfig, resolve: Callable[[str], str] | None = None) -> None:
    """
    Refuses the private dataset as the public one: its images would be learned outside the guarantee.

    It compares names, places and splits, and opens nothing: a copy of another name is not found out.

    Args:
        config ([`CurriculumConfig`]): Its sections `public_images` and `data` are read.
        resolve (`Callable`, *optional*): The id that a dataset of this name has on the Hub now. It is asked for names
            that are no folders.

    Raises:
        ValueError: If they are the same, or overlap.
    """
    options, private = config.public_images, config.data
    if options.pretrain_dataset_name is None:
        return
    public = _public_data(config)
    pairs = [(public, private)]
    if resolve is not None:
        pairs.append((_resolved(public, resolve), _resolved(private, resolve)))
    if any(share_images(*pair) for pair in pairs):
        raise ValueError(
            f"Expected --pretrain_dataset_name={options.pretrain_dataset_name} with --pretrain_dataset_split="
            f"{options.pretrain_dataset_split} to be other images than the private ones: nothing protects those. If "
            "they only share a name, use a copy in a folder of another name."
        )


def _resolved(data: DataConfig, resolve: Callable[[str], str]) -> DataConfig:
    on_hub = data.train_data_dir is None and data.dataset_name != DIGITS and not is_folder_name(data.dataset_name)
    return dataclasses.replace(data, dataset_name=resolve(data.dataset_name)) if on_hub else data


def _public_data(config: CurriculumConfig) -> DataConfig:
    options = config.public_images
    return DataConfig(
        dataset_name=str(options.pretrain_dataset_name),
        dataset_config_name=options.pretrain_dataset_config_name,
        dataset_split=options.pretrain_dataset_split,
        label_column="none",
        resolution=config.data.resolution,
        num_channels=config.data.num_channels,
        alpha_background=config.data.alpha_background,
    )


def public_source(config: CurriculumConfig) -> ImageSource:
    """
    The public dataset with its own classes, for a model of public images alone.

    Raises:
        ValueError: If there is no such dataset, configuration or split, or several columns may hold its classes.
    """
    try:
        return _open_images(dataclasses.replace(_public_data(config), label_column=None))
    except ValueError as error:
        raise ValueError(_of_public_images(str(error), config)) from None


def open_public_dataset(config: CurriculumConfig, class_names: tuple[str, ...]) -> tuple[ImageSource, DataConfig]:
    """
    The public dataset, and how its rows are to be read: in the shape of the private ones.

    Labels are read only where its classes are the private ones, by name and order; else every image is one whose class
    is not known, which a log line says.

    Raises:
        ValueError: If there is no such dataset, configuration or split, or it holds no images.
    """
    unlabelled = _public_data(config)
    labelled = dataclasses.replace(unlabelled, label_column=None)
    try:
        source = _open_images(unlabelled)
    except ValueError as error:
        raise ValueError(_of_public_images(str(error), config)) from None
    try:
        with_labels = _open_images(labelled)
    except ValueError:  # several columns may hold classes: none is the right one
        return source, unlabelled
    same = with_labels.labels is not None and with_labels.class_names == class_names
    return (with_labels, labelled) if same else (source, unlabelled)


def _of_public_images(message: str, config: CurriculumConfig) -> str:
    """A refusal in terms of the options of this lesson."""
    if "--dataset_" in message:
        return message.replace("--dataset_", "--pretrain_dataset_")
    name = config.public_images.pretrain_dataset_name
    return f"Expected --pretrain_dataset_name={name} to have one column of images by its type: {message}"


def check_public_dataset(config: CurriculumConfig, class_names: tuple[str, ...]) -> None:
    """
    Refuses what [`read_public_images`] would, as far as the first image that can be read.

    Raises:
        ValueError: As [`open_public_dataset`]; or if no row can be read.
    """
    source, data = open_public_dataset(config, class_names)
    from dp_curriculum.data.reading import decoded_rows  # takes a second to import, which a plan need not wait for

    if not any(decoded.readable.any() for decoded in decoded_rows(source, data, [], [])):
        raise _no_images(config)


def _no_images(config: CurriculumConfig) -> ValueError:
    return ValueError(
        f"Expected --pretrain_dataset_name={config.public_images.pretrain_dataset_name} to hold images: none of its "
        "rows can be read."
    )


def _open_images(data: DataConfig) -> ImageSource:
    from dp_curriculum.data.sources import open_images  # takes a second to import, which a plan need not wait for

    return open_images(data)


def read_public_images(config: CurriculumConfig, class_names: tuple[str, ...]) -> PrivateImages:
    """
    Reads the public dataset into memory.

    Args:
        config ([`CurriculumConfig`]): Its sections `public_images` and `data` are read.
        class_names (`tuple[str, ...]`): The classes of the private images.

    Returns:
        [`PrivateImages`], public in spite of its name: labels are `len(class_names)`, the class of no name, where the
        dataset has other classes.

    Raises:
        ValueError: As [`open_public_dataset`]; or if no row can be read.
    """
    source, data = open_public_dataset(config, class_names)
    from dp_curriculum.data.reading import read_images  # takes a second to import

    images = read_images(source, data)
    readable = images.labels >= 0  # public: a row that cannot be read is left out
    if not readable.any():
        raise _no_images(config)
    labels = images.labels[readable]
    if data.label_column == "none" and not config.data.has_no_images:
        process_state()  # before the first log line
        become = "each class learns those that suit it, moved to its released moments"
        if not config.matches_public_images:
            become = "its images are learned without one"
        logger.info(f"the public dataset has other classes: {become}")
        labels = labels.new_full(labels.shape, len(class_names))
    return PrivateImages(images.images[readable], labels, class_names)


def _prepare(
    tensors: Tensors, config: CurriculumConfig, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensors:
    public = read_public_images(config, class_names)
    return {"images": public.images, "labels": public.labels}


def _plan(config: CurriculumConfig, noise_multiplier: float) -> tuple[PlannedMechanism, ...]:
    return ()


def _release(*private: Any) -> Tensors:
    return {}


PUBLIC = Lesson(
    plan=_plan,
    release=_release,
    prepare=_prepare,
    draw=draw_rows,
    check=check_public_dataset,
    draws_pixels=True,
)
