"""Sheets of images as PNG: one row per class."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps

from dp_curriculum.runtime.checkpointing import appearing


_MIN_SIDE, _GAP, _GREY = 56, 2, 128


def image_sheet(images: torch.Tensor, *, columns: int) -> Image.Image:
    """
    A grid of images with grey gaps, filled row by row; small ones are enlarged by a whole factor.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Released or generated images in `[0, 1]`.
        columns (`int`): Images per row.
    """
    pictures = DiffusionPipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())
    width, height = pictures[0].size
    factor = max(1, -(-_MIN_SIDE // max(width, height)))
    grey = _GREY if pictures[0].mode == "L" else (_GREY,) * 3
    tiles = []
    for picture in pictures:
        enlarged = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        tiles.append(ImageOps.expand(enlarged, border=_GAP, fill=grey))
    tiles += [Image.new(tiles[0].mode, tiles[0].size, grey)] * (-len(tiles) % columns)
    grid = make_image_grid(tiles, rows=len(tiles) // columns, cols=columns)
    return grid.convert(pictures[0].mode)


def save_sheet(images: torch.Tensor, path: Path, *, columns: int) -> None:
    """Writes [`image_sheet`] to `path`, whole or not at all, making its folder."""
    with appearing(path) as temporary:
        image_sheet(images, columns=columns).save(temporary)


def save_note(text: str, path: Path) -> None:
    """Writes a picture of a few words, in the place of a sheet that was not drawn."""
    picture = Image.new("L", (240, 64), _GREY)
    ImageDraw.Draw(picture).multiline_text((12, 16), text, fill=255)
    with appearing(path) as temporary:
        picture.save(temporary)
