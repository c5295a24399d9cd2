"""A folder of images as a dataset: folders, options and the first line of a table decide on splits and classes.

`datasets` reads such folders too, and borrows more from the files: classes are those that occur, a file's name can
make a split, a value can change the type of its column. One image more or less, or an odd one, would then change what
becomes of all the others.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.data_files import SPLIT_KEYWORDS

from dp_curriculum.config import DataConfig
from dp_curriculum.data.columns import check_no_labels, check_unlabelled, declared_classes, label_index
from dp_curriculum.data.decoding import SUFFIXES
from dp_curriculum.data.images import Batch, ImageSource
from dp_curriculum.data.tables import FILE_NAME, TABLES, column_names, read_table


_SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_BATCH = 256


class ImageFolderError(ValueError):
    """A folder of images that cannot be read as one; the message says why."""


def open_image_folder(root: Path, config: DataConfig, split: str, *, option: str = "train_data_dir") -> ImageSource:
    """
    Opens a folder of images: `dog/1.png`, or `train/dog/1.png` where all folders at the top are named like splits.

    Sub-folders are the classes, in alphabetical order, with images or without, unless `class_names` says which and in
    which order; what lies beside two or more of them is not read. With `label_column`, the classes are in that column
    of the tables that lie beside the images, and a row of a table is a row of the dataset. Hidden files and folders
    are passed over.

    Args:
        root (`Path`): The folder.
        config ([`DataConfig`]): `label_column`, `class_names` and `num_classes` are read.
        split (`str`): "train", or another split that has a folder.
        option (`str`, *optional*, defaults to `"train_data_dir"`): The option that names it, for messages.

    Raises:
        ValueError: If there is no such split or column, an archive, the classes of a column are not declared, or a
            class has sub-folders itself.
    """
    files = list(_visible_files(root))
    if archive := next((path for path in files if path.suffix.lower() == ".zip"), None):
        raise ImageFolderError(f"Expected --{option}={root} to hold no archive: unpack {archive.name}.")
    splits = _split_folders(root)
    if split not in splits:
        raise ImageFolderError(f"Expected --dataset_split={split} of {root} to be one of {', '.join(splits)}.")
    column = None if config.label_column in (None, "none") else config.label_column
    tables = {path: _columns_of(path, column) for path in files if path.name in TABLES}
    if column is not None:
        class_names = _classes_of_tables(tables, column, config, f"--{option}={root}")
        folder, others = splits[split], [other for other in splits.values() if other != splits[split]]
        rows = functools.partial(_table_rows, folder, others, files, tables, column, class_names)
    else:
        class_names = _classes_of_folders(root, splits, config, option)
        if not class_names and config.label_column is None:
            check_no_labels(name for names in tables.values() for name in names or ())
        rows = functools.partial(_folder_rows, splits[split], class_names)
    return ImageSource(
        kind="folder",
        place=str(root.resolve()),
        option=f"--{option}={root}",
        split=split,
        labels=f"column {column}" if column is not None else "sub-folders" if class_names else None,
        class_names=class_names or ("image",),
        unread=(*_unread_columns(tables, column), *_unread_files(files)),
        read=functools.partial(_batched, rows),
        read_beside=functools.partial(_read_tables, tables),
        other_splits=tuple(name for name in splits if name != split),
    )


Row = tuple[Path | None, int]


def _batched(rows: Callable[[], Iterator[Row]]) -> Iterator[Batch]:
    iterator = rows()
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield [path for path, _ in batch], [label for _, label in batch]


# --- classes by folder ---------------------------------------------------------------------------------------------


def _classes_of_folders(root: Path, splits: Mapping[str, Path], config: DataConfig, option: str) -> tuple[str, ...]:
    """The declared classes, or the names of the sub-folders; none where there are no sub-folders."""
    found = sorted({folder.name for one in splits.values() for folder in _folders(one)})
    if config.label_column == "none" or not found:
        check_unlabelled(config, ())
        return ()
    if len(found) > 1:
        _check_classes(root, splits.values(), option)
    declared = tuple(config.class_names)
    if declared and not set(declared) & set(found):
        raise ImageFolderError(
            f"Expected --class_names={' '.join(declared)} to be sub-folders of --{option}={root}: those are "
            f"{' '.join(found)}."
        )
    classes = declared or tuple(found)
    if config.num_classes not in (None, len(classes)):
        raise ImageFolderError(
            f"Expected --num_classes={config.num_classes} to match the {len(classes)} sub-folders of "
            f"--{option}={root}."
        )
    return classes


def _folder_rows(folder: Path, class_names: tuple[str, ...]) -> Iterator[Row]:
    if len(class_names) < 2:
        yield from ((path, 0) for path in _images(_visible_files(folder)))
        return
    for label, name in enumerate(class_names):
        place = folder / name
        yield from ((path, label) for path in _images(place.iterdir() if place.is_dir() else ()))


def _check_classes(root: Path, splits: Iterable[Path], option: str) -> None:
    for folder in splits:
        for name in _folders(folder):
            if _folders(name):
                raise ImageFolderError(
                    f"Expected the classes in --{option}={root} to be folders of images: {name.name} has sub-folders. "
                    "Name the folder whose sub-folders are the classes, or move the images of each class into one "
                    "folder; give --group_size if they are of persons with several images each."
                )


# --- classes by a column of a table --------------------------------------------------------------------------------


def _columns_of(table: Path, column: str | None) -> tuple[str, ...] | None:
    """The columns of a table; of one that nothing reads, as far as its first line can be read."""
    try:
        return column_names(table)
    except ValueError:
        if column is not None:
            raise
        return None


def _classes_of_tables(
    tables: Mapping[Path, tuple[str, ...] | None], column: str, config: DataConfig, given: str
) -> tuple[str, ...]:
    if not tables:
        raise ImageFolderError(
            f"Expected --label_column={column} to name a column of a table beside the images of {given}: there is no "
            f"{' or '.join(TABLES)}."
        )
    for path, names in tables.items():
        if names is not None and column not in names:
            raise ImageFolderError(
                f"Expected --label_column={column} to be a column of {path.name}: it has {', '.join(names)}."
            )
    return declared_classes(column, config, is_text=False)


def _table_rows(
    folder: Path,
    other_splits: Sequence[Path],
    files: Sequence[Path],
    tables: Mapping[Path, tuple[str, ...] | None],
    column: str,
    class_names: tuple[str, ...],
) -> Iterator[Row]:
    """One row per line; a line that names no image that was found here stands for one that cannot be read."""
    listed = {str(path): path for path in _images(files)}
    for table in sorted(tables):
        if any(table.is_relative_to(other) for other in other_splits):
            continue
        for name, value in read_table(table, column):
            path = listed.get(os.path.normpath(table.parent / name)) if name is not None else None
            if path is not None and any(path.is_relative_to(other) for other in other_splits):
                continue
            yield path, label_index(value, class_names)


def _read_tables(tables: Mapping[Path, tuple[str, ...] | None]) -> Iterator[dict[str, list[Any]]]:
    for table, names in tables.items():
        for name in names or ():
            if name != FILE_NAME:
                yield {f"{name} of {table.name}": [value for _, value in read_table(table, name)]}


def _unread_columns(tables: Mapping[Path, tuple[str, ...] | None], column: str | None) -> list[str]:
    named = {(name, path.name) for path, names in tables.items() for name in names or ()}
    whole = {path.name for path, names in tables.items() if names is None and column is None}
    unread = [f"column {name} of {table}" for name, table in sorted(named) if name not in (FILE_NAME, column)]
    return [*unread, *(f"table {name}" for name in sorted(whole))]


# --- files ---------------------------------------------------------------------------------------------------------


def _unread_files(files: Iterable[Path]) -> list[str]:
    """Types of files that are no images; rows are images, so that no row changes this list."""
    others = {path.suffix.lower() for path in files if path.name not in TABLES} - SUFFIXES - {""}
    return [f"files *{suffix}" for suffix in sorted(others)]


def holds_images(folder: Path) -> bool:
    """True if a folder holds images rather than a dataset in parquet or Arrow files."""
    return not any(
        path.suffix.lower() in (".parquet", ".arrow") for path in _visible_files(folder) if path.name not in TABLES
    )


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _visible_files(root: Path) -> Iterator[Path]:
    seen = set()
    for path, inner, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(path))  # a link may lead back
        inner[:] = sorted(
            name for name in inner if not _is_hidden(name) and os.path.realpath(Path(path) / name) not in seen
        )
        yield from (Path(path) / name for name in names if not name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def split_names(root: Path) -> tuple[str, ...]:
    """The splits of a folder of images."""
    return tuple(_split_folders(root))


def _split_folders(root: Path) -> dict[str, Path]:
    top = _folders(root)
    if not top or any(folder.name not in _SPLITS for folder in top):
        return {"train": root}
    return {_SPLITS[folder.name]: folder for folder in top}
