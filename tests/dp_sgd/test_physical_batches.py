"""How a step is split: batches filled up to one size, memory that runs out, images on the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_dp_finetuning import NUM_CLASSES, config, make_trainer, make_unet, private, released

from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.audit.step_replay import audit_steps
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.dp_sgd import memory
from dp_curriculum.dp_sgd import trainer as dp_finetuning
from dp_curriculum.dp_sgd.device_images import DeviceImages
from dp_curriculum.dp_sgd.memory import even_batches, gradient_limit, images_that_fit
from dp_curriculum.dp_sgd.sampling import FILLER
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.accounting import GaussianEvent


__all__ = ["config", "private"]  # fixtures
CPU, OUT_OF_MEMORY = torch.device("cpu"), "CUDA out of memory. Tried to allocate 2.00 GiB"


# --- batches that are filled up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "norms_first"])
def test_a_batch_that_is_filled_up_moves_by_one_image_on_neighbours(mode: str, make_config: Any) -> None:
    """A row that fills up has the loss of the changed image: a huge one, or one that is no number."""
    config = make_config(noise_multiplicity=2, dp_max_grad_norm=0.37, per_image_gradients=mode)
    filled: list[bool] = []

    class Watched(DPTrainer):
        has_constant_batches = True  # as on a GPU

        def _add_batch(self, batch: torch.Tensor) -> bool:
            filled.append(bool((batch == FILLER).any()))
            return super()._add_batch(batch)

    audit = StepAudit(config, GaussianEvent(2.0, 0.25, 10), NUM_CLASSES, 16.0, Watched)
    names = "huge gradient, add", "gradient not finite, add", "endless gradient, replace", "ordinary, remove"
    every = neighbours(num_channels=1, side=8, num_classes=NUM_CLASSES, gradients=True)
    findings = audit_steps(audit, [pair for pair in every if pair.name in names])
    assert sum(filled) > 2 * len(names) and not all(filled)
    assert [finding.claim for finding in findings if not finding.holds] == []


def test_what_fills_up_a_batch_adds_nothing(config: CurriculumConfig, private: PrivateImages) -> None:
    """Also where its loss is no number: the sum is that of batches of one image, which nothing fills up."""

    class Broken(DPTrainer):
        def _losses(self, rows: torch.Tensor) -> torch.Tensor:
            broken = torch.where(rows == FILLER, torch.nan, 1.0)
            return super()._losses(rows) * broken.repeat(self.config.dp_sgd.noise_multiplicity)

    def total(kind: type[DPTrainer], size: int) -> torch.Tensor:
        trainer = make_trainer(config.replace(max_physical_batch_size=size), private, range(7))
        trainer.__class__ = kind
        return released(trainer)

    expected = total(DPTrainer, 2)
    for kind in (DPTrainer, Broken):
        assert (total(kind, 8) - expected).norm() < 1e-5 * expected.norm()


def test_a_filler_is_no_image(private: PrivateImages) -> None:
    images, labels = DeviceImages(private, CPU).take(torch.tensor([4, FILLER, 0, FILLER]))
    assert not images[[1, 3]].any() and labels[[1, 3]].tolist() == [0, 0]
    assert torch.equal(images[0], private.images[4] / 255.0 * 2 - 1) and labels[0] == private.labels[4]
    assert images.dtype == torch.float32 and labels[2] == private.labels[0]


@pytest.mark.parametrize(("expected", "most"), [(2048, 2048), (2048, 128), (5, 3), (0.5, 100), (4096, 10_000), (1, 1)])
def test_batches_of_a_constant_size_waste_little(expected: float, most: int) -> None:
    size, large = even_batches(expected, most), math.ceil(expected + 2.5 * math.sqrt(expected))
    assert 1 <= size <= most
    assert math.ceil(large / size) == math.ceil(large / most), "as few batches as the largest size takes"
    assert size == 1 or math.ceil(large / (size - 1)) > math.ceil(large / most), "and none smaller does"


# --- memory ----------------------------------------------------------------------------------------------------------


def out_of_memory_above(trainer: DPTrainer, rows: int, where: str) -> list[int]:
    """Lets memory run out where more than `rows` rows are computed at once; a list of the passes that were begun."""
    begun: list[int] = []
    original: Callable[..., None] = getattr(trainer.gradients, where)

    def limited(*arguments: Any, **options: Any) -> None:
        size = len(arguments[0]) if where == "backward" else 2 * len(options["counted"])
        begun.append(size)
        if size > rows:
            if where == "_weighted_sum":
                original(*arguments, **options)
            raise RuntimeError(OUT_OF_MEMORY)
        original(*arguments, **options)

    setattr(trainer.gradients, where, limited)
    return begun


@pytest.mark.parametrize("mode", ["auto", "norms_first"])
@pytest.mark.parametrize("where", ["backward", "accumulate_clipped"])
def test_where_memory_runs_out_the_batch_is_done_again_in_halves(
    where: str,
    mode: str,
    config: CurriculumConfig,
    private: PrivateImages,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every image is in the sum once, and a later step begins with what fits. Rows are images times two."""
    config = config.replace(max_physical_batch_size=20, per_image_gradients=mode)
    expected = released(make_trainer(config, private))
    trainer = make_trainer(config, private)
    begun, engine = out_of_memory_above(trainer, 7, where), trainer.gradients
    give_back, held = dp_finetuning.give_back_memory, []
    monkeypatch.setattr(
        dp_finetuning,
        "give_back_memory",
        lambda device: held.append((len(engine._calls), engine._flat.rows.numel())) or give_back(device),  # type: ignore[func-returns-value]
    )
    with caplog.at_level(logging.WARNING):
        found = released(trainer)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert begun == [12, 6, 6, 6, 6]
    assert held == [(0, 0)], "nothing of the pass that failed"
    told = "memory ran out: physical batches are halved to --max_physical_batch_size=6"
    assert [record.message for record in caplog.records] == [told]
    begun.clear()
    trainer.step()
    assert begun == [6, 6, 6, 6]


def test_memory_that_runs_out_within_the_sum_adds_nothing(config: CurriculumConfig, private: PrivateImages) -> None:
    """In the middle of the second of two batches, in the mode that adds up parameter by parameter."""
    config = config.replace(max_physical_batch_size=12, per_image_gradients="norms_first")
    expected = released(make_trainer(config, private))
    trainer = make_trainer(config, private)
    chunks, count = trainer.gradients._chunks, [0]

    def failing(parameter: Any) -> Any:
        count[0] += 1
        if count[0] == 3 * len(trainer.gradients.trainable) + 10:
            raise RuntimeError(OUT_OF_MEMORY)
        return chunks(parameter)

    trainer.gradients._chunks = failing  # type: ignore[method-assign]
    found = released(trainer)
    assert count[0] > 3 * len(trainer.gradients.trainable) + 10
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_memory_for_not_even_one_image_is_an_error(config: CurriculumConfig, private: PrivateImages) -> None:
    trainer = make_trainer(config, private)
    before = [parameter.clone() for parameter in trainer.unet.parameters()]
    out_of_memory_above(trainer, 0, "backward")
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step()
    assert trainer.images_at_once == 1 and trainer.num_steps_taken == 0
    assert all(torch.equal(parameter, old) for parameter, old in zip(trainer.unet.parameters(), before))


def test_another_error_is_not_taken_for_memory(config: CurriculumConfig, private: PrivateImages) -> None:
    trainer = make_trainer(config, private)
    trainer.gradients.backward = lambda losses: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        trainer.step()


def test_a_batch_is_as_large_as_free_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of which a pass takes 1 MB and 10 kB an image; of K = 4 rows each."""
    gpu, tried, free = torch.device("cuda"), [], [10_000_000]

    def out_of_memory(*arguments: Any) -> int:
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(memory, "_peak_bytes", lambda device, run, count: run(count) or 1_000_000 + 10_000 * count)

    def fitting(limit: int) -> int:
        return images_that_fit(gpu, 4, 2_000, limit, tried.append)

    assert fitting(0) == (0.8 * 10_000_000 - 1_000_000) // 10_000 and tried == [16, 16, 48]
    assert fitting(600_000) == 300, "their gradients are to be held"
    free[0] = 10**12
    assert fitting(0) == 8192 // 4, "more would keep it no busier"
    free[0] = 1000
    assert fitting(0) == 1
    monkeypatch.setattr(memory, "_peak_bytes", out_of_memory)
    assert fitting(0) == 16, "what was tried: steps go down from there"
    assert gradient_limit(gpu, None) == 250 and gradient_limit(gpu, 3) == 3 * 2**20
    assert images_that_fit(CPU, 4, 2_000, 0, tried.append) == 32 and images_that_fit(CPU, 500, 1, 1, tried.append) == 1
    assert gradient_limit(CPU, None) == 2**31 and gradient_limit(CPU, 0) == 0


def test_a_trial_of_memory_is_of_no_image_and_leaves_nothing(config: CurriculumConfig, private: PrivateImages) -> None:
    trainer = make_trainer(config, private)
    before = [parameter.clone() for parameter in trainer.unet.parameters()]
    read: list[torch.Tensor] = []
    take = trainer.images.take
    trainer.images.take = lambda rows: read.append(rows) or take(rows)  # type: ignore[method-assign,func-returns-value]
    trainer.try_images(5)
    assert [rows.tolist() for rows in read] == [[FILLER] * 5]
    for parameter, old in zip(trainer.unet.parameters(), before):
        assert torch.equal(parameter, old) and parameter.grad is None
        assert parameter.__dict__["grad_sample"] is None and parameter.__dict__["summed_grad"] is None


def test_the_way_that_gradients_are_computed_is_told_and_no_draw_changes_it(
    config: CurriculumConfig, private: PrivateImages
) -> None:
    """Twelve rows are drawn: their gradients would fit, those of a full batch do not."""
    most = 2**20 // (4 * sum(parameter.numel() for parameter in make_unet(config).parameters()))
    assert most > 12
    for images, told in ((most, "are held, "), (most + 1, "twice (norms_first), for they would take")):
        trainer = make_trainer(config.replace(max_physical_batch_size=2 * images, gradient_memory_limit=1), private)
        assert told in trainer.describe_batches() and trainer.is_recomputed == (images > most)
        trainer.step()
        assert trainer.gradients._is_materialized == (images == most)
    asked = make_trainer(config.replace(per_image_gradients="norms_first"), private)
    assert asked.describe_batches().endswith("(norms_first), as asked for")
