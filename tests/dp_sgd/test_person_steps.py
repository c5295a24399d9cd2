"""Noisy steps of persons: a coin for each, K rows of their images, one average, one clip, one contribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages, to_unit_range
from dp_curriculum.data.units import NO_PERSON
from dp_curriculum.diffusion.edm import build_unet, drop_labels, edm_loss, noise_levels
from dp_curriculum.dp_sgd.sampling import FILLER, physical_batches
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.run import blank_prior


DIVISOR = 5.0
# Persons 0 to 3 with 1, 2, 7 and no contributing images.
PERSONS = [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, NO_PERSON, 3, 3]


class Chosen(SecretGenerator):
    """Draws the units that a test names, takes rows in their order, and adds no noise."""

    def __init__(self, units: Any) -> None:
        super().__init__()
        self.units, self.num_rows, self.num_words = list(units), 0, 0

    def poisson_sample(self, num_rows: int, sample_rate: float) -> Tensor:
        self.num_rows = num_rows
        return torch.tensor(self.units, dtype=torch.int64)

    def random_words(self, count: int) -> Tensor:
        self.num_words += count
        return torch.arange(count)

    def gaussian(self, shape: Any, std: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)


class Trainer(DPTrainer):
    """Diffusion noise and label dropout that belong to place k of a row, in whatever batch it comes."""

    def _diffusion_normals(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        copies = self.config.dp_sgd.noise_multiplicity
        places = rows[:, None].expand(-1, copies) if rows.ndim == 1 else rows
        labels = torch.stack(
            [torch.stack([normals_of(int(row), k)[0] for row in places[:, k]]) for k in range(copies)]
        )
        drawn = [normals_of(int(row), k) for k in range(copies) for row in places[:, k]]
        labels = labels[:1] if rows.ndim == 1 else labels
        return labels.flatten(), torch.stack([one[1] for one in drawn]), torch.stack([one[2] for one in drawn])


def normals_of(row: int, copy: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * row + copy + 1)
    return (torch.randn((), generator=generator), torch.randn((), generator=generator),
            torch.randn(1, 8, 8, generator=generator))  # fmt: skip


def private_images(persons: list[int] | None = PERSONS) -> PrivateImages:
    images = torch.randint(256, (13, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(13) % 3
    labels[11:] = NO_CONTRIBUTION
    return PrivateImages(images, labels, ("a", "b", "c"), None if persons is None else torch.tensor(persons))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(noise_multiplicity=4, dp_max_grad_norm=1.0, max_physical_batch_size=64, label_dropout=0.3)


def make_trainer(config: CurriculumConfig, private: PrivateImages, units: Any, **options: Any) -> Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(config.model, resolution=8, num_channels=1, num_classes=3, has_prior=config.has_prior)
    return Trainer(
        unet, private, config, noise_multiplier=0.0, sample_rate=0.5, divisor=DIVISOR, secret=Chosen(units),
        prior=blank_prior(config, 3), **options,
    )  # fmt: skip


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def released(trainer: Trainer) -> Tensor:
    sums: list[Tensor] = []
    trainer.optimizer.attach_step_hook(lambda optimizer: sums.append(flat(p.grad for p in optimizer.params)))
    trainer.step()
    return sums[0] * DIVISOR


def mean_gradient(trainer: Trainer, person: int) -> Tensor:
    """By autograd, one row at a time: the average over K rows, the person's images in turn, or the first K of them."""
    config, private = trainer.config, trainer.private
    copies = config.dp_sgd.noise_multiplicity
    own = [row for row in range(13) if PERSONS[row] == person and private.labels[row] >= 0]
    total = torch.zeros(sum(parameter.numel() for parameter in trainer.unet.parameters()))
    for copy in range(copies):
        row = own[copy % len(own)]
        label_normal, level, noise = normals_of(row, copy)
        image = to_unit_range(private.images[row : row + 1]) * 2 - 1
        rate = config.model.label_dropout
        label = drop_labels(private.labels[row : row + 1], label_normal[None], null_label=3, rate=rate)
        sigma = noise_levels(level[None], p_mean=config.dp_sgd.dp_p_mean)
        loss = edm_loss(trainer.unet, image, noise[None], sigma, label, prior=trainer.prior)
        total += flat(torch.autograd.grad(loss.sum(), list(trainer.unet.parameters()))) / copies
    return total


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("copies", [1, 3, 4])
@pytest.mark.parametrize("stages", [["mean", "dp_sgd"], ["moments", "dp_sgd"]])
def test_the_rows_of_a_person_are_averaged_clipped_once_and_summed(
    stages: list[str], copies: int, mode: str, config: CurriculumConfig
) -> None:
    """Beside autograd, one row at a time, with a bound below two of three norms; with a prior and without."""
    config = config.replace(stages=stages, noise_multiplicity=copies, per_image_gradients=mode)
    gradients = torch.stack([mean_gradient(make_trainer(config, private_images(), []), person) for person in range(3)])
    norms = gradients.norm(dim=1)
    bound = float(norms.sort().values[0]) * 1.01
    expected = (gradients * (bound / norms).clamp(max=1)[:, None]).sum(0)
    found = released(make_trainer(config.replace(dp_max_grad_norm=bound), private_images(), range(4)))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    clipped_apart = released(make_trainer(config.replace(dp_max_grad_norm=bound), private_images(None), range(10)))
    assert (clipped_apart - expected).norm() > 0.1 * expected.norm(), "the twin: one clip per image"


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_physical_batches_do_not_change_the_sum_of_persons(mode: str, config: CurriculumConfig) -> None:
    sums = [
        released(make_trainer(config.replace(max_physical_batch_size=size, per_image_gradients=mode),
                              private_images(), range(4)))
        for size in (1, 4, 8, 64)
    ]  # fmt: skip
    for found in sums[1:]:
        assert (found - sums[0]).norm() < 1e-5 * sums[0].norm()


def test_processes_share_persons_without_remainder(config: CurriculumConfig) -> None:
    whole = released(make_trainer(config.replace(noise_multiplicity=8), private_images(), range(4)))
    parts = [
        released(make_trainer(config.replace(noise_multiplicity=8), private_images(), range(4), process_index=index,
                              num_processes=3))
        for index in range(3)
    ]  # fmt: skip
    assert (sum(parts) - whole).norm() < 1e-5 * whole.norm()


def test_a_person_adds_no_more_than_the_bound_however_many_images_they_have(config: CurriculumConfig) -> None:
    config = config.replace(dp_max_grad_norm=1e-6)
    for person in range(3):
        assert released(make_trainer(config, private_images(), [person])).norm() == pytest.approx(1e-6, rel=1e-4)
    assert not released(make_trainer(config, private_images(), [3])).any(), "no image of theirs can be read"
    twin = released(make_trainer(config, private_images(None), range(3, 10)))
    assert twin.norm() > 1.5e-6, "the seven images of one person, as units"


def test_coins_are_of_persons_and_images_ask_for_no_order(config: CurriculumConfig) -> None:
    persons, images = (
        make_trainer(config, private_images(), [0, 2]),
        make_trainer(config, private_images(None), [0, 2]),
    )
    for trainer, rows, words in ((persons, 4, 8), (images, 13, 0)):
        trainer.step()
        assert isinstance(trainer.secret, Chosen)
        assert (trainer.secret.num_rows, trainer.secret.num_words) == (rows, words)


def test_physical_batches_of_persons_are_filled_with_persons_that_are_nobody() -> None:
    drawn = torch.arange(20).view(5, 4)
    batches = physical_batches(drawn, 3)
    assert batches.shape == (2, 3, 4) and torch.equal(batches.view(-1, 4)[:5], drawn)
    assert (batches[1, 2] == FILLER).all()


def test_a_trial_has_as_many_rows_as_a_batch(config: CurriculumConfig) -> None:
    seen: list[Tensor] = []

    class Watched(Trainer):
        def _losses(self, rows: Tensor) -> Tensor:
            seen.append(rows)
            return super()._losses(rows)

    trainer = make_trainer(config, private_images(), range(4))
    trainer.__class__ = Watched
    trainer.try_images(3)
    trainer.step()
    assert [rows.shape for rows in seen] == [(3, 4), (3, 4)] and (seen[0] == FILLER).all()
