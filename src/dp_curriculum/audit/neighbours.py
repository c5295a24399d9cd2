"""Pairs of datasets that differ in one image. An audit tries to tell them apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages


_NUM_OTHERS = 6
RELATIONS = ("add", "remove", "replace")
PIXELS = ("ordinary", "all white", "out of range", "not a number")
LABELS = ("only one of its class", "label out of range", "no contribution")
# Factors on a loss: clipped; too large for a norm in float32; no number; nothing to divide by.
GRADIENTS = {"huge gradient": 1e6, "endless gradient": 1e20, "gradient not finite": math.nan, "gradient zero": 0.0}


@dataclass(frozen=True)
class Neighbours:
    """
    Two datasets that differ in their last row, if it is there.

    Args:
        name (`str`): The image and the relation.
        first, second ([`~data.PrivateImages`]): The datasets; their images are floats, and may leave `[0, 1]`.
        changed (`int`): Index of the row that comes, goes or is another.
        distance (`int`): How many images' worth the relation moves a sum by: 1, or 2 where one takes another's place.
        loss_scale (`float`): Factor on the loss of the changed row, for gradients that no picture would cause.
    """

    name: str
    first: PrivateImages
    second: PrivateImages
    changed: int
    distance: int
    loss_scale: float = 1.0


def neighbours(*, num_channels: int, side: int, num_classes: int, gradients: bool = False) -> Iterator[Neighbours]:
    """
    All pairs: each kind of image, added, removed, and in place of another.

    Args:
        num_channels (`int`): Public, as all of the shape.
        side (`int`): Pixels.
        num_classes (`int`): Number of classes.
        gradients (`bool`, *optional*, defaults to `False`): Whether images with extreme gradients are among them.
    """
    for kind in (*PIXELS, *LABELS, *(GRADIENTS if gradients else ())):
        for relation in RELATIONS:
            yield _pair(kind, relation, (num_channels, side, side), num_classes)


def random_images(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images `(count, C, H, W)` in `[0, 1]` from a constant seed: made-up ones."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def dataset(images: Tensor, labels: list[int], num_classes: int) -> PrivateImages:
    """A dataset whose classes are named by numbers."""
    return PrivateImages(
        images, torch.tensor(labels, dtype=torch.int64), tuple(str(label) for label in range(num_classes))
    )


def _image(kind: str, shape: tuple[int, ...]) -> Tensor:
    ordinary = random_images(1, shape, seed=1)
    if kind == "out of range":
        return 2000 * ordinary - 1000
    if kind == "not a number":
        ordinary[..., 0] = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).repeat(shape[-2])[: shape[-2]]
        return ordinary
    return torch.ones_like(ordinary) if kind in ("all white", *LABELS) else ordinary


def _pair(kind: str, relation: str, shape: tuple[int, ...], num_classes: int) -> Neighbours:
    last = num_classes - 1
    others = [label % max(1, last) for label in range(_NUM_OTHERS)]  # the last class has no other image
    if kind == "only one of its class" and num_classes == 1:
        others = []
    label = {"only one of its class": last, "label out of range": num_classes, "no contribution": NO_CONTRIBUTION}
    images = random_images(len(others), shape)
    without = dataset(images, others, num_classes)
    with_it = dataset(torch.cat([images, _image(kind, shape)]), [*others, label.get(kind, 0)], num_classes)
    # In its place: black, where the image was white, and of another class.
    instead = dataset(torch.cat([images, torch.zeros(1, *shape)]), [*others, num_classes // 2], num_classes)
    first, second = {
        "add": (without, with_it),
        "remove": (with_it, without),
        "replace": (with_it, instead),
    }[relation]
    distance, scale = (2 if relation == "replace" else 1), GRADIENTS.get(kind, 1.0)
    return Neighbours(f"{kind}, {relation}", first, second, len(others), distance, scale)
