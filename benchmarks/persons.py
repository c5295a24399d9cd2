"""A guarantee for a person: persons as the unit, one image of each person, or groups of images?

    python benchmarks/persons.py --data mnist=PATH fashion_mnist=PATH --runs RUNS --output RESULTS
    python benchmarks/persons.py --data mnist=PATH --runs RUNS --epsilons 10 --seeds 0 --layouts mixed
    python benchmarks/persons.py --step_time

A cell is a dataset, a layout, an epsilon, a method and a seed: one training on one thread, at the same computation per
step. Images are assigned to persons by a constant seed; the numbers of images have a heavy tail with a mean of 4 and a
largest of 200. In the layout `mixed` a person's images are of any class, in `class` all of one. Methods: `persons`,
the native unit; `one`, the first image of each person; `group`, up to 4 of each and `--group_size 4`. All three have
the same epsilon for a person. Figures: accuracy of classifiers that were trained on generated images, and the Fréchet
distance in the features of one that was trained on real ones. Cells that the output file holds are left alone.

`--step_time` compares a step of persons with the same step of images, in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from one_training import train

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import load_images
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.evaluation.classifiers import SmallCNN
from dp_curriculum.evaluation.evaluation import evaluate_images, sample_images
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.run import blank_prior


PRESETS = Path(__file__).parents[1] / "examples" / "configs"
MEAN_IMAGES, MOST_IMAGES, GROUP = 4.0, 200, 4
METHODS, LAYOUTS = ("persons", "one", "group"), ("mixed", "class")
NUM_GENERATED, NUM_REAL = 2000, 4000
OPTIONS = {
    "shortcut": "closed_form",
    "moment_components": 1,  # as measured
    "lesson_budget_share": 0.05,
    "block_out_channels": "16 32",
    "layers_per_block": 1,
    "patch_size": 2,  # a network of half the side: a cell takes minutes
    "expected_batch_size": 512,
    "noise_multiplicity": 2,
    "num_dp_steps": 40,
    "num_inference_steps": 6,
    "mixed_precision": "no",
    "sample_steps": 0,
}


def heavy_tail(total: int, seed: int = 0) -> np.ndarray:
    """Numbers of images of persons, `total` in all: a power law on 1 to 200 whose mean is 4, one person at its end."""
    sizes = np.arange(1, MOST_IMAGES + 1)
    low, high = 1.0, 4.0
    for _ in range(60):  # the exponent, by bisection
        weights = sizes ** -((low + high) / 2)
        low, high = (
            ((low + high) / 2, high) if (weights @ sizes) / weights.sum() > MEAN_IMAGES else (low, (low + high) / 2)
        )
    weights = sizes**-low
    drawn = np.random.RandomState(seed).choice(sizes, size=total, p=weights / weights.sum())
    drawn = np.concatenate([[MOST_IMAGES], drawn])
    count = int(np.searchsorted(drawn.cumsum(), total)) + 1
    drawn = drawn[:count]
    drawn[-1] -= drawn.sum() - total
    return drawn


def assign_persons(labels: np.ndarray, layout: str, seed: int = 0) -> np.ndarray:
    """Person of each image `(N,)`: public, the same in each run."""
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    if layout == "class":  # a person at the border of two classes is of both: nine of them
        order = order[np.argsort(labels[order], kind="stable")]
    sizes = heavy_tail(len(labels), seed)
    persons = np.empty(len(labels), dtype=np.int64)
    persons[order] = np.repeat(random.permutation(len(sizes)), sizes)
    return persons


def kept_rows(persons: np.ndarray, most: int) -> np.ndarray:
    """Rows of the first `most` images of each person, in order."""
    order = np.argsort(persons, kind="stable")
    starts = np.searchsorted(persons[order], persons[order])
    return np.sort(order[np.arange(len(order)) - starts < most])


def write_dataset(path: str, layout: str, method: str, folder: Path) -> None:
    """The images of a method as a parquet file, and the options that go with them."""
    rows = datasets.load_dataset(path, split="train")
    persons = assign_persons(np.array(rows["label"]), layout)
    kept = {"persons": len(rows), "one": 1, "group": GROUP}[method]
    left = kept_rows(persons, kept)
    options: dict[str, Any] = {"public_dataset_size": len(left)}
    if method == "persons":
        rows = rows.add_column("person", persons)
        options = {"person_column": "person", "public_dataset_size": len(np.unique(persons))}
    elif method == "group":
        options["group_size"] = GROUP
    folder.mkdir(parents=True)
    rows.select(left).to_parquet(folder / "train.parquet")
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(options))


def real_images(path: str) -> PrivateImages:
    """Random images of the test split, the same in each cell."""
    images = load_images(DataConfig(dataset_name=path, num_channels=1), "test")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:NUM_REAL]
    return PrivateImages(images.images[rows], images.labels[rows], images.class_names)


def measured(folder: Path, real: PrivateImages, judge: SmallCNN | None) -> tuple[dict[str, float], SmallCNN | None]:
    """Figures of a run, and the network in whose features its images were compared with `real`."""
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images, labels = sample_images(pipeline, NUM_GENERATED)
    found = evaluate_images(
        images,
        labels,
        real,
        reference_name="the test split",
        classifiers=("cnn", "logistic"),
        reference_network=judge,
    )
    values = {metric.name: metric.value for metric in found.metrics}
    noise = pipeline.privacy["mechanisms"][-1]["noise_multiplier"]
    names = ("accuracy_cnn", "accuracy_logistic", "fd_classifier", "fd_haar")
    figures = {name: round(values[name], 4) for name in names} | {"noise_multiplier": round(noise, 4)}
    return figures, found.reference_network


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, str, str, str, int]]:
    for name, path in (pair.split("=", 1) for pair in given.data):
        for seed in given.seeds:
            for layout in given.layouts:
                for epsilon in given.epsilons:
                    for method in given.methods:
                        yield name, path, layout, epsilon, method, seed


def sweep(given: argparse.Namespace) -> None:
    results: dict[str, Any] = {}
    if given.output is not None and given.output.exists():
        results = json.loads(given.output.read_text())
    judges: dict[str, SmallCNN | None] = {}
    test_split = functools.cache(real_images)
    for name, path, layout, epsilon, method, seed in cells(given):
        cell = f"{name}-{layout}-eps{epsilon}-{method}-seed{seed}"
        if cell in results:
            continue
        data, start = given.runs / f"{name}-{layout}-{method}-images", time.perf_counter()
        if not data.exists():
            write_dataset(path, layout, method, data)
        options = json.loads((data.parent / f"{data.name}.json").read_text())
        options |= {"target_epsilon": epsilon, "seed": seed, "dataset_name": data}
        train(given.runs / cell, PRESETS / f"{name.replace('_', '-')}-eps10-cpu.yaml", OPTIONS | options)
        results[cell], judges[path] = measured(given.runs / cell, test_split(path), judges.get(path))
        results[cell]["seconds"] = round(time.perf_counter() - start)
        print(cell, json.dumps(results[cell]), flush=True)
        if given.output is not None:
            given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# --- the time of a step ----------------------------------------------------------------------------------------------


class FirstUnits(SecretGenerator):
    """Takes the first units in each step, so that all steps have the same size."""

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        return torch.arange(256)


def step_trainer(persons: torch.Tensor | None) -> DPTrainer:
    config = CurriculumConfig.from_yaml(PRESETS / "mnist-eps10-cpu.yaml").replace(
        block_out_channels=[8, 16, 32], noise_multiplicity=4, mixed_precision="no"
    )
    images = torch.randint(256, (4096, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    unet = build_unet(config.model, resolution=28, num_channels=1, num_classes=10, has_prior=config.has_prior)
    private = PrivateImages(images, torch.arange(4096) % 10, tuple("0123456789"), persons)
    return DPTrainer(
        unet, private, config, noise_multiplier=1.0, sample_rate=0.5, divisor=256.0, secret=FirstUnits(),
        prior=blank_prior(config, 10),
    )  # fmt: skip


def step_time(rounds: int = 15) -> dict[str, float]:
    """Median seconds of a step of 256 images, and of 256 persons with 16 images each, K = 4, in turns."""
    trainers = {"images": step_trainer(None), "persons": step_trainer(torch.arange(4096) % 256)}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step()
            if turn:  # the first makes what is made at first use
                seconds[name].append(time.process_time() - start)
    ratios = [one / two for one, two in zip(seconds["persons"], seconds["images"])]
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return {**medians, "ratio": round(statistics.median(ratios), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH", help="mnist, fashion_mnist.")
    parser.add_argument("--epsilons", nargs="+", default=["10", "3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the trainings.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--num_dp_steps", type=int, help="Fewer noisy steps, for a trial.")
    parser.add_argument("--noise_multiplicity", type=int, help="K, the same for all methods.")
    parser.add_argument("--step_time", action="store_true", help="Time steps instead.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("num_dp_steps", "noise_multiplicity"):
        if getattr(given, name) is not None:
            OPTIONS[name] = getattr(given, name)
    if given.step_time:
        print(json.dumps(step_time()))
    sweep(given)


if __name__ == "__main__":
    main()
