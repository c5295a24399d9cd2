"""Any Hugging Face dataset as images and labels in memory.

Nothing about one row may be visible from outside: a row that cannot be read gets the label `NO_CONTRIBUTION` and adds
zero to every released sum. It raises nothing, is counted nowhere, and its name appears in no message.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from dp_curriculum.config import DataConfig
from dp_curriculum.image_folder import ImageFolderError, is_image_folder, open_image_folder


logger = logging.getLogger(__name__)

NO_CONTRIBUTION = -1
MAX_IMAGE_PIXELS = 50_000_000
# Decoders of pictures alone: others start an interpreter (EPS), or follow links (MIC, FPX).
_PICTURES = ("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA", "ICO", "AVIF")
Image.init()  # fills the table of the decoders that this Pillow was built with
_IMAGE_FORMATS = tuple(name for name in _PICTURES if name in Image.OPEN)
DIGITS = "digits"
NUM_TRAIN_DIGITS = 1437


@dataclass(frozen=True)
class PrivateImages:
    """
    Images in memory, as they came: one byte a channel, decoded once.

    Shapes:
        images: `torch.uint8` of shape `(N, C, H, W)`.
        labels: `torch.int64` of shape `(N,)`, in `[0, num_classes)`, or `NO_CONTRIBUTION`.
        class_names: one name a class; public, from the dataset's features, never from its rows.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)


def bound_images(images: torch.Tensor) -> torch.Tensor:
    """Brings float images into `[0, 1]`; NaN becomes 0."""
    return images.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def contributing(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mask of shape `(N,)`: rows whose label is a class. All others contribute zero."""
    return (labels >= 0) & (labels < num_classes)


def to_unit_range(
    images: torch.Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Private images `(N, C, H, W)`, bytes or floats, as floats in `[0, 1]`. Both stages read pixels through here."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    return bound_images(images.to(device).to(dtype) / scale)


# --- finding the dataset -------------------------------------------------------------------------------------------


def digits_dataset(split: str = "train") -> datasets.Dataset:
    """
    The embedded dataset: scikit-learn's 1,797 handwritten 8×8 digits (UCI, Alpaydin and Kaynak 1998).

    The split is fixed: 1,437 training images drawn with a constant seed, the other 360 for testing.

    Raises:
        ValueError: If `split` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"Expected --dataset_split={split} to be train or test for --dataset_name={DIGITS}.")
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    rows = order[:NUM_TRAIN_DIGITS] if split == "train" else order[NUM_TRAIN_DIGITS:]
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target[rows].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def open_dataset(config: DataConfig, split: str | None = None) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens a Hub dataset, a local folder in Hub layout, or a folder of images, without writing a copy to a cache.

    Args:
        config ([`DataConfig`]): Names the source.
        split (`str`, *optional*): The split; `config.dataset_split` if unset.

    Raises:
        ValueError: If there is no such dataset, configuration or split.
    """
    split = split or config.dataset_split
    if config.dataset_name == DIGITS and config.train_data_dir is None:
        return digits_dataset(split)
    name, data_dir = config.dataset_name, config.train_data_dir
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"Expected --train_data_dir={data_dir} to be a folder.")
    option = "dataset_name" if data_dir is None else "train_data_dir"
    if data_dir is None and Path(name).is_dir() and is_image_folder(Path(name)):
        data_dir = name
    try:
        if data_dir is not None:
            return open_image_folder(Path(data_dir), split, option=option)
        # Streaming reads the rows once, straight into memory; the ordinary way writes every pixel to an Arrow cache.
        return datasets.load_dataset(name, config.dataset_config_name, split=split, streaming=True)
    except ImageFolderError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Expected --{option}={data_dir or name} with --dataset_split={split} to be a readable dataset: {reason}"
        ) from None


def _find_column(features: datasets.Features, given: str | None, kind: Any, flag: str) -> str | None:
    if given == "none":
        return None
    if given is not None:
        if given not in features:
            raise ValueError(f"Expected --{flag}={given} to be a column: the dataset has {', '.join(features)}.")
        return given
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise ValueError(f"Expected --{flag} to be given: the dataset has several candidates, {', '.join(found)}.")
    return found[0] if found else None


def find_columns(features: datasets.Features, config: DataConfig) -> tuple[str, str | None, tuple[str, ...]]:
    """
    The image column, the label column (`None` where unlabelled) and the class names, from public metadata alone.

    Raises:
        ValueError: If a named column is missing, none has the right type, or the number of classes is not known.
    """
    image_column = _find_column(features, config.image_column, datasets.Image, "image_column")
    if image_column is None:
        raise ValueError(
            f"Expected --image_column to be given: none of {', '.join(features)} holds images by its type."
        )
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(
            f"Expected --image_column={image_column} to hold images: its type is {features[image_column]}; "
            "cast it with dataset.cast_column(name, datasets.Image())."
        )
    label_column = _find_column(features, config.label_column, datasets.ClassLabel, "label_column")
    if label_column is None:
        return image_column, None, ("image",)
    feature = features[label_column]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    if not names and not str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float", "bool")):
        raise ValueError(
            f"Expected --label_column={label_column} to hold integers or a ClassLabel: its type is {feature}; "
            "convert it with dataset.class_encode_column(name)."
        )
    if names and config.num_classes not in (None, len(names)):
        raise ValueError(f"Expected --num_classes={config.num_classes} to match the {len(names)} names of the labels.")
    if not names and config.num_classes is None:
        # Counting the labels that occur would publish which classes are empty.
        raise ValueError(
            f"Expected --num_classes to be given: --label_column={label_column} does not name its classes."
        )
    return image_column, label_column, names or tuple(str(index) for index in range(config.num_classes or 0))


# --- reading the rows ----------------------------------------------------------------------------------------------


def _to_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """Brings any Pillow mode to L or RGB by a rule that no pixel decides."""
    if image.mode.startswith(("I", "F")):
        # Integers are taken as 16 bits, floats as [0, 1]: the two conventions of scientific images.
        values = np.asarray(image, dtype=np.float64) / (1.0 if image.mode.startswith("F") else 65535.0)
        values = np.clip(np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
        image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    return image.convert("L" if num_channels == 1 else "RGB")


def _read_bytes(value: dict[str, Any]) -> bytes:
    if value.get("bytes") is not None:
        return value["bytes"]
    with fsspec.open(value["path"], "rb") as file:  # a local path, or a file inside a remote repository
        return file.read()


def decode_image(value: Any, *, resolution: int, num_channels: int) -> np.ndarray | None:
    """
    One row's image as `uint8` of shape `(C, H, W)`, or `None` where it cannot be read.

    Args:
        value: A Pillow image, or `{"bytes", "path"}` as `datasets.Image(decode=False)` gives it.
        resolution (`int`): Side in pixels; the image is cropped to a square around its centre and resized.
        num_channels (`int`): 1 or 3.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's tell the size of one image
            return _decode(value, resolution, num_channels)
    except Exception:  # noqa: BLE001 - whatever one row does, it must look like a row that adds zero
        return None


def _decode(value: Any, resolution: int, num_channels: int) -> np.ndarray | None:
    if isinstance(value, dict):
        value = Image.open(io.BytesIO(_read_bytes(value)), formats=_IMAGE_FORMATS)
    width, height = value.size
    if width * height > MAX_IMAGE_PIXELS:
        return None
    image = _to_mode(ImageOps.exif_transpose(value), num_channels)
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8).reshape(resolution, resolution, num_channels)
    return pixels.transpose(2, 0, 1)


def _label_index(value: Any, num_classes: int) -> int:
    try:
        index = int(value)
    except (TypeError, ValueError, OverflowError):
        return NO_CONTRIBUTION
    return index if 0 <= index < num_classes and index == value else NO_CONTRIBUTION


def read_rows(dataset: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, one after the other; an error of theirs is a `ValueError` that says nothing of a row."""
    # Once, with neither a number nor a time: how many rows there are may be private, and terminals are logged.
    logger.info("reading images")
    try:
        yield from dataset
    except Exception as error:
        # Its text may hold a row.
        raise ValueError(f"Expected the dataset to be readable to its end: {type(error).__name__}.") from None


def read_images(
    dataset: datasets.Dataset | datasets.IterableDataset, config: DataConfig, *, streamed: bool = False
) -> PrivateImages:
    """
    Reads a whole dataset into memory.

    Args:
        dataset: Rows with an image column and, for several classes, a label column.
        config ([`DataConfig`]): Columns, resolution and channels.
        streamed (`bool`): Whether an `IterableDataset` is expected, as [`open_dataset`] returns it.

    Raises:
        ValueError: If the dataset is a stream of someone else's, or its columns do not fit.
    """
    if isinstance(dataset, datasets.IterableDataset) and not streamed:
        raise ValueError(
            "Expected dataset to be a datasets.Dataset: Poisson sampling needs random access, which a streaming "
            "dataset has not; load it without streaming=True."
        )
    features = dataset.features
    if features is None:
        dataset = dataset._resolve_features()
        features = dataset.features
    image_column, label_column, class_names = find_columns(features, config)
    columns = [image_column] + ([label_column] if label_column else [])
    rows = dataset.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))
    images, labels = [], []
    blank = np.zeros((config.num_channels, config.resolution, config.resolution), dtype=np.uint8)
    for row in read_rows(rows):
        pixels = decode_image(row[image_column], resolution=config.resolution, num_channels=config.num_channels)
        label = _label_index(row[label_column], len(class_names)) if label_column else 0
        images.append(blank if pixels is None else pixels)
        labels.append(NO_CONTRIBUTION if pixels is None else label)
    stacked = np.stack(images) if images else np.zeros((0, *blank.shape), dtype=np.uint8)
    return PrivateImages(torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64), class_names)


def load_images(config: DataConfig, split: str | None = None) -> PrivateImages:
    """Opens and reads the dataset that `config` names; see [`open_dataset`] and [`read_images`]."""
    return read_images(open_dataset(config, split), config, streamed=True)
