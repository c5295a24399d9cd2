"""Opacus' DP-SGD step, with the clipping, the noise and the divisor that the guarantee assumes."""

from __future__ import annotations

import torch
from accelerate.utils import broadcast
from opacus.optimizers import DPOptimizer

from dp_curriculum.privacy.limits import DATASET_SIZE, check_mechanism, check_range
from dp_curriculum.privacy.randomness import SecretGenerator


class SecretNoiseOptimizer(DPOptimizer):
    r"""
    A `DPOptimizer` whose noise comes from a secret generator, once for all processes.

    Use: after each physical batch [`PerImageGradients.accumulate_clipped`] with this optimizer's `max_grad_norm`; it
    adds to `p.summed_grad`. After the last one of a logical step, however many there were, `step()`. There is no queue
    of skipped steps that a broken loop could leave stale.

    Args:
        optimizer (`torch.optim.Optimizer`): Applies the noised mean gradient.
        noise_multiplier (`float`): Noise over sensitivity.
        max_grad_norm (`float`): C, the L2 bound of one image's gradient.
        expected_batch_size (`float`): The public divisor: sample rate times the public number of images.
        generator ([`SecretGenerator`]): Source of the noise.

    Privacy:
        Each `step` releases the sum over the sampled images of their gradients, each of L2 norm at most C, plus
        N(0, (noise_multiplier C)^2) in every coordinate. Adding or removing one image moves the sum by at most C. A
        gradient that is not finite counts as zero. Division by `expected_batch_size` is post-processing.

    Raises:
        ValueError: If norm, noise or divisor is out of the range (`privacy/limits.py`) in which its bound was tested.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        generator: SecretGenerator,
    ) -> None:
        check_mechanism(clip_norm=max_grad_norm, noise_multiplier=noise_multiplier)
        check_range("expected_batch_size", expected_batch_size, DATASET_SIZE)
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._secret = generator

    def clip_and_accumulate(self) -> None:
        """Refused: Opacus' own clip lets a NaN through, and only one clip is audited."""
        raise NotImplementedError("Expected PerImageGradients.accumulate_clipped to clip: call it instead.")

    @torch.no_grad()
    def add_noise(self) -> None:
        """Adds the sums of all processes and one draw of noise; all processes get the same `p.grad`.

        The main process alone sees the whole sum before its noise, and draws the noise.
        """
        flat = torch.cat(
            [(torch.zeros_like(p) if p.summed_grad is None else p.summed_grad).flatten() for p in self.params]
        )
        distributed = torch.distributed.is_initialized()
        if distributed:
            torch.distributed.reduce(flat, dst=0)
        if not distributed or torch.distributed.get_rank() == 0:
            noise = self._secret.gaussian(
                flat.shape, std=self.noise_multiplier * self.max_grad_norm, dtype=torch.float64
            )
            # Added in float64 and rounded once: noise rounded earlier is a grid through which the sum shows.
            flat = (flat.to(noise) + noise).to(flat)
        noised = broadcast(flat, from_process=0) if distributed else flat
        for p, grad in zip(self.params, noised.split([p.numel() for p in self.params])):
            p.grad = grad.view_as(p)
            p.summed_grad = None

    def scale_grad(self) -> None:
        """Divides by the public expected batch size, never by how many images were drawn."""
        torch._foreach_div_([p.grad for p in self.params], self.expected_batch_size)

    def pre_step(self, closure: object = None) -> bool:
        """Noise and division; the clipping was done after each physical batch. An empty step is noise alone.

        Raises:
            RuntimeError: If there are gradients per image that nobody clipped; they would be lost.
        """
        if any(p.__dict__.get("grad_sample") is not None for p in self.params):
            raise RuntimeError("Expected PerImageGradients.accumulate_clipped after each backward, before step().")
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        return True
