"""What helps the hard stage at the same epsilon? Quality of the digits under changes of DP-SGD.

    python benchmarks/hard_stage.py --epsilons 10 2 --runs 3
    python benchmarks/hard_stage.py --epsilons 2 --variants base kalman-0.7 --runs 3

Each run trains as `benchmarks/digits_mean.yaml` with fewer steps, on one thread, with 5 % of the budget for the
lesson. The accuracy is that of a logistic regression that is trained on generated digits and tested on held-out ones,
the loss that of denoising them. Two variants are no options of the package, and are tried here alone; both only change
what is done with released gradients, so they spend the same:

- kalman-k: the gradient is taken ahead of the weights, (1 - k) / k times their last step, and averaged with the ones
  before it at weight k (DiSK, arXiv 2410.03883, with one gradient a step);
- noise-free-variance: Adam's second moment, less the known variance of the noise (DP-AdamBC, arXiv 2312.14334).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lesson_share import table
from resume_quality import quality

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.training import stages
from dp_curriculum.training.curriculum import run_curriculum


class KalmanTrainer(DPTrainer):
    """Gradients ahead of the weights, averaged over the steps."""

    gain = 0.7

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.optimizer.attach_step_hook(lambda optimizer: self._return_and_average())

    @torch.no_grad()
    def step(self) -> None:
        parameters = list(self.unet.parameters())
        self.here = [p.clone() for p in parameters]
        if self.num_steps_taken:
            torch._foreach_add_(parameters, self.last_step, alpha=(1 - self.gain) / self.gain)
        with torch.enable_grad():
            super().step()
        self.last_step = torch._foreach_sub(parameters, self.here)

    @torch.no_grad()
    def _return_and_average(self) -> None:
        """Runs when the noised gradients lie in `p.grad`, ahead of Adam's step."""
        parameters = list(self.unet.parameters())
        torch._foreach_copy_(parameters, self.here)
        gradients = [p.grad for p in parameters]
        if self.num_steps_taken:
            torch._foreach_lerp_(self.average, gradients, self.gain)
        else:
            self.average = [gradient.clone() for gradient in gradients]
        torch._foreach_copy_(gradients, self.average)


class LowGainTrainer(KalmanTrainer):
    gain = 0.4


class NoiseFreeVarianceTrainer(DPTrainer):
    """Adam whose second moment is the gradient's own: that of the noise is known, and taken off."""

    least = 0.05  # of the noise's variance: a difference of two near numbers is no denominator

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.optimizer.attach_step_hook(lambda optimizer: self._update())

    @torch.no_grad()
    def _update(self) -> None:
        """Runs when the noised gradients lie in `p.grad`, in place of Adam's step."""
        optimizer = self.optimizer
        noise = optimizer.noise_multiplier * optimizer.max_grad_norm / optimizer.expected_batch_size
        group, count = self.adam.param_groups[0], self.num_steps_taken + 1
        first, second = group["betas"]
        for p in self.unet.parameters():
            state = self.adam.state[p]
            if not state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            state["m"].lerp_(p.grad, 1 - first)
            state["v"].lerp_(p.grad.square(), 1 - second)
            variance = (state["v"] / (1 - second**count) - noise**2).clamp(min=self.least * noise**2)
            # As long a step as Adam's where there is noise alone.
            p.sub_(group["lr"] * self.least**0.5 * state["m"] / (1 - first**count) / variance.sqrt())
            p.grad = None  # Adam passes over it


BASE = {"expected_batch_size": 256, "noise_multiplicity": 2, "num_dp_steps": 60}
VARIANTS: dict[str, tuple[type[DPTrainer], dict[str, Any]]] = {
    "base": (DPTrainer, {}),
    "learning rate / 2": (DPTrainer, {"dp_learning_rate": 2e-3}),
    "learning rate x 2": (DPTrainer, {"dp_learning_rate": 8e-3}),
    "K 1, batch x 2": (DPTrainer, {"noise_multiplicity": 1, "expected_batch_size": 512}),
    "K 4, batch / 2": (DPTrainer, {"noise_multiplicity": 4, "expected_batch_size": 128}),
    "steps / 2, batch x 2": (DPTrainer, {"num_dp_steps": 30, "expected_batch_size": 512}),
    "steps x 2, batch / 2": (DPTrainer, {"num_dp_steps": 120, "expected_batch_size": 128}),
    "dp_p_mean -1.2": (DPTrainer, {"dp_p_mean": -1.2}),
    "dp_p_mean 0": (DPTrainer, {"dp_p_mean": 0.0}),
    "EMA 0.8": (DPTrainer, {"dp_ema_decay": 0.8}),
    "EMA 0.98": (DPTrainer, {"dp_ema_decay": 0.98}),
    "C x 100": (DPTrainer, {"dp_max_grad_norm": 0.1}),
    "C x 1000": (DPTrainer, {"dp_max_grad_norm": 1.0}),
    "kalman-0.7": (KalmanTrainer, {}),
    "kalman-0.4": (LowGainTrainer, {}),
    "noise-free-variance": (NoiseFreeVarianceTrainer, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[10, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hard_stage.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = CurriculumConfig.from_yaml("benchmarks/digits_mean.yaml").replace(
        pretrain_steps=600, sample_steps=0, lesson_budget_share=0.05, **BASE
    )
    rows = digits_dataset()
    cells = json.loads(given.output.read_text())["cells"] if given.output.exists() else []
    measured = {(cell["epsilon"], cell["variant"], cell["seed"]) for cell in cells}
    for seed in range(given.runs):  # whole sweeps first: one that is cut short is a sweep of fewer seeds
        for epsilon in given.epsilons:
            for variant in given.variants:
                if (epsilon, variant, seed) in measured:
                    continue
                trainer, changes = VARIANTS[variant]
                config = base.replace(seed=seed, target_epsilon=epsilon, **changes)
                with tempfile.TemporaryDirectory() as name, patch.object(stages, "DPTrainer", trainer):
                    result = run_curriculum(config, rows, output_dir=Path(name) / "run")
                    found = quality(Path(name) / "run", config)
                spent = result.report.fields["epsilon"]
                cells.append({"epsilon": epsilon, "variant": variant, "seed": seed, "spent_epsilon": spent, **found})
                print(cells[-1], flush=True)
                given.output.write_text(
                    json.dumps({"table": table(cells, "variant"), "cells": cells}, indent=1) + "\n"
                )


if __name__ == "__main__":
    main()
