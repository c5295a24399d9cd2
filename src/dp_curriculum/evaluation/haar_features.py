"""Features of images that no class and no training went into: how strong edges are, at which scale, and where.

`benchmarks/distances.py` chose them among others, by the order that a Fréchet distance in them gives to degradations.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F


_CELLS, _CELLS_OF_COLOUR = 4, 2  # per side
_WEIGHT_OF_LAYOUT = 2.0  # of the coarsest averages, beside the edges
_UNIT = 10.0  # features are in tenths of the range of a pixel


@torch.no_grad()
def haar_features(images: torch.Tensor) -> np.ndarray:
    r"""
    Averages of a Haar transform, in each of 4×4 cells.

    An image is enlarged to the next power of two, and coloured ones are split into brightness and two differences of
    colours. At each scale, from two pixels to a quarter of the image, a feature is the mean absolute difference
    across, along or on the diagonal, within a cell (brightness) or in the whole image (colours). The coarsest
    averages, 4×4 of brightness and 2×2 of colours, count twice.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In `[0, 1]`, square, with one or three channels.

    Returns:
        `np.ndarray` of shape `(N, D)`: 174 features of 32×32 pixels in colour, 160 in grey.
    """
    return torch.cat([_features(part) for part in images.split(1000)]).double().cpu().numpy()


def _features(images: torch.Tensor) -> torch.Tensor:
    averages, found = _enlarged(_by_brightness(images)), []
    while averages.shape[-1] > _CELLS:
        averages, edges = haar_step(averages)
        strength = edges.abs()
        found.append(F.adaptive_avg_pool2d(strength[:, 0], _CELLS).flatten(1))
        found.append(strength[:, 1:].mean((2, 3, 4)))
    found.append(_WEIGHT_OF_LAYOUT * averages[:, 0].flatten(1))
    if averages.shape[1] > 1:
        found.append(_WEIGHT_OF_LAYOUT * F.adaptive_avg_pool2d(averages[:, 1:], _CELLS_OF_COLOUR).flatten(1))
    return _UNIT * torch.cat(found, dim=1)


def _by_brightness(images: torch.Tensor) -> torch.Tensor:
    """Brightness ahead of two differences of colours; grey images as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return torch.stack([(red + green + blue) / 3, red - blue, green - (red + blue) / 2], dim=1)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    side = max(2 * _CELLS, 2 ** math.ceil(math.log2(images.shape[-1])))
    if side == images.shape[-1]:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def haar_step(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages `(B, C, H/2, W/2)` of two by two pixels, and their differences `(B, C, 3, H/2, W/2)`."""
    a, b = images[..., ::2, ::2], images[..., ::2, 1::2]
    c, d = images[..., 1::2, ::2], images[..., 1::2, 1::2]
    edges = torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], dim=2)
    return (a + b + c + d) / 4, edges / 4
