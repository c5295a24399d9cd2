"""The hard stage: DP-SGD on the images themselves, by logical step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from accelerate.utils import gather_object
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LRScheduler

from dp_curriculum.config import CurriculumConfig, DPSGDConfig
from dp_curriculum.data.images import PrivateImages, contributing, to_unit_range
from dp_curriculum.diffusion.edm import drop_labels, edm_loss, noise_levels
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.dp_sgd.dp_optimizer import SecretNoiseOptimizer
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradients
from dp_curriculum.dp_sgd.sampling import draw_indices, physical_batches, share_of_process
from dp_curriculum.privacy.randomness import SecretGenerator


# A launcher of several processes passes on the Ctrl-C that the terminal has sent to them as well.
_IS_LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
_SAME_CTRL_C_SECONDS = 3.0


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM: the step under way is finished, then training ends in good order."""

    requested: bool = field(default=False)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes ask together, and all get the same answer."""
        if torch.distributed.is_initialized():
            self.requested = max(gather_object([self.requested]))
        return self.requested


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a [`StopRequest`]; the second interrupts at once."""
    stop, first = StopRequest(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if not stop.requested:
            stop.requested, first = True, time.monotonic()
        elif not (_IS_LAUNCHED and time.monotonic() - first < _SAME_CTRL_C_SECONDS):
            raise KeyboardInterrupt

    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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
        unet ([`~diffusers.UNet2DModel`]): The network, on its device; trained in place.
        private ([`PrivateImages`]): The images, in memory.
        config ([`CurriculumConfig`]): The whole configuration.
        noise_multiplier (`float`): Noise over sensitivity, from the calibration.
        sample_rate (`float`): Probability that an image enters a step, as accounted.
        divisor (`float`): Public expected number of images a step.
        secret ([`SecretGenerator`]): Source of masks and DP noise.
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
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.unet, self.private, self.config = unet, private, config
        self.sample_rate, self.secret = sample_rate, secret
        # From a known seed, the noise of every image would depend on how many images were drawn before it: one image
        # more would change the gradients of all others.
        kind = unet.device.type
        self.diffusion_noise = SecretGenerator("fast" if kind in ("cpu", "cuda") else "secure", device=unet.device)
        self.process_index, self.num_processes = process_index, num_processes
        options = config.dp_sgd
        self.adam = torch.optim.Adam(unet.parameters(), lr=options.dp_learning_rate, foreach=True)
        self.optimizer = SecretNoiseOptimizer(
            self.adam,
            noise_multiplier=noise_multiplier,
            max_grad_norm=options.dp_max_grad_norm,
            expected_batch_size=divisor,
            generator=secret,
        )
        self.lr_scheduler = _lr_scheduler(self.adam, options)
        self.gradients = PerImageGradients(
            unet,
            noise_multiplicity=options.noise_multiplicity,
            mode=config.runtime.per_image_gradients,
            memory_limit=config.runtime.gradient_memory_limit * 1024**2,
        )
        self.ema = EMAModel(unet.parameters(), decay=options.dp_ema_decay, foreach=True)
        self.num_steps_taken = 0
        unet.train()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def step(self) -> None:
        """One draw, one noisy sum, one update of the weights and of their average. An empty draw is noise alone."""
        share = self._draw_share()
        max_images = max(1, self.config.runtime.max_physical_batch_size // self.config.dp_sgd.noise_multiplicity)
        with self.gradients:
            for rows in physical_batches(share, max_images):
                self.gradients.backward(self._losses(rows))
                self.gradients.accumulate_clipped(self.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())
        self.num_steps_taken += 1

    def _draw_share(self) -> torch.Tensor:
        """Rows of one Poisson draw that this process works on, without those that contribute nothing."""
        drawn = draw_indices(self.secret, num_rows=len(self.private), sample_rate=self.sample_rate)
        share = share_of_process(drawn, process_index=self.process_index, num_processes=self.num_processes)
        return share[contributing(self.private.labels[share], self.private.num_classes)]

    def _diffusion_normals(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fresh normals of these rows: label dropout `(B,)`, noise level `(K·B,)` and noise `(K·B, C, H, W)`."""
        copies = self.config.dp_sgd.noise_multiplicity * len(rows)
        shape = (copies, *self.private.images.shape[1:])
        return (
            self.diffusion_noise.gaussian(len(rows), 1.0),
            self.diffusion_noise.gaussian(copies, 1.0),
            self.diffusion_noise.gaussian(shape, 1.0),
        )

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        """Losses `(K·B,)` of K noised copies of each image; row k·B + b is copy k of image b."""
        options, device = self.config.dp_sgd, self.device
        copies = options.noise_multiplicity
        label_normals, level_normals, noise = self._diffusion_normals(rows)
        images = to_unit_range(self.private.images[rows], device) * 2 - 1
        labels = drop_labels(
            self.private.labels[rows].to(device),
            label_normals,
            null_label=self.private.num_classes,
            rate=self.config.model.label_dropout,
        )
        images, labels = images.repeat(copies, 1, 1, 1), labels.repeat(copies)
        sigma = noise_levels(level_normals, p_mean=options.dp_p_mean)
        with autocast(device, self.config.runtime.mixed_precision):
            return edm_loss(self.unet, images, noise, sigma, labels)

    @contextmanager
    def averaged_weights(self) -> Iterator[UNet2DModel]:
        """The model with its averaged weights, in evaluation mode, for as long as the context lasts."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.ema.restore(self.unet.parameters())
            self.unet.train()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of a checkpoint: weights, their average, and Adam's moments. All of them come from noised sums."""
        names = [name for name, _ in self.unet.named_parameters()]
        moments = {}
        for name, parameter in self.unet.named_parameters():
            for key, value in self.adam.state[parameter].items():
                moments[f"{name}.{key}"] = value
        average = dict(zip(names, self.ema.shadow_params))
        return {"unet": self.unet.state_dict(), "ema": average, "optimizer": moments}

    def load_state(self, step: int, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Takes up a checkpoint of `step` noisy steps. Masks and noise are drawn afresh, never replayed."""
        self.unet.load_state_dict(tensors["unet"])
        for name, shadow in zip((name for name, _ in self.unet.named_parameters()), self.ema.shadow_params):
            shadow.copy_(tensors["ema"][name])
        for name, parameter in self.unet.named_parameters():
            prefix = f"{name}."
            self.adam.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device) if not key.endswith(".step") else value
                for key, value in tensors["optimizer"].items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
        self.ema.optimization_step = step
        self.num_steps_taken = step
        self.lr_scheduler = _lr_scheduler(self.adam, self.config.dp_sgd, num_steps_taken=step)
