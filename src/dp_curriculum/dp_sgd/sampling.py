"""Poisson sampling by logical step.

A logical step is one draw over the whole dataset, one noisy sum and one event of the ledger. Physical batches split it
to fit into memory; they change nothing but the order of a sum. A draw that is empty is a step like any other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import broadcast_object_list

from dp_curriculum.privacy.randomness import SecretGenerator


def draw_indices(generator: SecretGenerator, *, num_rows: int, sample_rate: float) -> torch.Tensor:
    r"""
    One Poisson sample: every row enters by its own coin toss with probability `sample_rate`.

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


def physical_batches(indices: torch.Tensor, max_images: int) -> Iterator[torch.Tensor]:
    """Splits a draw into parts of at most `max_images` images; an empty draw has no part."""
    if max_images < 1:
        raise ValueError(f"Expected max_images={max_images} to be at least 1.")
    return iter(indices.split(max_images)) if len(indices) else iter(())
