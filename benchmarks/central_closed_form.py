"""Central images in closed form: the lesson of DP-FETA as a prior, beside that of means and covariances.

    python benchmarks/central_closed_form.py --data mnist=PATH fashion-mnist=PATH --runs RUNS --output RESULTS

Each class is a Gaussian around its released mean whose covariance is a multiple of the identity, with the released
variance: what central images say, and no more. All else is the small size of `curriculum_vs_plain.py`: same queries,
charges and noisy steps. Two figures per training, draws of the prior alone and images after DP-SGD, each by a CNN
that was trained on 2,000 of them and by its Fréchet distance. Cells that the output file holds are left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from curriculum_vs_plain import Cell, training_options

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.cli import main as dp_curriculum
from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import load_images
from dp_curriculum.evaluation.evaluation import evaluate_images, sample_images
from dp_curriculum.lessons.lesson import Lesson
from dp_curriculum.lessons.moment_images import MOMENTS
from dp_curriculum.lessons.table import LESSONS


NUM_GENERATED = 2000


def isotropic() -> Lesson:
    """The lesson `moments` with the directions of its covariances left out."""

    def release(*given: Any) -> dict[str, torch.Tensor]:
        tensors = dict(MOMENTS.release(*given))
        num_values = tensors["means"][0].numel()
        spread = (tensors["variances"] / num_values).clamp_min(0).sqrt()
        return {**tensors, "factors": spread[:, None, None] * torch.eye(num_values)}

    return dataclasses.replace(MOMENTS, release=release)


def measured(images: torch.Tensor, labels: torch.Tensor, real: PrivateImages) -> dict[str, float]:
    found = evaluate_images(images, labels, real, reference_name="the test split", classifiers=("cnn",), num_seeds=3)
    values = {metric.name: metric.value for metric in found.metrics}
    return {name: round(values[name], 4) for name in ("accuracy_cnn", "fd_classifier")}


def before_and_after(folder: Path, real: PrivateImages) -> dict[str, Any]:
    """Figures of draws of the prior, and of what DP-SGD made of it."""
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    after, labels = sample_images(pipeline, NUM_GENERATED)
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(NUM_GENERATED, pipeline.prior.factors.shape[2], generator=generator)
    before = pipeline.prior.draw(labels, normals, torch.randn(after.shape, generator=generator))
    return {"closed form": measured(before, labels, real), "after DP-SGD": measured(after, labels, real)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PATH", help="mnist, fashion-mnist.")
    parser.add_argument("--epsilons", nargs="+", default=["1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    LESSONS["moments"] = isotropic()  # type: ignore[index]
    results = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name, path in (pair.split("=", 1) for pair in given.data):
        real = load_images(DataConfig(dataset_name=path, resolution=28, num_channels=1), "test")
        for seed in given.seeds:
            for epsilon in given.epsilons:
                cell = Cell(name, epsilon, "curriculum", seed, "small")
                if cell.name in results:
                    continue
                folder = given.runs / f"{cell.name}-isotropic"
                options = ["--config", str(cell.preset), "--dataset_name", path, *training_options(cell)]
                dp_curriculum(["train", *options, "--mixed_precision", "no", "--output_dir", str(folder)])
                results[cell.name] = before_and_after(folder, real)
                given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
                print(cell.name, json.dumps(results[cell.name]), flush=True)


if __name__ == "__main__":
    main()
