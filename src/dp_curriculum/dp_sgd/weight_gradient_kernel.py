"""A Triton kernel for the weight gradient of 3x3 convolutions, image by image. Imported where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["images"])
def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
    inputs,
    gradients,
    result,
    images,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One image, one row of the kernel, and a tile of filters and channels: three products share a tile of gradients.

    Nothing is added atomically: the same numbers give the same bits.
    """
    OUT: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    TILES_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PROGRAMS: tl.constexpr = 3 * TILES_C * ((FILTERS + BLOCK_N - 1) // BLOCK_N)
    # Those of an image run side by side, and find its rows in the cache.
    image = tl.program_id(0) // PROGRAMS
    tile = (tl.program_id(0) % PROGRAMS) // 3
    i = tl.program_id(0) % 3
    n = (tile // TILES_C) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tile % TILES_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ok = n < FILTERS
    c_ok = c < CHANNELS
    left = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    middle = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    right = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, POSITIONS, BLOCK_L):
        place = start + tl.arange(0, BLOCK_L)
        is_place = place < POSITIONS
        row = (place // OUT).to(tl.int64) * images + image
        inside = place % OUT
        h = (inside // OUT_WIDTH) * STRIDE_H + i - PADDING_H
        w = (inside % OUT_WIDTH) * STRIDE_W - PADDING_W
        h_ok = is_place & (h >= 0) & (h < HEIGHT)
        at = gradients + (row * OUT + inside)[None, :] * FILTERS + n[:, None]
        gradient = tl.load(at, mask=n_ok[:, None] & is_place[None, :], other=0.0)
        at = inputs + (row * (HEIGHT * WIDTH) + h * WIDTH + w)[:, None] * CHANNELS + c[None, :]
        x = tl.load(at, mask=(h_ok & (w >= 0) & (w < WIDTH))[:, None] & c_ok[None, :], other=0.0)
        left = tl.dot(gradient, x, left, input_precision="ieee")
        ok = h_ok & (w + 1 >= 0) & (w + 1 < WIDTH)
        x = tl.load(at + CHANNELS, mask=ok[:, None] & c_ok[None, :], other=0.0)
        middle = tl.dot(gradient, x, middle, input_precision="ieee")
        ok = h_ok & (w + 2 >= 0) & (w + 2 < WIDTH)
        x = tl.load(at + 2 * CHANNELS, mask=ok[:, None] & c_ok[None, :], other=0.0)
        right = tl.dot(gradient, x, right, input_precision="ieee")
    first = (image.to(tl.int64) * FILTERS + n[:, None]) * 9 + i * 3
    at = result + first * CHANNELS + c[None, :]
    ok = n_ok[:, None] & c_ok[None, :]
    tl.store(at, left, mask=ok)
    tl.store(at + CHANNELS, middle, mask=ok)
    tl.store(at + 2 * CHANNELS, right, mask=ok)


def _block(count: int) -> int:
    """Tile of a dimension: a power of two from 16 on, which the matrix units want, up to 64."""
    return min(64, max(16, triton.next_power_of_2(count)))


def three_by_three(
    inputs: Tensor,
    output_gradients: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    draws: int,
    *,
    block_positions: int = 64,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """Gradients `(B, N, C, 3, 3)` in float32 of rows as in `weight_gradients`; copies rows that are channels first."""
    images, channels, filters = inputs.shape[0] // draws, inputs.shape[1], output_gradients.shape[1]
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    output_gradients = output_gradients.contiguous(memory_format=torch.channels_last)
    height, width = output_gradients.shape[2:]
    result = torch.empty(images, filters, 3, 3, channels, device=inputs.device, dtype=torch.float32)
    block_c, block_n = _block(channels), _block(filters)
    grid = (3 * triton.cdiv(filters, block_n) * triton.cdiv(channels, block_c) * images,)
    _weight_gradient_kernel[grid](
        inputs, output_gradients, result, images, draws * height * width,
        channels, filters, *inputs.shape[2:], height, width, *stride, *padding,
        block_c, block_n, block_positions, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return result.permute(0, 1, 4, 2, 3)
