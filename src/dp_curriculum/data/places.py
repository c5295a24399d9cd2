"""Places of datasets: folders and names on the Hub, distinguished once, and whether two may be the same images."""

from __future__ import annotations

import re
from pathlib import Path

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.config_sections import CHANNELS_NEEDED
from dp_curriculum.config_sections import DIGITS as DIGITS
from dp_curriculum.config_sections import NO_IMAGES as NO_IMAGES


NUM_TRAIN_DIGITS = 1437  # of the embedded digits


def settle_places(config: CurriculumConfig) -> CurriculumConfig:
    """
    The configuration with each folder of images by its absolute path.

    `patients/2024` is a folder in one working directory and looks like a name on the Hub in another. A run asks once,
    when it opens its datasets, and keeps the answer: an absolute path is no name, wherever it is read again, and also
    when the folder is gone.
    """
    return config.replace(
        dataset_name=_settled(config.data.dataset_name),
        train_data_dir=_settled(config.data.train_data_dir),
        image_root=_settled(config.data.image_root),
        pretrain_dataset_name=_settled(config.public_images.pretrain_dataset_name),
    )


def check_one_place(data: DataConfig) -> None:
    """
    Refuses two sources, and a folder that does not exist. It opens nothing.

    Raises:
        ValueError: If `train_data_dir` and `dataset_name` are both given, or name a folder that is not there.
    """
    name, folder = data.dataset_name, data.train_data_dir
    if folder is not None and name != DIGITS:
        raise ValueError(
            f"Expected --dataset_name={name} to be left out beside --train_data_dir={folder}: the images are in one "
            "place. Leave out either."
        )
    if folder is not None and not Path(folder).is_dir():
        what = "it is a file" if Path(folder).is_file() else "there is none"
        raise ValueError(f"Expected --train_data_dir={folder} to be a folder: {what}.")
    if Path(name).is_file():
        raise ValueError(f"Expected --dataset_name={name} to be a folder or a Hub id: it is a file. Name its folder.")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise ValueError(f"Expected --dataset_name={name} to be a folder: there is none.")


def settle_channels(config: CurriculumConfig, stated: int | None, *, in_memory: bool = False) -> CurriculumConfig:
    """
    The configuration with its number of channels: as declared, or as the type of the images states it.

    Args:
        config ([`CurriculumConfig`]): Its section `data` is read.
        stated (`int`, *optional*): What the metadata of the dataset states. It is public; no pixel is looked at.
        in_memory (`bool`, *optional*, defaults to `False`): Whether the dataset is passed as an object, so that the
            configuration does not have to name it.

    Raises:
        ValueError: If neither says it, and the images are not the embedded digits.
    """
    if config.data.num_channels is None and stated is None and in_memory:
        raise ValueError(CHANNELS_NEEDED)
    channels = stated if config.data.num_channels is None and stated is not None else config.data.channels
    return config.replace(num_channels=channels)


def _settled(name: str | None) -> str | None:
    # A folder goes before a name on the Hub, as in `datasets.load_dataset`.
    is_folder = name is not None and name not in (DIGITS, NO_IMAGES) and Path(name).is_dir()
    return str(Path(name).resolve()) if name is not None and is_folder else name


def is_folder_name(name: str) -> bool:
    """True if a name is that of a folder, there or gone; final for a configuration whose places are settled."""
    return name not in (DIGITS, NO_IMAGES) and (Path(name).is_absolute() or Path(name).exists())


def dataset_place(config: DataConfig) -> str:
    """Folder or Hub id; two ways to write a folder are one place."""
    name = config.train_data_dir or config.dataset_name
    is_folder = config.dataset_name != DIGITS or config.train_data_dir is not None
    return str(Path(name).resolve()) if is_folder and Path(name).exists() else name


def share_images(one: DataConfig, other: DataConfig) -> bool:
    """
    True if two configurations may read some of the same images, by place and split; it opens neither.

    A split may join several, and a part of one counts as it. A folder shares them with the folders inside it, whatever
    the splits. Otherwise the last parts of the names count, without case and separators: a dataset has several names
    on the Hub (`mnist`, `ylecun/mnist`), a folder may be a copy of it, and two configurations of a Hub dataset are
    often the same images at another size.
    """
    places = [dataset_place(config) for config in (one, other)]
    paths = [Path(place) for place in places]
    if all(path.is_absolute() for path in paths) and paths[0] != paths[1]:
        return paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])
    names = [re.sub("[-_.]", "", path.name).casefold() for path in paths]
    if names[0] != names[1]:
        return False
    splits = [{part.split("[")[0].strip() for part in config.dataset_split.split("+")} for config in (one, other)]
    return bool(splits[0] & splits[1]) or "all" in splits[0] | splits[1]
