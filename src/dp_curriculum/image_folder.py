"""A folder of images as a dataset: folders alone decide on splits and classes, so that no image does.

`datasets` reads such folders too, and borrows more from the files: classes are those that occur, and a file's name can
make a split. One image more or less, or one of an odd name, would change what becomes of all the others. A folder with
a table of metadata is left to it, told what the splits are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


_IMAGES = frozenset(ImageFolder.EXTENSIONS)
_DATA = frozenset({".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar"})
_SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


class ImageFolderError(ValueError):
    """A folder of images that cannot be read as one; the message says why."""


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images, and no dataset in another form beside them."""
    suffixes = {path.suffix.lower() for path in _visible_files(folder) if not _is_metadata(path)}
    return bool(suffixes & _IMAGES) and not suffixes & _DATA


def open_image_folder(root: Path, split: str, *, option: str = "train_data_dir") -> datasets.IterableDataset:
    """
    Opens a folder of images: `dog/1.png`, or `train/dog/1.png` where all folders at the top are named like splits.

    Two or more sub-folders are the classes, in alphabetical order, with images or without; what lies beside them is
    not read. With fewer there are no classes. Hidden files and folders are passed over. Rows come in order of names.

    Args:
        root (`Path`): The folder.
        split (`str`): "train", or another split that has a folder.
        option (`str`, *optional*, defaults to `"train_data_dir"`): The option that names it, for messages.

    Returns:
        `datasets.IterableDataset` with the columns `image` and, for several classes, `label`; or, where there is a
        table of metadata (`metadata.csv`), with its columns.

    Raises:
        ValueError: If there is no image file, no such split, an archive, or a class has sub-folders of its own.
    """
    files = list(_visible_files(root))
    if archive := next((path for path in files if path.suffix.lower() == ".zip"), None):
        raise ImageFolderError(f"Expected --{option}={root} to hold no archive: unpack {archive.name}.")
    if not any(path.suffix.lower() in _IMAGES for path in files):
        raise ImageFolderError(
            f"Expected --{option}={root} to hold image files: there are none; a dataset in parquet is read "
            f"with --dataset_name={root}."
        )
    splits = _split_folders(root)
    if split not in splits:
        raise ImageFolderError(f"Expected --dataset_split={split} of {root} to be one of {', '.join(splits)}.")
    if any(_is_metadata(path) for path in files):
        patterns = {name: "**" if folder == root else f"{folder.name}/**" for name, folder in splits.items()}
        return datasets.load_dataset(
            "imagefolder", data_dir=str(root), data_files=patterns, drop_labels=True, split=split, streaming=True
        )
    names = sorted({folder.name for one in splits.values() for folder in _folders(one)})
    features = datasets.Features({"image": datasets.Image()})
    classes = tuple(names) if len(names) > 1 else ()
    if classes:
        features["label"] = datasets.ClassLabel(names=names)
        _check_classes(root, splits.values(), option)
    return datasets.IterableDataset.from_generator(
        _rows, features=features, gen_kwargs={"folder": str(splits[split]), "names": classes}
    )


def _rows(folder: str, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if not names:
        yield from ({"image": {"path": str(path), "bytes": None}} for path in _images(_visible_files(Path(folder))))
    for label, name in enumerate(names):
        place = Path(folder) / name
        for path in _images(place.iterdir() if place.is_dir() else ()):
            yield {"image": {"path": str(path), "bytes": None}, "label": label}


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in _IMAGES and not path.name.startswith("."))


def _is_metadata(path: Path) -> bool:
    return path.name in ImageFolder.METADATA_FILENAMES


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


def _split_folders(root: Path) -> dict[str, Path]:
    top = _folders(root)
    if not top or any(folder.name not in _SPLITS for folder in top):
        return {"train": root}
    return {_SPLITS[folder.name]: folder for folder in top}


def _check_classes(root: Path, splits: Iterable[Path], option: str) -> None:
    for folder in splits:
        for name in _folders(folder):
            if _folders(name):
                raise ImageFolderError(
                    f"Expected the classes in --{option}={root} to be folders of images: {name.name} has "
                    "folders of its own; name the folder whose sub-folders are the classes."
                )
