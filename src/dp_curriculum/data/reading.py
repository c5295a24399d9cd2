"""A dataset into memory.

Nothing about one row may be visible from outside: a row that cannot be read gets the label `NO_CONTRIBUTION` and adds
zero to every released sum. It raises nothing, is counted nowhere, and its name appears in no message.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from dp_curriculum.config import DataConfig
from dp_curriculum.data.decoding import PixelFormat
from dp_curriculum.data.images import NO_CONTRIBUTION, Batch, ImageReference, ImageSource, PrivateImages
from dp_curriculum.data.persons import check_number_of_persons, number_persons
from dp_curriculum.data.sources import open_images
from dp_curriculum.data.units import NO_PERSON
from dp_curriculum.data.workers import Decoded, chunked, decoder_pool
from dp_curriculum.runtime.alive import shown_alive


logger = logging.getLogger(__name__)

_TRIAL_IMAGES = 2048


def pixel_format(config: DataConfig) -> PixelFormat:
    """The public shape and conventions of a configuration."""
    low_high = (config.intensity_range[0], config.intensity_range[1]) if config.intensity_range else None
    return PixelFormat(config.resolution, config.channels, low_high, config.alpha_background)


def decoded_rows(
    source: ImageSource, config: DataConfig, labels: list[int], persons: list[str | None], **options: Any
) -> Iterator[Decoded]:
    """Yields all rows in order, decoded in workers; the class and person of each are appended to the lists."""
    references = _references(source.read(), labels, persons)
    yield from decoder_pool().map(chunked(references), pixel_format(config), **options)


def _references(batches: Iterable[Batch], labels: list[int], persons: list[str | None]) -> Iterator[ImageReference]:
    for images, classes, names in batches:
        labels.extend(classes)
        persons.extend(names)
        yield from images


def read_images(source: ImageSource, config: DataConfig) -> PrivateImages:
    """
    Reads a whole dataset into memory.

    Args:
        source ([`ImageSource`]): The dataset.
        config ([`DataConfig`]): Resolution, channels and conventions.

    Raises:
        ValueError: If the rows cannot be read to their end; the message says nothing of a row.
    """
    # Once, with neither a number nor a time: how many rows there are may be private, and terminals are logged.
    logger.info("reading images")
    labels: list[int] = []
    names: list[str | None] = []
    pixels, readable = bytearray(), [np.zeros(0, dtype=bool)]
    with shown_alive("reading images"):
        for decoded in decoded_rows(source, config, labels, names):
            pixels += decoded.pixels.tobytes()
            readable.append(decoded.readable)
    shape = (len(labels), config.channels, config.resolution, config.resolution)
    images = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.zeros(0, dtype=torch.uint8)
    classes = np.where(np.concatenate(readable), np.array(labels, dtype=np.int64), NO_CONTRIBUTION)
    found = torch.from_numpy(classes.astype(np.int64))
    if source.persons is None:
        return PrivateImages(images.view(shape), found, source.class_names)
    persons = number_persons(names)
    found[persons == NO_PERSON] = NO_CONTRIBUTION
    return PrivateImages(images.view(shape), found, source.class_names, persons)


def reading_seconds(config: DataConfig, num_images: int) -> float:
    """Seconds that this process takes to read PNG files of the final size, measured on random pixels."""
    side, mode = config.resolution, "L" if config.num_channels == 1 else "RGB"
    shape = (side, side) if mode == "L" else (side, side, 3)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
    rows: list[ImageReference] = [file.getvalue()] * _TRIAL_IMAGES

    def read() -> float:
        start = time.perf_counter()
        for _ in decoder_pool().map(chunked(rows), pixel_format(config)):
            pass
        return time.perf_counter() - start

    read()  # starts the workers
    return read() * num_images / _TRIAL_IMAGES


def load_images(config: DataConfig, split: str | None = None) -> PrivateImages:
    """
    Opens and reads the dataset that `config` names.

    Raises:
        ValueError: As [`~sources.open_images`] and [`read_images`]; or if it holds no row, or fewer than two persons.
    """
    source = open_images(config, split)
    images = read_images(source, config)
    check_not_empty(images, source)
    check_number_of_persons(len(images.units), config)
    return images


def check_not_empty(images: PrivateImages, source: ImageSource) -> None:
    """
    Refuses a dataset without a row. Not for private images whose number is declared: one row less would show.

    Raises:
        ValueError: If there is none; the message names what lies there in place of images.
    """
    if len(images) == 0:
        beside = f"; not read: {', '.join(source.unread)}" if source.unread else ""
        raise ValueError(f"Expected {source.option} with --dataset_split={source.split} to hold images{beside}.")
