"""A small public autoencoder, and the memory of a run on its latents beside the estimate of `dp-curriculum plan`.

    python benchmarks/latents.py autoencoder --data tiny_imagenet_32 --output_dir public-vae --minutes 10
    python benchmarks/latents.py memory --config run.yaml --vae_name_or_path public-vae --output_dir out

The autoencoder makes images eight times smaller, to four channels. It is trained on public images that are enlarged to
128 pixels: enough to show that everything works, and no more. Measured is the largest resident memory of a whole
training, from the moment when images are read and the libraries are loaded, which Linux tells; on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from dp_curriculum.commands.plan import public_shape
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import load_images
from dp_curriculum.training import curriculum, validation
from dp_curriculum.training.cost_estimate import estimate_cost
from dp_curriculum.training.encoding import settle_autoencoder


SIDE, ENLARGED, CROP = 32, 128, 64
CHANNELS, DEPTH = (16, 32, 64, 64), 4
KL_WEIGHT = 1e-4


def resident_bytes(field: str) -> int:
    """VmRSS is what is resident now, VmHWM the most there ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def crops(images: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops of `CROP` pixels `(count, 3, CROP, CROP)` in [-1, 1] of enlarged images."""
    rows = torch.randint(len(images), (count,), generator=generator)
    large = F.interpolate(images[rows].float() / 127.5 - 1, size=(ENLARGED, ENLARGED), mode="bicubic")
    top, left = torch.randint(ENLARGED - CROP + 1, (2,), generator=generator).tolist()
    return large[..., top : top + CROP, left : left + CROP].clamp(-1, 1)


def train_autoencoder(images: torch.Tensor, minutes: float, batch_size: int) -> AutoencoderKL:
    """An autoencoder after so many minutes of squared and absolute errors, and a little of the usual divergence."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * DEPTH,
            up_block_types=("UpDecoderBlock2D",) * DEPTH,
            norm_num_groups=8,
            sample_size=ENLARGED,
        )
    adam = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    generator, began, steps, shown = torch.Generator().manual_seed(0), time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - began) < 60 * minutes:
        adam.param_groups[0]["lr"] = 1e-3 * max(0.05, 1 - spent / (60 * minutes)) * min(1.0, (steps + 1) / 50)
        pixels = crops(images, batch_size, generator)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        made = vae.decode(posterior.mean + posterior.std * noise).sample
        error = made - pixels
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / CROP
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        steps += 1
        if spent - shown > 60:
            shown = spent
            squared = float(error.detach().square().mean())
            print(f"{spent / 60:.1f} minutes, step {steps}, mean squared error {squared:.4f}")
    return vae.eval()


@torch.no_grad()
def scale_of(vae: AutoencoderKL, images: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the latents of public images."""
    latents = vae.encode(crops(images, 64, torch.Generator().manual_seed(1))).latent_dist.mode()
    return float(latents.mean()), float(latents.std())


def make_autoencoder(given: argparse.Namespace) -> None:
    data = DataConfig(dataset_name=given.data, num_channels=3, resolution=SIDE, label_column="none")
    images = load_images(data).images
    vae = train_autoencoder(images, given.minutes, given.batch_size)
    mean, deviation = scale_of(vae, images)
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)
    vae.save_pretrained(given.output_dir)
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    print(f"{num_parameters:,} parameters, latents of mean {mean:.3f} and deviation {deviation:.3f}")


def measure_memory(given: argparse.Namespace) -> None:
    """Trains, and prints what it took beside what `plan` says it takes."""
    torch.set_num_threads(1)
    config = CurriculumConfig.from_yaml(given.config).replace(vae_name_or_path=given.vae_name_or_path, cpu_threads=1)
    began, before = time.monotonic(), list[int]()
    read_images = validation.read_images

    def watched(*args: Any, **options: Any) -> PrivateImages:
        before.append(resident_bytes("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most there was until now
        return read_images(*args, **options)

    validation.read_images = watched
    curriculum.run_curriculum(config, output_dir=given.output_dir)
    measured, seconds = resident_bytes("VmHWM") - before[0], time.monotonic() - began
    settled, encoder = settle_autoencoder(config)
    size, num_classes = public_shape(settled)
    estimate = estimate_cost(
        settled, num_classes=num_classes, dataset_size=size, device=torch.device("cpu"), encoder=encoder
    )
    found = {
        "measured_bytes": measured,
        "estimated_bytes": estimate.peak_bytes,
        "dataset_bytes": estimate.dataset_bytes,
        "seconds": round(seconds),
        "estimated_seconds": round(estimate.seconds),
        "estimated_encoding_seconds": round(estimate.encoding_seconds),
    }
    print(json.dumps({**found, "ratio": round(found["estimated_bytes"] / found["measured_bytes"], 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    autoencoder = commands.add_parser("autoencoder")
    autoencoder.add_argument("--data", required=True)
    autoencoder.add_argument("--output_dir", required=True)
    autoencoder.add_argument("--minutes", type=float, default=10)
    autoencoder.add_argument("--batch_size", type=int, default=16)
    memory = commands.add_parser("memory")
    memory.add_argument("--config", required=True)
    memory.add_argument("--vae_name_or_path", required=True)
    memory.add_argument("--output_dir", required=True)
    given = parser.parse_args()
    (make_autoencoder if given.command == "autoencoder" else measure_memory)(given)


if __name__ == "__main__":
    main()
