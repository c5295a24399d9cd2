"""State that the stages of one run share: configuration, data, ledger, randomness, the network and the folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from diffusers import EDMEulerScheduler, ModelMixin, UNet2DModel

from dp_curriculum.closed_form_prior import ClosedFormPrior, corrected_bands, is_clamped
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.config_sections import LATENT_BOUND
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.diffusion.autoencoder import LatentSpace
from dp_curriculum.diffusion.edm import SIGMA_DATA, build_unet
from dp_curriculum.diffusion.precision import passes_precision
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.lessons.planned import PlannedLesson
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, NoiseSchedule
from dp_curriculum.privacy.execution import Execution, weakest_execution
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.mechanism import DP_SGD, PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import Checkpoint
from dp_curriculum.runtime.processes import COLLECTIVE_TIMEOUT, from_main
from dp_curriculum.runtime.stopping import StopRequest
from dp_curriculum.runtime.threads import Threads
from dp_curriculum.training.dataset_account import DatasetAccount
from dp_curriculum.training.plan import BudgetPlan
from dp_curriculum.training.starting import Start


SHEET_COLUMNS = 8
SHEET_CLASSES = 10
_SAMPLING_DEFAULTS = ("num_inference_steps", "guidance_scale", "s_churn")
_SAMPLING_CONSTANTS = {"s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.0}  # of EDM's Algorithm 2
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
PRIOR_SIGMA_MAX = 1.0  # above it the prior alone is as good: sampling starts from its own images, noised
PHOTO_SIGMA_MAX = 0.4  # the same for photos
LATENT_SIGMA_MAX = 0.2  # the same for latents, whose values are half as far from their middle
DRAW_SIGMA_MAX = 0.01  # of a prior whose network was never trained: its own images as they are
_TYPICAL_BLOCK = 256  # coefficients of photos that a prior correlates, before the plan of the moments is known

Value = TypeVar("Value")


@dataclass
class Run:
    """
    One run under way. The main process holds the ledger and the checkpoint to resume from; the others follow it.

    `gradient_check` is what the self-check of the per-image gradients found; `None` if none was made. `account` is
    that in the ledger of the dataset, if there is one. `start` is the model that training started from. With
    `latents`, `private` holds latents of the images; `autoencoder` is what the report says of what made them.
    """

    config: CurriculumConfig
    folder: RunFolder
    accelerator: Accelerator
    private: PrivateImages
    plan: BudgetPlan
    ledger: PrivacyLedger | None
    secret: SecretGenerator
    generator: torch.Generator
    unet: UNet2DModel
    prior: ClosedFormPrior | None = None
    checkpoint: Checkpoint | None = None
    gradient_check: Mapping[str, Any] | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    threads: Threads = Threads(1)
    account: DatasetAccount | None = None
    start: Start | None = None
    latents: LatentSpace | None = None
    autoencoder: Mapping[str, str] | None = None

    @property
    def schedule(self) -> NoiseSchedule | None:
        """Noise schedule of a network that began as DDPM."""
        return None if self.start is None else self.start.schedule

    def is_prior(self, lesson: PlannedLesson) -> bool:
        """True if a lesson is the prior under the network, which need not be taught."""
        return self.prior is not None and lesson.number == 1

    @property
    def is_main(self) -> bool:
        """True if this process holds the ledger, writes files and shows progress bars."""
        return bool(self.accelerator.is_main_process)

    def ask_ledger(self, compute: Callable[[PrivacyLedger], Value]) -> Value:
        """A value that the main process computes from the ledger, on all processes."""

        def ask() -> Value:
            assert self.ledger is not None, "the main process holds the ledger"
            return compute(self.ledger)

        return from_main(self.accelerator, ask)

    def reserve(self, planned: PlannedMechanism, num_steps: int) -> None:
        """Writes to the ledger, durably, what the next `num_steps` of a stage release; then all processes continue."""
        executions = [self.execution_of(planned)]
        if self.accelerator.num_processes > 1:  # machines may differ
            executions = gather_object(executions)
        event = replace(planned.event, num_steps=num_steps)
        if self.ledger is not None:
            if self.account is not None:
                self.account.check_held(self.ledger, event)
            self.ledger.reserve(
                event,
                stage=planned.name,
                clip_norm=planned.clip_norm,
                execution=weakest_execution(executions),
            )
        self.accelerator.wait_for_everyone()

    def execution_of(self, planned: PlannedMechanism) -> Execution:
        """Way in which this process computes the steps of a mechanism."""
        device, randomness = self.accelerator.device, self.secret.describe()
        if planned.name != DP_SGD:
            return Execution(randomness=randomness, device=device.type, precision="float64", gradients="not taken")
        checked = self.gradient_check
        return Execution(
            randomness=randomness,
            device=device.type,
            precision=passes_precision(device, self.config.runtime.mixed_precision),
            gradients="unchecked" if checked is None else "checked",
            max_gradient_error=None if checked is None else float(checked["max_relative_error"]),
        )

    def record(self, path: Path, digest: str) -> None:
        """Writes to the ledger, durably, the hash of what will be at `path`."""
        if self.ledger is not None:
            self.ledger.record(self.folder.name(path), digest)

    def refund(self, planned: PlannedMechanism, num_steps: int) -> None:
        """Returns to the budget, durably, steps of a stage that were charged and not taken."""
        if self.ledger is not None:
            self.ledger.give_back(stage=planned.name, num_steps=num_steps)

    def epsilon(self) -> float | None:
        """Epsilon charged so far; `None` away from the main process and without noise."""
        budget = self.config.privacy
        if self.ledger is None or budget.non_private:
            return None
        return self.ledger.epsilon(budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)

    def pipeline(self, unet: UNet2DModel, privacy: dict[str, Any] | None = None) -> DPCurriculumPipeline:
        """The pipeline that users get, around `unet`."""
        sampler = self.config.sampler
        lowest, highest = SIGMA_MIN, SIGMA_MAX
        if self.prior is not None:
            highest = self._highest_level(self.prior)
        schedule = self.schedule
        if schedule is not None:  # the network knows no levels beyond its own
            lowest, highest = max(lowest, schedule.sigma_range[0]), min(highest, schedule.sigma_range[1])
        scheduler = EDMEulerScheduler(sigma_min=lowest, sigma_max=highest, sigma_data=SIGMA_DATA)
        return DPCurriculumPipeline(
            unet,
            scheduler,
            id2label=dict(enumerate(self.private.class_names)),
            sampling={name: getattr(sampler, name) for name in _SAMPLING_DEFAULTS} | _SAMPLING_CONSTANTS,
            privacy=privacy,
            prior=self.prior,
            patch_size=self.config.model.patch_size,
            noise_schedule=None if schedule is None else dataclasses.asdict(schedule),
            vae=None if self.latents is None else self.latents.vae,
            latent_bound=None if self.latents is None else LATENT_BOUND,
        )

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Images of released values in `[0, 1]`, for a sheet: decoded where those are latents."""
        return images if self.latents is None else self.latents.decode(images)

    def _highest_level(self, prior: ClosedFormPrior) -> float:
        """Noise level from which images of a prior are denoised by the network on it."""
        if self.plan.dp_sgd is None and not self.config.trains_before_noise:
            return DRAW_SIGMA_MAX
        if is_clamped(prior.means.shape[1:]):
            return PRIOR_SIGMA_MAX
        return PHOTO_SIGMA_MAX if self.latents is None else LATENT_SIGMA_MAX

    def save_samples(self, unet: UNet2DModel, path: Path) -> bool:
        """
        A sheet of generated images, one row per class. Noised weights went in, so it is covered.

        Returns whether there is one: a stop request leaves it out.
        """
        return self.is_main and self.stop.unless_stopped(lambda: self._draw_samples(unet, path)) is not None

    def _draw_samples(self, unet: UNet2DModel, path: Path) -> Path:
        pipeline = self.pipeline(unet)
        pipeline.set_progress_bar_config(desc="sample sheet", leave=False)
        classes = range(min(SHEET_CLASSES, self.private.num_classes))
        generator = torch.Generator(self.accelerator.device)
        generator.manual_seed(0 if self.config.runtime.seed is None else self.config.runtime.seed)
        (images,) = pipeline(
            class_labels=[label for label in classes for _ in range(SHEET_COLUMNS)],
            generator=generator,
            output_type="pt",
            return_dict=False,
        )
        save_sheet(images, path, columns=SHEET_COLUMNS)
        return path


def make_accelerator(config: CurriculumConfig, folder: RunFolder) -> Accelerator:
    """Devices, processes and trackers; nothing private passes through it (design rule 8)."""
    report_to = config.runtime.report_to
    return Accelerator(
        mixed_precision="no",  # autocast is ours
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=str(folder.root / "run"), logging_dir=str(folder.logs)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )


def initial_unet(
    config: CurriculumConfig,
    num_classes: int,
    accelerator: Accelerator,
    start: Start | None = None,
    class_names: tuple[str, ...] = (),
) -> UNet2DModel:
    """The network before its first lesson, the same on all processes: random, or that of a model to start from."""
    # diffusers draws initial weights from the global generator; fork_rng leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        if config.runtime.seed is not None:
            torch.random.default_generator.manual_seed(config.runtime.seed)
        unet = blank_unet(config, num_classes, start)
        if start is not None:  # the main process has its files
            from_main(accelerator, lambda: start.network.load_into(unet, class_names))
    unet = unet.to(accelerator.device)
    broadcast_weights(unet, accelerator)
    return unet


def blank_unet(config: CurriculumConfig, num_classes: int, start: Start | None = None) -> UNet2DModel:
    """The network of a run with random weights."""
    if start is not None:
        return start.build(config, num_classes)
    channels, side, _ = config.input_shape
    return build_unet(
        config.model,
        resolution=side,
        num_channels=channels,
        num_classes=num_classes,
        has_prior=config.has_prior,
    )


def blank_prior(config: CurriculumConfig, num_classes: int) -> ClosedFormPrior | None:
    """A prior of the right shapes before anything was released; `None` where there will be none."""
    if not config.has_prior:
        return None
    shape = channels, side, _ = config.input_shape
    rank = 1 if is_clamped(shape) else min(_TYPICAL_BLOCK, math.prod(shape))
    return ClosedFormPrior(num_classes, channels, side, rank, num_bands=corrected_bands(shape))


def broadcast_weights(unet: ModelMixin, accelerator: Accelerator) -> None:
    """Gives all processes the weights of the main one."""
    if accelerator.num_processes > 1:
        for tensor in unet.state_dict().values():
            tensor.copy_(broadcast(tensor.clone(), from_process=0))


def broadcast_tensors(tensors: Mapping[str, torch.Tensor] | None, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Gives all processes the named tensors of the main one, on the CPU. The others may pass `None`."""
    if accelerator.num_processes == 1:
        assert tensors is not None, "the main process has them"
        return dict(tensors)
    layout = [[(name, tensor.shape, tensor.dtype) for name, tensor in (tensors or {}).items()]]
    received = {}
    for name, shape, dtype in broadcast_object_list(layout, from_process=0)[0]:
        tensor = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
        received[name] = broadcast(tensor.to(accelerator.device).contiguous(), from_process=0).cpu()
    return received


def public_generator(config: CurriculumConfig, accelerator: Accelerator) -> torch.Generator:
    """Public randomness: diffusion noise, augmentation, label dropout. DP noise and masks never come from here."""
    generator = torch.Generator(accelerator.device)
    if config.runtime.seed is None:
        generator.seed()
        return generator
    # One stream a process: two processes must not add the same diffusion noise to their shares of a draw.
    return generator.manual_seed(config.runtime.seed + 1_000_003 * accelerator.process_index)


def secret_generator(config: CurriculumConfig, device: torch.device) -> SecretGenerator:
    """Secret randomness, in the mode that the configuration asks for."""
    mode = config.runtime.secret_randomness
    if mode == "auto":
        mode = "fast" if device.type == "cuda" else "secure"
    return SecretGenerator(mode, device=device if mode == "fast" else "cpu")
