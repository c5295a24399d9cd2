"""Poisson sampling: one coin toss a row and step, whatever the physical batches and the processes are."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dp_curriculum.dp_sgd.sampling import FILLER, draw_indices, physical_batches, share_of_process
from dp_curriculum.privacy.randomness import SecretGenerator


def test_a_draw_is_ascending_without_repeats_and_in_range() -> None:
    generator = SecretGenerator()
    for rate in (0.001, 0.3, 0.999, 1.0):
        drawn = draw_indices(generator, num_rows=500, sample_rate=rate)
        assert drawn.dtype == torch.int64 and drawn.ndim == 1
        assert torch.equal(drawn, drawn.unique()) and ((drawn >= 0) & (drawn < 500)).all()
    assert torch.equal(draw_indices(generator, num_rows=7, sample_rate=1.0), torch.arange(7))


def test_an_empty_draw_is_a_draw() -> None:
    generator = SecretGenerator()
    for num_rows, rate in ((0, 0.5), (0, 1.0), (5, 1e-12)):
        drawn = draw_indices(generator, num_rows=num_rows, sample_rate=rate)
        assert drawn.shape == (0,) and drawn.dtype == torch.int64
        assert len(physical_batches(drawn, 3)) == len(physical_batches(drawn, 3, is_constant=True)) == 0
        assert share_of_process(drawn, process_index=1, num_processes=2).shape == (0,)


@pytest.mark.statistical
def test_each_row_enters_by_its_own_coin() -> None:
    """2,000 steps of 400 rows at rate 0.1: inclusion of each row and size of each step, five and six standard errors.

    Broken twins: batches of a fixed size (no variance of the size), and one mask for all steps (no variance of rows).
    """
    generator, rate, steps, num_rows = SecretGenerator(), 0.1, 2000, 400
    masks = torch.zeros(steps, num_rows)
    for mask in masks:
        mask[draw_indices(generator, num_rows=num_rows, sample_rate=rate)] = 1

    def is_poisson(masks: torch.Tensor) -> bool:
        sizes, rows = masks.sum(1), masks.sum(0)
        variance = num_rows * rate * (1 - rate)
        rows_fit = (rows - steps * rate).abs().max() <= 6 * math.sqrt(steps * rate * (1 - rate))
        mean_fits = abs(sizes.mean() - num_rows * rate) <= 5 * math.sqrt(variance / steps)
        variance_fits = abs(sizes.var() - variance) <= 5 * variance * math.sqrt(2 / steps)
        again = (masks[1:] * masks[:-1]).sum() / (steps - 1)  # rows that are in two steps in a row
        return bool(rows_fit and mean_fits and variance_fits and abs(again - num_rows * rate**2) < 1)

    assert is_poisson(masks)
    fixed_size = torch.stack(
        [torch.randperm(num_rows, generator=torch.Generator().manual_seed(i)) < 40 for i in range(steps)]
    )
    assert not is_poisson(fixed_size.float())
    assert not is_poisson(masks[:1].expand_as(masks))


def test_consecutive_draws_differ() -> None:
    generator = SecretGenerator()
    draws = [tuple(draw_indices(generator, num_rows=200, sample_rate=0.5).tolist()) for _ in range(20)]
    assert len(set(draws)) == 20


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("limit", [1, 5, 12, 100])
def test_physical_batches_are_the_whole_draw_once_and_never_too_large(count: int, limit: int) -> None:
    indices = torch.arange(count) * 3
    for is_constant in (False, True):
        parts = physical_batches(indices, limit, is_constant=is_constant)
        assert len(parts) == math.ceil(count / limit), "as few as there can be"
        assert count == 0 or 1 <= parts.shape[1] <= limit and (not is_constant or parts.shape[1] == limit)
        assert torch.equal(parts.flatten()[:count], indices)
        assert (parts.flatten()[count:] == FILLER).all()
        assert is_constant or parts.numel() - count < max(1, len(parts)), "no more is filled up than must be"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_physical_batch_of_no_image_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_images={limit} to be at least 1"):
        physical_batches(torch.arange(3), limit)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_shares_of_processes_are_disjoint_and_together_the_draw(num_processes: int) -> None:
    indices = torch.arange(0, 40, 2)
    shares = [share_of_process(indices, process_index=i, num_processes=num_processes) for i in range(num_processes)]
    assert torch.equal(torch.cat(shares).sort().values, indices)
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


ONE_RANK = """
import json, sys
import torch
from accelerate import PartialState
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.dp_sgd.sampling import draw_indices, share_of_process
torch.set_num_threads(1)
state = PartialState(cpu=True)
assert state.num_processes == 2
draws, generator = [], SecretGenerator()
for step in range(30):
    rate = (0.2, 0.005)[step % 2]  # every second draw is mostly empty
    draw = draw_indices(generator, num_rows=40, sample_rate=rate)
    share = share_of_process(draw, process_index=state.process_index, num_processes=2)
    draws.append([draw.tolist(), share.tolist()])
with open(f"{sys.argv[1]}/{state.process_index}.json", "w") as file:
    json.dump(draws, file)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_see_one_draw_and_work_on_disjoint_parts_of_it(tmp_path: Path) -> None:
    """Gloo, two real processes: also where the draw is empty, which must keep both in step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ONE_RANK, str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == 30
    for (draw, share), (other_draw, other_share) in zip(first, second):
        assert draw == other_draw
        assert sorted(share + other_share) == draw
    assert any(not draw for draw, _ in first) and any(draw for draw, _ in first)
