"""The hard stage: DP-SGD on the images themselves, by logical step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LRScheduler

from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import CurriculumConfig, DPSGDConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.diffusion.edm import drop_labels, edm_loss, noise_levels
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.diffusion.trainable import choose_weights
from dp_curriculum.dp_sgd.device_images import DeviceImages
from dp_curriculum.dp_sgd.dp_optimizer import SecretNoiseOptimizer
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradients
from dp_curriculum.dp_sgd.memory import even_batches, give_back_memory, gradient_limit, images_that_fit
from dp_curriculum.dp_sgd.sampling import FILLER, draw_indices, physical_batches, share_of_process
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule
from dp_curriculum.privacy.diffusion_noise import DiffusionNoise
from dp_curriculum.privacy.randomness import SecretGenerator


logger = logging.getLogger(__name__)


def _lr_scheduler(adam: torch.optim.Adam, options: DPSGDConfig, *, num_steps_taken: int = 0) -> LRScheduler:
    """The course of the learning rate. Step 0 of diffusers' courses has rate 0 and would waste its noise: it is left
    out, so that w warm-up steps take 1/(w+1), 2/(w+1), ... of the rate."""
    for group in adam.param_groups:
        group["initial_lr"] = options.dp_learning_rate
    warmup = options.dp_warmup_steps + 1
    return get_scheduler("constant_with_warmup", adam, num_warmup_steps=warmup, last_epoch=num_steps_taken)


class DPTrainer:
    r"""
    Takes noisy steps on a model, one logical batch each.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The network, on its device; trained in place, as `trainable` of the
            configuration says. [`merge_weights`] makes it a stock network again.
        private ([`PrivateImages`]): The images, in memory.
        config ([`CurriculumConfig`]): The whole configuration.
        noise_multiplier (`float`): Noise over sensitivity, from the calibration.
        sample_rate (`float`): Probability that an image, or a person, enters a step, as accounted.
        divisor (`float`): Public expected number of images, or persons, per step.
        secret ([`SecretGenerator`]): Source of masks and DP noise.
        max_grad_norm (`float`, *optional*): C, the L2 bound of one image or person, as accounted; that of the
            configuration if unset.
        prior ([`ClosedFormPrior`], *optional*): What the network adds to, on its device; a released value.
        schedule ([`NoiseSchedule`], *optional*): That of a network which began as DDPM.
        process_index, num_processes (`int`, *optional*): Which share of each draw this process works on.

    Privacy:
        [`~DPTrainer.step`] releases one noisy gradient sum, hence the weights and their average; see
        [`SecretNoiseOptimizer`]. The caller reserves each step in the ledger before it calls.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        private: PrivateImages,
        config: CurriculumConfig,
        *,
        noise_multiplier: float,
        sample_rate: float,
        divisor: float,
        secret: SecretGenerator,
        max_grad_norm: float | None = None,
        prior: ClosedFormPrior | None = None,
        schedule: NoiseSchedule | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.unet, self.private, self.config, self.prior = unet, private, config, prior
        self.schedule = schedule
        self.sample_rate, self.secret = sample_rate, secret
        self.images = DeviceImages(private, unet.device)
        self.diffusion_noise = DiffusionNoise(unet.device)
        self.process_index, self.num_processes = process_index, num_processes
        options = config.dp_sgd
        self.trained = choose_weights(unet, options, seed=config.runtime.seed)
        self.adam = torch.optim.Adam(self.trained, lr=options.dp_learning_rate, foreach=True)
        self.optimizer = SecretNoiseOptimizer(
            self.adam,
            noise_multiplier=noise_multiplier,
            max_grad_norm=options.dp_max_grad_norm if max_grad_norm is None else max_grad_norm,
            expected_batch_size=divisor,
            generator=secret,
        )
        self.lr_scheduler = _lr_scheduler(self.adam, options)
        self.gradients = PerImageGradients(
            unet,
            noise_multiplicity=options.noise_multiplicity,
            mode=config.runtime.per_image_gradients,
            memory_limit=gradient_limit(unet.device, config.runtime.gradient_memory_limit),
        )
        self.ema = EMAModel(self.trained, decay=options.dp_ema_decay, foreach=True)
        self.num_steps_taken = 0
        unet.train()
        self.images_at_once = self._images_at_once(divisor / num_processes)
        self.is_recomputed = self._settle_gradients()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def has_constant_batches(self) -> bool:
        """Whether all steps have physical batches of one size: kernels and memory are chosen by shape on a GPU. On a
        CPU rows that fill up cost what others do."""
        return self.device.type == "cuda"

    def step(self) -> None:
        """One draw, one noisy sum, one update of the weights and of their average. An empty draw is noise alone."""
        share = self._draw_share()
        with self.gradients, self.gradients.fixed_weights():
            self._add_images(share)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.ema.step(self.trained)
        self.num_steps_taken += 1

    def attached(self) -> PerImageGradients:
        """The context in which the engine stays in the network from step to step."""
        return self.gradients

    def _add_images(self, rows: torch.Tensor) -> None:
        """Adds the clipped gradients of some rows, in physical batches of one size. One for which memory runs out has
        added nothing: it is done again in halves, and so are all that follow."""
        taken = 0
        while taken < len(rows):
            left = physical_batches(rows[taken:], self.images_at_once, is_constant=self.has_constant_batches)
            for batch in left.to(self.device):
                if not self._add_batch(batch):
                    self._halve(len(batch))
                    break
                taken += len(batch)

    def _add_batch(self, batch: torch.Tensor) -> bool:
        """Whether there was the memory to add a physical batch."""
        try:
            self._add_clipped(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
            return False
        return True

    def _add_clipped(self, batch: torch.Tensor) -> None:
        self.gradients.backward(self._losses(batch))
        first = batch if batch.ndim == 1 else batch[:, 0]
        self.gradients.accumulate_clipped(self.optimizer.max_grad_norm, counted=first != FILLER)

    def _halve(self, images: int) -> None:
        self.gradients.let_go()
        give_back_memory(self.device)
        self.images_at_once = -(-images // 2)
        rows = self.images_at_once * self.config.dp_sgd.noise_multiplicity
        logger.warning(f"memory ran out: physical batches are halved to --max_physical_batch_size={rows}")

    def _images_at_once(self, expected: float) -> int:
        """Images of a physical batch: at most as many as were asked for, or else as many as fit."""
        runtime, draws, engine = self.config.runtime, self.config.dp_sgd.noise_multiplicity, self.gradients
        if runtime.max_physical_batch_size is not None:
            most = max(1, runtime.max_physical_batch_size // draws)
        else:
            limit = 0 if engine.mode == "norms_first" else engine.memory_limit
            most = images_that_fit(self.device, draws, engine.num_bytes(1), limit, self.try_images)
        return even_batches(expected, most) if self.has_constant_batches else most

    def try_images(self, count: int) -> None:
        """A pass over `count` images, or persons, that are nobody. It leaves nothing behind."""
        rows = () if self.private.persons is None else (self.config.dp_sgd.noise_multiplicity,)
        self.try_rows(torch.full((count, *rows), FILLER))

    def try_rows(self, rows: torch.Tensor) -> None:
        """A pass over rows as a step has it. It leaves nothing behind."""
        try:
            with self.gradients, self.gradients.fixed_weights():
                self._add_clipped(rows.to(self.device))
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def expected_pass_seconds(self) -> float:
        """
        What the passes over the images of one step take on average: a trial on images that are nobody's, and the
        public number of images that a step expects. The time of a true step would show how many images it drew.
        """
        images = max(1, min(self.images_at_once, round(self.optimizer.expected_batch_size)))
        seconds = []
        for _ in range(2):  # the first one makes what is made at first use
            start = time.perf_counter()
            self.try_images(images)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return seconds[-1] * self.optimizer.expected_batch_size / (self.num_processes * images)

    def _settle_gradients(self) -> bool:
        """Whether gradients are computed twice; whatever a draw holds, all steps do it in the same way."""
        engine = self.gradients
        if engine.mode == "auto" and engine.num_bytes(self.images_at_once) > engine.memory_limit:
            engine.mode = "norms_first"
        return engine.mode == "norms_first"

    def describe_batches(self) -> str:
        """How the steps are computed, in a line for whoever watches. It says nothing of a draw."""
        images, mebibytes = self.images_at_once, self.gradients.num_bytes(self.images_at_once) / 1024**2
        batches = f"physical batches of {images * self.config.dp_sgd.noise_multiplicity} network inputs"
        if not self.is_recomputed:
            return f"{batches}; the gradients of the images are held, {mebibytes:.0f} MiB"
        reason = (
            "as asked for"
            if self.config.runtime.per_image_gradients == "norms_first"
            else (f"for they would take {mebibytes:.0f} MiB, more than --gradient_memory_limit")
        )
        return f"{batches}; the gradients of the images are computed twice (norms_first), {reason}"

    def _draw_share(self) -> torch.Tensor:
        """
        Rows `(n,)` of one Poisson draw that this process works on, or `(n, K)`, K of each person, without the units
        that contribute nothing.
        """
        units = self.private.units
        drawn = draw_indices(self.secret, num_rows=len(units), sample_rate=self.sample_rate)
        share = share_of_process(drawn, process_index=self.process_index, num_processes=self.num_processes)
        return units.draw_rows(share, self.config.dp_sgd.noise_multiplicity, self.secret)

    def _diffusion_normals(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Fresh normals of the rows of B units: label dropout, one for each row, noise level `(K·B,)` and noise
        `(K·B, C, H, W)`.
        """
        copies = self.config.dp_sgd.noise_multiplicity * len(rows)
        shape = (copies, *self.private.images.shape[1:])
        return (
            self.diffusion_noise.gaussian(rows.numel(), 1.0),
            self.diffusion_noise.gaussian(copies, 1.0),
            self.diffusion_noise.gaussian(shape, 1.0),
        )

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Losses `(K·B,)` of B units; loss k·B + b is number k of unit b, and `FILLER` is no image.

        Rows `(B,)` are images, each noised K times; rows `(B, K)` are K images of each person, each noised once.
        """
        options = self.config.dp_sgd
        label_normals, level_normals, noise = self._diffusion_normals(rows)
        images, labels = self.images.take(rows.t().flatten())
        rate = self.config.model.label_dropout
        labels = drop_labels(labels, label_normals, null_label=self.private.num_classes, rate=rate)
        labels = labels.repeat(len(noise) // len(labels))
        sigma = noise_levels(level_normals, p_mean=options.dp_p_mean, schedule=self.schedule)
        with autocast(self.device, self.config.runtime.mixed_precision):
            return edm_loss(self.unet, images, noise, sigma, labels, prior=self.prior, schedule=self.schedule)

    @contextmanager
    def averaged_weights(self) -> Iterator[UNet2DModel]:
        """The model with its averaged weights, in evaluation mode, for as long as the context lasts."""
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.ema.restore(self.trained)
            self.unet.train()

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights that are trained, with their names, in order."""
        return ((name, parameter) for name, parameter in self.unet.named_parameters() if parameter.requires_grad)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """
        Tensors of a checkpoint: all weights, and of those that are trained the average and Adam's moments. What is
        trained comes from noised sums.
        """
        moments = {}
        for name, parameter in self._named():
            for key, value in self.adam.state[parameter].items():
                moments[f"{name}.{key}"] = value
        average = dict(zip((name for name, _ in self._named()), self.ema.shadow_params))
        return {"unet": self.unet.state_dict(), "ema": average, "optimizer": moments}

    def load_state(self, step: int, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Takes up a checkpoint of `step` noisy steps. Masks and noise are drawn afresh, never replayed."""
        self.unet.load_state_dict(tensors["unet"])
        for (name, _), shadow in zip(self._named(), self.ema.shadow_params):
            shadow.copy_(tensors["ema"].get(name, tensors["unet"][name]))  # a frozen weight is its own average
        for name, parameter in self._named():
            prefix = f"{name}."
            self.adam.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device) if not key.endswith(".step") else value
                for key, value in tensors["optimizer"].items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
        self.ema.optimization_step = step
        self.num_steps_taken = step
        self.lr_scheduler = _lr_scheduler(self.adam, self.config.dp_sgd, num_steps_taken=step)
