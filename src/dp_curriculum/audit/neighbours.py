"""Pairs of datasets that differ in one image, or in one person. An audit tries to tell them apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.privacy.privacy_report import Unit


_NUM_OTHERS = 6
RELATIONS = ("add", "remove", "replace")
PIXELS = ("ordinary", "all white", "out of range", "not a number")
LABELS = ("only one of its class", "label out of range", "no contribution")
PERSONS = (
    "one image",
    "3 images of one class",
    "3 images of several classes",
    "500 images of one class",
    "500 images of several classes",
    "with broken rows",
    "only person of a class",
    "no image that can be read",
)
_OTHER_PERSONS = (0, 1, 1, 2, 1, 2)
# Factors on a loss: clipped; too large for a norm in float32; no number; nothing to divide by.
GRADIENTS = {"huge gradient": 1e6, "endless gradient": 1e20, "gradient not finite": math.nan, "gradient zero": 0.0}


@dataclass(frozen=True)
class Neighbours:
    """
    Two datasets that differ in their last row, or in their last person, if it is there.

    Args:
        name (`str`): The image or person, and the relation.
        first, second ([`~data.PrivateImages`]): The datasets; their images are floats, and may leave `[0, 1]`.
        changed (`int`): Index of the row, or of the person, that comes, goes or is another.
        distance (`int`): How many units' worth the relation moves a sum by: 1, or 2 where one takes another's place.
        loss_scale (`float`): Factor on the loss of what is changed, for gradients that no picture would cause.
        num_others (`int`): Rows of what stays; those that follow are changed.
    """

    name: str
    first: PrivateImages
    second: PrivateImages
    changed: int
    distance: int
    loss_scale: float = 1.0
    num_others: int = _NUM_OTHERS


def neighbours(
    *, num_channels: int, side: int, num_classes: int, gradients: bool = False, unit: Unit = "image"
) -> Iterator[Neighbours]:
    """
    All pairs: each kind of image or person, added, removed, and in place of another.

    Args:
        num_channels (`int`): Public, as all of the shape.
        side (`int`): Pixels.
        num_classes (`int`): Number of classes.
        gradients (`bool`, *optional*, defaults to `False`): Whether extreme gradients are among them.
        unit (`"image"` or `"person"`, *optional*, defaults to `"image"`): What they differ in.
    """
    shape = (num_channels, side, side)
    if unit == "person":
        for kind in (*PERSONS, *(GRADIENTS if gradients else ())):
            for relation in RELATIONS:
                yield _pair_of_persons(kind, relation, shape, num_classes)
        return
    for kind in (*PIXELS, *LABELS, *(GRADIENTS if gradients else ())):
        for relation in RELATIONS:
            yield _pair(kind, relation, shape, num_classes)


def random_images(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images `(count, C, H, W)` in `[0, 1]` from a constant seed: made-up ones."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def dataset(images: Tensor, labels: list[int], num_classes: int, persons: list[int] | None = None) -> PrivateImages:
    """A dataset whose classes are named by numbers."""
    names = tuple(str(label) for label in range(num_classes))
    owners = None if persons is None else torch.tensor(persons, dtype=torch.int64)
    return PrivateImages(images, torch.tensor(labels, dtype=torch.int64), names, owners)


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
    return _related(kind, relation, without, with_it, instead, changed=len(others))


def _related(
    kind: str, relation: str, without: PrivateImages, with_it: PrivateImages, instead: PrivateImages, *, changed: int
) -> Neighbours:
    first, second = {
        "add": (without, with_it),
        "remove": (with_it, without),
        "replace": (with_it, instead),
    }[relation]
    distance, scale = (2 if relation == "replace" else 1), GRADIENTS.get(kind, 1.0)
    return Neighbours(f"{kind}, {relation}", first, second, changed, distance, scale, len(without))


def _labels_of_person(kind: str, num_classes: int) -> list[int]:
    """Classes of the images of a person of this kind."""
    last = num_classes - 1
    if kind == "only person of a class":
        return [last] * 3
    if kind == "no image that can be read":
        return [NO_CONTRIBUTION, num_classes]
    if kind == "one image":
        return [0]
    count = int(kind.split()[0]) if kind[0].isdigit() else 3
    several = kind.endswith("several classes") or kind in GRADIENTS
    labels = [row % num_classes if several else 0 for row in range(count)]
    return [*labels, NO_CONTRIBUTION, 0, num_classes] if kind == "with broken rows" else labels


def _images_of_person(kind: str, count: int, shape: tuple[int, ...]) -> Tensor:
    """Equal and white: of all images, their contributions add up to most."""
    images = torch.ones(count, *shape)
    if kind == "with broken rows":
        images[1] = _image("not a number", shape)[0]
        images[-2] = _image("out of range", shape)[0]
    return images


def _pair_of_persons(kind: str, relation: str, shape: tuple[int, ...], num_classes: int) -> Neighbours:
    owners = [] if kind == "only person of a class" and num_classes == 1 else list(_OTHER_PERSONS)
    others = [row % max(1, num_classes - 1) for row in range(len(owners))]  # the last class has no other person
    images, person = random_images(len(owners), shape), max(owners, default=-1) + 1
    labels = _labels_of_person(kind, num_classes)
    theirs = _images_of_person(kind, len(labels), shape)
    without = dataset(images, others, num_classes, owners)
    with_it = dataset(torch.cat([images, theirs]), others + labels, num_classes, owners + [person] * len(labels))
    # In their place: another person with two black images of other classes.
    black = [num_classes // 2, num_classes - 1]
    instead = dataset(
        torch.cat([images, torch.zeros(2, *shape)]), others + black, num_classes, [*owners, person, person]
    )
    return _related(kind, relation, without, with_it, instead, changed=person)
