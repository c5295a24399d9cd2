"""How much memory there is for a step: how many images at once, and how large their gradients may be."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import torch
from accelerate.utils.memory import should_reduce_batch_size


_CPU_ROWS = 128
_MOST_ROWS = 8192  # on a GPU: more keep it no busier
_SHARE, _SHARE_OF_GRADIENTS = 0.8, 0.25  # of free memory, for a whole pass and for the gradients in it
_CPU_GRADIENT_BYTES = 2 * 1024**3
_DEVIATIONS = 2.5  # a draw is larger than this once in 160 steps


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, or kept by torch for whoever asks next."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def gradient_limit(device: torch.device, mebibytes: int | None) -> int:
    """Bytes that the gradients of a physical batch may take: as asked for, or a quarter of a GPU's free memory."""
    if mebibytes is not None:
        return mebibytes * 1024**2
    return int(_SHARE_OF_GRADIENTS * free_bytes(device)) if device.type == "cuda" else _CPU_GRADIENT_BYTES


def usual_rows(device: torch.device) -> int:
    """Network inputs of a physical batch where nobody asks for a number; on a GPU, if there is memory for them."""
    return _MOST_ROWS if device.type == "cuda" else _CPU_ROWS


def even_batches(expected: float, most: int) -> int:
    r"""
    Images of a physical batch, of which nearly every draw fills a whole number.

    Args:
        expected (`float`): Public mean size of a draw.
        most (`int`): Images that fit into memory at once.

    Returns:
        `int`: At most `most`. A draw of mean size and 2.5 standard deviations more takes as few batches of this size
        as it takes of the largest one.
    """
    large_draw = math.ceil(expected + _DEVIATIONS * math.sqrt(expected))
    return max(1, -(-large_draw // -(-large_draw // most)))


def images_that_fit(
    device: torch.device, draws: int, gradient_bytes_per_image: int, limit: int, try_images: Callable[[int], None]
) -> int:
    r"""
    Images whose pass fits into memory: a constant on a CPU; on a GPU from what passes over a few of them take.

    Args:
        device (`torch.device`): Of the network.
        draws (`int`): K, rows an image.
        gradient_bytes_per_image (`int`): Of one gradient.
        limit (`int`): Bytes that the gradients may take together, or 0 where they are not kept.
        try_images (`Callable[[int], None]`): A whole pass over so many images that are nobody's.
    """
    if device.type != "cuda":
        return max(1, usual_rows(device) // draws)
    few = max(1, 64 // draws)
    try:
        try_images(few)  # what is allocated once
        small, large = (_peak_bytes(device, try_images, count) for count in (few, 3 * few))
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return few  # steps go down from there
    per_image = max(1.0, (large - small) / (2 * few))
    images = (_SHARE * free_bytes(device) - max(0.0, small - few * per_image)) / per_image
    if limit:
        images = min(images, limit / gradient_bytes_per_image)
    return max(1, int(min(images, usual_rows(device) / draws)))


def _peak_bytes(device: torch.device, try_images: Callable[[int], None], count: int) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try_images(count)
    return int(torch.cuda.max_memory_allocated(device) - before)


def give_back_memory(device: torch.device) -> None:
    """Of a pass that failed, once nothing refers to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
