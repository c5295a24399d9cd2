"""Sheets of images as PNG: one row a class."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image


_MIN_SIDE = 56


def image_sheet(images: torch.Tensor, *, columns: int) -> Image.Image:
    """
    A grid of images, filled row by row; small ones are enlarged by a whole factor.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Released or generated images in `[0, 1]`.
        columns (`int`): Images a row.
    """
    pictures = DiffusionPipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())
    width, height = pictures[0].size
    factor = max(1, -(-_MIN_SIDE // max(width, height)))
    size = (width * factor, height * factor)
    pictures = [picture.resize(size, Image.Resampling.NEAREST) for picture in pictures]
    blanks = -len(pictures) % columns
    pictures += [Image.new(pictures[0].mode, size)] * blanks
    grid = make_image_grid(pictures, rows=len(pictures) // columns, cols=columns)
    return grid.convert(pictures[0].mode)


def save_sheet(images: torch.Tensor, path: Path, *, columns: int) -> None:
    """Writes [`image_sheet`] to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_sheet(images, columns=columns).save(path)
