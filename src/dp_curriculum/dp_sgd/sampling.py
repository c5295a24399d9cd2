"""Poisson sampling by logical step.

A logical step is one draw over the whole dataset, one noisy sum and one event of the ledger. Physical batches split it
to fit into memory; they change nothing but the order of a sum. A draw that is empty is a step like any other.
"""

from __future__ import annotations

import torch
from accelerate.utils import broadcast_object_list

from dp_curriculum.privacy.randomness import SecretGenerator


FILLER = -1


def draw_indices(generator: SecretGenerator, *, num_rows: int, sample_rate: float) -> torch.Tensor:
    r"""
    One Poisson sample: every unit, a row or a person, enters by its own coin toss with probability `sample_rate`.

    Under several processes the first one draws and the others receive the same draw: one sample for all of them, as it
    is accounted.

    Returns:
        `torch.LongTensor` of shape `(n,)`, with n random: indices in ascending order.
    """
    if not torch.distributed.is_initialized():
        return generator.poisson_sample(num_rows, sample_rate)
    draws = torch.distributed.get_rank() == 0
    drawn = [generator.poisson_sample(num_rows, sample_rate) if draws else None]
    return broadcast_object_list(drawn, from_process=0)[0]


def share_of_process(indices: torch.Tensor, *, process_index: int, num_processes: int) -> torch.Tensor:
    """The part of one draw that a process works on; the parts are disjoint and together the whole draw."""
    return indices[process_index::num_processes]


def physical_batches(indices: torch.Tensor, max_images: int, *, is_constant: bool = False) -> torch.Tensor:
    r"""
    Splits a draw into as few parts of at most `max_images` images as there can be, all of one size.

    What a part lacks is made up by `FILLER`, an index of no image; [`~PerImageGradients.accumulate_clipped`] is told
    not to count it.

    Args:
        indices (`torch.LongTensor` of shape `(n,)` or `(n, K)`): The draw; of a person, the K rows of a gradient.
        max_images (`int`): Images, or persons, of a part.
        is_constant (`bool`, *optional*, defaults to `False`): Whether parts are of `max_images` whatever the draw, so
            that shapes stand still from step to step; else of the smallest size that serves.

    Returns:
        `torch.LongTensor` of shape `(parts, size)` or `(parts, size, K)`: No part of an empty draw.
    """
    if max_images < 1:
        raise ValueError(f"Expected max_images={max_images} to be at least 1.")
    parts = -(-len(indices) // max_images)
    size = max_images if is_constant or not parts else -(-len(indices) // parts)
    filled = indices.new_full((parts * size, *indices.shape[1:]), FILLER)
    filled[: len(indices)] = indices
    return filled.view(parts, size, *indices.shape[1:])
