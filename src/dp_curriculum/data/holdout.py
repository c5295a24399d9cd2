"""Images that training never reads: which they are follows from a secret key and the image, and from nothing else.

Each row is kept or left out by itself. A row more or less therefore moves no other row to the other side, and two
datasets that differ in one row still differ in at most one row once the held-out ones are gone: for every key, known
or not. So training on what is left has the guarantee of training, for the whole dataset.
"""

from __future__ import annotations

import hashlib

import torch

from dp_curriculum.data.images import PrivateImages


KEY_BYTES = 32


def is_held_out(images: torch.Tensor, key: bytes, share: float) -> torch.Tensor:
    """
    Mask of the held-out rows. Equal images are on the same side, so that a copy does not leak into training.

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
    limit = share * 2.0**64
    coins = (hashlib.blake2b(image.tobytes(), key=key, digest_size=8).digest() for image in images.numpy())
    return torch.tensor([int.from_bytes(coin, "little") < limit for coin in coins], dtype=torch.bool)


def training_part(private: PrivateImages, key: bytes, share: float) -> PrivateImages:
    """Rows that are left for training, in their order."""
    return _rows(private, ~is_held_out(private.images, key, share))


def held_out_part(private: PrivateImages, key: bytes, share: float) -> PrivateImages:
    """Rows that were held out, in their order."""
    return _rows(private, is_held_out(private.images, key, share))


def _rows(private: PrivateImages, mask: torch.Tensor) -> PrivateImages:
    return PrivateImages(private.images[mask], private.labels[mask], private.class_names)
