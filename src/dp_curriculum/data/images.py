"""Images before they are read, and in memory, and which of them contribute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


NO_CONTRIBUTION = -1
ImageReference = bytes | Path | None  # an image file, where it is, or nothing
Batch = tuple[list[ImageReference], list[int]]  # images, and their classes or `NO_CONTRIBUTION`


@dataclass(frozen=True)
class ImageSource:
    """
    A dataset of images before a row is read: all that is public of it, settled from options and metadata.

    Args:
        kind (`str`): "embedded", "folder", "hub" or "memory".
        place (`str`): Resolved folder, Hub id or name.
        option (`str`): The option that names it, with its value, for messages.
        split (`str`): The split.
        labels (`str`, *optional*): Where the classes come from; `None` where all images are of one class.
        class_names (`tuple[str, ...]`): One name per class.
        unread (`tuple[str, ...]`): Columns and types of files that lie beside the images, and that nothing reads.
        read (`Callable`): The rows from the beginning, in batches. What it raises says nothing of a row.
        read_beside (`Callable`): Values of all columns beside the images, in batches by name; for the owner of the
            images alone.
        image_column (`str`, *optional*): Column of the images; `None` where they are files.
        other_splits (`tuple[str, ...]`): Splits that the source has beside this one, as far as they are known.
        num_channels (`int`, *optional*): Channels that the type of the images states, if it does.
    """

    kind: str
    place: str
    option: str
    split: str
    labels: str | None
    class_names: tuple[str, ...]
    unread: tuple[str, ...]
    read: Callable[[], Iterator[Batch]]
    read_beside: Callable[[], Iterator[dict[str, list[Any]]]]
    image_column: str | None = None
    other_splits: tuple[str, ...] = ()
    num_channels: int | None = None


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
