"""Peak memory of noisy steps, measured in a process of its own, beside the estimate that `dp-curriculum plan` prints.

    python benchmarks/memory.py --config examples/configs/rgb32.yaml --max_physical_batch_size 32

Measured is the largest resident memory after the libraries are loaded, which Linux tells; on the CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.cost_estimate import estimate_cost


def resident_bytes(field: str) -> int:
    """VmRSS is what is resident now, VmHWM the most there ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure_steps(config: CurriculumConfig, *, num_steps: int) -> int:
    """Bytes that some noisy steps of one full physical batch each take, at most."""
    data, num_images = config.data, config.dp_sgd.expected_batch_size
    num_classes = data.num_classes or 10
    shape = (num_images, data.channels, data.resolution, data.resolution)
    labels = torch.arange(num_images) % num_classes
    private = PrivateImages(torch.zeros(shape, dtype=torch.uint8), labels, tuple(map(str, range(num_classes))))
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most there was until now
    unet = build_unet(config.model, resolution=data.resolution, num_channels=data.channels, num_classes=num_classes)
    trainer = DPTrainer(
        unet,
        private,
        config,
        noise_multiplier=1.0,
        sample_rate=1.0,
        divisor=float(num_images),
        secret=SecretGenerator(),
    )
    with trainer.attached():  # as in a training
        for _ in range(num_steps):
            trainer.step()
    return resident_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/configs/rgb32.yaml")
    parser.add_argument("--max_physical_batch_size", type=int, default=32)
    parser.add_argument("--noise_multiplicity", type=int, default=4)
    parser.add_argument("--per_image_gradients", default="materialize")
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = CurriculumConfig.from_yaml(given.config).replace(
        max_physical_batch_size=given.max_physical_batch_size,
        noise_multiplicity=given.noise_multiplicity,
        per_image_gradients=given.per_image_gradients,
        expected_batch_size=given.max_physical_batch_size // given.noise_multiplicity,
        pretrain_batch_size=2,
        mixed_precision="no",
    )
    measured = measure_steps(config, num_steps=given.steps)
    estimate = estimate_cost(
        config, num_classes=config.data.num_classes or 10, dataset_size=1000, device=torch.device("cpu")
    )
    found = {"measured_bytes": measured, "estimated_bytes": estimate.memory_bytes}
    print(json.dumps({**vars(given), **found, "ratio": round(estimate.memory_bytes / measured, 3)}))


if __name__ == "__main__":
    main()
