"""What secret noise costs: one draw for all weights, in each mode, beside a DP-SGD step at the size of the paper.

DP-FETA takes 4096 images a step with K = 32 noised copies of each, on a network of 1.5 million weights: 131,072
network inputs. A step of that size takes minutes on a CPU, so it is not taken. What a network input costs, clipping
with it, is measured on small physical batches and multiplied; noise, mask and update, once a step, are measured as
they are. Draws and batches take turns, so that a slow spell of the machine falls on both; shares are taken within a
turn. Times are those of the processor, on one thread.

    python benchmarks/secure_noise.py
    python benchmarks/secure_noise.py --rows 64 --turns 15 --output benchmarks/results/secure_noise.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.randomness import SecretGenerator


RESULTS = Path(__file__).parent / "results" / "secure_noise.json"
PAPER = {"images_a_step": 4096, "noise_multiplicity": 32, "dataset_size": 60_000}
LIMIT = 0.05  # of a step


def build_trainer(copies: int) -> DPTrainer:
    """A network of 1.5 million weights on images of MNIST's size, and images of nobody."""
    config = CurriculumConfig().replace(
        resolution=28, block_out_channels=[48, 96], layers_per_block=1, noise_multiplicity=copies
    )
    images = torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    private = PrivateImages(images, torch.arange(256) % 10, tuple(map(str, range(10))))
    unet = build_unet(config.model, resolution=28, num_channels=1, num_classes=10)
    return DPTrainer(
        unet, private, config, noise_multiplier=1.0, sample_rate=0.5, divisor=128.0, secret=SecretGenerator()
    )


def milliseconds(work: Callable[[], Any]) -> float:
    """Of processor time, which other work on the machine does not lengthen by its turns."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def physical_batch(trainer: DPTrainer, rows: torch.Tensor) -> None:
    with trainer.gradients:
        trainer.gradients.backward(trainer._losses(rows))
        trainer.gradients.accumulate_clipped(trainer.optimizer.max_grad_norm)


def measure(num_rows: int, copies: int, turns: int) -> dict[str, Any]:
    """Medians over turns, in milliseconds, and the shares of a step."""
    trainer = build_trainer(copies)
    num_weights = sum(parameter.numel() for parameter in trainer.unet.parameters())
    rows = torch.arange(num_rows // copies)
    generators = {"secure": SecretGenerator("secure"), "fast": SecretGenerator("fast")}
    draws: dict[str, Callable[[], Any]] = {
        f"noise_{name}": lambda generator=generator: generator.gaussian(num_weights, 1.0, dtype=torch.float64)  # type: ignore[misc]
        for name, generator in generators.items()
    }
    rate = PAPER["images_a_step"] / PAPER["dataset_size"]
    draws["mask"] = lambda: generators["secure"].poisson_sample(PAPER["dataset_size"], rate)

    def update() -> None:  # all of a step but network and noise
        trainer.optimizer.zero_grad(set_to_none=True)
        for parameter in trainer.optimizer.params:
            parameter.grad = torch.zeros_like(parameter)
        trainer.adam.step()
        trainer.ema.step(trainer.unet.parameters())

    physical_batch(trainer, rows)
    update()
    turns_of: dict[str, list[float]] = {name: [] for name in (*draws, "batch", "update")}
    for _ in range(turns):
        for name, draw in draws.items():
            turns_of[name].append(milliseconds(draw))
        turns_of["batch"].append(milliseconds(lambda: physical_batch(trainer, rows)))
        turns_of["update"].append(milliseconds(update))
        trainer.optimizer.zero_grad(set_to_none=True)
    inputs = PAPER["images_a_step"] * PAPER["noise_multiplicity"]
    steps = [
        batch * inputs / len(rows) / copies + update_time
        for batch, update_time in zip(turns_of["batch"], turns_of["update"])
    ]
    shares = {
        name: [
            (noise + mask) / (step + noise + mask)
            for noise, mask, step in zip(turns_of[f"noise_{name}"], turns_of["mask"], steps)
        ]
        for name in generators
    }
    secure = statistics.median(turns_of["noise_secure"])
    per_input = statistics.median(turns_of["batch"]) / len(rows) / copies
    return {
        "weights": num_weights,
        "milliseconds": {name: round(statistics.median(times), 3) for name, times in turns_of.items()},
        "milliseconds_a_network_input": round(per_input, 4),
        "network_inputs_a_step": inputs,
        "step_seconds_extrapolated": round(statistics.median(steps) / 1000, 1),
        "share_of_step": {name: float(f"{statistics.median(values):.3g}") for name, values in shares.items()},
        "largest_share_of_step": {name: float(f"{max(values):.3g}") for name, values in shares.items()},
        "secure_over_fast": round(statistics.median(
            secure / fast for secure, fast in zip(turns_of["noise_secure"], turns_of["noise_fast"])
        ), 2),
        "network_inputs_at_which_secure_noise_is_5_percent": round((1 / LIMIT - 1) * secure / per_input),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="Network inputs of a physical batch.")
    parser.add_argument("--copies", type=int, default=8, help="K of the measured batches; the step has 32.")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--note", default="", help="On the machine, e.g. that others used it meanwhile.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    result = {
        "question": "share of a DP-SGD step at the paper's size that secret noise and its mask take",
        "extrapolated": f"from physical batches of {given.rows} network inputs, K = {given.copies}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, no GPU",
        "note": given.note,
        "torch": torch.__version__,
        "turns": given.turns,
        "paper": PAPER,
        **measure(given.rows, given.copies, given.turns),
        "gpu": "not measured",
    }
    result["load_average"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
