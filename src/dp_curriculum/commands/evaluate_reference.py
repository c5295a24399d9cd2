"""Real images that generated ones are compared with: which they are, who may see them, and how they are read."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.holdout import held_out_part, training_part
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.places import dataset_place, is_folder_name, share_images
from dp_curriculum.data.reading import load_images, read_images
from dp_curriculum.data.sources import open_rows, reference_split
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing.hub import is_public_dataset


HELD_OUT = "holdout"  # the split of the images that a run held out


@dataclass(frozen=True)
class Reference:
    """
    Facts about the real images.

    Args:
        split (`str`): Their split; [`HELD_OUT`] for the images that the run held out.
        name (`str`): Dataset and split, as the report names them.
        was_trained_on (`bool`): Whether training images may be among them.
        is_public (`bool`): Whether anybody may see them.
        data ([`DataConfig`]): Their place, in the shape of the generated images.
    """

    split: str
    name: str
    was_trained_on: bool
    is_public: bool
    data: DataConfig


def find_reference(given: argparse.Namespace, run: RunFolder | None, pipeline: DPCurriculumPipeline) -> Reference:
    """
    Finds the images to compare with, and reads none of them.

    Args:
        given (`argparse.Namespace`): Arguments of `evaluate`.
        run ([`RunFolder`], *optional*): The run that made the model, where it is there.
        pipeline ([`DPCurriculumPipeline`]): The model.

    Raises:
        ValueError: If no such images were held out, or a split is not known or may hold training images and
            `--leakage` is given.
    """
    trained, data = _training_data(run, pipeline), _reference_data(run, given, pipeline)
    found = _find(given, run, trained, data)
    if given.leakage and _has_unknown_split(given):
        raise ValueError(
            "Expected split to be given with leakage and a Dataset in memory: the images that it holds have to be "
            "others than those of the training. Name their split, 'test' for example."
        )
    if given.leakage and found.was_trained_on:
        raise ValueError(
            f"Refusing to measure --leakage on --split={found.split}: it may hold training images. Name another split."
        )
    return found


def _find(given: argparse.Namespace, run: RunFolder | None, trained: DataConfig | None, data: DataConfig) -> Reference:
    in_memory = _is_in_memory(given)
    has_unknown_split = _has_unknown_split(given)
    own = given.reference_dataset is None or in_memory or (trained is not None and _same_place(trained, data))
    holds_out = run is not None and trained is not None and trained.holdout is not None
    if has_unknown_split and holds_out:
        raise ValueError(
            f"Expected split to be given with a Dataset in memory, because the run held images out: {HELD_OUT!r} for "
            "those of the images that it was made from, 'test' for other images."
        )
    if given.split is not None:
        split = given.split
    elif own:  # the only split of a training set is the one that was trained on
        split = HELD_OUT if holds_out and not in_memory else "test"
    else:
        split = reference_split(data)
    if split == HELD_OUT and not (holds_out and own):
        raise ValueError(
            f"Expected --split={HELD_OUT} to come with a run that held images out, and its own dataset: train with "
            "--holdout 0.1, or name another split."
        )
    if split == HELD_OUT:
        place = "dataset in memory" if in_memory else Path(dataset_place(data)).name
        return Reference(split, f"{place} (held out of the training)", False, given.reference_is_public, data)
    compared = dataclasses.replace(data, dataset_split=split)
    name = "dataset in memory" if in_memory else Path(data.train_data_dir or data.dataset_name).name
    if in_memory and trained is not None:  # its place says nothing, so it is that of the training
        compared = dataclasses.replace(trained, dataset_split=split)
    was_trained_on = trained is not None and not has_unknown_split and share_images(trained, compared)
    is_public = given.reference_is_public or (not in_memory and _is_public(data))
    return Reference(split, name if has_unknown_split else f"{name} ({split})", was_trained_on, is_public, data)


def _is_in_memory(given: argparse.Namespace) -> bool:
    return not (given.reference_dataset is None or isinstance(given.reference_dataset, str))


def _has_unknown_split(given: argparse.Namespace) -> bool:
    """True if the caller did not say which images these are."""
    return _is_in_memory(given) and given.split is None and not isinstance(given.reference_dataset, dict)


def _same_place(one: DataConfig, other: DataConfig) -> bool:
    return dataset_place(one) == dataset_place(other)


def _is_public(data: DataConfig) -> bool:
    """True if anybody may see the images. What is not known is taken to be private."""
    if data.is_embedded:
        return True
    if data.train_data_dir is not None or is_folder_name(data.dataset_name):
        return False
    return is_public_dataset(data.dataset_name)


def load_reference(
    given: argparse.Namespace, run: RunFolder | None, found: Reference, pipeline: DPCurriculumPipeline
) -> PrivateImages:
    """
    Reads the real images.

    Args:
        given (`argparse.Namespace`): Arguments of `evaluate`; the message of an error names them.
        run ([`RunFolder`], *optional*): The run that made the model, where it is there.
        found ([`Reference`]): Their place.
        pipeline ([`DPCurriculumPipeline`]): The model, whose classes they must have.

    Raises:
        ValueError: If they cannot be read, or have other classes.
    """
    reference = _read(given, run, found)
    _check_classes(pipeline, reference, has_names=found.data.is_embedded and not _is_in_memory(given))
    return reference


def _read(given: argparse.Namespace, run: RunFolder | None, found: Reference) -> PrivateImages:
    data = found.data
    split = data.dataset_split if found.split == HELD_OUT else found.split
    if found.split != HELD_OUT and not given.leakage:  # then nothing asks whose images these are
        data = dataclasses.replace(data, person_column=None, person_from=None)
    try:
        if _is_in_memory(given):
            reference = read_images(open_rows(given.reference_dataset, data, split=split), data)
        else:
            reference = load_images(data, split)
    except ValueError as error:
        message = str(error).replace("--dataset_split", "--split")
        if given.reference_dataset is not None:
            message = message.replace("--dataset_name", "--reference_dataset")
        elif given.split is None:
            message += (
                " The run held no images out: train with --holdout 0.1, or name other images with --reference_dataset."
            )
        raise ValueError(message) from None
    if found.split == HELD_OUT:
        assert run is not None, "`find_reference` asks for a run that held images out"
        return held_out_part(reference, *_holdout(run))
    return reference


def load_training(run: RunFolder, pipeline: DPCurriculumPipeline) -> PrivateImages:
    """Reads the images that a run was trained on, without those that it held out."""
    data = _in_shape(CurriculumConfig.from_yaml(run.config, finished=True).data, pipeline)
    training = load_images(data, data.dataset_split)
    return training if data.holdout is None else training_part(training, *_holdout(run))


def _holdout(run: RunFolder) -> tuple[bytes, float]:
    """Key and share of the images that a run held out."""
    share = CurriculumConfig.from_yaml(run.config, finished=True).data.holdout
    if share is None or not run.holdout_key.is_file():
        raise ValueError(
            f"Expected {run.holdout_key} to exist: without it, the images that were held out are not known. Restore "
            "the file."
        )
    return run.holdout_key.read_bytes(), share


def _training_data(run: RunFolder | None, pipeline: DPCurriculumPipeline) -> DataConfig | None:
    """Place of the training images; for a model without its run, as far as its report states it."""
    if run is not None:
        return CurriculumConfig.from_yaml(run.config, finished=True).data
    name = ((pipeline.privacy or {}).get("protected_dataset") or {}).get("name")
    return None if name is None else DataConfig(dataset_name=name)


def _reference_data(run: RunFolder | None, given: argparse.Namespace, pipeline: DPCurriculumPipeline) -> DataConfig:
    """Place of the reference: the run's own dataset, as it was read for training, or another one."""
    data = None if run is None else CurriculumConfig.from_yaml(run.config, finished=True).data
    if isinstance(given.reference_dataset, str):
        other = DataConfig(dataset_name=given.reference_dataset)
        if data is None:
            data = other
        elif dataset_place(other) != dataset_place(data):  # other images, brought to the same conventions
            data = dataclasses.replace(
                other, intensity_range=data.intensity_range, alpha_background=data.alpha_background
            )
    data = data or DataConfig()  # a dataset in memory: `_check` asks for one where there is no run
    columns = {name: getattr(given, name) for name in ("image_column", "label_column", "num_classes", "class_names")}
    data = dataclasses.replace(data, **{name: value for name, value in columns.items() if value not in (None, [])})
    return _in_shape(data, pipeline)


def _in_shape(data: DataConfig, pipeline: DPCurriculumPipeline) -> DataConfig:
    return dataclasses.replace(data, resolution=pipeline.image_size[0], num_channels=pipeline.num_channels)


def _check_classes(pipeline: DPCurriculumPipeline, reference: PrivateImages, *, has_names: bool) -> None:
    """
    Refuses a reference whose class i is not the model's class i. What has no names is taken on trust, unless it
    `has_names` that only look like none: digits.
    """
    ours = tuple(sorted(pipeline.labels, key=pipeline.labels.__getitem__))
    theirs = reference.class_names
    unnamed = tuple(str(index) for index in range(len(theirs)))
    on_trust = not has_names and (unnamed in (ours, theirs) or not ours)
    same = len(theirs) == pipeline.num_classes and (theirs == ours or on_trust)
    if not same:
        raise ValueError(
            f"Expected the reference to have the classes of the model, {pipeline.num_classes} ({_shorten(ours)}): it "
            f"has {len(theirs)} ({_shorten(theirs)}). Classes are the ClassLabel names of a column, in their order."
        )


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
