"""Sheets: every image whole, in order, large enough to see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dp_curriculum.diffusion.sheets import image_sheet, save_sheet


@pytest.mark.parametrize(("num_channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_fill_the_grid_row_by_row(num_channels: int, mode: str) -> None:
    """Five images of 28 pixels, two a row: doubled in size, in order, in grey gaps, and the rest is grey."""
    values = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])
    sheet = image_sheet(values.view(5, 1, 1, 1).expand(5, num_channels, 28, 28), columns=2)
    assert sheet.mode == mode and sheet.size == (2 * 60, 3 * 60)
    pixels = np.asarray(sheet).reshape(3, 60, 2, 60, num_channels).transpose(0, 2, 1, 3, 4).reshape(6, 60, 60, -1)
    tiles = pixels[:, 2:-2, 2:-2].reshape(6, -1)
    assert all(len(np.unique(tile)) == 1 for tile in tiles)
    assert tiles[:, 0].tolist() == [51, 102, 153, 204, 255, 128]
    assert (pixels[:, :2] == 128).all() and (pixels[:, :, -2:] == 128).all()


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_kept() -> None:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sheet = np.asarray(image_sheet(image, columns=1))
    assert sheet.shape == (60, 60)
    assert np.array_equal(sheet[2:-2:7, 2:-2:7], (image[0, 0].numpy() * 255).round().astype(np.uint8))
    assert image_sheet(torch.zeros(1, 3, 64, 64), columns=1).size == (68, 68)


def test_a_sheet_is_saved_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.png"
    save_sheet(torch.ones(2, 1, 56, 56), path, columns=2)
    with Image.open(path) as image:
        assert image.size == (120, 60) and image.getextrema() == (128, 255)
