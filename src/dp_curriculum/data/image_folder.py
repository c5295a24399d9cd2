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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.data_files import SPLIT_KEYWORDS

from dp_curriculum.config import DataConfig
from dp_curriculum.data.columns import check_no_labels, check_unlabelled, declared_classes, label_index
from dp_curriculum.data.decoding import SUFFIXES
from dp_curriculum.data.images import NO_CONTRIBUTION, Batch, ImageSource
from dp_curriculum.data.persons import person_name
from dp_curriculum.data.tables import FILE_NAME, TABLES, check_person_type, column_names, read_table


_SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_BATCH = 256


class ImageFolderError(ValueError):
    """A folder of images that cannot be read as one; the message says why."""


def open_image_folder(root: Path, config: DataConfig, split: str, *, option: str = "train_data_dir") -> ImageSource:
    """
    Opens a folder of images: `dog/1.png`, or `train/dog/1.png` where all folders at the top are named like splits.

    Sub-folders are the classes, in alphabetical order, with images or without, unless `class_names` says which and in
    which order; what lies beside two or more of them is not read. With `label_column`, the classes are in that column
    of the tables that lie beside the images, and a row of a table is a row of the dataset. So it is with
    `person_column`. With `person_from`, a folder is a person: `dog/ann/1.png`, or `ann/1.png` where folders are no
    classes. Hidden files and folders are passed over.

    Args:
        root (`Path`): The folder.
        config ([`DataConfig`]): `label_column`, `class_names`, `num_classes`, `person_column` and `person_from` are
            read.
        split (`str`): "train", or another split that has a folder.
        option (`str`, *optional*, defaults to `"train_data_dir"`): The option that names it, for messages.

    Raises:
        ValueError: If there is no such split or column, an archive, the classes of a column are not declared, or a
            class has sub-folders itself, and they are not of persons.
    """
    files = list(_visible_files(root))
    if archive := next((path for path in files if path.suffix.lower() == ".zip"), None):
        raise ImageFolderError(f"Expected --{option}={root} to hold no archive: unpack {archive.name}.")
    splits = _split_folders(root)
    if split not in splits:
        raise ImageFolderError(f"Expected --dataset_split={split} of {root} to be one of {', '.join(splits)}.")
    column = None if config.label_column in (None, "none") else config.label_column
    person = config.person_column
    read = [name for name in (column, person) if name is not None]
    tables = {path: _columns_of(path, bool(read)) for path in files if path.name in TABLES}
    for name, flag in ((column, "label_column"), (person, "person_column")):
        if name is not None:
            _check_column(tables, name, f"--{flag}={name}", f"--{option}={root}")
    if column is not None:
        class_names = declared_classes(column, config, is_text=False)
    else:
        class_names = _classes_of_folders(root, splits, config, option)
        if not class_names and config.label_column is None:
            check_no_labels(name for names in tables.values() for name in names or () if name != person)
    folder = splits[split]
    rows: Callable[[], Iterator[Row]]
    if read:
        table_rows = _TableRows(folder, tuple(splits.values()), files, tables, column, person, class_names)
        rows = functools.partial(table_rows.read, has_person_folders=config.person_from is not None)
    elif config.person_from is not None:
        rows = functools.partial(_person_folder_rows, folder, class_names)
    else:
        rows = functools.partial(_folder_rows, folder, class_names)
    return ImageSource(
        kind="folder",
        place=str(root.resolve()),
        option=f"--{option}={root}",
        split=split,
        labels=f"column {column}" if column is not None else "sub-folders" if class_names else None,
        class_names=class_names or ("image",),
        unread=(*_unread_columns(tables, read), *_unread_files(files)),
        read=functools.partial(_batched, rows, has_persons=config.unit == "person"),
        read_beside=functools.partial(_read_tables, tables),
        other_splits=tuple(name for name in splits if name != split),
        persons=f"column {person}" if person is not None else "sub-folders" if config.person_from else None,
    )


Row = tuple[Path | None, int, str | None]  # image, class, person


def _batched(rows: Callable[[], Iterator[Row]], *, has_persons: bool) -> Iterator[Batch]:
    iterator = rows()
    while batch := list(itertools.islice(iterator, _BATCH)):
        paths, labels, persons = map(list, zip(*batch))
        yield paths, labels, persons if has_persons else []


# --- classes by folder ---------------------------------------------------------------------------------------------


def _classes_of_folders(root: Path, splits: Mapping[str, Path], config: DataConfig, option: str) -> tuple[str, ...]:
    """The declared classes, or the names of the sub-folders; none where there are no sub-folders."""
    found = sorted({folder.name for one in splits.values() for folder in _folders(one)})
    if config.label_column == "none" or not found:
        check_unlabelled(config, ())
        return ()
    if config.person_from is not None:
        _check_persons_in_classes(root, splits.values(), option)
    elif len(found) > 1:
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
        yield from ((path, 0, None) for path in _images(_visible_files(folder)))
        return
    for label, name in enumerate(class_names):
        place = folder / name
        yield from ((path, label, None) for path in _images(place.iterdir() if place.is_dir() else ()))


def _person_folder_rows(folder: Path, class_names: tuple[str, ...]) -> Iterator[Row]:
    """Images of the folders of persons, in those of their classes if there are any; a name is one person in each."""
    places = [(label, folder / name) for label, name in enumerate(class_names)] or [(0, folder)]
    for label, place in places:
        for path in _images(_visible_files(place) if place.is_dir() else ()):
            yield path, label, _person_of(path, place)


def _person_of(path: Path, place: Path) -> str | None:
    """The folder of `place` that an image is in; `None` where it lies beside the folders."""
    parts = path.relative_to(place).parts
    return person_name(parts[0]) if len(parts) > 1 else None


def _check_classes(root: Path, splits: Iterable[Path], option: str) -> None:
    for folder in splits:
        for name in _folders(folder):
            if _folders(name):
                raise ImageFolderError(
                    f"Expected the classes in --{option}={root} to be folders of images: {name.name} has sub-folders. "
                    "Name the folder whose sub-folders are the classes, or move the images of each class into one "
                    "folder. If they are folders of persons, type --person_from folder."
                )


def _check_persons_in_classes(root: Path, splits: Iterable[Path], option: str) -> None:
    classes = [name for folder in splits for name in _folders(folder)]
    if not any(_folders(name) for name in classes):
        raise ImageFolderError(
            f"Expected the classes in --{option}={root} to hold folders of persons, because of --person_from: none "
            "does. If the folders are the persons, type --label_column none."
        )


# --- classes by a column of a table --------------------------------------------------------------------------------


def _columns_of(table: Path, is_read: bool) -> tuple[str, ...] | None:
    """The columns of a table; of one that nothing reads, as far as its first line can be read."""
    try:
        return column_names(table)
    except ValueError:
        if is_read:
            raise
        return None


def _check_column(tables: Mapping[Path, tuple[str, ...] | None], column: str, given: str, place: str) -> None:
    if not tables:
        raise ImageFolderError(
            f"Expected {given} to name a column of a table beside the images of {place}: there is no "
            f"{' or '.join(TABLES)}."
        )
    for path, names in tables.items():
        if column == FILE_NAME or (names is not None and column not in names):
            raise ImageFolderError(f"Expected {given} to be a column of {path.name}: it has {', '.join(names or ())}.")
        if given.startswith("--person_column"):
            check_person_type(path, column)


@dataclass(frozen=True)
class _TableRows:
    """
    Rows of tables, one per line. A line that names no image that was found here stands for one that cannot be read.

    Args:
        folder (`Path`): The split.
        splits (`tuple[Path, ...]`): All splits.
        files (`Sequence[Path]`): All that was found.
        tables (`Mapping`): Columns of each table.
        label, person (`str`, *optional*): Columns of the classes and of the persons.
        class_names (`tuple[str, ...]`): The classes; of folders where there is no column.
    """

    folder: Path
    splits: tuple[Path, ...]
    files: Sequence[Path]
    tables: Mapping[Path, tuple[str, ...] | None]
    label: str | None
    person: str | None
    class_names: tuple[str, ...]

    def read(self, *, has_person_folders: bool) -> Iterator[Row]:
        """Yields the rows; with folders of persons, the person of an image is the folder that it is in."""
        listed = {str(path): path for path in _images(self.files)}
        for table in sorted(self.tables):
            if self._is_elsewhere(table):
                continue
            columns = [name for name in (self.label, self.person) if name is not None]
            for name, *values in read_table(table, *columns):
                path = listed.get(os.path.normpath(table.parent / name)) if name is not None else None
                if path is not None and self._is_elsewhere(path):
                    continue
                named = person_name(values[-1]) if self.person is not None else None
                if has_person_folders and path is not None:
                    named = _person_of(path, self.folder)
                yield path, self._class_of(path, values[0]), named

    def _is_elsewhere(self, path: Path) -> bool:
        return any(path.is_relative_to(other) for other in self.splits if other != self.folder)

    def _class_of(self, path: Path | None, value: Any) -> int:
        if self.label is not None:
            return label_index(value, self.class_names)
        if not self.class_names:
            return 0
        name = None if path is None or path.parent.parent != self.folder else path.parent.name
        return self.class_names.index(name) if name in self.class_names else NO_CONTRIBUTION


def _read_tables(tables: Mapping[Path, tuple[str, ...] | None]) -> Iterator[dict[str, list[Any]]]:
    for table, names in tables.items():
        for name in names or ():
            if name != FILE_NAME:
                yield {f"{name} of {table.name}": [value for _, value in read_table(table, name)]}


def _unread_columns(tables: Mapping[Path, tuple[str, ...] | None], read: Sequence[str]) -> list[str]:
    named = {(name, path.name) for path, names in tables.items() for name in names or ()}
    whole = {path.name for path, names in tables.items() if names is None and not read}
    unread = [f"column {name} of {table}" for name, table in sorted(named) if name not in (FILE_NAME, *read)]
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
