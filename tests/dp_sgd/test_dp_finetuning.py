"""The hard stage: what a step releases, what it leaves alone, what a checkpoint keeps, when privacy is reserved."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import NO_CONTRIBUTION, PrivateImages, digits_dataset, to_unit_range
from dp_curriculum.diffusion.edm import build_unet, edm_loss, noise_levels
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.diffusion_noise import DiffusionNoise
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.runtime.checkpointing import load_checkpoint, save_checkpoint
from dp_curriculum.training.curriculum import run_curriculum


NUM_ROWS, NUM_CLASSES, DIVISOR = 12, 3, 5.0
ALL = range(NUM_ROWS)


class ChosenRows(SecretGenerator):
    """Draws the rows that a test names, and keeps the DP noise that it drew."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self.rows, self.noise = rows, torch.zeros(0)

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        return torch.tensor(self.rows, dtype=torch.int64)

    def gaussian(self, shape: Any, std: float, **options: Any) -> torch.Tensor:
        self.noise = super().gaussian(shape, std, **options)
        return self.noise


class StillDiffusion(SecretGenerator):
    """Diffusion noise that hangs on the copy alone: the same for each image, in whatever batch it comes."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.levels = torch.randn(copies, generator=generator)
        self.noise = torch.randn(copies, 1, 8, 8, generator=generator)

    def gaussian(self, shape: Any, std: float, **options: Any) -> torch.Tensor:
        if not isinstance(shape, int):
            return self.noise.repeat_interleave(shape[0] // len(self.noise), dim=0)
        # Once for label dropout, (B,), where the value only has to be far from a dropped label; once for the levels.
        self.is_level = not getattr(self, "is_level", True)
        copies = len(self.levels)
        return self.levels.repeat_interleave(shape // copies) if self.is_level else torch.ones(shape)


@pytest.fixture
def private() -> PrivateImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_ROWS, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return PrivateImages(images, torch.arange(NUM_ROWS) % NUM_CLASSES, ("a", "b", "c"))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(
        noise_multiplicity=2, dp_max_grad_norm=1.0, dp_learning_rate=0.01, num_dp_steps=6, max_physical_batch_size=64
    )


def make_unet(config: CurriculumConfig, seed: int = 0) -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_unet(config.model, resolution=8, num_channels=1, num_classes=NUM_CLASSES)


def make_trainer(
    config: CurriculumConfig,
    private: PrivateImages,
    rows: Sequence[int] = ALL,
    *,
    noise_multiplier: float = 0.0,
    unet: UNet2DModel | None = None,
    **options: Any,
) -> DPTrainer:
    """A trainer with chosen rows and still diffusion noise."""
    trainer = DPTrainer(
        make_unet(config) if unet is None else unet,
        private,
        config,
        noise_multiplier=noise_multiplier,
        sample_rate=0.5,
        divisor=DIVISOR,
        secret=ChosenRows(rows),
        **options,
    )
    trainer.diffusion_noise = StillDiffusion(config.dp_sgd.noise_multiplicity)
    return trainer


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def released(trainer: DPTrainer) -> torch.Tensor:
    """Takes a step and returns the noisy sum that it released."""
    sums: list[torch.Tensor] = []
    trainer.optimizer.attach_step_hook(lambda optimizer: sums.append(flat(p.grad for p in optimizer.params)))
    trainer.step()
    return sums[0] * DIVISOR


def mean_gradients(trainer: DPTrainer) -> torch.Tensor:
    """`(N, parameters)`: the mean over its noised copies of each image's gradient, by autograd, one copy at a time."""
    noise, config, private = trainer.diffusion_noise, trainer.config, trainer.private
    assert isinstance(noise, StillDiffusion)
    gradients = []
    for index in range(len(private)):
        image = to_unit_range(private.images[index : index + 1]) * 2 - 1
        total = torch.zeros(sum(parameter.numel() for parameter in trainer.unet.parameters()))
        for level, normal in zip(noise.levels, noise.noise):
            sigma = noise_levels(level.view(1), p_mean=config.dp_sgd.dp_p_mean)
            label = private.labels[index : index + 1]
            loss = edm_loss(trainer.unet, image, normal[None], sigma, label)
            total += flat(torch.autograd.grad(loss.sum(), list(trainer.unet.parameters()))) / len(noise.levels)
        gradients.append(total)
    return torch.stack(gradients)


# --- what a step releases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("copies", [1, 3])
def test_copies_are_averaged_then_clipped_once_then_summed(
    copies: int, mode: str, config: CurriculumConfig, private: PrivateImages
) -> None:
    """With a bound in the middle of the norms. To clip each copy, or to sum the copies, gives another sum."""
    config = config.replace(noise_multiplicity=copies, per_image_gradients=mode)
    gradients = mean_gradients(make_trainer(config, private))
    norms = gradients.norm(dim=1)
    bound = float(norms.median())
    expected = (gradients * (bound / norms).clamp(max=1)[:, None]).sum(0)
    found = released(make_trainer(config.replace(dp_max_grad_norm=bound), private))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_physical_batches_do_not_change_the_sum(mode: str, config: CurriculumConfig, private: PrivateImages) -> None:
    sums = [
        released(make_trainer(config.replace(max_physical_batch_size=size, per_image_gradients=mode), private))
        for size in (1, 2, 10, 24, 512)
    ]
    for found in sums[1:]:
        assert (found - sums[0]).norm() < 1e-5 * sums[0].norm()


def test_processes_share_a_draw_without_remainder(config: CurriculumConfig, private: PrivateImages) -> None:
    rows = [0, 2, 3, 5, 7]
    whole = released(make_trainer(config, private, rows))
    parts = [released(make_trainer(config, private, rows, process_index=i, num_processes=3)) for i in range(3)]
    assert (sum(parts) - whole).norm() < 1e-5 * whole.norm()


def test_no_image_adds_more_than_the_bound(config: CurriculumConfig, private: PrivateImages) -> None:
    """However small it is; and then a step is its noise."""
    config = config.replace(dp_max_grad_norm=1e-6)
    assert 0 < released(make_trainer(config, private)).norm() <= NUM_ROWS * 1e-6 * (1 + 1e-5)
    one = released(make_trainer(config, private, [4])).norm()
    assert one == pytest.approx(1e-6, rel=1e-4)
    noisy = make_trainer(config, private, noise_multiplier=1e6)
    assert torch.allclose(released(noisy), secret_of(noisy).noise.float(), atol=NUM_ROWS * 1e-5)
    assert float(secret_of(noisy).noise.std()) == pytest.approx(1, abs=0.1)


def secret_of(trainer: DPTrainer) -> ChosenRows:
    assert isinstance(trainer.secret, ChosenRows)
    return trainer.secret


def test_an_empty_draw_is_a_noisy_step_like_any_other(config: CurriculumConfig, private: PrivateImages) -> None:
    trainer = make_trainer(config, private, [], noise_multiplier=2.0)
    before = flat(trainer.unet.parameters()).clone()
    found = released(trainer)
    assert torch.allclose(found, secret_of(trainer).noise.float(), rtol=1e-5)
    assert float(found.std()) == pytest.approx(2.0, rel=0.1)
    assert (flat(trainer.unet.parameters()) != before).float().mean() > 0.99
    assert trainer.num_steps_taken == trainer.ema.optimization_step == 1
    assert trainer.lr_scheduler.last_epoch == 2, "the course of the learning rate leaves its step 0 out"


def test_a_row_without_contribution_adds_zero(config: CurriculumConfig, private: PrivateImages) -> None:
    labels = private.labels.clone()
    labels[3], labels[5] = NO_CONTRIBUTION, NUM_CLASSES  # unreadable, and a label that is no class
    spoiled = PrivateImages(private.images, labels, private.class_names)
    found = released(make_trainer(config, spoiled, [1, 3, 5, 6]))
    assert torch.equal(found, released(make_trainer(config, private, [1, 6])))
    assert not released(make_trainer(config, spoiled, [3, 5])).any()


def test_the_divisor_is_public_and_not_the_size_of_the_draw(config: CurriculumConfig, private: PrivateImages) -> None:
    grads: list[torch.Tensor] = []
    for rows in ([4], [4, 4, 4]):
        trainer = make_trainer(config, private, rows)
        trainer.optimizer.attach_step_hook(lambda optimizer: grads.append(flat(p.grad for p in optimizer.params)))
        trainer.step()
    assert torch.allclose(grads[1], 3 * grads[0], rtol=1e-4, atol=1e-7)
    assert grads[0].norm() <= 1.0 / DIVISOR * (1 + 1e-5)


def test_labels_are_withheld_at_the_rate_that_guidance_needs(config: CurriculumConfig, private: PrivateImages) -> None:
    """At rate 0 the class decides the gradient, at a rate of nearly 1 it does not."""
    other = PrivateImages(private.images, (private.labels + 1) % NUM_CLASSES, private.class_names)
    for rate, is_equal in ((0.0, False), (0.999, True)):
        changed = config.replace(label_dropout=rate)
        sums = [released(make_trainer(changed, images, [0, 1])) for images in (private, other)]
        assert torch.equal(*sums) == is_equal


# --- seeds ---------------------------------------------------------------------------------------------------------


def test_no_seed_repeats_the_diffusion_noise_of_a_step(config: CurriculumConfig, private: PrivateImages) -> None:
    """Noise that a seed gives would shift by an image more in the draw, and change the gradients of all others."""
    sums = []
    for _ in range(2):
        trainer = DPTrainer(
            make_unet(config.replace(seed=7)),
            private,
            config.replace(seed=7),
            noise_multiplier=0.0,
            sample_rate=0.5,
            divisor=DIVISOR,
            secret=ChosenRows(ALL),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            sums.append(released(trainer))
    assert (sums[0] - sums[1]).norm() > 1e-3 * sums[0].norm()


def test_a_seed_never_reaches_a_secret_generator(config: CurriculumConfig, tmp_path: Path) -> None:
    assert set(inspect.signature(SecretGenerator.__init__).parameters) == {"self", "mode", "device"}
    seed, made = 982_451_653, []
    original = SecretGenerator.__init__

    def record(self: SecretGenerator, *arguments: Any, **options: Any) -> None:
        made.append((*arguments, *options.values()))
        original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecretGenerator, "__init__", record)
        config = config.replace(seed=seed, non_private=True, num_inference_steps=1, sample_steps=0)
        run_curriculum(config, digits_dataset().select(range(32)), output_dir=tmp_path / "out")
    assert len(made) >= 2 and all(str(seed) not in repr(arguments) for arguments in made)


# --- what a step leaves alone --------------------------------------------------------------------------------------


def test_frozen_parameters_and_buffers_stay_as_they_are(config: CurriculumConfig, private: PrivateImages) -> None:
    unet = make_unet(config)
    unet.conv_in.requires_grad_(False)
    unet.register_buffer("statistics", torch.arange(3.0))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    trainer = make_trainer(config, private, noise_multiplier=1.0, unet=unet)
    for _ in range(2):
        trainer.step()
    kept = {name for name, value in unet.state_dict().items() if torch.equal(value, before[name])}
    assert kept == {"conv_in.weight", "conv_in.bias", "statistics"}
    with trainer.averaged_weights():
        assert torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    again = make_trainer(config, private, unet=make_unet(config, seed=1))
    again.unet.register_buffer("statistics", torch.zeros(3))
    again.load_state(2, trainer.state())
    assert torch.equal(again.unet.conv_in.weight, before["conv_in.weight"])


def test_nothing_of_an_image_is_kept_after_a_step(config: CurriculumConfig, private: PrivateImages) -> None:
    """Neither on the parameters nor in a checkpoint: its tensors have the shapes of weights, or hold one number."""
    trainer = make_trainer(config, private, range(7), noise_multiplier=1.0)
    trainer.step()
    for parameter in trainer.unet.parameters():
        assert parameter.grad is None
        assert parameter.__dict__.get("grad_sample") is None and parameter.__dict__.get("summed_grad") is None
    shapes = {name: parameter.shape for name, parameter in trainer.unet.named_parameters()}
    state = trainer.state()
    assert set(state) == {"unet", "ema", "optimizer"}
    assert {name: value.shape for name, value in state["unet"].items()} == shapes
    assert {name: value.shape for name, value in state["ema"].items()} == shapes
    moments = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in ("exp_avg", "exp_avg_sq")}
    steps = {f"{name}.step": torch.Size([]) for name in shapes}
    assert {name: value.shape for name, value in state["optimizer"].items()} == moments | steps


# --- the average ---------------------------------------------------------------------------------------------------


def test_averaged_weights_are_the_average_and_the_raw_ones_come_back(
    config: CurriculumConfig, private: PrivateImages
) -> None:
    """The average is by noisy step, with a decay of (1 + n) / (10 + n) until that reaches its value."""
    trainer = make_trainer(config.replace(dp_ema_decay=0.15), private, noise_multiplier=1.0)
    average = torch.zeros(0)
    for step in range(4):
        trainer.step()
        raw = flat(trainer.unet.parameters()).clone()
        decay = min(0.15, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1 - decay) * raw if step else raw
    assert trainer.unet.training
    with trainer.averaged_weights() as unet:
        assert unet is trainer.unet and not unet.training
        assert torch.allclose(flat(unet.parameters()), average, atol=1e-6)
        assert not torch.equal(flat(unet.parameters()), raw)
    assert torch.equal(flat(trainer.unet.parameters()), raw) and trainer.unet.training
    with pytest.raises(RuntimeError, match="while sampling"):
        with trainer.averaged_weights():
            raise RuntimeError("while sampling")
    assert torch.equal(flat(trainer.unet.parameters()), raw) and trainer.unet.training


# --- learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_rises_over_noisy_steps_and_is_constant_afterwards(
    warmup: int, config: CurriculumConfig, private: PrivateImages
) -> None:
    """Empty draws count. No step has rate 0: its noise was paid."""
    trainer = make_trainer(config.replace(dp_warmup_steps=warmup), private, [])
    for step in range(6):
        expected = min(1.0, (step + 1) / (warmup + 1))
        assert trainer.adam.param_groups[0]["lr"] == pytest.approx(0.01 * expected)
        trainer.step()


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "step"), [(0, 1), (4, 2), (2, 4)])
def test_a_trainer_goes_on_from_a_checkpoint_as_if_nothing_had_been(
    warmup: int, step: int, config: CurriculumConfig, private: PrivateImages, tmp_path: Path
) -> None:
    """Through files, into a trainer of other weights. Without DP noise, which is never replayed."""
    config = config.replace(dp_warmup_steps=warmup)
    trainer = make_trainer(config, private)
    for _ in range(step):
        trainer.step()
    path = save_checkpoint(tmp_path, step=step, tensors=trainer.state(), facts={}, total_limit=1)
    checkpoint = load_checkpoint(path)
    again = make_trainer(config, private, unet=make_unet(config, seed=1))
    again.load_state(checkpoint.step, checkpoint.tensors)
    for _ in range(6 - step):
        assert again.num_steps_taken == again.ema.optimization_step == again.lr_scheduler.last_epoch - 1
        assert again.adam.param_groups[0]["lr"] == trainer.adam.param_groups[0]["lr"]
        trainer.step()
        again.step()
    first, second = trainer.state(), again.state()
    assert again.num_steps_taken == 6
    for group in first:
        assert set(first[group]) == set(second[group])
        for name, value in first[group].items():
            assert torch.equal(value, second[group][name]), f"{group}: {name}"


# --- what a trainer is made of -------------------------------------------------------------------------------------


def test_diffusion_noise_is_standard_normal_and_secret(config: CurriculumConfig, private: PrivateImages) -> None:
    """200 draws for each of 12 images and two copies: a scale off by 15 % is caught, by six deviations."""
    trainer = make_trainer(config, private)
    trainer.diffusion_noise = fresh = make_trainer_of_a_run(config, private).diffusion_noise
    assert type(fresh) is DiffusionNoise
    draws = [trainer._diffusion_normals(torch.arange(NUM_ROWS)) for _ in range(200)]
    assert [part.shape for part in draws[0]] == [(NUM_ROWS,), (2 * NUM_ROWS,), (2 * NUM_ROWS, 1, 8, 8)]
    for part in range(3):
        values = torch.stack([draw[part] for draw in draws])
        error = (2 / values.numel()) ** 0.5
        assert abs(float(values.square().mean()) - 1) < 6 * error and abs(float(values.mean())) < 6 * error


def make_trainer_of_a_run(config: CurriculumConfig, private: PrivateImages) -> DPTrainer:
    return DPTrainer(
        make_unet(config),
        private,
        config,
        noise_multiplier=1.0,
        sample_rate=0.5,
        divisor=5.0,
        secret=SecretGenerator(),
    )


@pytest.mark.parametrize(("limit", "parts"), [(1, NUM_ROWS), (4, 6), (7, 4), (10, 3), (16, 2), (64, 1)])
def test_a_physical_batch_holds_as_many_inputs_as_were_allowed_and_at_least_an_image(
    limit: int, parts: int, config: CurriculumConfig, private: PrivateImages
) -> None:
    trainer = make_trainer(config.replace(max_physical_batch_size=limit), private)
    passes, backward = [], trainer.gradients.backward

    def counted(losses: torch.Tensor) -> None:
        passes.append(len(losses))
        backward(losses)

    trainer.gradients.backward = counted  # type: ignore[method-assign]
    trainer.step()
    assert len(passes) == parts and len(set(passes)) == 1 and passes[0] <= max(limit, 2)
    assert 2 * NUM_ROWS <= sum(passes) < 2 * (NUM_ROWS + parts)


def test_the_engine_has_the_memory_and_the_mode_that_were_asked_for(
    config: CurriculumConfig, private: PrivateImages
) -> None:
    config = config.replace(gradient_memory_limit=3, per_image_gradients="norms_first", noise_multiplicity=4)
    engine = make_trainer(config, private).gradients
    assert (engine.memory_limit, engine.mode, engine.noise_multiplicity) == (3 * 1024**2, "norms_first", 4)


@pytest.mark.usefixtures("bf16_hardware")
def test_bf16_is_used_where_it_is_asked_for_and_sums_stay_float32(
    config: CurriculumConfig, private: PrivateImages
) -> None:
    exact = released(make_trainer(config, private))
    coarse = released(make_trainer(config.replace(mixed_precision="bf16"), private))
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, exact)
    assert float((coarse - exact).norm() / exact.norm()) < 0.1
