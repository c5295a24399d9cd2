"""Images before they are read, and in memory, and which of them contribute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dp_curriculum.data.units import Units
from dp_curriculum.data.units import contributing as contributing


NO_CONTRIBUTION = -1
ImageReference = bytes | Path | None  # an image file, where it is, or nothing
# Images, their classes or `NO_CONTRIBUTION`, and their persons or `None`: no list of these where images are the unit.
Batch = tuple[list[ImageReference], list[int], list[str | None]]


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
        persons (`str`, *optional*): Where the person of a row comes from; `None` where images are the unit.
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
    persons: str | None = None


@dataclass(frozen=True)
class PrivateImages:
    """
    Images in memory, as they came: one byte a channel, decoded once.

    Shapes:
        images: `torch.uint8` of shape `(N, C, H, W)`.
        labels: `torch.int64` of shape `(N,)`, in `[0, num_classes)`, or `NO_CONTRIBUTION`.
        class_names: one name per class; public, from the dataset's features, never from its rows.
        persons: `torch.int64` of shape `(N,)`, numbers without meaning, or `NO_PERSON`; `None` where images are the
            unit. They are neither shown nor saved.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    persons: torch.Tensor | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def units(self) -> Units:
        """Images, or persons with all their images: what the guarantee is for."""
        return Units(self.labels, self.num_classes, self.persons)

    def __len__(self) -> int:
        return len(self.images)


def bound_images(images: torch.Tensor) -> torch.Tensor:
    """Brings float images into `[0, 1]`; NaN becomes 0."""
    return images.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def to_unit_range(
    images: torch.Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Private images `(N, C, H, W)`, bytes or floats, as floats in `[0, 1]`. Both stages read pixels through here."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    return bound_images(images.to(device).to(dtype) / scale)
