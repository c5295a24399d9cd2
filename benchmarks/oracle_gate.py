"""Few images: would the network of a closed form do better if it spoke more softly at some levels or frequencies?

    python benchmarks/oracle_gate.py --data fashion_mnist=PATH cifar10=PATH --runs RUNS --output RESULTS

For the runs of `do_no_harm.py` that lie in RUNS. What the network adds is multiplied by shares that are read off the
private images by least squares: one per noise level, or one per level and band of frequencies, at most 1. No such gate
that is made of released values can have a smaller squared error. That does not bound how good images are, because they
do not follow the error alone. It is a diagnosis, and no release: the images that it makes are not private. Cells that
the output file holds are left alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from do_no_harm import CLASSES, NUM_GENERATED, NUM_IMAGES, measured, two_classes

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.closed_form_prior import ClosedFormPrior, Network, frequencies, to_frequencies, to_pixels
from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.evaluation.evaluation import sample_images
from dp_curriculum.pipeline_dp_curriculum import unet_output


SIGMAS = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.3, 2.5, 5.0, 10.0, 20.0, 80.0)
EDGES = (0, 1, 2, 4, 6, 9, 12, 16, 20, 24)  # of the bands, in half periods per image
NUM_READ = 2000  # images that shares are read off


class GatedPrior(ClosedFormPrior):
    """A prior on which the network is heard in part: `shares` `(levels, bands)` at `SIGMAS` and between `EDGES`."""

    shares = torch.ones(len(SIGMAS), len(EDGES))

    def denoise(
        self, network: Network, noisy_images: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        mean, _ = self(noisy_images, sigma, class_labels)
        added = super().denoise(network, noisy_images, sigma, class_labels) - mean
        shares = self._at(sigma)[:, bands(noisy_images.shape[-1])][:, None]
        return mean + to_pixels(shares * to_frequencies(added))

    def _at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Shares `(B, bands)`, linear in ln(sigma) between two levels."""
        levels, wanted = torch.tensor(SIGMAS).log(), sigma.log().clamp(*torch.tensor(SIGMAS).log()[[0, -1]])
        after = torch.searchsorted(levels, wanted.contiguous()).clamp(1, len(levels) - 1)
        weight = ((wanted - levels[after - 1]) / (levels[after] - levels[after - 1]))[:, None]
        return (1 - weight) * self.shares[after - 1] + weight * self.shares[after]


def bands(side: int) -> torch.Tensor:
    """The band of each frequency, `(side, side)`."""
    return torch.searchsorted(torch.tensor(EDGES, dtype=torch.float64), frequencies(side).double(), right=True) - 1


@torch.no_grad()
def best_shares(pipeline: DPCurriculumPipeline, images: PrivateImages) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Products of what the network adds with what the prior lacks, and its squares: sums by level and band, `(levels,
    bands)`. Their quotient is the share that leaves the least squared error.
    """
    clean, labels = 2 * to_unit_range(images.images) - 1, images.labels
    generator = torch.Generator().manual_seed(0)
    products, squares = torch.zeros(2, len(SIGMAS), len(EDGES))
    of_frequency = bands(clean.shape[-1]).flatten()
    for row, level in enumerate(SIGMAS):
        sigma = torch.full((len(clean),), level)
        noisy = clean + level * torch.randn(clean.shape, generator=generator)
        mean, _ = pipeline.prior(noisy, sigma, labels)
        denoised = pipeline.prior.denoise(lambda *inputs: unet_output(pipeline.unet, *inputs), noisy, sigma, labels)
        added, lacking = to_frequencies(denoised - mean), to_frequencies(clean - mean)
        products[row].index_add_(0, of_frequency, (added * lacking).sum((0, 1)).flatten())
        squares[row].index_add_(0, of_frequency, added.square().sum((0, 1)).flatten())
    return products, squares


def measured_with(pipeline: DPCurriculumPipeline, shares: torch.Tensor, real: PrivateImages, sheet: Path) -> Any:
    pipeline.prior.shares = shares
    images, labels = sample_images(pipeline, NUM_GENERATED)
    order = torch.cat([(labels[:64] == label).nonzero().flatten() for label in (0, 1)])
    save_sheet(images[order], sheet, columns=16)
    return measured(images, labels, real, 3)


def gated(folder: Path) -> DPCurriculumPipeline:
    """The pipeline of a run, with a prior that can be heard through shares."""
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_modules(prior=GatedPrior.from_pretrained(folder / "prior"))
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PATH", help="fashion_mnist, cifar10.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the trainings.")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name, path in (pair.split("=", 1) for pair in given.data):
        private = two_classes(path, CLASSES[name], "train", NUM_READ)
        real = two_classes(path, CLASSES[name], "test", NUM_IMAGES)
        for folder in sorted(given.runs.glob(f"{name}-eps*-seed[0-9]")):
            if folder.name in results:
                continue
            pipeline = gated(folder)
            products, squares = best_shares(pipeline, private)
            per_level = (products.sum(1) / squares.sum(1))[:, None].expand_as(products)
            ways = {"as it is": torch.ones_like(products), "per level": per_level, "per band": products / squares}
            found = {
                way: measured_with(
                    pipeline, shares.clamp(0, 1), real, given.runs / f"{folder.name}-{way.replace(' ', '-')}.png"
                )
                for way, shares in ways.items()
            }
            shares = {str(level): round(float(share), 3) for level, share in zip(SIGMAS, per_level[:, 0])}
            results[folder.name] = {**found, "best share per level": shares}
            given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
