"""Images that training never reads: which they are follows from a secret key and the image, and from nothing else.

Each unit, an image or a person with all their images, is kept or left out by itself. A unit more or less therefore
moves no other to the other side, and two datasets that differ in one unit still differ in at most one once the
held-out ones are gone: for every key, known or not. So training on what is left has the guarantee of training, for the
whole dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.persons import renumbered
from dp_curriculum.data.units import NO_PERSON


KEY_BYTES = 32


def is_held_out(images: torch.Tensor, key: bytes, share: float) -> torch.Tensor:
    """
    Mask of the held-out rows where images are the unit. Equal images are on the same side, so that a copy does not
    leak into training.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Decoded images, `torch.uint8`.
        key (`bytes`): Secret of the run, drawn from the operating system before anything is read.
        share (`float`): Probability that an image is held out.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.

    Privacy:
        A filter of single rows. Nothing is released.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"Expected images as bytes, not {images.dtype}.")
    return torch.tensor([_is_below(_digest([image.tobytes()], key), share) for image in images.numpy()]).bool()


def _digest(parts: Iterable[bytes], key: bytes) -> bytes:
    keyed = hashlib.blake2b(key=key, digest_size=8)
    for part in parts:
        keyed.update(part)
    return keyed.digest()


def _is_below(coin: bytes, share: float) -> bool:
    return int.from_bytes(coin, "little") < share * 2.0**64


def _is_of_held_out_person(private: PrivateImages, key: bytes, share: float) -> torch.Tensor:
    """
    Mask `(N,)` of the rows of held-out persons. The coin of a person is a keyed hash of all their images together, in
    whichever order they come: no other person has a part in it, and what the person is called is not hashed.
    """
    assert private.persons is not None, "images are not the unit"
    digests = [_digest([image.tobytes()], key) for image in private.images.numpy()]
    images_of: dict[int, list[bytes]] = {}
    for person, digest in zip(private.persons.tolist(), digests):
        images_of.setdefault(person, []).append(digest)
    held_out = {person: _is_below(_digest(sorted(rows), key), share) for person, rows in images_of.items()}
    held_out[NO_PERSON] = False  # such rows contribute nothing on either side
    return torch.tensor([held_out[person] for person in private.persons.tolist()]).bool()


def training_part(private: PrivateImages, key: bytes, share: float) -> PrivateImages:
    """Rows that are left for training, in their order."""
    return _rows(private, ~_held_out_rows(private, key, share))


def held_out_part(private: PrivateImages, key: bytes, share: float) -> PrivateImages:
    """Rows that were held out, in their order."""
    return _rows(private, _held_out_rows(private, key, share))


def _held_out_rows(private: PrivateImages, key: bytes, share: float) -> torch.Tensor:
    if private.persons is not None:
        return _is_of_held_out_person(private, key, share)
    return is_held_out(private.images, key, share)


def _rows(private: PrivateImages, mask: torch.Tensor) -> PrivateImages:
    persons = None if private.persons is None else renumbered(private.persons[mask])
    return PrivateImages(private.images[mask], private.labels[mask], private.class_names, persons)
