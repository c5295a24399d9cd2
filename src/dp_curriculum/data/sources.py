"""Sources of images: a folder, a dataset on the Hub or in parquet files, a dataset in memory, the embedded digits."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from dp_curriculum.config import DataConfig
from dp_curriculum.data.columns import Columns, find_columns, label_index
from dp_curriculum.data.image_folder import ImageFolderError, holds_images, open_image_folder, split_names
from dp_curriculum.data.images import Batch, ImageReference, ImageSource
from dp_curriculum.data.persons import person_name
from dp_curriculum.data.places import DIGITS, NUM_TRAIN_DIGITS, dataset_place


_BATCH = 256


def digits_dataset(split: str = "train") -> datasets.Dataset:
    """
    The embedded dataset: scikit-learn's 1,797 handwritten 8×8 digits (UCI, Alpaydin and Kaynak 1998).

    The split is fixed: 1,437 training images drawn with a constant seed, the other 360 for testing.

    Raises:
        ValueError: If `split` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"Expected --dataset_split={split} to be train or test for --dataset_name={DIGITS}.")
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    rows = order[:NUM_TRAIN_DIGITS] if split == "train" else order[NUM_TRAIN_DIGITS:]
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target[rows].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def open_images(config: DataConfig, split: str | None = None) -> ImageSource:
    """
    Opens what `config` names, without reading a row or writing a copy to a cache.

    Args:
        config ([`DataConfig`]): Names the source, and declares what its metadata does not state.
        split (`str`, *optional*): The split; `config.dataset_split` if unset.

    Raises:
        ValueError: If there is no such dataset, configuration, split or column, its classes are not known, or its
            types would be taken from its rows.
    """
    split = split or config.dataset_split
    name, data_dir = config.dataset_name, config.train_data_dir
    if config.has_no_images:
        raise ValueError(f"Expected --dataset_name={name} to name images here: none are private with --stages public.")
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(f"Expected --train_data_dir={data_dir} to be a folder.")
        if _is_saved(Path(data_dir)):
            raise ValueError(
                f"Expected --train_data_dir={data_dir} to hold image files: it holds a saved dataset. Type "
                f"--dataset_name {data_dir} instead."
            )
        return open_image_folder(Path(data_dir), config, split)
    if name == DIGITS:
        return open_rows(digits_dataset(split), config, kind="embedded", place=DIGITS, split=split)
    folder = Path(name) if Path(name).is_dir() else None
    try:
        if folder is not None and _is_saved(folder):
            return _open_saved(folder, config, split)
        if folder is not None and holds_images(folder):
            return open_image_folder(folder, config, split, option="dataset_name")
        rows, splits = _stream(name, config.dataset_config_name, split)
    except (ImageFolderError, ColumnTypesError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Expected --dataset_name={name} with --dataset_split={split} to be a readable dataset: {reason}"
        ) from None
    kind = "hub" if folder is None else "folder"
    place = dataset_place(config)
    return open_rows(rows, config, kind=kind, place=place, split=split, root=folder, other_splits=splits)


def reference_split(config: DataConfig) -> str:
    """The split to compare with if none is named: `test`, or the only one of a folder."""
    name = config.train_data_dir or config.dataset_name
    folder = None if config.is_embedded or not Path(name).is_dir() else Path(name)
    if folder is not None and (folder / "state.json").is_file():
        return _only_split(datasets.load_from_disk(str(folder)))
    if folder is None or _is_saved(folder) or not holds_images(folder):
        return "test"
    names = split_names(folder)
    return names[0] if len(names) == 1 else "test"


class ColumnTypesError(ValueError):
    """A layout in which rows decide on the types of columns, or on the classes."""


def _stream(name: str, config_name: str | None, split: str) -> tuple[datasets.IterableDataset, tuple[str, ...]]:
    """
    The rows of parquet files, and the names of the other splits. They are read once, straight into memory; the
    ordinary way writes every pixel to a cache.
    """
    builder = datasets.load_dataset_builder(name, config_name)
    if not isinstance(builder, (Parquet, Arrow)):
        kind = type(builder).__module__.rsplit(".", 1)[-1]
        raise ColumnTypesError(
            f"Refusing to read --dataset_name={name}: in {kind} data the rows decide on types and classes, so that "
            "one row could be seen. Save it as parquet files with Dataset.to_parquet, or download it and name the "
            "folder of images with --train_data_dir."
        )
    rows = builder.as_streaming_dataset(split=split)
    others = tuple(other for other in map(str, builder.config.data_files or ()) if other != split)
    return (rows if rows.features is not None else rows._resolve_features()), others


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _open_saved(folder: Path, config: DataConfig, split: str) -> ImageSource:
    """Opens what `save_to_disk` wrote."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict) and split not in saved:
        raise ValueError(f"its splits are {', '.join(saved)}")
    if isinstance(saved, datasets.Dataset) and split != _only_split(saved):
        raise ValueError(f"its only split is {_only_split(saved)}")
    return open_rows(saved, config, kind="folder", place=dataset_place(config), split=split, root=folder)


def _only_split(saved: datasets.Dataset) -> str:
    name = str(saved.split or "train").split("[")[0]
    return name if name.isidentifier() else "train"


def open_rows(
    rows: datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset,
    config: DataConfig,
    *,
    kind: str = "memory",
    place: str | None = None,
    split: str | None = None,
    root: Path | None = None,
    other_splits: tuple[str, ...] = (),
) -> ImageSource:
    """
    A dataset of `datasets` as a source of images.

    Args:
        rows (`datasets.Dataset` or `datasets.DatasetDict`): With a column of images and, for several classes, one of
            classes. Of several splits, `split` is taken.
        config ([`DataConfig`]): What is declared of its columns and classes.
        kind (`str`, *optional*, defaults to `"memory"`): As of an [`ImageSource`].
        place (`str`, *optional*): The same; `config.dataset_name` if unset.
        split (`str`, *optional*): The same; `config.dataset_split` if unset.
        root (`Path`, *optional*): Folder in which rows may name files; `config.image_root` goes before it. Without
            one, an image is what a row holds, and a row that only names a file contributes zero.
        other_splits (`tuple[str, ...]`, *optional*): Splits of the source beside this one.

    Raises:
        ValueError: If it is a stream of someone else's, lacks the split, has a transform, or its columns do not fit.
    """
    split = split or config.dataset_split
    if isinstance(rows, dict):
        other_splits = tuple(name for name in rows if name != split)
        if split not in rows:
            raise ValueError(f"Expected --dataset_split={split} to be a split of the dataset: {', '.join(rows)}.")
        rows = rows[split]
    if isinstance(rows, datasets.IterableDataset) and kind == "memory":
        raise ValueError(
            "Expected dataset to be a datasets.Dataset: Poisson sampling needs random access, which a streaming "
            "dataset lacks; load it without streaming=True."
        )
    if isinstance(rows, datasets.Dataset) and rows.format["type"] == "custom":
        raise ValueError("Expected dataset to have no transform: apply it with map(), or call reset_format().")
    if config.person_from is not None:
        raise ValueError(
            f"Expected --person_from={config.person_from} to come with a folder of images: name the column of the "
            "persons with --person_column."
        )
    assert rows.features is not None, "its opener resolves them"
    columns = find_columns(rows.features, config)
    folder = Path(config.image_root) if config.image_root is not None else root
    return ImageSource(
        kind=kind,
        place=place or config.dataset_name,
        option=f"--dataset_name={config.dataset_name}",
        split=split,
        labels=None if columns.label is None else f"column {columns.label}",
        class_names=columns.class_names,
        unread=tuple(f"column {name}" for name in columns.unread),
        read=functools.partial(_batches, rows, columns, None if folder is None else os.path.realpath(folder)),
        read_beside=functools.partial(_beside, rows, columns),
        image_column=columns.image,
        other_splits=other_splits,
        num_channels=columns.num_channels,
        persons=None if columns.person is None else f"column {columns.person}",
    )


def _batches(rows: datasets.Dataset | datasets.IterableDataset, columns: Columns, root: str | None) -> Iterator[Batch]:
    names = [name for name in (columns.image, columns.label, columns.person) if name is not None]
    tables = (
        rows.select_columns(names)
        .cast_column(columns.image, datasets.Image(decode=False))
        .with_format("arrow")
        .iter(batch_size=_BATCH)
    )
    try:
        for table in tables:
            images = [_reference(value, root) for value in table.column(columns.image).to_pylist()]
            yield images, _labels(table, columns), _persons(table, columns)
    except Exception as error:
        # Its text may hold a row.
        raise ValueError(f"Expected the dataset to be readable to its end: {type(error).__name__}.") from None


def _beside(rows: datasets.Dataset | datasets.IterableDataset, columns: Columns) -> Iterator[dict[str, list[Any]]]:
    names = [name for name in (*columns.unread, columns.label, columns.person) if name is not None]
    if names:
        for table in rows.select_columns(names).with_format("arrow").iter(batch_size=_BATCH):
            yield {name: table.column(name).to_pylist() for name in names}


def _labels(table: pa.Table, columns: Columns) -> list[int]:
    if columns.label is None:
        return [0] * len(table)
    return [label_index(value, columns.class_names) for value in table.column(columns.label).to_pylist()]


def _persons(table: pa.Table, columns: Columns) -> list[str | None]:
    if columns.person is None:
        return []
    return [person_name(value) for value in table.column(columns.person).to_pylist()]


def _reference(value: dict[str, Any] | None, root: str | None) -> ImageReference:
    """The bytes of an image, or a file inside `root`: a row that names any other place names nothing."""
    if value is None or value["bytes"] is not None:
        return None if value is None else value["bytes"]
    path = value["path"]
    if path is None or root is None or "://" in path or "\0" in path:
        return None
    resolved = os.path.realpath(os.path.join(root, path))
    return Path(resolved) if Path(resolved).is_relative_to(root) else None
