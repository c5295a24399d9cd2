"""Persons on two processes: the bound for a person holds for the sum of both, and a run is one of persons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import results_of

from dp_curriculum.audit.frozen import FrozenGenerator
from dp_curriculum.audit.neighbours import Neighbours, neighbours
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.data import digits_dataset
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.training.curriculum import run_curriculum


KINDS = ("3 images of several classes", "500 images of one class", "with broken rows", "only person of a class",
         "huge gradient", "gradient not finite")  # fmt: skip


def distances(audit: StepAudit, pair: Neighbours, rank: int) -> list[float]:
    """Distance of the sums of two steps of both processes, in bounds of what the relation allows."""
    first = FrozenGenerator(always=pair.changed)
    second = FrozenGenerator(always=pair.changed, recorded=first)
    for private, secret in ((pair.first, first), (pair.second, second)):
        trainer = audit.build(private, secret)
        trainer.process_index, trainer.num_processes = rank, 2
        trainer.loss_scale = trainer.loss_scale.clone()  # type: ignore[attr-defined]
        trainer.loss_scale[pair.num_others :] = pair.loss_scale  # type: ignore[attr-defined]
        for _ in range(2):
            trainer.step()
    assert len(first.sums) == len(second.sums) == (2 if rank == 0 else 0)
    return [float((a - b).norm()) / (pair.distance * audit.bound) for a, b in zip(first.sums, second.sums)]


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("relation", ["add", "replace"])
def test_one_person_moves_the_sum_of_two_processes_by_at_most_the_bound(
    relation: str, mode: str, make_config: Any
) -> None:
    config = make_config(
        noise_multiplicity=4, dp_max_grad_norm=0.37, per_image_gradients=mode, person_column="person",
        max_physical_batch_size=8,
    )  # fmt: skip
    audit = StepAudit(config, GaussianEvent(2.0, 0.25, 10), 3, 16.0)
    pairs = [
        pair
        for pair in neighbours(num_channels=1, side=8, num_classes=3, gradients=True, unit="person")
        if pair.name in {f"{kind}, {relation}" for kind in KINDS}
    ]
    assert len(pairs) == len(KINDS)

    def work(rank: int) -> list[list[float]]:
        from accelerate import Accelerator

        Accelerator(cpu=True)
        return [distances(audit, pair, rank) for pair in pairs]

    found = results_of(2, work)[0]
    assert all(len(one) == 2 and max(one) <= 1 + 1e-4 for one in found)
    assert max(max(one) for one in found) > 0.5, "a person who is seen"


def test_a_run_of_persons_on_two_processes(make_config: Any, tmp_path: Path) -> None:
    owners = [f"p{person}" for person in range(20) for _ in range(1 + person % 3)]
    rows = digits_dataset().select(range(len(owners))).add_column("person", owners)
    config = make_config(
        person_column="person", expected_batch_size=6, num_dp_steps=2, num_inference_steps=2, sample_steps=0,
        checkpointing_steps=1, noise_multiplicity=4, holdout=0.2, seed=0,
    )  # fmt: skip
    for fields in results_of(
        2, lambda rank: run_curriculum(config, rows, output_dir=tmp_path / "run").report.to_dict()
    ):
        assert fields["privacy_unit"]["unit"] == "person" and fields["protected_dataset"]["num_records"] == 16
        assert all(check.holds for check in verify_report(fields))
