"""Does a filter by a classifier of generated images make generated images teach more?

    python benchmarks/filter.py --runs RUN... --output RESULTS

For each run, three sets of its images: as many as are asked for, as many through `--filter_by_classifier`, and
without it as many as the filter was trained on and let through, because generating costs nothing. A CNN is trained on
each set, with three seeds, and tested on the test split of the dataset of the run. Runs that the output file holds are
left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages, contributing, to_unit_range
from dp_curriculum.data.reading import load_images
from dp_curriculum.evaluation.classifiers import CLASSIFIERS
from dp_curriculum.evaluation.sampling import sample_images, train_judge
from dp_curriculum.runs.run_folder import RunFolder


SEEDS = (0, 1, 2)
POOL = 2000  # images that the judge of ten classes is trained on


def test_images(run: Path, pipeline: DPCurriculumPipeline) -> PrivateImages:
    data = CurriculumConfig.from_yaml(RunFolder(run).config, finished=True).data
    shape = {"resolution": pipeline.image_size[0], "num_channels": pipeline.num_channels}
    return load_images(dataclasses.replace(data, **shape), "test")


def accuracies(images: torch.Tensor, labels: torch.Tensor, real: PrivateImages) -> list[float]:
    rows = contributing(real.labels, real.num_classes)
    pixels, classes = to_unit_range(real.images[rows]), real.labels[rows].numpy()
    return [
        round(float((CLASSIFIERS["cnn"](images, labels, real.num_classes, seed)(pixels) == classes).mean()), 4)
        for seed in SEEDS
    ]


def compared(run: Path, num_images: int) -> dict[str, Any]:
    pipeline = DPCurriculumPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    real = test_images(run, pipeline)
    many, labels_of_many = sample_images(pipeline, num_images + POOL)
    images, labels = many[:num_images], labels_of_many[:num_images]
    judge = train_judge(pipeline)
    filtered, _ = sample_images(pipeline, num_images, judge=judge)
    sets = {
        "plain": (images, labels),
        "filtered": (filtered, labels),
        "plain, as many as the filter saw": (many, labels_of_many),
    }
    found: dict[str, Any] = {
        "num_images": num_images,
        "share_kept_at_the_first_draw": round(float(judge.agrees(images, labels).float().mean()), 4),
        "share_that_the_judge_agrees_with_in_the_end": round(float(judge.agrees(filtered, labels).float().mean()), 4),
    }
    for name, (pixels, classes) in sets.items():
        values = accuracies(pixels, classes, real)
        found[name] = {"images": len(pixels), "accuracy_cnn": values, "mean": round(float(np.mean(values)), 4)}
        print(run.name, name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="Folders of runs.")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if given.output is not None and given.output.exists():
        results = json.loads(given.output.read_text())
    for run in given.runs:
        if run.name not in results:
            results[run.name] = compared(run, given.num_images)
        if given.output is not None:
            given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
